//! The trace file: Chrome's trace-event JSON, which Perfetto opens with a process per device and a row per lane.
//!
//! One event per line, so that a file whose writer was killed can still be read up to where it ends. Times are whole
//! nanoseconds printed as microseconds: a task that starts when another ends never overlaps it through rounding.
//! Format: "Trace Event Format" (Google, 2016), the JSON object form with complete ("X") and metadata ("M") events.

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde::Deserialize;

use super::{Event, LaneSum, Summary, TaskName, What};
use crate::base::{Error, LaneId, LaneKind, Result};

/// Bytes buffered before a write to the file.
const BUFFER_BYTES: usize = 64 << 10;

/// Chrome's process number of a lane: 1 for device 0; the host comes after every device. 0 means "idle" to Perfetto.
fn process(lane: LaneId) -> u32 {
    u32::from(lane.device) + 1
}

/// Chrome's thread number of a lane. Unique also across processes, since Perfetto keys threads by this number alone.
fn thread(lane: LaneId) -> u32 {
    process(lane) * 8 + lane.kind as u32
}

/// Nanoseconds since the run's start; NaN becomes 0, and the cast clamps all others to the range.
fn nanos(secs: f64) -> u64 {
    (secs * 1e9).round() as u64
}

/// `value` if it is finite, else 0, since JSON cannot represent the others.
fn finite(value: f64) -> f64 {
    if value.is_finite() { value } else { 0.0 }
}

/// Writes the file from first byte to last; after the first failure it writes nothing more.
#[derive(Debug)]
pub(super) struct ChromeWriter {
    out: BufWriter<File>,
    lanes: Vec<LaneId>,
    lines: u64,
    events: u64,
    failure: Option<io::Error>,
}

impl ChromeWriter {
    /// Creates the file and names the rows of `lanes`.
    pub(super) fn create(path: &Path, lanes: &[LaneId]) -> io::Result<Self> {
        let out = BufWriter::with_capacity(BUFFER_BYTES, File::create(path)?);
        let mut writer =
            ChromeWriter { out, lanes: Vec::with_capacity(lanes.len() + 64), lines: 0, events: 0, failure: None };
        writer.attempt(|this| this.out.write_all(HEAD.as_bytes()));
        for &lane in lanes {
            writer.name_row(lane);
        }
        Ok(writer)
    }

    /// Events written so far.
    pub(super) fn events(&self) -> u64 {
        self.events
    }

    /// Writes one event. Allocates only for a lane that was not named at the start.
    pub(super) fn event(&mut self, event: &Event) {
        self.name_row(event.lane);
        self.attempt(|this| this.try_event(event));
        self.events += u64::from(self.failure.is_none());
    }

    /// Passes buffered bytes to the operating system.
    pub(super) fn flush(&mut self) {
        self.attempt(|this| this.out.flush());
    }

    /// Closes the JSON with the summary; returns the first failure of any write.
    pub(super) fn close(mut self, dropped: u64, displaced: u64, sums: &[LaneSum], models: &[String]) -> io::Result<()> {
        self.attempt(|this| {
            write!(this.out, "\n],\"otherData\":{{\"events\":{},\"dropped\":{dropped}", this.events)?;
            write!(this.out, ",\"displaced\":{displaced},\"models\":")?;
            serde_json::to_writer(&mut this.out, models)?;
            write!(this.out, ",\"lanes\":[")?;
            for (i, sum) in sums.iter().enumerate() {
                let comma = if i == 0 { "" } else { "," };
                let LaneSum { lane, tasks, busy_secs, bytes, flops } = sum;
                write!(
                    this.out,
                    "{comma}\n{{\"lane\":\"{lane}\",\"tasks\":{tasks},\"busy_secs\":{}",
                    finite(*busy_secs)
                )?;
                write!(this.out, ",\"bytes\":{bytes},\"flops\":{}}}", finite(*flops))?;
            }
            writeln!(this.out, "]}}}}")?;
            this.out.flush()
        });
        match self.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    fn attempt(&mut self, write: impl FnOnce(&mut Self) -> io::Result<()>) {
        if self.failure.is_none()
            && let Err(failure) = write(self)
        {
            self.failure = Some(failure);
        }
    }

    fn next_line(&mut self) -> io::Result<()> {
        let comma = if self.lines == 0 { "\n" } else { ",\n" };
        self.lines += 1;
        self.out.write_all(comma.as_bytes())
    }

    fn name_row(&mut self, lane: LaneId) {
        if self.lanes.contains(&lane) {
            return;
        }
        let first_of_process = self.lanes.iter().all(|known| known.device != lane.device);
        self.lanes.push(lane);
        let (pid, tid) = (process(lane), thread(lane));
        let process = if lane.is_host() { "host".to_string() } else { format!("device {}", lane.device) };
        if first_of_process {
            self.metadata(format_args!("{pid},\"name\":\"process_name\",\"args\":{{\"name\":\"{process}\"}}"));
            self.metadata(format_args!("{pid},\"name\":\"process_sort_index\",\"args\":{{\"sort_index\":{pid}}}"));
        }
        let row = format!("{pid},\"tid\":{tid}");
        self.metadata(format_args!("{row},\"name\":\"thread_name\",\"args\":{{\"name\":\"{lane}\"}}"));
        let index = lane.kind as u32;
        self.metadata(format_args!("{row},\"name\":\"thread_sort_index\",\"args\":{{\"sort_index\":{index}}}"));
    }

    /// Writes a metadata event of a process, from its number on.
    fn metadata(&mut self, of_process: fmt::Arguments) {
        self.attempt(|this| {
            this.next_line()?;
            write!(this.out, "{{\"ph\":\"M\",\"pid\":{of_process}}}")
        });
    }

    fn try_event(&mut self, event: &Event) -> io::Result<()> {
        self.next_line()?;
        let Event { lane, name, step, bytes, ticket, after, .. } = *event;
        let start = nanos(event.start_secs);
        let duration = nanos(event.end_secs).saturating_sub(start);
        write!(self.out, "{{\"ph\":\"X\",\"pid\":{},\"tid\":{}", process(lane), thread(lane))?;
        write!(self.out, ",\"ts\":{}.{:03}", start / 1000, start % 1000)?;
        write!(self.out, ",\"dur\":{}.{:03}", duration / 1000, duration % 1000)?;
        write!(self.out, ",\"cat\":\"{0}\",\"name\":\"{0} {1}\"", name.what.label(), name.shard)?;
        write!(self.out, ",\"args\":{{\"step\":{step},\"model\":{},\"shard\":{}", name.model, name.shard)?;
        if let Some(microbatch) = name.microbatch {
            write!(self.out, ",\"microbatch\":{microbatch}")?;
        }
        let flops = finite(event.flops);
        // One per nanosecond is a billion per second: bytes divided by nanoseconds are GB/s.
        if bytes > 0 {
            write!(self.out, ",\"bytes\":{bytes}")?;
            if duration > 0 {
                write!(self.out, ",\"GB/s\":{:.3}", bytes as f64 / duration as f64)?;
            }
        }
        if flops > 0.0 {
            write!(self.out, ",\"flops\":{flops}")?;
            if duration > 0 {
                write!(self.out, ",\"GFLOP/s\":{:.3}", flops / duration as f64)?;
            }
        }
        write!(self.out, ",\"ticket\":{ticket},\"after\":{after}}}}}")
    }
}

#[derive(Deserialize)]
struct Document {
    #[serde(rename = "traceEvents")]
    events: Vec<Line>,
    #[serde(rename = "otherData", default)]
    end: Option<End>,
}

/// What [`ChromeWriter::close`] writes; other programs' traces have other data here.
#[derive(Deserialize)]
struct End {
    events: Option<u64>,
    dropped: Option<u64>,
    displaced: Option<u64>,
    #[serde(default)]
    models: Vec<String>,
    #[serde(default)]
    lanes: Vec<LaneLine>,
}

#[derive(Deserialize)]
struct LaneLine {
    lane: String,
    tasks: u64,
    busy_secs: f64,
    bytes: u64,
    flops: f64,
}

/// One element of `traceEvents`, ours or another program's.
#[derive(Deserialize)]
struct Line {
    ph: String,
    #[serde(default)]
    cat: String,
    #[serde(default)]
    tid: u32,
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    args: serde_json::Value,
}

#[derive(Deserialize)]
struct Args {
    step: u32,
    model: u16,
    shard: u16,
    microbatch: Option<u16>,
    #[serde(default)]
    bytes: u64,
    #[serde(default)]
    flops: f64,
    ticket: u64,
    after: u64,
}

/// The start of every file, up to where events begin.
const HEAD: &str = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";

/// A trace as it was read back.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// The events, in file order, times to the nanosecond.
    pub events: Vec<Event>,
    /// The recorder's summary at the end; `None` where the file is truncated before it, or another program wrote the
    /// file.
    pub summary: Option<Summary>,
    /// Names of the models, by number; empty where the file does not say.
    pub models: Vec<String>,
}

impl Trace {
    /// Reads a trace that a [`Recorder`](super::Recorder) wrote.
    ///
    /// Lines of other kinds and categories that are not ours are skipped. A file that is truncated because its writer
    /// was killed yields the events up to there; it may even be empty.
    ///
    /// # Errors
    /// When the file cannot be read, is not a trace, or one of our events lacks a field or has an impossible one; the
    /// message states the path and the event's position.
    pub fn read(path: &Path) -> Result<Trace> {
        let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
        let text = std::str::from_utf8(&bytes).map_err(|e| Error::bad(format!("{}: no trace: {e}", path.display())))?;
        let (lines, mut end) = match serde_json::from_str::<Document>(text) {
            Ok(document) => (document.events, document.end),
            Err(e) if e.is_eof() && (text.contains("\"traceEvents\":[") || HEAD.starts_with(text)) => {
                (whole_lines(text), None)
            }
            Err(e) => return Err(Error::bad(format!("{}: no trace: {e}", path.display()))),
        };
        let mut events = Vec::with_capacity(lines.len());
        for (place, line) in lines.into_iter().enumerate() {
            let Some(what) = What::from_label(&line.cat).filter(|_| line.ph == "X") else { continue };
            let event =
                to_event(what, line).map_err(|why| Error::bad(format!("{}: event {place}: {why}", path.display())))?;
            events.push(event);
        }
        let models = end.as_mut().map_or_else(Vec::new, |end| std::mem::take(&mut end.models));
        Ok(Trace { events, summary: end.and_then(End::summary), models })
    }
}

impl End {
    fn summary(self) -> Option<Summary> {
        let sums = self.lanes.iter().filter_map(|line| {
            let LaneLine { tasks, busy_secs, bytes, flops, .. } = *line;
            Some(LaneSum { lane: line.lane.parse().ok()?, tasks, busy_secs, bytes, flops })
        });
        Some(Summary {
            written: self.events?,
            dropped: self.dropped?,
            displaced: self.displaced?,
            sums: sums.collect(),
        })
    }
}

/// Reads the events of a trace, as [`Trace::read`] does, without the summary.
///
/// # Errors
/// As [`Trace::read`].
pub fn read_trace(path: &Path) -> Result<Vec<Event>> {
    Ok(Trace::read(path)?.events)
}

/// The complete lines of a truncated file.
fn whole_lines(text: &str) -> Vec<Line> {
    text.lines().filter_map(|line| serde_json::from_str(line.trim_end_matches(',')).ok()).collect()
}

fn to_event(what: What, line: Line) -> std::result::Result<Event, String> {
    let args: Args = serde_json::from_value(line.args).map_err(|e| format!("args: {e}"))?;
    let lane = lane_of(line.tid).ok_or_else(|| format!("tid {} is no lane", line.tid))?;
    if !(line.ts >= 0.0 && line.dur >= 0.0 && (line.ts + line.dur).is_finite()) {
        return Err(format!("ts {} and dur {} are no times", line.ts, line.dur));
    }
    // Via whole nanoseconds, so that times that were equal before writing are equal after reading.
    let (start, duration) = ((line.ts * 1e3).round(), (line.dur * 1e3).round());
    Ok(Event {
        lane,
        name: TaskName { what, model: args.model, shard: args.shard, microbatch: args.microbatch },
        step: args.step,
        start_secs: start / 1e9,
        end_secs: (start + duration) / 1e9,
        bytes: args.bytes,
        flops: args.flops,
        ticket: args.ticket,
        after: args.after,
    })
}

fn lane_of(thread: u32) -> Option<LaneId> {
    let device = u16::try_from((thread / 8).checked_sub(1)?).ok()?;
    let kind = *LaneKind::ALL.get(thread as usize % 8)?;
    Some(LaneId { device, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Event>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read_trace(file.path())
    }

    #[test]
    fn lanes_survive_their_numbers() {
        for device in [0, 1, 31, 1023, LaneId::HOST] {
            for kind in LaneKind::ALL {
                assert_eq!(lane_of(thread(LaneId { device, kind })), Some(LaneId { device, kind }));
            }
        }
        for number in [0, 7, 8 + 6, u32::MAX] {
            assert_eq!(lane_of(number), None, "{number}");
        }
    }

    #[test]
    fn hostile_files_are_errors_with_a_place() {
        let ours = r#"{"ph":"X","cat":"forward","tid":8,"ts":1,"dur":2,"args":{"step":0,"model":0,"shard":0,"ticket":1,"after":0}}"#;
        assert_eq!(read(&format!("{{\"traceEvents\":[{ours}]}}")).unwrap().len(), 1);
        for (text, says) in [
            ("\u{0}".to_string(), "no trace"),
            ("[]".to_string(), "no trace"),
            ("{\"traceEvents\":7}".to_string(), "no trace"),
            ("{}".to_string(), "traceEvents"),
            (format!("{{\"traceEvents\":[{}]}}", ours.replace("\"tid\":8", "\"tid\":3")), "tid 3 is no lane"),
            (
                format!("{{\"traceEvents\":[{ours},{}]}}", ours.replace("\"dur\":2", "\"dur\":-2")),
                "event 1: ts 1 and dur -2",
            ),
            (format!("{{\"traceEvents\":[{}]}}", ours.replace("\"shard\":0", "\"shard\":-1")), "event 0: args"),
            (format!("{{\"traceEvents\":[{}]}}", ours.replace("\"shard\":0,", "")), "shard"),
        ] {
            let error = read(&text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        let others =
            r#"{"traceEvents":[{"ph":"B","name":"x"},{"ph":"X","cat":"toplevel","ts":-1},{"ph":"i"}],"more":1}"#;
        assert_eq!(read(others).unwrap(), []);
        assert!(read_trace(Path::new("/nonexistent/trace.json")).is_err());
    }

    #[test]
    fn a_file_that_breaks_off_is_read_up_to_there() {
        let line = |n: u32| {
            format!(
                r#"{{"ph":"X","cat":"norm","tid":8,"ts":{n},"dur":1,"args":{{"step":0,"model":0,"shard":0,"ticket":{n},"after":0}}}}"#
            )
        };
        let text = format!("{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{},\n{},\n{}", line(1), line(2), line(3));
        assert_eq!(read(&text).unwrap().len(), 3);
        assert_eq!(read(&text[..text.len() - 5]).unwrap().len(), 2);
        for bytes in 0..HEAD.len() {
            assert_eq!(read(&text[..bytes]).unwrap(), [], "{bytes} bytes");
        }
    }
}
