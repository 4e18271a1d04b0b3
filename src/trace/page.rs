//! The report: one self-contained HTML page that follows the reader's light or dark setting and needs no script.
//!
//! It is drawn from plain values; the caller reads the files.

use std::fmt::Write;

use super::bars::{Bar, stacked_bars};
use super::chart::{LineChart, LineStyle, Series, smoothed};
use super::svg::{BOUND_COLOURS, colour, escape};
use super::{Bound, ColourBy, Event, GanttOptions, LaneSum, gantt_svg};
use crate::base::{LaneKind, format_bytes, format_secs};

/// More bars than this are averaged into this many.
const MOST_BARS: usize = 60;
const WIDTH: f64 = 1160.0;

/// One model's numbers over its steps, each a list of (step, value) that ascends in step; any may be empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelCurves {
    /// The model's name.
    pub name: String,
    /// Training loss.
    pub train_loss: Vec<(u64, f64)>,
    /// Loss on held-out data.
    pub valid_loss: Vec<(u64, f64)>,
    /// Learning rate.
    pub learning_rate: Vec<(u64, f64)>,
    /// Global norm of the gradient, before clipping.
    pub grad_norm: Vec<(u64, f64)>,
}

/// What bound one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepBound {
    /// The step.
    pub step: u64,
    /// Its seconds.
    pub bound: Bound,
}

/// A lane's totals and its ceiling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LaneRow {
    /// Totals over the steps shown.
    pub sum: LaneSum,
    /// Its ceiling: flop/s for compute, bytes/s for the others; `None` where it was not measured.
    pub peak_per_sec: Option<f64>,
    /// The share of the time in which it worked, where the time is known.
    pub busy_share: Option<f64>,
}

/// What a device did, in shares of the time; `computes`, `copies_alone` and `idle` sum to one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceRow {
    /// The device.
    pub device: u16,
    /// It computed.
    pub computes: f64,
    /// Something was copied to or from it.
    pub copies: f64,
    /// Something was copied while it did not compute.
    pub copies_alone: f64,
    /// Neither.
    pub idle: f64,
}

/// Everything that the page shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReportData {
    /// The page's title.
    pub title: String,
    /// Short sentences under the title: when, where, what was dropped from the trace.
    pub notes: Vec<String>,
    /// The plan's key figures: names and values.
    pub facts: Vec<(String, String)>,
    /// Names of the shards' columns; may be empty.
    pub plan_columns: Vec<String>,
    /// The shards, a row each.
    pub plan_rows: Vec<Vec<String>>,
    /// Names of the columns of the models' outcomes; may be empty.
    pub outcome_columns: Vec<String>,
    /// What became of each model.
    pub outcome_rows: Vec<Vec<String>>,
    /// The models' curves.
    pub models: Vec<ModelCurves>,
    /// What bound each step, ascending in step.
    pub steps: Vec<StepBound>,
    /// What the devices did.
    pub devices: Vec<DeviceRow>,
    /// Totals of the lanes.
    pub lanes: Vec<LaneRow>,
    /// Which time the totals of devices and lanes cover.
    pub lanes_note: String,
    /// Events of the steps whose schedule is drawn.
    pub events: Vec<Event>,
    /// The seconds whose schedule is drawn; all of `events` where `None`.
    pub window: Option<(f64, f64)>,
    /// Which steps the schedule shows.
    pub schedule_note: String,
    /// What colours show in the schedule.
    pub colour_by: ColourBy,
}

impl ReportData {
    /// How the schedule is drawn, in the page and in its own file.
    pub fn gantt_options(&self) -> GanttOptions {
        let models = self.models.iter().map(|model| model.name.clone()).collect();
        GanttOptions { width: WIDTH, colour_by: self.colour_by, models, window: self.window, ..GanttOptions::default() }
    }
}

/// Draws the report as one HTML page without links to anything outside it.
pub fn report_page(data: &ReportData) -> String {
    let title = if data.title.is_empty() { "Training report" } else { &data.title };
    let mut out = String::with_capacity(64 << 10);
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{0}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <main>\n<header><h1>{0}</h1>\n",
        escape(title)
    );
    for note in &data.notes {
        let _ = writeln!(out, "<p>{}</p>", escape(note));
    }
    out.push_str("</header>\n");
    headline(&mut out, data);
    if !data.outcome_rows.is_empty() {
        section(&mut out, "Models", |out| table(out, &data.outcome_columns, &data.outcome_rows));
    }
    facts(&mut out, data);
    curves(&mut out, data);
    time(&mut out, data);
    section(&mut out, "Schedule", |out| {
        note(out, &data.schedule_note);
        if data.events.is_empty() {
            out.push_str("<p class=\"none\">No events were kept.</p>\n");
        } else {
            let options = data.gantt_options();
            let _ = writeln!(out, "<figure>{}</figure>", gantt_svg(&data.events, &options));
        }
    });
    section(&mut out, "Shards", |out| {
        if data.plan_rows.is_empty() {
            out.push_str("<p class=\"none\">The plan lists no shards.</p>\n");
        } else {
            table(out, &data.plan_columns, &data.plan_rows);
        }
    });
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

fn section(out: &mut String, title: &str, body: impl FnOnce(&mut String)) {
    let _ = writeln!(out, "<section><h2>{title}</h2>");
    body(out);
    out.push_str("</section>\n");
}

/// A sentence under a heading, unless it is empty.
fn note(out: &mut String, text: &str) {
    if !text.is_empty() {
        let _ = writeln!(out, "<p class=\"none\">{}</p>", escape(text));
    }
}

/// The plan's key figures.
fn facts(out: &mut String, data: &ReportData) {
    if data.facts.is_empty() {
        return;
    }
    section(out, "Plan", |out| {
        out.push_str("<dl>\n");
        for (name, value) in &data.facts {
            let _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
        }
        out.push_str("</dl>\n");
    });
}

/// A table of text; columns of numbers are right-aligned, except the first, which names the rows.
fn table(out: &mut String, columns: &[String], rows: &[Vec<String>]) {
    let is_number = |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit() || c == '-');
    let numbers = |i: usize| i > 0 && rows.iter().filter_map(|row| row.get(i)).all(is_number);
    out.push_str("<div class=\"scroll\"><table>\n");
    let classes: Vec<&str> = (0..rows.iter().map(Vec::len).fold(columns.len(), usize::max))
        .map(|i| if numbers(i) { " class=\"n\"" } else { "" })
        .collect();
    let line = |tag: &str, cells: &[String]| -> String {
        let cell = |(class, cell): (&&str, &String)| format!("<{tag}{class}>{}</{tag}>", escape(cell));
        classes.iter().zip(cells).map(cell).collect()
    };
    if !columns.is_empty() {
        let _ = writeln!(out, "<thead><tr>{}</tr></thead>", line("th", columns));
    }
    out.push_str("<tbody>\n");
    for row in rows {
        let _ = writeln!(out, "<tr>{}</tr>", line("td", row));
    }
    out.push_str("</tbody></table></div>\n");
}

/// The few numbers that a reader wants first.
fn headline(out: &mut String, data: &ReportData) {
    let mut tiles: Vec<(String, String)> = Vec::new();
    let steps = data.models.iter().filter_map(|model| model.train_loss.last()).map(|last| last.0 + 1).max();
    if let Some(steps) = steps {
        tiles.push(("steps".into(), steps.to_string()));
    }
    if let [model] = data.models.as_slice() {
        if let Some(last) = smoothed(&model.train_loss, span(model)).last() {
            tiles.push(("training loss, smoothed".into(), format!("{:.4}", last.1)));
        }
        let best = model.valid_loss.iter().filter(|point| point.1.is_finite()).min_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((step, loss)) = best {
            tiles.push((format!("best held-out loss, step {step}"), format!("{loss:.4}")));
        }
    } else if !data.models.is_empty() {
        tiles.push(("models".into(), data.models.len().to_string()));
    }
    let whole = total(&data.steps);
    if whole.total() > 0.0 {
        tiles.push(("a step, mean".into(), format_secs(whole.total() / data.steps.len() as f64)));
        tiles.push(("bound by compute".into(), format!("{:.1} %", whole.compute / whole.total() * 100.0)));
    }
    if tiles.is_empty() {
        out.push_str("<p class=\"none\">No steps yet: the run has recorded nothing.</p>\n");
        return;
    }
    out.push_str("<div class=\"tiles\">\n");
    for (name, value) in tiles {
        let _ = writeln!(out, "<div><b>{}</b><span>{}</span></div>", escape(&value), escape(&name));
    }
    out.push_str("</div>\n");
}

/// Steps on either side over which the loss is smoothed: more where more are shown.
fn span(model: &ModelCurves) -> f64 {
    (model.train_loss.len() as f64 / 80.0).max(2.0)
}

fn curves(out: &mut String, data: &ReportData) {
    let mut loss = Vec::new();
    let alone = data.models.len() == 1;
    for (i, model) in data.models.iter().enumerate() {
        let held_out = if alone { colour(1) } else { colour(i) };
        let label = |what: &str| if alone { what.to_string() } else { format!("{}, {what}", model.name) };
        let series = |label, colour, style, points| Series { label, colour, style, points };
        loss.push(series(label("raw"), colour(i), LineStyle::Faint, model.train_loss.clone()));
        let smooth = smoothed(&model.train_loss, span(model));
        loss.push(series(
            if alone { "training, smoothed".into() } else { model.name.clone() },
            colour(i),
            LineStyle::Curve,
            smooth,
        ));
        loss.push(series(label("held out"), held_out, LineStyle::Dots, model.valid_loss.clone()));
    }
    // Faint lines come first, so that none covers a curve; sorting is stable.
    loss.sort_by_key(|series| series.style != LineStyle::Faint);
    let small = |title: &str, of: fn(&ModelCurves) -> &Vec<(u64, f64)>| {
        let series = data.models.iter().enumerate().map(|(i, model)| Series {
            label: model.name.clone(),
            colour: colour(i),
            style: LineStyle::Curve,
            points: of(model).clone(),
        });
        let series = series.collect();
        LineChart { title: title.into(), y_label: String::new(), width: 570.0, height: 240.0, series }
    };
    section(out, "Training", |out| {
        let chart =
            LineChart { title: "Loss".into(), y_label: "loss".into(), width: WIDTH, height: 400.0, series: loss };
        let rate = small("Learning rate", |model| &model.learning_rate);
        let norm = small("Gradient norm", |model| &model.grad_norm);
        let _ = writeln!(
            out,
            "<figure>{}</figure>\n<div class=\"pair\"><figure>{}</figure><figure>{}</figure></div>",
            chart.svg(),
            rate.svg(),
            norm.svg()
        );
    });
}

/// The sum over steps, each part finite.
fn total(steps: &[StepBound]) -> Bound {
    let mut sum = Bound::default();
    steps.iter().filter(|step| step.bound.total().is_finite()).for_each(|step| sum.add(&step.bound));
    sum
}

fn time(out: &mut String, data: &ReportData) {
    section(out, "Where the time went", |out| {
        if data.steps.is_empty() && data.devices.is_empty() {
            out.push_str("<p class=\"none\">No steps yet.</p>\n");
        } else if !data.steps.is_empty() {
            if data.models.len() > 1 {
                note(out, "A step's mean over the models; idle is what a model waited for others, or for nothing.");
            }
            let sum = total(&data.steps);
            share_bar(out, &sum);
            let parts = std::array::from_fn(|i| (Bound::NAMES[i], BOUND_COLOURS[i]));
            let bars = bars(&data.steps);
            let title =
                if bars.len() < data.steps.len() { "What bound the steps, averaged" } else { "What bound each step" };
            let chart = stacked_bars(title, parts, (700.0, 340.0), &bars);
            let columns = ["bound by", "seconds", "a step", "share"].map(String::from);
            let rows: Vec<Vec<String>> = Bound::NAMES
                .iter()
                .zip(sum.parts())
                .chain([(&"all", sum.total())])
                .map(|(name, secs)| {
                    let share = if sum.total() > 0.0 { secs / sum.total() * 100.0 } else { 0.0 };
                    let step = secs / data.steps.len() as f64;
                    let step = if step > 0.0 { format_secs(step) } else { "-".into() };
                    vec![name.to_string(), format!("{secs:.3}"), step, format!("{share:.1} %")]
                })
                .collect();
            let _ = write!(out, "<div class=\"beside\"><figure>{chart}</figure><div>");
            table(out, &columns, &rows);
            out.push_str("</div></div>\n");
        }
        if !data.devices.is_empty() {
            out.push_str("<h3>Devices</h3>\n");
            note(out, &data.lanes_note);
            let columns = ["device", "computes", "only copies", "idle", "copies, all"].map(String::from);
            let percent = |share: f64| format!("{:.1} %", share * 100.0);
            let cells = |row: &DeviceRow| {
                let shares = [row.computes, row.copies_alone, row.idle, row.copies].map(percent);
                [format!("device {}", row.device)].into_iter().chain(shares).collect()
            };
            table(out, &columns, &data.devices.iter().map(cells).collect::<Vec<_>>());
        }
        if !data.lanes.is_empty() {
            out.push_str("<h3>Lanes against their ceilings</h3>\n");
            if data.devices.is_empty() {
                note(out, &data.lanes_note);
            }
            let columns =
                ["lane", "tasks", "busy", "of the time", "work", "rate while busy", "peak", "of peak", "at best"]
                    .map(String::from);
            let rows: Vec<Vec<String>> = data.lanes.iter().map(lane_cells).collect();
            table(out, &columns, &rows);
        }
    });
}

/// One bar across the page, each part as wide as its share.
fn share_bar(out: &mut String, sum: &Bound) {
    if sum.total() <= 0.0 {
        return;
    }
    out.push_str("<div class=\"share\">");
    for (i, secs) in sum.parts().into_iter().enumerate() {
        let share = secs / sum.total() * 100.0;
        if share >= 0.05 {
            let label = if share >= 9.0 { format!("{} {share:.0} %", Bound::NAMES[i]) } else { String::new() };
            let _ = write!(
                out,
                "<span style=\"width:{share:.2}%;background:{}\" title=\"{}: {share:.1} %\">{label}</span>",
                BOUND_COLOURS[i],
                Bound::NAMES[i]
            );
        }
    }
    out.push_str("</div>\n");
}

/// A bar per step; where there are many, one per run of consecutive steps, with their average.
fn bars(steps: &[StepBound]) -> Vec<Bar> {
    let run = steps.len().div_ceil(MOST_BARS).max(1);
    let bar = |steps: &[StepBound]| {
        let secs = total(steps).parts().map(|secs| secs / steps.len() as f64);
        let (first, last) = (steps[0].step, steps[steps.len() - 1].step);
        let label =
            if steps.len() == 1 { format!("step {first}") } else { format!("steps {first} to {last}, average") };
        Bar { label, step: first, secs }
    };
    steps.chunks(run).map(bar).collect()
}

/// `value` with the unit prefix that leaves one to three digits before the point: `61.2 GFLOP/s`.
fn rate(value: f64, unit: &str) -> String {
    const PREFIXES: [(f64, &str); 5] = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match PREFIXES.into_iter().find(|&(size, _)| value >= size) {
        Some((size, prefix)) => format!("{:.2} {prefix}{unit}", value / size),
        None => format!("{value:.2} {unit}"),
    }
}

fn lane_cells(row: &LaneRow) -> Vec<String> {
    let LaneRow { sum, peak_per_sec, busy_share } = row;
    let none = || "-".to_string();
    let (measured, work, unit, least) = if sum.lane.kind == LaneKind::Compute {
        (sum.flops_per_sec(), rate(sum.flops, "FLOP"), "FLOP/s", sum.flops)
    } else {
        (sum.bytes_per_sec(), format_bytes(sum.bytes), "B/s", sum.bytes as f64)
    };
    let peak = peak_per_sec.filter(|&peak| peak > 0.0 && peak.is_finite());
    vec![
        sum.lane.to_string(),
        sum.tasks.to_string(),
        format_secs(sum.busy_secs),
        busy_share.filter(|share| share.is_finite()).map_or_else(none, |share| format!("{:.1} %", share * 100.0)),
        if measured.is_some() { work } else { none() },
        measured.map_or_else(none, |value| rate(value, unit)),
        peak.map_or_else(none, |peak| rate(peak, unit)),
        measured.zip(peak).map_or_else(none, |(value, peak)| format!("{:.0} %", value / peak * 100.0)),
        peak.filter(|_| least > 0.0).map_or_else(none, |peak| format_secs(least / peak)),
    ]
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2733;--soft:#5d6b7a;--line:#dfe4ea;--paper:#ffffff;--desk:#f3f5f8;--accent:#2f5fa8}\
@media (prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9aa7b4;--line:#313b46;--paper:#171d24;--desk:#0f1419;\
--accent:#8fb8e8}}\
*{box-sizing:border-box}body{margin:0;background:var(--desk);color:var(--ink);\
font:15px/1.5 system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}\
main{max-width:1240px;margin:0 auto;padding:36px 20px 60px}\
header p{color:var(--soft);margin:2px 0}h1{font-size:28px;line-height:1.25;margin:0 0 8px;letter-spacing:-.01em}\
h2{font-size:18px;margin:0 0 14px}h3{font-size:15px;margin:22px 0 8px}\
section{background:var(--paper);border:1px solid var(--line);border-radius:12px;padding:20px;margin:20px 0;break-inside:avoid}\
figure{margin:0}figure svg{display:block;width:100%}\
.tiles{display:flex;flex-wrap:wrap;gap:14px;margin:22px 0}\
.tiles div{flex:1 1 150px;background:var(--paper);border:1px solid var(--line);border-radius:12px;padding:14px 18px}\
.tiles b{display:block;font-size:24px;line-height:1.3;font-variant-numeric:tabular-nums;color:var(--accent)}\
.tiles span{color:var(--soft);font-size:13px}\
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:16px;margin-top:12px}\
.beside{display:grid;grid-template-columns:minmax(0,1.7fr) minmax(280px,1fr);gap:24px;align-items:center}\
@media (max-width:860px){.beside{grid-template-columns:1fr}}\
.share{display:flex;height:30px;border-radius:8px;overflow:hidden;margin:0 0 16px}\
.share span{color:#fff;font-size:12px;font-weight:600;line-height:30px;text-align:center;white-space:nowrap;overflow:hidden}\
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:14px 24px;margin:0}dl div{min-width:0}\
dt{color:var(--soft);font-size:13px}dd{margin:0;font-variant-numeric:tabular-nums}\
.scroll{overflow:auto;max-height:640px}table{border-collapse:collapse;width:100%;font-size:14px}\
th,td{padding:7px 12px;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}\
th{color:var(--soft);font-weight:600;font-size:13px}tbody tr:last-child td{border-bottom:0}\
.n{text-align:right;font-variant-numeric:tabular-nums}.none{color:var(--soft);margin:6px 0}\
@media print{body{background:none}section{border-color:#ccc}}";

#[cfg(test)]
#[path = "page_tests.rs"]
mod tests;
