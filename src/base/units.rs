//! Bytes, rates and times as people write them, and the nearest word to a misspelt one.

use super::{Error, Result};

/// A number of bytes.
pub type Bytes = u64;

/// `value` rounded up to a multiple of `alignment`, or the largest 64-bit number where that multiple does not fit.
pub const fn align_up(value: u64, alignment: u64) -> u64 {
    value.div_ceil(alignment).saturating_mul(alignment)
}

/// Splits "64 MiB" into its number and its unit.
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_')).unwrap_or(text.len());
    let number: f64 = text[..end].replace('_', "").parse().ok()?;
    number.is_finite().then(|| (number, text[end..].trim()))
}

fn byte_unit(unit: &str) -> Option<f64> {
    Some(match unit {
        "" | "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        "TiB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    })
}

/// Sizes must be below this, so that they fit the signed 64-bit numbers of files and messages.
const TOO_LARGE: f64 = 9e18;

/// Parses a size of any magnitude, in bytes.
fn size(text: &str) -> Option<f64> {
    number_and_unit(text).and_then(|(n, unit)| Some(n * byte_unit(unit)?))
}

/// Reads a size such as `64 MiB`, `1.5 GB` or `4096`.
///
/// # Errors
/// When the text is not a number with a unit of bytes, or the size is too large.
pub fn parse_bytes(text: &str) -> Result<Bytes> {
    match size(text) {
        Some(n) if n < TOO_LARGE => Ok(n.round() as u64),
        Some(_) => Err(Error::bad(format!("'{text}' is too large; no machine has as much"))),
        None => Err(Error::bad(format!("'{text}' is no size; write it like \"64 MiB\" or 67108864"))),
    }
}

/// Whether the text is a size larger than [`parse_bytes`] accepts.
pub fn is_too_large(text: &str) -> bool {
    size(text).is_some_and(|n| n >= TOO_LARGE)
}

/// Reads a bandwidth such as `2 GB/s`, in bytes per second.
///
/// # Errors
/// When the text is not a size followed by `/s`.
pub fn parse_bytes_per_sec(text: &str) -> Result<f64> {
    text.trim()
        .strip_suffix("/s")
        .and_then(number_and_unit)
        .and_then(|(n, unit)| Some(n * byte_unit(unit)?))
        .filter(|&rate| rate > 0.0)
        .ok_or_else(|| Error::bad(format!("'{text}' is no bandwidth; write it like \"2 GB/s\"")))
}

/// Reads an arithmetic rate such as `60 TFLOP/s`, in floating-point operations per second.
///
/// # Errors
/// When the text is not a number with a unit of FLOP/s.
pub fn parse_flops_per_sec(text: &str) -> Result<f64> {
    number_and_unit(text)
        .and_then(|(n, unit)| {
            Some(match unit {
                "MFLOP/s" => n * 1e6,
                "GFLOP/s" => n * 1e9,
                "TFLOP/s" => n * 1e12,
                "PFLOP/s" => n * 1e15,
                _ => return None,
            })
        })
        .filter(|&rate| rate > 0.0)
        .ok_or_else(|| Error::bad(format!("'{text}' is no arithmetic rate; write it like \"60 TFLOP/s\"")))
}

/// Bytes for people to read: `1.50 MiB`.
pub fn format_bytes(bytes: Bytes) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}

/// Seconds for people to read: `1.25 ms`, `3.10 s`, `2 h 05 min`.
pub fn format_secs(secs: f64) -> String {
    if secs < 1e-3 {
        format!("{:.1} us", secs * 1e6)
    } else if secs < 1.0 {
        format!("{:.2} ms", secs * 1e3)
    } else if secs < 120.0 {
        format!("{secs:.2} s")
    } else if secs < 7200.0 {
        format!("{} min {:02} s", secs as u64 / 60, secs as u64 % 60)
    } else {
        format!("{} h {:02} min", secs as u64 / 3600, secs as u64 % 3600 / 60)
    }
}

/// The word of `known` with the fewest edits from `word`, if any is close. Case matters only to break ties.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let small = word.to_lowercase();
    let edits =
        |k: &str| (strsim::damerau_levenshtein(&small, &k.to_lowercase()), strsim::damerau_levenshtein(word, k));
    let (best, near) = known.into_iter().map(|k| (edits(k), k)).min()?;
    (best.0 <= 1 + word.chars().count() / 3).then_some(near)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_rates() {
        for (text, want) in
            [("64 MiB", 64 << 20), ("1.5GB", 1_500_000_000), ("4096", 4096), ("10 B", 10), ("1_000", 1000)]
        {
            assert_eq!(parse_bytes(text).unwrap(), want, "{text}");
        }
        for text in ["", "MiB", "12 parsecs", "-3 MiB", "1e5 MiB", "64 MiB/s"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        // What has a unit that is not known is no size, however large.
        for (text, too_large) in
            [("99999999999 TiB", true), ("8185453 TiB", true), ("8185452 TiB", false), ("8 EiB", false)]
        {
            assert_eq!(is_too_large(text), too_large, "{text}");
        }
        assert!(parse_bytes("99999999999 TiB").unwrap_err().to_string().contains("is too large"));
        assert_eq!(parse_bytes_per_sec("2 GB/s").unwrap(), 2e9);
        assert!(parse_bytes_per_sec("0 GB/s").is_err());
        assert_eq!(parse_flops_per_sec("60 TFLOP/s").unwrap(), 6e13);
        assert_eq!(format_bytes(3 << 19), "1.50 MiB");
    }

    #[test]
    fn misspelt_words() {
        assert_eq!(nearest("bacth", ["batch", "steps", "name"]), Some("batch"));
        assert_eq!(nearest("zzzzzz", ["batch", "steps"]), None);
        assert_eq!(nearest("GPT2", ["bert", "gpt2", "vit"]), Some("gpt2"));
        assert_eq!(nearest("V100", ["a100", "v100", "h100"]), Some("v100"));
        assert_eq!(nearest("Ab", ["ab", "aB", "AB", "Ab"]), Some("Ab"));
    }
}
