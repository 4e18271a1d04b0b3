//! Where models' state is at home: in the host's store, and in the disk tier what that has no room for.
//!
//! As little goes to the disk as will do: first of every model what costs a step least, and where all of it need not
//! go, the first models keep theirs; or those of which that spares the disk most, where it has no room else.

use super::fleet::{FleetMap, Placed};
use super::memory::Bump;
use super::store::OnDisk;
use crate::base::{Error, Result, format_bytes};
use std::sync::Arc;

/// Bytes of host memory and of the disk tier that a model takes, for each of [`OnDisk::ALL`].
pub(super) type Homes = [(u64, u64); OnDisk::ALL.len()];

/// Bytes of the places where state is at home.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HomeBudgets {
    /// The host's store; `None` is no limit.
    pub host: Option<u64>,
    /// The disk tier; 0 is no disk.
    pub disk: u64,
}

impl HomeBudgets {
    /// What models that are there leave for others.
    pub fn beside(self, there: &FleetMap) -> HomeBudgets {
        let host = self.host.map(|bytes| bytes.saturating_sub(there.host_bytes));
        HomeBudgets { host, disk: self.disk.saturating_sub(there.disk_bytes) }
    }
}

/// Gives every model what it keeps on the disk, so that all fit.
///
/// # Errors
/// [`Error::OutOfBudget`] that says what is needed.
pub fn find_homes(placed: &[Placed], budgets: HomeBudgets) -> Result<Vec<Placed>> {
    let homes: Vec<Homes> = placed.iter().map(|p| p.plan.homes(&p.model)).collect();
    let smallest = placed.iter().map(|p| p.plan.smallest_device_bytes).max().unwrap_or(0);
    let chosen = choose_homes(&homes, budgets, smallest)?;
    let of = |(p, on_disk): (&Placed, OnDisk)| match p.plan.choice.on_disk == on_disk {
        true => p.clone(),
        false => Placed { plan: Arc::new(p.plan.at_home(&p.model, on_disk)), ..p.clone() },
    };
    Ok(placed.iter().zip(chosen).map(of).collect())
}

/// The first of several ways to place the models for which all fit.
///
/// # Errors
/// Where there is none, that of the way that needs the least host memory with the disk as it is.
pub(super) fn first_at_home(ways: &[Vec<Placed>], budgets: HomeBudgets) -> Result<usize> {
    let mut refused: Option<(u64, Error)> = None;
    for (way, placed) in ways.iter().enumerate() {
        let Err(error) = find_homes(placed, budgets) else { return Ok(way) };
        let needs = least_host_bytes(placed, budgets.disk);
        if refused.as_ref().is_none_or(|(least, _)| needs < *least) {
            refused = Some((needs, error));
        }
    }
    Err(refused.expect("there is a way").1)
}

/// The least host memory that models need where the disk tier has so many bytes.
fn least_host_bytes(placed: &[Placed], disk: u64) -> u64 {
    let homes: Vec<Homes> = placed.iter().map(|p| p.plan.homes(&p.model)).collect();
    let even = OnDisk::ALL.map(|on_disk| total(&homes, |_| on_disk as usize));
    even.into_iter().filter(|(_, on_disk)| *on_disk <= disk).map(|(bytes, _)| bytes).min().unwrap_or(u64::MAX)
}

/// What of each model goes to the disk.
pub(super) fn choose_homes(models: &[Homes], budgets: HomeBudgets, smallest_device_bytes: u64) -> Result<Vec<OnDisk>> {
    let refused = |message: String| Error::OutOfBudget { message, smallest_device_bytes };
    let of_all = if models.len() == 1 { String::new() } else { format!(" for {} models", models.len()) };
    let host = budgets.host.unwrap_or(u64::MAX);
    let even = OnDisk::ALL.map(|on_disk| total(models, |_| on_disk as usize));
    let tried = if budgets.disk == 0 { &even[..1] } else { &even[..] };
    let Some(level) = tried.iter().position(|(bytes, _)| *bytes <= host) else {
        let needs = tried.iter().map(|(bytes, _)| *bytes).min().unwrap_or(0);
        // What is advised does with the disk as it is.
        let on_this_disk = even.iter().filter(|(_, disk)| *disk <= budgets.disk);
        let enough = on_this_disk.map(|(bytes, _)| *bytes).min().unwrap_or(needs);
        let words = if budgets.disk == 0 { "" } else { " even with moments, gradients and weights on the disk" };
        let or_disk = match even.iter().find(|(bytes, _)| *bytes <= host) {
            Some((_, disk)) => format!(", or disk = {{ path = \"spill\", memory = {disk} }} beside it"),
            None => String::new(),
        };
        return Err(refused(format!(
            "the host's store needs {} ({needs} bytes){of_all}{words}, its budget is {} ({host} bytes); \
             [host] memory = {enough} would do{or_disk}",
            format_bytes(needs),
            format_bytes(host)
        )));
    };
    let mut order: Vec<usize> = (0..models.len()).collect();
    let mut levels = levels_in(&order, models, level, host);
    let mut disk = total(models, |m| levels[m]).1;
    if disk > budgets.disk {
        order.sort_by_key(|&m| std::cmp::Reverse(models[m][level].1));
        let sparing = levels_in(&order, models, level, host);
        let least = total(models, |m| sparing[m]).1;
        if least < disk {
            (levels, disk) = (sparing, least);
        }
    }
    if disk > budgets.disk {
        return Err(refused(format!(
            "the disk tier needs {} ({disk} bytes){of_all}, its budget is {} ({} bytes)",
            format_bytes(disk),
            format_bytes(budgets.disk),
            budgets.disk
        )));
    }
    Ok(levels.into_iter().map(|level| OnDisk::ALL[level]).collect())
}

/// Where all models of the same `level` fit in the host's store: of each one in turn the least that will do.
fn levels_in(order: &[usize], models: &[Homes], level: usize, host: u64) -> Vec<usize> {
    let mut levels = vec![level; models.len()];
    for &m in order {
        let with = |less: usize| total(models, |i| if i == m { less } else { levels[i] }).0;
        levels[m] = (0..level).find(|&less| with(less) <= host).unwrap_or(level);
    }
    levels
}

/// Why no plan of a model has a home for its state: of all plans the one that needs the least host memory with the disk
/// as it is, and the one that needs the least of a disk, where one would do.
pub(super) fn no_home(host: Homes, disk: Option<Homes>, budgets: HomeBudgets, smallest_device_bytes: u64) -> Error {
    let homes = match disk {
        // Both are told.
        Some([_, on_disk @ ..]) if budgets.disk == 0 => {
            let [off_disk, ..] = host;
            std::array::from_fn(|level| if level == 0 { off_disk } else { on_disk[level - 1] })
        }
        Some(disk) => disk,
        None => host,
    };
    let chosen = choose_homes(&[homes], budgets, smallest_device_bytes);
    chosen.expect_err("a plan that has no home needs more than the budgets")
}

/// Bytes of host memory and of the disk tier of all models, each as its number among [`OnDisk::ALL`] says.
fn total(models: &[Homes], level: impl Fn(usize) -> usize) -> (u64, u64) {
    let (mut store, mut disk) = (Bump::default(), Bump::default());
    for (m, homes) in models.iter().enumerate() {
        let (host_bytes, disk_bytes) = homes[level(m)];
        store.take(host_bytes);
        disk.take(disk_bytes);
    }
    (store.end, disk.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(models: &[Homes], host: u64, disk: u64) -> Result<Vec<OnDisk>> {
        choose_homes(models, HomeBudgets { host: Some(host), disk }, 7)
    }

    /// Multiples of every alignment.
    const K: u64 = 1 << 10;
    const MODEL: Homes = [(16 * K, 0), (8 * K, 9 * K), (6 * K, 13 * K), (2 * K, 17 * K)];

    #[test]
    fn as_little_goes_to_the_disk_as_will_do() {
        use OnDisk::{Gradients, Nothing, UpdateState, Weights};
        for (host, want) in [
            (32, [Nothing, Nothing]),
            (31, [Nothing, UpdateState]),
            (24, [Nothing, UpdateState]),
            (23, [UpdateState, UpdateState]),
            (15, [UpdateState, Gradients]),
            (13, [Gradients, Gradients]),
            (11, [UpdateState, Weights]),
            (4, [Weights, Weights]),
        ] {
            assert_eq!(choose(&[MODEL, MODEL], host * K, 100 * K).unwrap(), want, "{host} KiB");
        }
        assert_eq!(choose_homes(&[MODEL], HomeBudgets::default(), 0).unwrap(), [Nothing]);
    }

    #[test]
    fn what_spares_the_disk_most_leaves_it_first_where_it_is_short() {
        use OnDisk::{Nothing, UpdateState};
        let large = MODEL.map(|(host, disk)| (4 * host, 4 * disk));
        for (models, roomy, short) in [
            ([MODEL, large], [Nothing, UpdateState], [UpdateState, Nothing]),
            ([large, MODEL], [Nothing, UpdateState], [Nothing, UpdateState]),
        ] {
            // In the order of the models where the disk has room for that.
            assert_eq!(choose(&models, 72 * K, 100 * K).unwrap(), roomy);
            assert_eq!(choose(&models, 72 * K, 9 * K).unwrap(), short);
            assert!(choose(&models, 72 * K, 8 * K).is_err());
        }
    }

    #[test]
    fn what_fits_nowhere_is_refused_with_what_it_needs() {
        for (host, disk, words) in [
            (
                15 * K,
                0,
                "the host's store needs 16.00 KiB (16384 bytes), its budget is 15.00 KiB (15360 bytes); \
                 [host] memory = 16384 would do, or disk = { path = \"spill\", memory = 9216 } beside it",
            ),
            (K, 0, "its budget is 1.00 KiB (1024 bytes); [host] memory = 16384 would do"),
            (
                K,
                99 * K,
                "needs 2.00 KiB (2048 bytes) even with moments, gradients and weights on the disk, \
                 its budget is 1.00 KiB (1024 bytes); [host] memory = 2048 would do",
            ),
            (K, 12 * K, "; [host] memory = 8192 would do"),
            (15 * K, 8 * K, "the disk tier needs 9.00 KiB (9216 bytes), its budget is 8.00 KiB (8192 bytes)"),
        ] {
            let error = choose(&[MODEL], host, disk).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
            assert!(matches!(error, Error::OutOfBudget { smallest_device_bytes: 7, .. }));
        }
        let error = choose(&[MODEL, MODEL], K, 0).unwrap_err();
        assert!(error.to_string().contains("(32768 bytes) for 2 models"), "{error}");
    }
}
