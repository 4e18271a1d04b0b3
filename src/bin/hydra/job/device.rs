//! `[[device]]` and `[host]` of a job: what computes, and the store behind it.

use super::section::Section;
use hydra::base::Result;
use std::path::PathBuf;
use toml::Table;

/// One `[[device]]`: `count` identical devices.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    /// The kind of the devices.
    pub kind: DeviceKind,
    /// How many; default 1.
    pub count: usize,
    /// Budget of each, in bytes; `None` means all there is.
    pub memory: Option<u64>,
    /// Host and sim: bytes per second each way; `None` means unlimited.
    pub link: Option<f64>,
    /// Host: cores of each; `None` means all, shared.
    pub threads: Option<usize>,
    /// Sim: floating-point operations per second.
    pub flops: Option<f64>,
    /// Sim: bytes per second of its own memory; given exactly when `flops` is.
    pub memory_bandwidth: Option<f64>,
    /// A named set of rates, or a file with one. Sim: given exactly when `flops` is not; others: replaces measurement.
    pub profile: Option<String>,
    /// The same as an absolute path.
    pub profile_path: Option<PathBuf>,
}

/// The kind of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Rust op loops in host memory.
    Host,
    /// A GPU.
    Cuda,
    /// The GPU's kernels run on the CPU.
    Emulated,
    /// A cost model and a virtual clock.
    Sim,
}

impl DeviceKind {
    /// Each with the word for it.
    pub const WORDS: [(&'static str, DeviceKind); 4] = [
        ("host", DeviceKind::Host),
        ("cuda", DeviceKind::Cuda),
        ("emulated", DeviceKind::Emulated),
        ("sim", DeviceKind::Sim),
    ];

    /// The word for it in a job file.
    pub fn word(self) -> &'static str {
        let found = DeviceKind::WORDS.iter().find(|(_, kind)| *kind == self);
        found.expect("WORDS has every kind").0
    }

    /// The name for the memory of its host's store.
    pub fn host_tier(self) -> &'static str {
        match self {
            DeviceKind::Cuda | DeviceKind::Emulated => "pinned",
            DeviceKind::Host | DeviceKind::Sim => "pageable",
        }
    }
}

/// The store behind the devices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Host {
    /// Budget in bytes; `None` means 80 % of free memory.
    pub memory: Option<u64>,
    /// Bytes per second that all devices share; `None` means unlimited.
    pub link: Option<f64>,
    /// The disk tier, if there is one.
    pub disk: Option<Disk>,
}

/// The disk tier.
#[derive(Clone, Debug, PartialEq)]
pub struct Disk {
    /// Its folder, absolute.
    pub path: PathBuf,
    /// Budget in bytes.
    pub memory: u64,
    /// Bytes per second each way; `None` means unlimited.
    pub link: Option<f64>,
}

/// The keys of a `[[device]]`.
pub const DEVICE_KEYS: &[&str] =
    &["kind", "count", "memory", "link", "threads", "flops", "memory_bandwidth", "profile"];

/// Reads all `[[device]]`; without one there is one host device.
pub fn read_devices(root: &Section) -> Result<Vec<Device>> {
    let sections = root.sections("device", DEVICE_KEYS)?;
    if sections.is_empty() {
        // An empty [[device]] is the default: one host device with everything there is.
        return Ok(vec![read_device(&Section::open(root.origin(), "device".into(), &Table::new(), DEVICE_KEYS)?)?]);
    }
    sections.iter().map(read_device).collect()
}

fn read_device(s: &Section) -> Result<Device> {
    use DeviceKind::{Host, Sim};
    let kind = s.word("kind", &DeviceKind::WORDS)?.unwrap_or(Host);
    if kind != Sim {
        s.refuse(&["flops", "memory_bandwidth"], "is for kind = \"sim\" only; leave it out")?;
    }
    if kind != Host {
        s.refuse(&["threads"], "is for kind = \"host\" only; leave it out")?;
    }
    if kind != Host && kind != Sim {
        s.refuse(&["link"], "is for kind = \"host\" and \"sim\" only; leave it out")?;
    }
    let flops = s.flops("flops")?;
    let memory_bandwidth = s.bandwidth("memory_bandwidth")?;
    let profile = s.string("profile", "a profile's name in quotes, such as \"v100\"")?.map(str::to_string);
    if profile.is_some() {
        s.refuse(&["flops", "memory_bandwidth"], "profile is there too; keep the profile or the rates")?;
    } else if kind == Sim && (flops.is_none() || memory_bandwidth.is_none()) {
        let rates = "flops = \"60 TFLOP/s\" with memory_bandwidth = \"900 GB/s\"";
        return Err(s.fault_here(format!("a sim device needs its rates; write {rates}, or profile = \"v100\"")));
    }
    Ok(Device {
        kind,
        count: s.count("count")?.unwrap_or(1),
        memory: s.bytes("memory")?,
        link: s.bandwidth("link")?,
        threads: s.count("threads")?,
        flops,
        memory_bandwidth,
        profile,
        profile_path: s.path("profile")?,
    })
}

/// The keys of `[host]`.
pub const HOST_KEYS: &[&str] = &["memory", "link", "disk"];
/// The keys of `disk`.
pub const DISK_KEYS: &[&str] = &["path", "memory", "link"];

/// Reads `[host]`.
pub fn read_host(root: &Section) -> Result<Host> {
    let Some(s) = root.section("host", HOST_KEYS)? else { return Ok(Host::default()) };
    let disk = match s.section("disk", DISK_KEYS)? {
        None => None,
        Some(d) => Some(Disk {
            path: d
                .path("path")?
                .ok_or_else(|| d.fault("path", "is missing; write a folder, such as path = \"spill\""))?,
            memory: d.bytes("memory")?.ok_or_else(|| d.fault("memory", "is missing; write memory = \"16 GiB\""))?,
            link: d.bandwidth("link")?,
        }),
    };
    Ok(Host { memory: s.bytes("memory")?, link: s.bandwidth("link")?, disk })
}
