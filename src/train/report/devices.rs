//! What each device did in the time that the trace covers completely.

use super::shown::{covered_secs, kept_windows};
use crate::base::LaneKind;
use crate::trace::{DeviceRow, Trace};
use std::collections::BTreeSet;

/// Shares of that time, by device; a device on which nothing ran also has a row, if the trace names its lanes.
pub(super) fn device_rows(trace: &Trace) -> Vec<DeviceRow> {
    let windows = kept_windows(&trace.events);
    let secs: f64 = windows.iter().map(|window| window.1 - window.0).sum();
    if secs <= 0.0 {
        return Vec::new();
    }
    let named = trace.summary.iter().flat_map(|summary| &summary.sums).map(|sum| sum.lane);
    let lanes = named.chain(trace.events.iter().map(|event| event.lane));
    let devices: BTreeSet<u16> = lanes.filter(|lane| !lane.is_host()).map(|lane| lane.device).collect();
    let row = |device: u16| {
        // Seconds in which a lane of one of the kinds was at work.
        let works = |kinds: &[LaneKind]| {
            let of = trace.events.iter().filter(|e| e.lane.device == device && kinds.contains(&e.lane.kind));
            covered_secs(of.filter(|e| e.has_times()).map(|e| (e.start_secs, e.end_secs)).collect(), &windows)
        };
        let copies = [LaneKind::HostToDevice, LaneKind::DeviceToHost];
        let (computes, any) = (works(&[LaneKind::Compute]), works(&[LaneKind::Compute, copies[0], copies[1]]));
        DeviceRow {
            device,
            computes: computes / secs,
            copies: works(&copies) / secs,
            copies_alone: (any - computes).max(0.0) / secs,
            idle: (secs - any).max(0.0) / secs,
        }
    };
    devices.into_iter().map(row).collect()
}
