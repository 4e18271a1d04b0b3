//! Names of lanes: ordered queues that each do one kind of work.
//!
//! The device module queues tasks on lanes and the trace records what ran on them, so the name is defined below both.

use std::fmt;

/// The kind of work that a lane does, in the order of a chart's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LaneKind {
    /// Units: forward, backward, evaluation, updates on the device.
    Compute,
    /// Copies from host memory into the device's arena.
    HostToDevice,
    /// Copies from the device's arena into host memory.
    DeviceToHost,
    /// Arithmetic on the host: updates, norms, conversions.
    HostMath,
    /// Reads from the disk tier into host memory.
    DiskRead,
    /// Writes from host memory to the disk tier.
    DiskWrite,
}

impl LaneKind {
    /// Every kind, in the order of rows.
    pub const ALL: [LaneKind; 6] = [
        LaneKind::Compute,
        LaneKind::HostToDevice,
        LaneKind::DeviceToHost,
        LaneKind::HostMath,
        LaneKind::DiskRead,
        LaneKind::DiskWrite,
    ];

    /// The kind in words: `host to device`.
    pub const fn label(self) -> &'static str {
        match self {
            LaneKind::Compute => "compute",
            LaneKind::HostToDevice => "host to device",
            LaneKind::DeviceToHost => "device to host",
            LaneKind::HostMath => "math",
            LaneKind::DiskRead => "disk read",
            LaneKind::DiskWrite => "disk write",
        }
    }
}

/// One lane: a device (or the host) and the kind of work. Lanes order by device, then by kind; the host comes last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub struct LaneId {
    /// The device's number, or [`LaneId::HOST`].
    pub device: u16,
    /// The work it does.
    pub kind: LaneKind,
}

impl LaneId {
    /// Stands for the host where a device's number would.
    pub const HOST: u16 = u16::MAX;

    /// The lane of `kind` on `device`.
    pub const fn device(device: u16, kind: LaneKind) -> Self {
        LaneId { device, kind }
    }

    /// The host's lane of `kind`.
    pub const fn host(kind: LaneKind) -> Self {
        LaneId { device: LaneId::HOST, kind }
    }

    /// True where the lane belongs to the host.
    pub const fn is_host(self) -> bool {
        self.device == LaneId::HOST
    }
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.device {
            LaneId::HOST => write!(f, "host {}", self.kind.label()),
            device => write!(f, "device {device} {}", self.kind.label()),
        }
    }
}

impl std::str::FromStr for LaneId {
    type Err = super::Error;

    /// Parses a lane's printed form.
    ///
    /// # Errors
    /// When the text does not name a lane.
    fn from_str(text: &str) -> super::Result<Self> {
        let read = || {
            let (device, kind) = match text.strip_prefix("host ") {
                Some(kind) => (LaneId::HOST, kind),
                None => {
                    let (number, kind) = text.strip_prefix("device ")?.split_once(' ')?;
                    (number.parse().ok().filter(|&number| number != LaneId::HOST)?, kind)
                }
            };
            Some(LaneId { device, kind: LaneKind::ALL.into_iter().find(|known| known.label() == kind)? })
        };
        read().ok_or_else(|| super::Error::bad(format!("'{text}' is no lane")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_print_and_order() {
        assert_eq!(LaneId::device(0, LaneKind::Compute).to_string(), "device 0 compute");
        assert_eq!(LaneId::device(3, LaneKind::HostToDevice).to_string(), "device 3 host to device");
        assert_eq!(LaneId::host(LaneKind::HostMath).to_string(), "host math");
        assert_eq!(LaneId::host(LaneKind::DiskRead).to_string(), "host disk read");
        assert!(LaneId::device(7, LaneKind::DiskWrite) < LaneId::host(LaneKind::Compute));
        assert_eq!(
            serde_json::to_string(&LaneId::device(1, LaneKind::DeviceToHost)).unwrap(),
            r#"{"device":1,"kind":"device_to_host"}"#
        );
        for kind in LaneKind::ALL {
            for lane in [LaneId::device(0, kind), LaneId::device(1023, kind), LaneId::host(kind)] {
                assert_eq!(lane.to_string().parse::<LaneId>().unwrap(), lane);
            }
        }
        for text in ["", "host", "device 0", "device x compute", "device 65535 compute", "host dreams"] {
            assert!(text.parse::<LaneId>().is_err(), "{text}");
        }
    }
}
