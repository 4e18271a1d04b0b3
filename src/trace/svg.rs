//! What all drawings share: escaping, coordinates, axis ticks, colours, the style.
//!
//! Drawings are text, built in a fixed order, so that equal data gives equal bytes.

use std::fmt::Write;

/// Colours of series and models, in the order of assignment; legible on white and on near-black.
pub(super) const COLOURS: [&str; 16] = [
    "#4c8bd6", "#dd6f3c", "#3f9d5a", "#9a6fd0", "#d0649c", "#1fa3a3", "#b8902a", "#7b8794", "#c74b4b", "#7d9b2f",
    "#5b66c9", "#a0623a", "#b35ab8", "#5aa0c4", "#d98aa0", "#6f7a4f",
];

/// Colours of what bounds a step, in the order of [`Bound::parts`](super::Bound::parts).
pub(super) const BOUND_COLOURS: [&str; 6] = ["#4c8bd6", "#f0993a", "#9a6fd0", "#3f9d5a", "#a97b55", "#a9b4bf"];

/// The colour of series or model `index`.
pub(super) fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

/// `text` for use in the content and the attributes of XML and HTML. Control characters, which XML forbids, become
/// spaces.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' && c != '\t' => out.push(' '),
            '\u{fffe}' | '\u{ffff}' => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// A coordinate with at most two decimals and no needless zeros.
pub(super) fn px(value: f64) -> String {
    let text = format!("{value:.2}");
    let short = text.trim_end_matches('0').trim_end_matches('.');
    if short == "-0" { "0".into() } else { short.into() }
}

/// Opens a drawing of `width` by `height` pixels that scales to the available space; `title` names it for screen
/// readers.
pub(super) fn open(width: f64, height: f64, title: &str) -> String {
    let (w, h) = (px(width), px(height));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"hydra\" viewBox=\"0 0 {w} {h}\" width=\"{w}\" height=\"{h}\" \
         role=\"img\" aria-label=\"{}\">\n<style>{STYLE}</style>\n",
        escape(title)
    );
    let _ = writeln!(out, "<rect class=\"paper\" width=\"{w}\" height=\"{h}\"/>");
    out
}

/// Included in every drawing, so that each can be saved alone; a page may set the same variables. Everything is under
/// `svg.hydra`, because a style inside a page applies to the whole page.
const STYLE: &str = "svg.hydra{--ink:#1d2733;--soft:#5d6b7a;--line:#dfe4ea;--paper:#ffffff;max-width:100%;height:auto}\
@media (prefers-color-scheme:dark){svg.hydra{--ink:#e6ebf0;--soft:#9aa7b4;--line:#313b46;--paper:#171d24}}\
svg.hydra text{font:12px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;fill:var(--ink)}\
svg.hydra .paper{fill:var(--paper)}svg.hydra .soft{fill:var(--soft)}svg.hydra .name{font-weight:600}\
svg.hydra .grid{stroke:var(--line);stroke-width:1;shape-rendering:crispEdges}\
svg.hydra .axis{stroke:var(--soft);stroke-width:1;shape-rendering:crispEdges}\
svg.hydra .step{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}\
svg.hydra .band{fill:var(--line);opacity:.35}svg.hydra .in{fill:#fff;font-size:11px;font-weight:600;pointer-events:none}\
svg.hydra .curve{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}\
svg.hydra .bound{fill:none;stroke-width:1.5;stroke-dasharray:5 4}\
svg.hydra .gap{fill:var(--line);opacity:.6}\
svg.hydra .faint{fill:none;stroke-width:1;opacity:.55}svg.hydra .dot{stroke:var(--paper);stroke-width:1.5}";

/// Approximate width in pixels of `text` at 12 px, in the wider ones of the common sans-serif fonts.
pub(super) fn text_width(text: &str) -> f64 {
    let width = |c: char| match c {
        'i' | 'j' | 'l' | '.' | ',' | ' ' | ':' | '\'' => 3.6,
        'f' | 'r' | 't' | '-' | '(' | ')' => 5.0,
        'm' | 'w' | 'M' | 'W' => 10.5,
        c if c.is_ascii() => 7.4,
        _ => 12.0,
    };
    text.chars().map(width).sum()
}

/// The unit that suits times of up to `secs`: its length in seconds, its symbol and its name.
pub(super) fn time_unit(secs: f64) -> (f64, &'static str, &'static str) {
    match secs {
        s if s >= 1.0 => (1.0, "s", "seconds"),
        s if s >= 1e-3 => (1e-3, "ms", "milliseconds"),
        _ => (1e-6, "us", "microseconds"),
    }
}

/// The points of a line.
pub(super) fn points(points: &[(f64, f64)]) -> String {
    points.iter().map(|&(x, y)| format!("{},{}", px(x), px(y))).collect::<Vec<_>>().join(" ")
}

/// Draws a dot with a tooltip.
pub(super) fn dot(out: &mut String, (x, y): (f64, f64), radius: u32, colour: &str, title: &str) {
    let (x, y, title) = (px(x), px(y), escape(title));
    let _ = writeln!(
        out,
        "<circle class=\"dot\" cx=\"{x}\" cy=\"{y}\" r=\"{radius}\" fill=\"{colour}\"><title>{title}</title></circle>"
    );
}

/// The line of an axis from `left` to `right` at `y`, with its name `below` pixels below the right end.
pub(super) fn axis(left: f64, right: f64, y: f64, below: f64, name: &str) -> String {
    let (left, right, at, name_y, name) = (px(left), px(right), px(y), px(y + below), escape(name));
    format!(
        "<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{at}\" y2=\"{at}\"/>\
         <text class=\"soft\" x=\"{right}\" y=\"{name_y}\" text-anchor=\"end\">{name}</text>"
    )
}

/// A line of coloured squares with labels, wrapped at `width`. Returns the drawing and its height.
pub(super) fn legend<'a>(
    entries: impl IntoIterator<Item = (&'a str, String)>,
    left: f64,
    top: f64,
    width: f64,
) -> (String, f64) {
    let (mut out, mut x, mut y) = (String::new(), left, top);
    for (colour, label) in entries {
        let takes = 18.0 + text_width(&label) + 16.0;
        if x > left && x + takes > left + width {
            (x, y) = (left, y + 20.0);
        }
        let (rect, text, base) = (px(x), px(x + 17.0), px(y + 10.0));
        let _ =
            writeln!(out, "<rect x=\"{rect}\" y=\"{}\" width=\"12\" height=\"12\" rx=\"3\" fill=\"{colour}\"/>", px(y));
        let _ = writeln!(out, "<text class=\"soft\" x=\"{text}\" y=\"{base}\">{}</text>", escape(&label));
        x += takes;
    }
    (out, y + 20.0 - top)
}

/// Ticks of a linear axis: multiples of 1, 2 or 5 times a power of ten within the range, about `count` of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ticks {
    pub at: Vec<f64>,
    pub step: f64,
}

/// Chooses the ticks between `low` and `high`; both finite, `low < high`.
pub(super) fn ticks(low: f64, high: f64, count: usize) -> Ticks {
    let rough = (high - low) / count.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&step| step >= rough * 0.999).unwrap_or(rough);
    let first = (low / step - 1e-9).ceil();
    let last = (high / step + 1e-9).floor();
    // Not finite, or no longer distinguishable as f64: one tick is better than a million.
    if !(last - first).is_finite() || !(0.0..=1000.0).contains(&(last - first)) || low + step == low {
        return Ticks { at: vec![low], step: (high - low).max(f64::MIN_POSITIVE) };
    }
    Ticks { at: (0..=(last - first) as u32).map(|i| (first + f64::from(i)) * step).collect(), step }
}

/// The numbers of an axis, all in the same format: with powers of ten if the greatest needs them, or if it is small and
/// the others would.
pub(super) fn tick_labels(ticks: &Ticks) -> Vec<String> {
    let most = ticks.at.iter().fold(ticks.step, |most, at| most.max(at.abs()));
    let powers = !(1e-3..1e6).contains(&most) || (ticks.step < 1e-3 && most < 1e-2);
    ticks.at.iter().map(|&at| number(at, ticks.step, powers)).collect()
}

/// A single number: as many decimals as `step` needs, with a power of ten where it would otherwise be mostly zeros.
pub(super) fn tick_label(value: f64, step: f64) -> String {
    number(value, step, !(1e-3..1e6).contains(&value.abs().max(step)))
}

fn number(value: f64, step: f64, powers: bool) -> String {
    if value.abs() < step * 1e-6 {
        return "0".into();
    }
    let place = (step.log10() + 1e-9).floor() as i32;
    if powers {
        let digits = (value.abs().log10() + 1e-9).floor() as i32 - place;
        let text = format!("{value:.*e}", digits.clamp(0, 12) as usize);
        return match text.split_once('e') {
            Some((mantissa, power)) if mantissa.contains('.') => {
                format!("{}e{power}", mantissa.trim_end_matches('0').trim_end_matches('.'))
            }
            _ => text,
        };
    }
    format!("{value:.*}", (-place).clamp(0, 12) as usize)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Panics unless every tag of `text` is closed in order, every attribute is quoted and every `&` begins an entity.
    pub(in crate::trace) fn check_tags(text: &str) {
        let mut open: Vec<String> = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find('<') {
            check_entities(&rest[..at]);
            assert!(!rest[..at].contains('>'), "a loose > in {:?}", &rest[..at]);
            let end = at + rest[at..].find('>').expect("a tag ends");
            let tag = &rest[at + 1..end];
            rest = &rest[end + 1..];
            if tag.starts_with('!') {
                continue;
            }
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name), "</{name}> closes what is open");
                continue;
            }
            let name = tag.split([' ', '/', '\n']).next().unwrap().to_string();
            assert_eq!(tag.matches('"').count() % 2, 0, "quotes of <{tag}>");
            check_entities(tag);
            if !tag.ends_with('/') && name != "meta" {
                if name == "style" {
                    rest = &rest[rest.find("</style>").expect("a style ends")..];
                }
                open.push(name);
            }
        }
        assert!(open.is_empty(), "left open: {open:?}");
    }

    fn check_entities(text: &str) {
        for (at, _) in text.match_indices('&') {
            let end = text[at..].find(';').unwrap_or_else(|| panic!("a loose & in {text:?}"));
            assert!(text[at + 1..at + end].chars().all(|c| c.is_ascii_alphanumeric() || c == '#'), "{text:?}");
        }
    }

    #[test]
    fn text_is_escaped() {
        assert_eq!(escape("<b a=\"1\" c='2'>&\u{1}\u{ffff}é\n"), "&lt;b a=&quot;1&quot; c=&#39;2&#39;&gt;&amp;  é\n");
        assert_eq!(escape(""), "");
    }

    #[test]
    fn coordinates_are_short() {
        for (value, want) in [(0.0, "0"), (-0.001, "0"), (1.5, "1.5"), (100.0, "100"), (2.0 / 3.0, "0.67")] {
            assert_eq!(px(value), want);
        }
    }

    #[test]
    fn ticks_are_round() {
        let labels = |low, high, count| -> Vec<String> { tick_labels(&ticks(low, high, count)) };
        assert_eq!(labels(0.0, 10.0, 5), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(
            labels(-0.1, 0.35, 5),
            ["-0.1", "0.0", "0.1", "0.2", "0.3"].map(|t| if t == "0.0" { "0" } else { t })
        );
        assert_eq!(labels(0.0, 3e-4, 3), ["0", "1e-4", "2e-4", "3e-4"]);
        assert_eq!(labels(0.0, 1.05e-3, 3), ["0", "5e-4", "1e-3"], "one form along an axis");
        assert_eq!(labels(2.0, 2.0005, 2), ["2.0000", "2.0005"]);
        assert_eq!(labels(0.0, 2.5e7, 2), ["0", "2e7"]);
        assert_eq!(labels(1e9, 1e9 + 1e-9, 4).len(), 1);
        assert_eq!(tick_label(1.5e-4, 5e-5), "1.5e-4");
    }

    #[test]
    #[should_panic(expected = "closes what is open")]
    fn the_check_of_tags_can_fail() {
        check_tags("<a><b></a></b>");
    }
}
