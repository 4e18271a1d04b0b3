//! The chart of what bound each step: one stacked bar of seconds per step.

use std::fmt::Write;

use super::chart::{Plot, empty, open};
use super::svg::{self, escape, px};
use crate::base::format_secs;

/// One stacked bar.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    pub label: String,
    /// The first step that it stands for.
    pub step: u64,
    /// Seconds of each part.
    pub secs: [f64; 6],
}

/// Draws stacked bars of seconds as an SVG document. `parts` are names and colours, from the bottom up. Parts that are
/// negative or not finite count as 0.
pub(super) fn stacked_bars(
    title: &str,
    parts: [(&'static str, &'static str); 6],
    (width, height): (f64, f64),
    bars: &[Bar],
) -> String {
    let clean = |secs: f64| if secs.is_finite() { secs.max(0.0) } else { 0.0 };
    let total = |bar: &Bar| bar.secs.iter().map(|&secs| clean(secs)).sum::<f64>();
    let most = bars.iter().map(total).fold(0.0, f64::max);
    if most <= 0.0 || !most.is_finite() {
        return empty(title, width, "No steps yet.");
    }
    let (unit, _, name) = svg::time_unit(most);
    let there = (0..6).filter(|&part| bars.iter().any(|bar| clean(bar.secs[part]) > 0.0));
    let entries = there.map(|part| (parts[part].1, parts[part].0.to_string()));
    let (mut out, top) = open(title, width, height, entries);
    let plot = Plot::new(width, height, top, (0.0, 1.0), (0.0, most / unit * 1.04));
    plot.axes(&mut out, "step", &format!("{name} a step"));
    let pitch = (plot.right - plot.left) / bars.len() as f64;
    let width = (pitch * 0.82).min(64.0);
    let mut labelled_until = f64::NEG_INFINITY;
    for (i, bar) in bars.iter().enumerate() {
        let middle = plot.left + pitch * (i as f64 + 0.5);
        let mut base = 0.0;
        for (part, (name, colour)) in parts.iter().enumerate() {
            let secs = clean(bar.secs[part]);
            if secs <= 0.0 {
                continue;
            }
            let (low, high) = (plot.y(base / unit), plot.y((base + secs) / unit));
            base += secs;
            let _ = writeln!(
                out,
                "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{colour}\"><title>{}, {name}: {}, {:.1} \
                 %</title></rect>",
                px(middle - width / 2.0),
                px(high),
                px(width),
                px((low - high).max(0.1)),
                escape(&bar.label),
                format_secs(secs),
                secs / total(bar) * 100.0
            );
        }
        let label = bar.step.to_string();
        let half = svg::text_width(&label) / 2.0;
        if middle - half > labelled_until {
            labelled_until = middle + half + 14.0;
            let _ = writeln!(
                out,
                "<text class=\"soft\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
                px(middle),
                px(plot.bottom + 19.0)
            );
        }
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::svg::tests::check_tags;

    #[test]
    fn bars_stack() {
        let parts = [("a", "#1"), ("b", "#2"), ("c", "#3"), ("d", "#4"), ("e", "#5"), ("f", "#6")];
        for count in [0usize, 1, 2, 33] {
            let bar = |i| Bar { label: format!("step {i}"), step: i, secs: [0.5, 0.0, f64::NAN, 0.25, -1.0, 0.25] };
            let bars: Vec<Bar> = (0..count as u64).map(bar).collect();
            let svg = stacked_bars("t", parts, (600.0, 300.0), &bars);
            check_tags(&svg);
            assert_eq!(svg.matches("<title>").count(), 3 * count);
            assert_eq!(svg.contains("No steps yet"), count == 0);
        }
    }
}
