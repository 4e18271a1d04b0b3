//! The Gantt chart: a row per lane, a bar per task, as one SVG.
//!
//! Consecutive bars of one colour that are thinner than half a pixel are drawn as one, so that a chart of a million
//! tasks is only as large as what is visible of it.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::svg::{self, colour, escape, px, tick_label, ticks};
use super::{Event, What};
use crate::base::{LaneId, LaneKind, format_bytes, format_secs};

const MARGIN: f64 = 14.0;
const LABELS: f64 = 170.0;
const ROW: f64 = 30.0;
const BAR: f64 = 22.0;
/// Bars that are thinner than this, in pixels, merge.
const THIN: f64 = 0.5;

/// What a bar's colour shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ColourBy {
    /// The kind of task.
    #[default]
    What,
    /// The model it is for.
    Model,
}

/// How to draw.
#[derive(Clone, Debug, PartialEq)]
pub struct GanttOptions {
    /// The chart's title; none where empty.
    pub title: String,
    /// Width in pixels; at least 400.
    pub width: f64,
    /// What colours show.
    pub colour_by: ColourBy,
    /// Names of the models, by number; a model without a name is called by its number.
    pub models: Vec<String>,
    /// The seconds to show, from and until; `None` means the events' own span.
    pub window: Option<(f64, f64)>,
}

impl Default for GanttOptions {
    fn default() -> Self {
        GanttOptions {
            title: String::new(),
            width: 1200.0,
            colour_by: ColourBy::What,
            models: Vec::new(),
            window: None,
        }
    }
}

/// Draws `events`, in any order, as an SVG document. Events outside the window or with impossible times are left out;
/// if none remain, the chart says so.
pub fn gantt_svg(events: &[Event], options: &GanttOptions) -> String {
    let mut shown: Vec<Event> = events.iter().copied().filter(Event::has_times).collect();
    let span = options.window.unwrap_or_else(|| {
        let from = shown.iter().fold(f64::INFINITY, |from, event| from.min(event.start_secs));
        let until = shown.iter().fold(f64::NEG_INFINITY, |until, event| until.max(event.end_secs));
        (from, until)
    });
    shown.retain(|event| event.start_secs <= span.1 && event.end_secs >= span.0);
    let width = options.width.max(400.0);
    let length = span.1 - span.0;
    if shown.is_empty() || !(length > 0.0 && length.is_finite()) {
        let mut out = svg::open(width, 60.0, &options.title);
        out.push_str("<text class=\"soft\" x=\"14\" y=\"35\">No tasks to show.</text>\n</svg>\n");
        return out;
    }
    shown.sort_by(|a, b| a.lane.cmp(&b.lane).then(a.start_secs.total_cmp(&b.start_secs)).then(a.ticket.cmp(&b.ticket)));
    Chart { options, from: span.0, until: span.1, width, top: 0.0 }.draw(&shown)
}

/// The times in which steps of some model ran that are missing from `events`, since they were not kept: in order, none
/// touching another.
fn unrecorded(events: &[Event]) -> Vec<(f64, f64)> {
    let mut steps: BTreeMap<u16, BTreeMap<u32, (f64, f64)>> = BTreeMap::new();
    for event in events {
        let (from, until) = (event.start_secs, event.end_secs);
        let step = steps.entry(event.name.model).or_default().entry(event.step).or_insert((from, until));
        *step = (step.0.min(from), step.1.max(until));
    }
    let mut jumps: Vec<(f64, f64)> = steps
        .values()
        .flat_map(|steps| steps.iter().zip(steps.iter().skip(1)))
        .filter(|((before, _), (after, _))| **after > **before + 1)
        .map(|((_, before), (_, after))| (before.1, after.0))
        .filter(|(from, until)| from < until)
        .collect();
    jumps.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut gaps: Vec<(f64, f64)> = Vec::new();
    for (from, until) in jumps {
        match gaps.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(until),
            _ => gaps.push((from, until)),
        }
    }
    gaps
}

/// The chart being drawn: its window and where its rows begin.
struct Chart<'a> {
    options: &'a GanttOptions,
    from: f64,
    until: f64,
    width: f64,
    top: f64,
}

impl Chart<'_> {
    fn draw(&mut self, events: &[Event]) -> String {
        let title = if self.options.title.is_empty() { 0.0 } else { 26.0 };
        let entries = self.legend_entries(events);
        let (legend, legend_height) = svg::legend(entries, MARGIN, MARGIN + title, self.width - 2.0 * MARGIN);
        let one_model = events.iter().all(|event| event.name.model == events[0].name.model);
        let mut lanes: Vec<LaneId> = events.iter().map(|event| event.lane).collect();
        lanes.dedup();
        self.top = MARGIN + title + legend_height + if one_model { 22.0 } else { 8.0 };
        let bottom = self.top + ROW * lanes.len() as f64;
        let height = bottom + 44.0;

        let mut out = svg::open(self.width, height, &self.options.title);
        if title > 0.0 {
            let _ = writeln!(
                out,
                "<text class=\"name\" x=\"{}\" y=\"{}\" style=\"font-size:15px\">{}</text>",
                px(MARGIN),
                px(MARGIN + 13.0),
                escape(&self.options.title)
            );
        }
        out.push_str(&legend);
        self.axis(&mut out, bottom);
        if one_model {
            self.steps(&mut out, events, bottom);
        }
        for gap in unrecorded(events) {
            self.gap(&mut out, gap, bottom);
        }
        for (row, lane_events) in events.chunk_by(|a, b| a.lane == b.lane).enumerate() {
            self.row(&mut out, row, lane_events, one_model);
        }
        out.push_str("</svg>\n");
        out
    }

    fn model_name(&self, model: u16) -> String {
        let name = self.options.models.get(usize::from(model)).filter(|name| !name.is_empty());
        name.cloned().unwrap_or_else(|| format!("model {model}"))
    }

    fn colour(&self, event: &Event) -> &'static str {
        match self.options.colour_by {
            ColourBy::What => event.name.what.colour(),
            ColourBy::Model => colour(usize::from(event.name.model)),
        }
    }

    fn legend_entries(&self, events: &[Event]) -> Vec<(&'static str, String)> {
        match self.options.colour_by {
            ColourBy::What => {
                let there = |what: &What| events.iter().any(|event| event.name.what == *what);
                What::ALL.into_iter().filter(there).map(|what| (what.colour(), what.label().to_string())).collect()
            }
            ColourBy::Model => {
                let mut models: Vec<u16> = events.iter().map(|event| event.name.model).collect();
                models.sort_unstable();
                models.dedup();
                models.into_iter().map(|model| (colour(usize::from(model)), self.model_name(model))).collect()
            }
        }
    }

    fn left(&self) -> f64 {
        MARGIN + LABELS
    }

    /// The pixel of a time, clamped to the chart.
    fn x(&self, secs: f64) -> f64 {
        let share = ((secs - self.from) / (self.until - self.from)).clamp(0.0, 1.0);
        self.left() + share * (self.width - MARGIN - self.left())
    }

    /// Grid lines and the time axis, which counts from the window's start in a unit that suits its length.
    fn axis(&self, out: &mut String, bottom: f64) {
        let length = self.until - self.from;
        let (unit, name, _) = svg::time_unit(length);
        let marks = ticks(0.0, length / unit, ((self.width - self.left()) / 110.0) as usize);
        for &at in &marks.at {
            let x = px(self.x(self.from + at * unit));
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{x}\" x2=\"{x}\" y1=\"{}\" y2=\"{}\"/><text class=\"soft\" x=\"{x}\" y=\"{}\" \
                 text-anchor=\"middle\">{}</text>",
                px(self.top),
                px(bottom + 5.0),
                px(bottom + 19.0),
                tick_label(at, marks.step)
            );
        }
        let start = if self.from == 0.0 { "the start".to_string() } else { format!("{:.6} s", self.from) };
        let name = format!("{name} since {start} of the run");
        let _ = writeln!(out, "{}", svg::axis(self.left(), self.width - MARGIN, bottom, 37.0, &name));
    }

    /// A shaded area where nothing was recorded.
    fn gap(&self, out: &mut String, (from, until): (f64, f64), bottom: f64) {
        const LABEL: &str = "steps not recorded";
        let (left, right) = (self.x(from), self.x(until));
        if right - left < 3.0 {
            return;
        }
        let _ = writeln!(
            out,
            "<rect class=\"gap\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"><title>{LABEL}: {}</title></rect>",
            px(left),
            px(self.top),
            px(right - left),
            px(bottom - self.top),
            format_secs(until - from)
        );
        if right - left > svg::text_width(LABEL) + 8.0 {
            let (x, y) = (px(0.5 * (left + right)), px(0.5 * (self.top + bottom) + 4.0));
            let _ = writeln!(out, "<text class=\"soft\" x=\"{x}\" y=\"{y}\" text-anchor=\"middle\">{LABEL}</text>");
        }
    }

    /// A dashed line where each step of the only model begins: at the start of its first unit, since copies run ahead.
    fn steps(&self, out: &mut String, events: &[Event], bottom: f64) {
        let computes = events.iter().any(|event| event.lane.kind == LaneKind::Compute);
        let mut begins: BTreeMap<u32, f64> = BTreeMap::new();
        for event in events.iter().filter(|event| !computes || event.lane.kind == LaneKind::Compute) {
            let begin = begins.entry(event.step).or_insert(event.start_secs);
            *begin = begin.min(event.start_secs);
        }
        // A step that began before the window has no start in it.
        begins.retain(|_, begin| (self.from..self.until).contains(begin));
        let mut labelled_until = f64::NEG_INFINITY;
        for (step, begin) in begins {
            let x = self.x(begin);
            if x < labelled_until {
                continue;
            }
            let label = format!("step {step}");
            labelled_until = x + svg::text_width(&label) + 8.0;
            let _ = writeln!(
                out,
                "<line class=\"step\" x1=\"{x}\" x2=\"{x}\" y1=\"{}\" y2=\"{}\"/><text class=\"soft\" x=\"{}\" y=\"{}\">{label}</text>",
                px(self.top - 14.0),
                px(bottom),
                px(x + 4.0),
                px(self.top - 5.0),
                x = px(x)
            );
        }
    }

    fn row(&self, out: &mut String, row: usize, events: &[Event], one_model: bool) {
        let y = self.top + ROW * row as f64;
        if row % 2 == 1 {
            let _ = writeln!(
                out,
                "<rect class=\"band\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{ROW}\"/>",
                px(MARGIN),
                px(y),
                px(self.width - 2.0 * MARGIN)
            );
        }
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            px(self.left() - 10.0),
            px(y + ROW / 2.0 + 4.0),
            events[0].lane
        );
        let mut i = 0;
        while i < events.len() {
            let first = &events[i];
            let (begin, mut end, fill) = (self.x(first.start_secs), self.x(first.end_secs), self.colour(first));
            let mut count = 1;
            if end - begin < THIN {
                let is_thin = |event: &Event| self.x(event.end_secs) - self.x(event.start_secs) < THIN;
                while let Some(next) = events.get(i + count)
                    && is_thin(next)
                    && self.x(next.start_secs) - end < THIN
                    && self.colour(next) == fill
                {
                    end = end.max(self.x(next.end_secs));
                    count += 1;
                }
            }
            let width = (end - begin).max(THIN);
            let title =
                if count == 1 { self.tooltip(first) } else { format!("{count} tasks, {} the first", first.name) };
            let _ = writeln!(
                out,
                "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{BAR}\" rx=\"{}\" fill=\"{fill}\"><title>{}</title></rect>",
                px(begin),
                px(y + (ROW - BAR) / 2.0),
                // Slightly less, so that neighbours stay apart.
                px(if width > 3.0 { width - 0.6 } else { width }),
                if width > 6.0 { 3 } else { 0 },
                escape(&title)
            );
            let label = if one_model {
                first.name.shard.to_string()
            } else {
                format!("{}.{}", first.name.model, first.name.shard)
            };
            if count == 1 && width > svg::text_width(&label) + 5.0 {
                let _ = writeln!(
                    out,
                    "<text class=\"in\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
                    px((begin + end) / 2.0),
                    px(y + ROW / 2.0 + 4.0)
                );
            }
            i += count;
        }
    }

    fn tooltip(&self, event: &Event) -> String {
        let name = &event.name;
        let mut text = format!("{}: {} shard {}", name.what.label(), self.model_name(name.model), name.shard);
        if let Some(microbatch) = name.microbatch {
            let _ = write!(text, " microbatch {microbatch}");
        }
        let _ = write!(text, ", step {}\n{}", event.step, event.lane);
        let _ = write!(text, "\n{} from {:.6} s", format_secs(event.secs()), event.start_secs);
        if event.bytes > 0 {
            let _ = write!(text, "\n{}", format_bytes(event.bytes));
            if event.secs() > 0.0 {
                let _ = write!(text, " at {:.2} GB/s", event.bytes as f64 / event.secs() / 1e9);
            }
        }
        if event.flops > 0.0 && event.secs() > 0.0 {
            let _ = write!(text, "\n{:.2} GFLOP/s", event.flops / event.secs() / 1e9);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::sample;
    use crate::trace::svg::tests::check_tags;

    fn check(events: &[Event], options: &GanttOptions) -> String {
        let svg = gantt_svg(events, options);
        check_tags(&svg);
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert_eq!(svg, gantt_svg(events, options), "equal data give equal bytes");
        svg
    }

    /// Where steps are left out; not where a lane merely waits.
    #[test]
    fn what_was_not_recorded_is_shaded() {
        let moved = |event: &Event, step: u32, secs: f64| Event {
            step: event.step + step,
            start_secs: event.start_secs + secs,
            end_secs: event.end_secs + secs,
            ..*event
        };
        let first = sample::two_steps();
        let until = first.iter().map(|event| event.end_secs).fold(0.0, f64::max);
        let with = |step: u32, secs: f64| -> Vec<Event> {
            first.iter().copied().chain(first.iter().map(|event| moved(event, step, secs))).collect()
        };
        let later = with(9, 9.0 * until);
        assert_eq!(
            unrecorded(&later),
            [(until, 9.0 * until + first.iter().map(|e| e.start_secs).fold(f64::INFINITY, f64::min))]
        );
        assert!(check(&later, &GanttOptions::default()).contains(">steps not recorded</text>"));
        for none in [with(2, 9.0 * until), with(9, 0.5 * until), first.clone()] {
            assert_eq!(unrecorded(&none), []);
            assert!(!check(&none, &GanttOptions::default()).contains("not recorded"));
        }
    }

    #[test]
    fn every_lane_has_a_row_and_every_task_a_bar() {
        let events = sample::two_steps();
        for colour_by in [ColourBy::What, ColourBy::Model] {
            let options = GanttOptions { title: "a <title> & more".into(), colour_by, ..GanttOptions::default() };
            let svg = check(&events, &options);
            for event in &events {
                assert!(svg.contains(&format!(">{}</text>", event.lane)), "{}", event.lane);
            }
            assert_eq!(svg.matches("<title>").count(), events.len());
            assert!(svg.contains("a &lt;title&gt; &amp; more"));
            assert!(svg.contains(">step 0<") && svg.contains(">step 1<"));
        }
        let options =
            GanttOptions { models: vec!["<gpt>".into()], colour_by: ColourBy::Model, ..GanttOptions::default() };
        assert!(check(&events, &options).contains(">&lt;gpt&gt;</text>"));
        let mut reversed = events.clone();
        reversed.reverse();
        assert_eq!(check(&events, &options), check(&reversed, &options), "order does not matter");
    }

    #[test]
    fn awkward_events_are_drawn_or_left_out() {
        let events = sample::two_steps();
        let options = GanttOptions::default();
        assert!(check(&[], &options).contains("No tasks"));
        let mut broken = events[..3].to_vec();
        broken[0].start_secs = f64::NAN;
        broken[1].end_secs = f64::INFINITY;
        assert_eq!(check(&broken, &options).matches("<title>").count(), 1);
        let mut point = events[0];
        point.end_secs = point.start_secs;
        assert!(check(&[point], &options).contains("No tasks"));
        for window in [(0.0, 0.0), (1.0, -1.0), (f64::NAN, 1.0), (-1e9, -1e8)] {
            assert!(
                check(&events, &GanttOptions { window: Some(window), ..GanttOptions::default() }).contains("No tasks")
            );
        }
        let one = GanttOptions { window: Some((0.0, events[0].end_secs / 2.0)), ..GanttOptions::default() };
        assert!(check(&events, &one).matches("<title>").count() < events.len());
    }

    #[test]
    fn a_million_tasks_stay_small() {
        let first = sample::two_steps()[0];
        let events: Vec<Event> = (0..200_000)
            .map(|i| Event { start_secs: f64::from(i), end_secs: f64::from(i) + 0.9, ticket: i as u64 + 1, ..first })
            .collect();
        let svg = check(&events, &GanttOptions::default());
        assert!(svg.len() < 1 << 20, "{} bytes", svg.len());
        assert!(svg.contains(" tasks, "));
    }
}
