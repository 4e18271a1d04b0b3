//! Measures devices in about a second, so that plans are predicted with this machine's rates.
//!
//! Networks of usual shapes (see `networks`), small ones for the host and ones that fill it for a GPU, are traced and
//! placed like any model; their programs run op by op, each op as a task of its own, so that an op is measured with the
//! operands, the caches and the threads that it has in a model. Host devices are measured while as many others run as
//! in the job: they share memory, last-level cache and clock, so each is slower next to the others than alone.
//! Invariant: devices that a job starts together are started and timed together.

mod bench;
mod networks;
mod rates;

use super::host::HostSpec;
use super::sim::{Cores, CostModel};
use super::{DeviceSpec, FleetMemory, gpus, start_fleet};
use crate::base::Result;
use bench::Bench;
use rates::Network;

/// Assumed rates of an emulated device, which is not measured: no plan depends on its seconds, and it computes little
/// in a second.
const EMULATED: (f64, f64, f64) = (1e9, 1e9, 1e10);
/// Elements of the update that is timed, on the host and on a GPU: four arrays of this are larger than most last-level
/// caches.
const UPDATE_ELEMS: [u64; 2] = [1 << 21, 1 << 25];

/// Measures a device that works alone. Waits about a second.
///
/// # Errors
/// When the device cannot be started, or a task fails on it.
pub fn calibrate(spec: &DeviceSpec) -> Result<CostModel> {
    Ok(calibrate_fleet(std::slice::from_ref(spec), 1)?.remove(0))
}

/// Measures devices of which `at_work` compute at the same time, each while that many in all are running. Waits about a
/// second for each kind of device among them.
///
/// If devices have to share cores, as many are measured at once as the cores allow, and all are assigned their share of
/// the rates. As many GPUs are measured at once as are at work, each once, however many logical devices it has: GPUs
/// share only the host's memory. GPUs of the same model are alike.
///
/// # Errors
/// When the devices cannot be started, or a task fails on one.
pub fn calibrate_fleet(specs: &[DeviceSpec], at_work: usize) -> Result<Vec<CostModel>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let of_gpus = matches!(specs.first(), Some(DeviceSpec::Cuda { .. }));
    let alike = alike(specs, &if of_gpus { gpus() } else { Vec::new() });
    let mut costs: Vec<Option<CostModel>> = vec![None; specs.len()];
    for group in groups(specs, &alike, at_work, cores) {
        let members: Vec<DeviceSpec> = group.members.iter().map(|&i| specs[i].clone()).collect();
        let kinds: Vec<usize> = group.members.iter().map(|&i| alike[i]).collect();
        let first = |kind: usize| kinds.iter().position(|&k| k == kind);
        let measured = measure(&members, &kinds.iter().filter_map(|&kind| first(kind)).collect::<Vec<_>>())?;
        for (i, cost) in costs.iter_mut().enumerate().filter(|(_, cost)| cost.is_none()) {
            *cost = first(alike[i]).map(|like| share(&measured[like], &specs[i], specs.len(), group.share));
        }
    }
    Ok(costs.into_iter().map(|cost| cost.expect("each device is a member of a group, or like one")).collect())
}

/// For each device, the first one like it; `gpus` are the names and memory sizes of the GPUs.
fn alike(specs: &[DeviceSpec], gpus: &[(String, u64)]) -> Vec<usize> {
    let model = |spec: &DeviceSpec| match spec {
        DeviceSpec::Cuda { ordinal, .. } => gpus.get(*ordinal).cloned(),
        _ => None,
    };
    let like = |a: &DeviceSpec, b: &DeviceSpec| a == b || model(a).is_some_and(|model_a| model(b) == Some(model_a));
    specs.iter().map(|spec| specs.iter().position(|s| like(s, spec)).expect("it is like itself")).collect()
}

/// Devices that are measured at the same time.
#[derive(Debug, PartialEq)]
struct Group {
    /// Indices in the list of all devices.
    members: Vec<usize>,
    /// The fraction of a member's rates that a device has once all working devices share the cores.
    share: f64,
}

/// Groups in which every device, or one like it, is measured once. Each group begins with the next device not yet
/// covered and continues with those after it, cyclically, up to `at_work` and, on the host, up to what fits the cores.
/// A GPU is in a group only once.
fn groups(specs: &[DeviceSpec], alike: &[usize], at_work: usize, cores: usize) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for first in 0..specs.len() {
        if groups.iter().flat_map(|g| &g.members).any(|&m| alike[m] == alike[first]) {
            continue;
        }
        let wanted = at_work.clamp(1, specs.len());
        let mut members: Vec<usize> = (0..wanted).map(|i| (first + i) % specs.len()).collect();
        let DeviceSpec::Host(_) = specs[first] else {
            let mut gpus = Vec::new();
            members.retain(|&m| {
                !gpus.contains(&&specs[m]) && {
                    gpus.push(&specs[m]);
                    true
                }
            });
            groups.push(Group { members, share: 1.0 });
            continue;
        };
        let wants = |place: &usize| match &specs[*place] {
            // A device without cores of its own shares all of them: measuring as many at once as there are cores shows
            // the cost of that.
            DeviceSpec::Host(HostSpec { threads, .. }) => threads.unwrap_or(1).clamp(1, cores),
            _ => 1,
        };
        while members.len() > 1 && members.iter().map(wants).sum::<usize>() > cores {
            members.pop();
        }
        let share = members.len() as f64 / wanted as f64;
        groups.push(Group { members, share });
    }
    groups
}

/// The rates of a device, one of `devices`, that has the fraction `share` of what was measured.
fn share(measured: &CostModel, spec: &DeviceSpec, devices: usize, share: f64) -> CostModel {
    let mut cost = measured.slowed(share);
    if let DeviceSpec::Host(host) = spec {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        // Copies are measured without the stated link limit: the core time that they take does not depend on it.
        let copy_bytes_per_sec = cost.h2d_bytes_per_sec.min(cost.d2h_bytes_per_sec);
        let own = host.threads.is_some() || devices == 1;
        let count = host.threads.unwrap_or(all).clamp(1, all);
        cost.cores = own.then_some(Cores { count, copy_bytes_per_sec });
        if let Some(link) = host.link_bytes_per_sec {
            cost.h2d_bytes_per_sec = cost.h2d_bytes_per_sec.min(link);
            cost.d2h_bytes_per_sec = cost.d2h_bytes_per_sec.min(link);
        }
    }
    cost
}

/// Measures devices at the same time; those that are alike get the same rates. For each device, `alike` is the first
/// one like it.
fn measure(specs: &[DeviceSpec], alike: &[usize]) -> Result<Vec<CostModel>> {
    if let DeviceSpec::Emulated { .. } = specs[0] {
        return Ok(vec![CostModel::stated(EMULATED.0, EMULATED.1, EMULATED.2); specs.len()]);
    }
    let is_gpu = matches!(specs[0], DeviceSpec::Cuda { .. });
    let mut networks = Vec::new();
    for mut graph in if is_gpu { networks::large()? } else { networks::all()? } {
        graph.scratch = specs[0].wants_scratch();
        // The host computes in f32, even where a graph allows tf32.
        graph.tf32 = is_gpu;
        networks.push(Network::new(graph)?);
    }
    // A GPU's networks are so large that each has the arena to itself.
    let regions: Vec<u64> = networks.iter().map(|n| n.arena_bytes).collect();
    let update_elems = UPDATE_ELEMS[usize::from(is_gpu)];
    let state_bytes = bench::state_bytes(update_elems);
    let arena_bytes = match is_gpu {
        true => regions.iter().copied().max().unwrap_or(0).max(state_bytes),
        false => regions.iter().sum::<u64>() + state_bytes,
    };
    let arena_bytes = arena_bytes.max(bench::LARGE_COPY_BYTES);
    let started: Vec<DeviceSpec> = specs
        .iter()
        .map(|spec| match spec {
            DeviceSpec::Host(host) => HostSpec { link_bytes_per_sec: None, ..host.clone() }.into(),
            other => other.clone(),
        })
        .collect();
    let host_bytes = bench::host_bytes(specs.len() as u64, update_elems);
    let memory = FleetMemory { arena_bytes: vec![arena_bytes; specs.len()], host_bytes, ..FleetMemory::default() };
    let mut bench = Bench::new(start_fleet(&started, memory)?, alike, update_elems, specs[0].wants_scratch());
    bench.measure(&networks, !is_gpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Family, Work};

    fn host(threads: Option<usize>) -> DeviceSpec {
        HostSpec { threads, ..Default::default() }.into()
    }

    /// Every family has a rate, and every number is one that a plan can be made with. How fast is for
    /// `benches/prediction.rs` to say.
    #[test]
    fn measures_every_family_on_every_device() {
        let costs = calibrate_fleet(&[host(Some(1)), host(Some(1))], 2).unwrap();
        assert_eq!(costs[0], costs[1], "devices that are alike cost the same");
        let model = &costs[0];
        for family in Family::ALL {
            let mut rates = model.rates.iter().filter(|r| r.family == family).peekable();
            assert!(rates.peek().is_some(), "{family:?} was not measured");
            assert!(rates.all(|r| r.work_per_sec.is_finite() && r.work_per_sec > 0.0), "{family:?}");
        }
        let cores = model.cores.unwrap();
        assert_eq!(cores.count, 1);
        let rates = [
            model.memory_bytes_per_sec,
            model.h2d_bytes_per_sec,
            model.d2h_bytes_per_sec,
            model.device_update_bytes_per_sec,
            model.host_update_bytes_per_sec,
            model.device_norm_bytes_per_sec.unwrap(),
            model.host_norm_bytes_per_sec.unwrap(),
            cores.copy_bytes_per_sec,
        ];
        assert!(rates.iter().all(|r| r.is_finite() && *r > 0.0), "{model:?}");
        let secs = [model.op_secs, model.run_secs, model.copy_secs, model.hand_over_secs];
        assert!(secs.iter().all(|s| s.is_finite() && *s >= 0.0), "{model:?}");
        assert!(model.rates.iter().any(|r| r.family.work() == Work::Flops && r.sizes.iter().all(|&n| n >= 64)));
    }

    #[test]
    fn devices_are_measured_in_groups_that_the_cores_hold() {
        let check = |threads: &[Option<usize>], at_work: usize, cores: usize, want: &[(&[usize], f64)]| {
            let specs: Vec<DeviceSpec> = threads.iter().map(|&t| host(t)).collect();
            let want: Vec<Group> =
                want.iter().map(|(members, share)| Group { members: members.to_vec(), share: *share }).collect();
            assert_eq!(
                groups(&specs, &alike(&specs, &[]), at_work, cores),
                want,
                "{threads:?}, {at_work} at work, {cores} cores"
            );
        };
        let (one, two, all) = (Some(1), Some(2), None);
        check(&[all], 1, 2, &[(&[0], 1.0)]);
        check(&[one, one], 2, 2, &[(&[0, 1], 1.0)]);
        check(&[one, one], 1, 2, &[(&[0], 1.0)]);
        check(&[one; 8], 8, 2, &[(&[0, 1], 0.25)]);
        check(&[one; 3], 2, 4, &[(&[0, 1], 1.0)]);
        check(&[one, one, two], 2, 4, &[(&[0, 1], 1.0), (&[2, 0], 1.0)]);
        check(&[one, one, two], 3, 4, &[(&[0, 1, 2], 1.0)]);
        check(&[one, two, two], 3, 3, &[(&[0, 1], 2.0 / 3.0)]);
        // More than there are is all there are.
        check(&[Some(64), one], 2, 4, &[(&[0], 0.5), (&[1], 0.5)]);
        check(&[all, all, all], 3, 2, &[(&[0, 1], 2.0 / 3.0)]);
    }

    #[test]
    fn gpus_are_measured_together_each_once_and_one_model_for_all_of_it() {
        let gpu = |ordinal| DeviceSpec::Cuda { ordinal, threads: None };
        let (a, b) = (("a".to_string(), 80), ("b".to_string(), 80));
        let check = |gpus: &[&(String, u64)], ordinals: &[usize], at_work, want: &[&[usize]]| {
            let specs: Vec<DeviceSpec> = ordinals.iter().map(|&ordinal| gpu(ordinal)).collect();
            let gpus: Vec<(String, u64)> = gpus.iter().map(|&gpu| gpu.clone()).collect();
            let group = |members: &&[usize]| Group { members: members.to_vec(), share: 1.0 };
            let want: Vec<Group> = want.iter().map(group).collect();
            assert_eq!(groups(&specs, &alike(&specs, &gpus), at_work, 1), want, "{ordinals:?}, {at_work} at work");
        };
        check(&[&a], &[0, 0, 0], 3, &[&[0]]);
        check(&[&a, &a], &[0, 1], 2, &[&[0, 1]]);
        // One of a model is enough where one is at work.
        check(&[&a, &a], &[0, 1], 1, &[&[0]]);
        check(&[&a, &b], &[0, 1], 1, &[&[0], &[1]]);
        // Logical devices 0 and 2 lie on one GPU.
        check(&[&a, &b], &[0, 1, 0], 3, &[&[0, 1]]);
        check(&[&a, &b, &a], &[0, 1, 2], 2, &[&[0, 1]]);
        check(&[&a, &a, &b], &[0, 1, 2], 2, &[&[0, 1], &[2, 0]]);
        assert_eq!(alike(&[gpu(0), gpu(1), gpu(2)], &[a.clone(), b, a]), [0, 1, 0]);
        assert_eq!(alike(&[gpu(0), gpu(1), gpu(0)], &[]), [0, 1, 0], "nothing is known of them");
    }

    #[test]
    fn a_link_holds_copies_and_takes_nothing_from_cores() {
        let mut measured = CostModel::stated(1e9, 8e9, 8e9);
        measured.d2h_bytes_per_sec = 6e9;
        let of = |link_bytes_per_sec, threads, devices, part| {
            share(&measured, &HostSpec { link_bytes_per_sec, threads, ..Default::default() }.into(), devices, part)
        };
        let linked = of(Some(1e9), Some(1), 2, 0.5);
        assert_eq!((linked.h2d_bytes_per_sec, linked.d2h_bytes_per_sec), (1e9, 1e9));
        assert_eq!(linked.cores, Some(Cores { count: 1, copy_bytes_per_sec: 3e9 }));
        assert_eq!(of(Some(7e9), Some(1), 2, 1.0).d2h_bytes_per_sec, 6e9);
        assert_eq!(of(None, None, 2, 1.0).cores, None, "none are its own");
        assert!(of(None, None, 1, 1.0).cores.is_some());
    }
}
