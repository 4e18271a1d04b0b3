//! Charts for the report: lines over steps, and the axes that bar charts use too.

use std::fmt::Write;

use super::svg::{self, escape, px, tick_label, tick_labels, ticks};

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineStyle {
    Curve,
    /// Thin and pale, for raw values behind a smoothed curve; not in the legend.
    Faint,
    Dots,
}

/// Points (step, value) that belong together, ascending in step. Values that are not finite, or beyond 1e150, leave a
/// gap.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub label: String,
    pub colour: &'static str,
    pub style: LineStyle,
    pub points: Vec<(u64, f64)>,
}

/// Lines over steps.
#[derive(Clone, Debug)]
pub(super) struct LineChart {
    pub title: String,
    pub y_label: String,
    pub width: f64,
    pub height: f64,
    pub series: Vec<Series>,
}

/// The rectangle that curves are drawn in, and the values at its edges.
pub(super) struct Plot {
    pub left: f64,
    pub right: f64,
    pub top: f64,
    pub bottom: f64,
    pub x: (f64, f64),
    pub y: (f64, f64),
}

impl Plot {
    /// The plot of a chart of `width` by `height` pixels, whose head ends at `top`.
    pub(super) fn new(width: f64, height: f64, top: f64, x: (f64, f64), y: (f64, f64)) -> Plot {
        Plot { left: 74.0, right: width - 18.0, top, bottom: height - 46.0, x, y }
    }

    pub(super) fn x(&self, value: f64) -> f64 {
        self.left + (value - self.x.0) / (self.x.1 - self.x.0) * (self.right - self.left)
    }

    pub(super) fn y(&self, value: f64) -> f64 {
        let share = (value - self.y.0) / (self.y.1 - self.y.0);
        self.bottom - share * (self.bottom - self.top)
    }

    /// Grid and ticks of the values, and the names of both axes.
    pub(super) fn axes(&self, out: &mut String, x_label: &str, y_label: &str) {
        let ticks = ticks(self.y.0, self.y.1, ((self.bottom - self.top) / 27.0) as usize);
        for (&at, label) in ticks.at.iter().zip(tick_labels(&ticks)) {
            let y = self.y(at);
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\"/><text class=\"soft\" x=\"{}\" y=\"{}\" \
                 text-anchor=\"end\">{label}</text>",
                px(self.left),
                px(self.right),
                px(self.left - 8.0),
                px(y + 4.0),
                y = px(y)
            );
        }
        let middle = px((self.top + self.bottom) / 2.0);
        let _ = writeln!(
            out,
            "{}<text class=\"soft\" x=\"14\" y=\"{middle}\" text-anchor=\"middle\" \
             transform=\"rotate(-90 14 {middle})\">{}</text>",
            svg::axis(self.left, self.right, self.bottom, 36.0, x_label),
            escape(y_label),
        );
    }

    /// Ticks at whole steps.
    fn step_ticks(&self, out: &mut String) {
        let steps = ticks(self.x.0, self.x.1, ((self.right - self.left) / 90.0) as usize);
        let whole: Vec<(f64, String)> =
            steps.at.iter().filter(|at| at.fract() == 0.0).map(|&at| (at, at.to_string())).collect();
        self.value_ticks(out, whole.iter().map(|(at, label)| (*at, label.as_str())));
    }

    /// Ticks along the horizontal axis with their labels; a label that does not fit is left out.
    pub(super) fn value_ticks<'a>(&self, out: &mut String, ticks: impl Iterator<Item = (f64, &'a str)>) {
        let mut ticks: Vec<(f64, &str)> = ticks.collect();
        ticks.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut labelled_until = f64::NEG_INFINITY;
        for (at, label) in ticks {
            let (x, half) = (self.x(at), svg::text_width(label) / 2.0);
            let fits = x - half > labelled_until;
            let label = if fits { label } else { "" };
            labelled_until = if fits { x + half + 6.0 } else { labelled_until };
            let _ = writeln!(
                out,
                "<line class=\"axis\" x1=\"{x}\" x2=\"{x}\" y1=\"{}\" y2=\"{}\"/><text class=\"soft\" x=\"{x}\" y=\"{}\" \
                 text-anchor=\"middle\">{}</text>",
                px(self.bottom),
                px(self.bottom + 5.0),
                px(self.bottom + 19.0),
                escape(label),
                x = px(x)
            );
        }
    }
}

/// Opens the drawing of a chart and draws its head (title and legend); also returns the pixel where the plot may begin.
pub(super) fn open<'a>(
    title: &str,
    width: f64,
    height: f64,
    entries: impl IntoIterator<Item = (&'a str, String)>,
) -> (String, f64) {
    let mut out = svg::open(width, height, title);
    let _ = writeln!(out, "<text class=\"name\" x=\"14\" y=\"24\" style=\"font-size:14px\">{}</text>", escape(title));
    let (legend, height) = svg::legend(entries, 14.0, 36.0, width - 28.0);
    out.push_str(&legend);
    (out, if legend.is_empty() { 42.0 } else { 36.0 + height + 10.0 })
}

/// A chart without data, which shows the text `says` instead.
pub(super) fn empty(title: &str, width: f64, says: &str) -> String {
    let (mut out, _) = open(title, width, 90.0, []);
    let _ = writeln!(out, "<text class=\"soft\" x=\"14\" y=\"58\">{says}</text>\n</svg>");
    out
}

impl LineChart {
    /// The chart as an SVG document; a chart without values says so.
    pub(super) fn svg(&self) -> String {
        // No plotted value comes near this; within it, differences and ratios stay finite.
        let shown = |value: f64| value.abs() < 1e150;
        let values = || self.series.iter().flat_map(|series| &series.points).filter(|point| shown(point.1));
        let low = values().map(|point| point.1).fold(f64::INFINITY, f64::min);
        let high = values().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
        let first = values().map(|point| point.0).min();
        let last = values().map(|point| point.0).max();
        let (Some(first), Some(last)) = (first, last) else {
            return empty(&self.title, self.width, "No values yet.");
        };
        let named = self.series.iter().filter(|series| series.style != LineStyle::Faint && !series.points.is_empty());
        let entries: Vec<(&str, String)> = named.map(|series| (series.colour, series.label.clone())).collect();
        let entries = if entries.len() > 1 { entries } else { Vec::new() };
        let (mut out, top) = open(&self.title, self.width, self.height, entries);
        // Very large steps that differ may be the same f64: the range must not be empty even then.
        let last = (last as f64).max(first as f64 + 1.0).max(first as f64 * (1.0 + 1e-12));
        let plot = Plot::new(self.width, self.height, top, (first as f64, last), padded(low, high));
        plot.axes(&mut out, "step", &self.y_label);
        plot.step_ticks(&mut out);
        for series in &self.series {
            self.draw(&mut out, &plot, series, &shown);
        }
        out.push_str("</svg>\n");
        out
    }

    fn draw(&self, out: &mut String, plot: &Plot, series: &Series, shown: &dyn Fn(f64) -> bool) {
        let colour = series.colour;
        for run in series.points.split(|point| !shown(point.1)).filter(|run| !run.is_empty()) {
            let at: Vec<(f64, f64)> = run.iter().map(|&(step, value)| (plot.x(step as f64), plot.y(value))).collect();
            if series.style == LineStyle::Dots || run.len() == 1 {
                let radius = if series.style == LineStyle::Dots { 4 } else { 3 };
                for (&point, (step, value)) in at.iter().zip(run) {
                    let value = tick_label(*value, (value.abs() * 1e-5).max(f64::MIN_POSITIVE));
                    svg::dot(out, point, radius, colour, &format!("{}, step {step}: {value}", series.label));
                }
                continue;
            }
            let class = if series.style == LineStyle::Faint { "faint" } else { "curve" };
            let points = svg::points(&thinned(&at));
            let _ = writeln!(out, "<polyline class=\"{class}\" stroke=\"{colour}\" points=\"{points}\"/>");
        }
    }
}

/// The range of an axis around the values, with room above and below.
pub(super) fn padded(low: f64, high: f64) -> (f64, f64) {
    let length = high - low;
    let room = if length > low.abs().max(high.abs()) * 1e-9 { length * 0.05 } else { high.abs().max(1e-12) * 0.5 };
    // Zero is shown when it is near, and a quantity that is never negative needs no room below it.
    let floor = if low >= 0.0 && low - room <= length * 0.25 { 0.0 } else { low - room };
    (floor, high + room)
}

/// The points that are visible: where a pixel column has more than a few, its lowest and highest.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() < 2000 {
        return points.to_vec();
    }
    let mut out = Vec::new();
    for column in points.chunk_by(|a, b| a.0.floor() == b.0.floor()) {
        let by_height = |a: &(usize, &(f64, f64)), b: &(usize, &(f64, f64))| a.1.1.total_cmp(&b.1.1);
        let low = column.iter().enumerate().min_by(by_height).map_or(0, |(i, _)| i);
        let high = column.iter().enumerate().max_by(by_height).map_or(0, |(i, _)| i);
        out.push(column[low.min(high)]);
        if low != high {
            out.push(column[low.max(high)]);
        }
    }
    out
}

/// The finite values, each averaged with its neighbours on both sides with weights that decay as `exp(-distance /
/// span)`. Both sides, since an average of only the past would lie above a falling curve.
pub(super) fn smoothed(points: &[(u64, f64)], span: f64) -> Vec<(u64, f64)> {
    let keep = (-1.0 / span.max(1e-9)).exp();
    let mut out: Vec<(u64, f64)> = points.iter().copied().filter(|point| point.1.is_finite()).collect();
    let values: Vec<f64> = out.iter().map(|point| point.1).collect();
    let (mut sum, mut weight) = (0.0, 0.0);
    let past: Vec<(f64, f64)> = values
        .iter()
        .map(|value| {
            (sum, weight) = (keep * sum + value, keep * weight + 1.0);
            (sum, weight)
        })
        .collect();
    let (mut sum, mut weight) = (0.0, 0.0);
    for i in (0..values.len()).rev() {
        out[i].1 = (past[i].0 + sum) / (past[i].1 + weight);
        (sum, weight) = (keep * (sum + values[i]), keep * (weight + 1.0));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::svg::tests::check_tags;

    fn chart(points: Vec<(u64, f64)>) -> String {
        let faint = Series { label: "raw".into(), colour: "#111111", style: LineStyle::Faint, points: points.clone() };
        let curve =
            Series { label: "a < b".into(), colour: "#222222", style: LineStyle::Curve, points: points.clone() };
        let dots = Series { label: "held out".into(), colour: "#333333", style: LineStyle::Dots, points };
        let svg = LineChart {
            title: "loss & more".into(),
            y_label: "loss".into(),
            width: 600.0,
            height: 300.0,
            series: vec![faint, curve, dots],
        }
        .svg();
        check_tags(&svg);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        svg
    }

    #[test]
    fn lines_of_awkward_values() {
        assert!(chart(vec![]).contains("No values yet"));
        assert!(chart(vec![(0, f64::NAN), (1, f64::INFINITY)]).contains("No values yet"));
        let svg = chart(vec![(0, 4.0), (1, 3.0), (2, f64::NAN), (3, 2.5), (4, 2.4), (5, f64::INFINITY), (6, 2.0)]);
        // Two runs of two points are lines; the last one alone is a circle, twice, beside the five dots.
        assert_eq!((svg.matches("<polyline").count(), svg.matches("<circle").count()), (4, 7));
        for points in [vec![(7, 1.0)], vec![(0, 2.0), (1, 2.0)], vec![(u64::MAX - 1, 1e-30), (u64::MAX, 1e30)]] {
            assert!(chart(points).contains("<circle"));
        }
        assert!(chart(vec![(0, 0.0), (1, 0.0)]).contains("<polyline"));
        assert!(chart(vec![(0, -f64::MAX), (1, f64::MAX)]).contains("No values yet"));
    }

    #[test]
    fn many_points_are_thinned_and_keep_their_extremes() {
        let points: Vec<(f64, f64)> =
            (0..100_000).map(|i| (f64::from(i) / 200.0, f64::from((i * 7919) % 1000))).collect();
        let thin = thinned(&points);
        assert!(thin.len() <= 1000, "{}", thin.len());
        assert!(thin.iter().any(|point| point.1 == 0.0) && thin.iter().any(|point| point.1 == 999.0));
        assert!(thin.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    }

    #[test]
    fn smoothing_keeps_a_constant_and_skips_gaps() {
        let points: Vec<(u64, f64)> = (0..33).map(|step| (step, if step == 5 { f64::NAN } else { 3.0 })).collect();
        let smooth = smoothed(&points, 7.0);
        assert_eq!(smooth.len(), 32);
        // Weights that sum to one, up to rounding.
        assert!(smooth.iter().all(|point| (point.1 - 3.0).abs() < 1e-12));
        // A straight line stays where it is, but for its ends; the weights left and right of the middle are equal.
        let line: Vec<(u64, f64)> = (0..101).map(|step| (step, step as f64)).collect();
        assert!((smoothed(&line, 3.0)[50].1 - 50.0).abs() < 1e-9);
        assert_eq!(smoothed(&[], 3.0), []);
    }
}
