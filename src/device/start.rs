//! Starting a device of any kind, from a job's description of it.

use super::Device;
use super::host::{HostConfig, HostDevice, HostSpec};
use crate::base::Result;

/// Which device, without the sizes that a plan determines.
#[derive(Clone, Debug, PartialEq)]
pub enum DeviceSpec {
    /// The machine's own cores.
    Host(HostSpec),
    /// A logical device on an NVIDIA GPU; several may share a GPU, each with its own arena.
    Cuda {
        /// The machine's number for the GPU.
        ordinal: usize,
        /// Cores for the host's arithmetic; `None` means all.
        threads: Option<usize>,
    },
    /// The GPU's kernels on the CPU; each device of a fleet is an emulated GPU of its own.
    Emulated {
        /// Emulated compute capability, such as 80 or 90.
        arch: u32,
        /// Seed for the order of threads, blocks and streams; 0 means in order.
        seed: u32,
        /// Cores for the host's arithmetic; `None` means all.
        threads: Option<usize>,
    },
}

impl Default for DeviceSpec {
    fn default() -> Self {
        DeviceSpec::Host(HostSpec::default())
    }
}

impl From<HostSpec> for DeviceSpec {
    fn from(spec: HostSpec) -> Self {
        DeviceSpec::Host(spec)
    }
}

/// The disk tier: an unnamed file in a folder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DiskSpec {
    /// The folder, which is created if missing.
    pub path: std::path::PathBuf,
    /// Bytes of the file.
    pub bytes: u64,
    /// Bandwidth each way, in bytes per second; `None` means unlimited.
    pub bytes_per_sec: Option<f64>,
}

/// Memory of devices that are to be started together.
#[derive(Clone, Debug, Default)]
pub struct FleetMemory {
    /// Bytes of each device's arena.
    pub arena_bytes: Vec<u64>,
    /// Bytes of the host's store.
    pub host_bytes: u64,
    /// Whether to fill the arenas with NaN first.
    pub poison: bool,
    /// Bytes per second each way that the links of all devices share; for host devices only.
    pub shared_bytes_per_sec: Option<f64>,
    /// The disk tier, if plans put anything there.
    pub disk: Option<DiskSpec>,
}

/// Allocates memory and starts devices of one kind. Threads, and the emulator's seed, are those of the first device.
///
/// # Errors
/// When there are no devices or a different number of arenas, their kinds differ or are not built in
/// ([`crate::base::Error::BadInput`]), their GPUs' compute capabilities differ, which would make bits depend on where a
/// shard ran, or memory or threads are not available.
pub fn start_fleet(specs: &[DeviceSpec], memory: FleetMemory) -> Result<Box<dyn Device>> {
    let first = specs.first().ok_or_else(|| crate::base::Error::bad("no device"))?;
    if specs.iter().any(|s| std::mem::discriminant(s) != std::mem::discriminant(first)) {
        return Err(crate::base::Error::bad("devices of different kinds do not work together"));
    }
    let (devices, arenas) = (specs.len(), memory.arena_bytes.len());
    if devices != arenas {
        return Err(crate::base::Error::bad(format!("{devices} devices, and arena_bytes of {arenas}")));
    }
    match first {
        DeviceSpec::Host(_) => {
            let host = specs.iter().zip(&memory.arena_bytes).filter_map(|(spec, &arena_bytes)| match spec {
                DeviceSpec::Host(spec) => Some(HostSpec { arena_bytes, ..spec.clone() }),
                _ => None,
            });
            let devices = host.collect();
            let FleetMemory { host_bytes, poison, shared_bytes_per_sec, disk, .. } = memory;
            let config = HostConfig { devices, host_bytes, poison, shared_bytes_per_sec, disk, withhold: None };
            Ok(Box::new(HostDevice::new(&config)?))
        }
        #[cfg(feature = "cuda")]
        DeviceSpec::Cuda { threads, .. } => {
            let (mut ordinals, mut places) = (Vec::new(), Vec::new());
            for spec in specs {
                let DeviceSpec::Cuda { ordinal, .. } = spec else { unreachable!("all are of one kind") };
                let place = ordinals.iter().position(|o| o == ordinal).unwrap_or(ordinals.len());
                if place == ordinals.len() {
                    ordinals.push(*ordinal);
                }
                places.push(place);
            }
            let start = |config: &_| super::cuda::CudaDevice::on_gpus(&ordinals, config);
            start_cuda(start, &places, *threads, memory)
        }
        #[cfg(feature = "emulator")]
        DeviceSpec::Emulated { seed, threads, .. } => {
            let facts = specs.iter().enumerate().map(|(ordinal, spec)| match spec {
                DeviceSpec::Emulated { arch, .. } => super::cuda::Emulated::facts_of(ordinal, *arch),
                _ => unreachable!("all are of one kind"),
            });
            let facts = facts.collect();
            let start = |config: &_| super::cuda::CudaDevice::emulated(facts, *seed, config);
            start_cuda(start, &(0..specs.len()).collect::<Vec<_>>(), *threads, memory)
        }
        #[cfg(not(feature = "cuda"))]
        DeviceSpec::Cuda { .. } => Err(not_built("cuda")),
        #[cfg(not(feature = "emulator"))]
        DeviceSpec::Emulated { .. } => Err(not_built("emulator")),
    }
}

/// Memory of a device that is to be started.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceMemory {
    /// Bytes of the arena.
    pub arena_bytes: u64,
    /// Bytes of the host's store.
    pub host_bytes: u64,
    /// Whether to fill the arena with NaN first.
    pub poison: bool,
}

impl DeviceSpec {
    /// Whether its programs need scratch in the workspace ([`crate::graph::Graph::scratch`]).
    pub fn wants_scratch(&self) -> bool {
        !matches!(self, DeviceSpec::Host(_))
    }

    /// Allocates memory and starts one device.
    ///
    /// # Errors
    /// When its kind is not built in ([`crate::base::Error::BadInput`]), it does not exist, or memory or threads are
    /// not available.
    pub fn start(&self, memory: DeviceMemory) -> Result<Box<dyn Device>> {
        let DeviceMemory { arena_bytes, host_bytes, poison } = memory;
        let memory = FleetMemory { arena_bytes: vec![arena_bytes], host_bytes, poison, ..FleetMemory::default() };
        start_fleet(std::slice::from_ref(self), memory)
    }
}

/// Why a kind of device is missing.
#[cfg(not(all(feature = "cuda", feature = "emulator")))]
fn not_built(feature: &str) -> crate::base::Error {
    crate::base::Error::bad(format!("this program was built without the feature \"{feature}\""))
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
fn start_cuda(
    start: impl FnOnce(&super::cuda::CudaConfig) -> Result<super::cuda::CudaDevice>,
    gpus: &[usize],
    threads: Option<usize>,
    memory: FleetMemory,
) -> Result<Box<dyn Device>> {
    let devices = gpus.iter().zip(memory.arena_bytes);
    let devices = devices.map(|(&gpu, arena_bytes)| super::cuda::LogicalDevice { gpu, arena_bytes });
    let config = super::cuda::CudaConfig {
        devices: devices.collect(),
        host_bytes: memory.host_bytes,
        threads,
        poison: memory.poison,
        disk: memory.disk,
        withhold: None,
    };
    Ok(Box::new(start(&config)?))
}

/// Name and bytes of memory of each GPU; none where [`why_no_cuda`] has a reason.
pub fn gpus() -> Vec<(String, u64)> {
    #[cfg(feature = "cuda")]
    return super::cuda::list().unwrap_or_default();
    #[cfg(not(feature = "cuda"))]
    Vec::new()
}

/// Why no CUDA device is available; `None` where one is.
pub fn why_no_cuda() -> Option<String> {
    #[cfg(feature = "cuda")]
    return match super::cuda::count() {
        Ok(0) => Some("cuda: the driver finds no GPU".into()),
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    };
    #[cfg(not(feature = "cuda"))]
    Some(not_built("cuda").to_string())
}

/// Why the emulator is not available; `None` where it is.
pub fn why_no_emulator() -> Option<String> {
    if cfg!(feature = "emulator") {
        None
    } else {
        Some("this program was built without the feature \"emulator\"".into())
    }
}
