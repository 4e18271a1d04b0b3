//! Plans that fit the machine's free memory, where the devices' arenas are in it too.
//!
//! The system overcommits memory, so a run that would not get its memory must not begin. A job that leaves the devices'
//! memory to the program is planned to fit; a job that states too much is refused, with a budget that would fit.

use crate::job::{DeviceKind, Job};
use crate::machine::SHARE_OF_FREE_MEMORY;
use crate::plan::planned::{PlannedJob, plan_loaded};
use crate::print::warn;
use crate::text::Texts;
use hydra::base::{Result, format_bytes};
use std::path::Path;
use std::rc::Rc;

/// Plans a job that was read from `path`, as [`plan_loaded`]. If its devices state no memory and would take more than
/// is `free`, they get what the host's store leaves of it.
///
/// # Errors
/// As [`plan_loaded`].
pub fn plan_to_fit(path: &Path, job: Job, texts: &Rc<Texts>, trains: bool, free: Option<u64>) -> Result<PlannedJob> {
    let planned = plan_loaded(path, job, texts, trains)?;
    let states_none = planned.job.devices.iter().all(|device| device.memory.is_none());
    let wants = planned.wants_bytes();
    let Some(free) = free.filter(|&free| states_none && wants > free) else { return Ok(planned) };
    let Some((fits, budget)) = within(path, &planned, free) else { return Ok(planned) };
    let [wants, free, budget] = [wants, free, budget].map(format_bytes);
    warn(format!(
        "{}: with no memory stated the run would take {wants}, and {free} is free: each device gets {budget}",
        path.display()
    ));
    Ok(fits)
}

/// Why the machine does not have the memory that the run takes, with a budget that would fit; `None` if it does.
pub fn why_not(path: &Path, planned: &PlannedJob, free: Option<u64>) -> Option<String> {
    let wants = planned.wants_bytes();
    // Simulated devices take no memory here.
    let is_here = planned.machine.first().kind != DeviceKind::Sim;
    let free = free.filter(|&free| is_here && wants > free)?;
    let names: Vec<&str> = planned.models.iter().map(|m| m.prepared.name.as_str()).collect();
    let instead = match within(path, planned, free) {
        Some((_, budget)) => format!("write memory = {budget} under [[device]]"),
        None if lies_in_host_memory(planned) => {
            let least = planned.smallest_device_bytes;
            format!("with memory = {least} under [[device]], the least that works, it does not fit either")
        }
        None => "write a smaller memory under [host]".to_string(),
    };
    Some(format!(
        "{}: the machine has {} of memory free, the run needs {} ({} for the devices, {} for the host's store); {instead}",
        names.join(", "),
        format_bytes(free),
        format_bytes(wants),
        format_bytes(wants - planned.map.host_bytes),
        format_bytes(planned.map.host_bytes)
    ))
}

fn lies_in_host_memory(planned: &PlannedJob) -> bool {
    matches!(planned.machine.first().kind, DeviceKind::Host | DeviceKind::Emulated)
}

/// The same job planned to take at most `free` bytes, and the budget of each device with which it does.
fn within(path: &Path, planned: &PlannedJob, free: u64) -> Option<(PlannedJob, u64)> {
    if !lies_in_host_memory(planned) {
        return None;
    }
    let by = |budget: u64| {
        let mut job = planned.job.clone();
        job.devices.iter_mut().for_each(|device| device.memory = Some(budget));
        let fits = plan_loaded(path, job, &planned.texts, false).ok()?;
        (fits.wants_bytes() <= free).then_some((fits, budget))
    };
    // With the least memory on the devices, the store is largest: any other budget leaves it at least what remains
    // then.
    let least = by(planned.smallest_device_bytes)?;
    let room = (free as f64 * SHARE_OF_FREE_MEMORY) as u64;
    let devices = least.0.machine.devices.len() as u64;
    by(room.saturating_sub(least.0.map.host_bytes) / devices).or(Some(least))
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "[[device]]
profile = 'v100'
[[model]]
name = 'm'
family = 'gpt2'
config = { n_layer = 6, n_embd = 64, n_head = 2, n_positions = 64, vocab_size = 61, bos_token_id = 0, eos_token_id = 0 }
data = { random = true }
batch = 8
steps = 5
";

    #[test]
    fn what_states_no_memory_is_planned_to_fit_and_what_states_it_is_told_what_would() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.toml");
        std::fs::write(&path, JOB).unwrap();
        let plan = |memory: Option<u64>, free| {
            let sets: Vec<String> = memory.map(|memory| format!("device.0.memory={memory}")).into_iter().collect();
            plan_to_fit(&path, Job::load(&path, &sets).unwrap(), &Rc::default(), true, free).unwrap()
        };
        let whole = plan(None, None);
        let wants = whole.wants_bytes();
        assert!(why_not(&path, &whole, Some(wants)).is_none() && why_not(&path, &whole, None).is_none());
        assert_eq!(plan(None, Some(wants)).machine.first().budget, None);
        for free in [wants - 1, wants / 4 * 3] {
            let fits = plan(None, Some(free));
            assert!(fits.wants_bytes() <= free && fits.machine.first().budget.is_some(), "{free} of {wants}");
            // A stated budget is kept, and the suggested budget fits.
            let stated = plan(Some(wants), Some(free));
            assert_eq!(stated.machine.first().budget, Some(wants));
            let why = why_not(&path, &stated, Some(free)).expect("it does not fit");
            let (_, budget) = why.split_once("; write memory = ").expect("a budget");
            let budget = budget.split(' ').next().unwrap().parse().unwrap();
            assert!(why_not(&path, &plan(Some(budget), None), Some(free)).is_none(), "{why}");
        }
        let least = plan(Some(whole.smallest_device_bytes), None).wants_bytes();
        assert_eq!(plan(None, Some(least)).wants_bytes(), least);
        let none = plan(None, Some(least - 1));
        assert_eq!(none.machine.first().budget, None);
        let why = why_not(&path, &none, Some(least - 1)).expect("it does not fit");
        let says = format!("with memory = {} under [[device]], the least that works, it", whole.smallest_device_bytes);
        assert!(why.contains(&says), "{why}");
    }
}
