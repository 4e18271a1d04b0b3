//! The plot of a sweep: makespans over one swept parameter, with a line for each combination of the others, and dashed
//! lines for the bounds.

use std::fmt::Write;

use super::chart::{Plot, empty, open, padded};
use super::svg::{self, colour};
use crate::base::format_secs;

/// If the ratio of an axis' highest value to its lowest exceeds this, the axis is logarithmic.
const LONG: f64 = 20.0;

/// A sweep to draw.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SweepPlot {
    /// The chart's title.
    pub title: String,
    /// The label of the horizontal axis.
    pub axis: String,
    /// The values along it, as text.
    pub values: Vec<String>,
    /// The values as numbers; `None` if they are words, with nothing in between.
    pub numbers: Option<Vec<f64>>,
    /// A line for each combination of the other swept parameters.
    pub lines: Vec<SweepLine>,
}

/// The results of one combination.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SweepLine {
    /// The combination; empty where it is the only one.
    pub label: String,
    /// Makespan and bound at each of the values, in seconds; `None` where the combination does not run.
    pub secs: Vec<Option<(f64, f64)>>,
}

/// Draws the plot as an SVG document.
pub fn sweep_svg(plot: &SweepPlot) -> String {
    const WIDTH: f64 = 900.0;
    let shown = |&(makespan, bound): &(f64, f64)| makespan.is_finite() && makespan > 0.0 && bound.is_finite();
    let line = |line: &SweepLine| -> Vec<Option<(f64, f64)>> {
        let at = |i: usize| line.secs.get(i).copied().flatten().filter(shown);
        (0..plot.values.len()).map(at).collect()
    };
    let lines: Vec<_> = plot.lines.iter().map(line).collect();
    let most = lines.iter().flatten().flatten().map(|point| point.0.max(point.1)).fold(0.0, f64::max);
    if most == 0.0 {
        return empty(&plot.title, WIDTH, "No combination runs.");
    }
    let (unit, _, name) = svg::time_unit(most);
    let height = 420.0 + 20.0 * (plot.lines.len() / 4) as f64;
    let labels = plot.lines.iter().enumerate().map(|(i, line)| (colour(i), line.label.clone()));
    let (mut out, top) = open(&plot.title, WIDTH, height, labels.filter(|(_, label)| !label.is_empty()));
    let places = places(plot);
    let (first, last) = places.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
    // Room beside the outermost points, or around a single one.
    let room = if last > first { 0.04 * (last - first) } else { 1.0 };
    let frame = Plot::new(WIDTH, height, top, (first - room, last + room), padded(0.0, most / unit));
    frame.axes(&mut out, &plot.axis, &format!("makespan, {name} (bound dashed)"));
    frame.value_ticks(&mut out, places.iter().copied().zip(plot.values.iter().map(String::as_str)));
    for (i, line) in lines.iter().enumerate() {
        // Bounds that are the same for several lines are drawn once, in a neutral colour.
        let bounds = |line: &[Option<(f64, f64)>]| line.iter().map(|point| point.map(|p| p.1)).collect::<Vec<_>>();
        let (own, same) = (bounds(line), |other: &Vec<_>| bounds(other) == bounds(line));
        let shared = lines.iter().filter(|other| same(other)).count() > 1;
        if !lines[..i].iter().any(same) {
            let stroke = if shared || plot.lines.len() == 1 { "var(--soft)" } else { colour(i) };
            draw(&mut out, &frame, plot, &places, &own, unit, ("bound", stroke));
        }
    }
    for (i, (line, points)) in plot.lines.iter().zip(&lines).enumerate() {
        let makespans: Vec<Option<f64>> = points.iter().map(|point| point.map(|p| p.0)).collect();
        draw(&mut out, &frame, plot, &places, &makespans, unit, ("curve", colour(i)));
        for ((&x, point), value) in places.iter().zip(points).zip(&plot.values) {
            let Some((makespan, bound)) = point else { continue };
            let label = if line.label.is_empty() { String::new() } else { format!("{}, ", line.label) };
            let figures = format!("{}, bound {}", format_secs(*makespan), format_secs(*bound));
            let title = format!("{label}{} = {value}: {figures}", plot.axis);
            svg::dot(&mut out, (frame.x(x), frame.y(makespan / unit)), 4, colour(i), &title);
        }
    }
    out.push_str("</svg>\n");
    out
}

/// The values' positions along the axis: by number, by logarithm where they are far apart, or evenly spaced for words.
fn places(plot: &SweepPlot) -> Vec<f64> {
    let one_by_one = || (0..plot.values.len()).map(|i| i as f64).collect();
    let Some(numbers) = plot.numbers.as_ref().filter(|n| n.len() == plot.values.len()) else { return one_by_one() };
    let low = numbers.iter().copied().fold(f64::INFINITY, f64::min);
    let high = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    match numbers.iter().all(|number| number.is_finite()) {
        true if low > 0.0 && high > LONG * low => numbers.iter().map(|n| n.ln()).collect(),
        true => numbers.clone(),
        false => one_by_one(),
    }
}

/// Draws one series: lines between neighbours on an axis of numbers; short strokes at words.
fn draw(
    out: &mut String,
    frame: &Plot,
    plot: &SweepPlot,
    places: &[f64],
    secs: &[Option<f64>],
    unit: f64,
    (class, stroke): (&str, &str),
) {
    let mut points: Vec<(f64, Option<f64>)> = places.iter().copied().zip(secs.iter().copied()).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let pixels = |&(x, secs): &(f64, Option<f64>)| (frame.x(x), secs.map(|secs| frame.y(secs / unit)));
    let points: Vec<(f64, Option<f64>)> = points.iter().map(pixels).collect();
    let runs: Vec<Vec<(f64, f64)>> = if plot.numbers.is_some() {
        let runs = points.split(|point| point.1.is_none());
        runs.map(|run| run.iter().filter_map(|&(x, y)| Some((x, y?))).collect()).collect()
    } else {
        Vec::new()
    };
    let mut polyline = |points: &[(f64, f64)]| {
        let points = svg::points(points);
        let _ = writeln!(out, "<polyline class=\"{class}\" style=\"stroke:{stroke}\" points=\"{points}\"/>");
    };
    for run in runs.iter().filter(|run| run.len() > 1) {
        polyline(run);
    }
    // A bound that no line reaches.
    let alone = |x: f64| runs.iter().all(|run| run.len() < 2 || run.iter().all(|point| point.0 != x));
    for &(x, y) in points.iter().filter(|point| class == "bound" && alone(point.0)) {
        y.into_iter().for_each(|y| polyline(&[(x - 14.0, y), (x + 14.0, y)]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::svg::tests::check_tags;

    type Secs = Option<(f64, f64)>;

    fn plot(values: &[&str], numbers: Option<&[f64]>, lines: &[(&str, &[Secs])]) -> SweepPlot {
        let line = |(label, secs): &(&str, &[_])| SweepLine { label: label.to_string(), secs: secs.to_vec() };
        SweepPlot {
            title: "a <sweep>".into(),
            axis: "devices".into(),
            values: values.iter().map(|v| v.to_string()).collect(),
            numbers: numbers.map(<[f64]>::to_vec),
            lines: lines.iter().map(line).collect(),
        }
    }

    fn check(plot: &SweepPlot, curves: usize, bounds: usize, dots: usize) -> String {
        let svg = sweep_svg(plot);
        check_tags(&svg);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let count = |text: &str| svg.matches(text).count();
        let got = (count("class=\"curve\""), count("class=\"bound\""), count("<circle"));
        assert_eq!(got, (curves, bounds, dots), "{svg}");
        svg
    }

    #[test]
    fn numbers_have_lines_and_words_have_points() {
        let (slow, fast) =
            ([Some((8.0, 4.0)), Some((5.0, 2.0)), Some((3.0, 1.0))], [Some((6.0, 4.0)), None, Some((2.0, 1.5))]);
        let devices: &[f64] = &[1.0, 2.0, 4.0];
        let svg = check(&plot(&["1", "2", "4"], Some(devices), &[("policy=a", &slow)]), 1, 1, 3);
        assert!(svg.contains(">policy=a</text>") && svg.contains(">devices</text>") && svg.contains(">4</text>"));
        assert!(svg.contains("policy=a, devices = 2: 5.00 s, bound 2.00 s"), "{svg}");
        // A gap leaves two points and no line; their bounds are strokes of their own.
        check(&plot(&["1", "2", "4"], Some(devices), &[("a", &slow), ("b", &fast)]), 1, 3, 5);
        // The same bounds are drawn once.
        check(&plot(&["1", "2", "4"], Some(devices), &[("a", &slow), ("b", &slow), ("c", &slow)]), 3, 1, 9);
        check(&plot(&["fifo", "srtf", "a<b"], None, &[("", &slow)]), 0, 3, 3);
        check(&plot(&["1"], Some(&[1.0]), &[("a", &slow)]), 0, 1, 1);
    }

    #[test]
    fn lines_go_from_left_to_right() {
        let secs = [Some((3.0, 1.0)), Some((8.0, 4.0)), Some((5.0, 2.0))];
        let mixed = sweep_svg(&plot(&["4", "1", "2"], Some(&[4.0, 1.0, 2.0]), &[("", &secs)]));
        let curve = mixed.lines().find(|line| line.contains("class=\"curve\"")).unwrap();
        let points = curve.split("points=\"").nth(1).unwrap().trim_end_matches("\"/>");
        let x: Vec<f64> = points.split(' ').map(|p| p.split(',').next().unwrap().parse().unwrap()).collect();
        // One to two is half as long as two to four.
        assert!(x[0] < x[1] && ((x[2] - x[1]) / (x[1] - x[0]) - 2.0).abs() < 1e-3, "{x:?}");
        let far = plot(&["1", "10", "100"], Some(&[1.0, 10.0, 100.0]), &[("", &secs)]);
        assert_eq!(
            places(&far).windows(2).map(|w| (w[1] - w[0]) / 10f64.ln()).map(f64::round).collect::<Vec<_>>(),
            [1.0; 2]
        );
    }

    #[test]
    fn awkward_values_are_left_out() {
        assert!(sweep_svg(&SweepPlot::default()).contains("No combination runs"));
        let nothing = plot(&["1", "2"], Some(&[1.0, 2.0]), &[("a", &[None, None])]);
        assert!(sweep_svg(&nothing).contains("No combination runs"));
        let odd = [Some((f64::NAN, 1.0)), Some((f64::INFINITY, 1.0)), Some((1e-9, f64::NAN)), Some((2e-9, 0.0))];
        check(&plot(&["1", "2", "3", "4"], Some(&[1.0, f64::NAN, 3.0, 4.0]), &[("a", &odd)]), 0, 1, 1);
        check(&plot(&["0", "0"], Some(&[0.0, 0.0]), &[("a", &[Some((1.0, 0.5)), Some((1.0, 0.5))])]), 1, 1, 2);
    }
}
