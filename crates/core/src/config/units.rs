//! Durations and sizes as operators write them: a whole number with its unit.

use std::time::Duration;

/// Longest duration: one week. Longer ones are typing errors, and this keeps sums of deadlines far from overflow.
pub(super) const DURATION_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

const DURATIONS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
const SIZES: [(&str, u64); 7] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1000),
    ("B", 1),
];

/// Reads `500ms`, `30s`, `5m` or `1h`.
///
/// # Errors
/// Says what to write when the number or its unit is missing, unknown or too big.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("\"{text}\" is not a duration; write a whole number and ms, s, m or h, such as \"30s\"");
    let ms = parse(text, &DURATIONS).ok_or_else(wrong)?;
    let duration = Duration::from_millis(ms);
    if duration > DURATION_MAX {
        return Err(format!("\"{text}\" is longer than a week (168h)"));
    }
    Ok(duration)
}

/// Reads `512B`, `32KiB`, `20MiB` or `1GiB` (powers of 1,024), `64KB`, `20MB` or `1GB` (powers of 1,000), in bytes.
///
/// # Errors
/// Says what to write when the number or its unit is missing, unknown or too big.
pub fn parse_size(text: &str) -> Result<u64, String> {
    parse(text, &SIZES).ok_or_else(|| {
        format!("\"{text}\" is not a size; write a whole number and B, KiB, MiB, GiB, KB, MB or GB, such as \"20MiB\"")
    })
}

/// The shortest exact text that `parse_duration` reads back; parts of a millisecond are cut off.
#[must_use]
pub fn duration_text(duration: Duration) -> String {
    let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if ms == 0 {
        return "0s".into();
    }
    let fits = DURATIONS.iter().rev().find(|(_, unit)| ms.is_multiple_of(*unit));
    fits.map_or_else(String::new, |(name, unit)| format!("{}{name}", ms / unit))
}

/// The shortest exact text that `parse_size` reads back.
#[must_use]
pub fn size_text(bytes: u64) -> String {
    let fits = SIZES.iter().find(|(_, unit)| bytes > 0 && bytes.is_multiple_of(*unit));
    fits.map_or_else(|| "0B".into(), |(name, unit)| format!("{}{name}", bytes / unit))
}

fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start_matches(' '))?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_read_back() {
        for text in ["1ms", "500ms", "30s", "90s", "5m", "1h", "168h", "0s"] {
            assert_eq!(duration_text(parse_duration(text).unwrap()), text);
        }
        for text in ["1B", "512KiB", "20MiB", "1GiB", "1MB", "0B", "1001B"] {
            assert_eq!(size_text(parse_size(text).unwrap()), text);
        }
        assert_eq!(parse_duration("2 s"), Ok(Duration::from_secs(2)));
        assert_eq!(duration_text(Duration::from_secs(120)), "2m");
        assert_eq!(parse_size("1MB"), Ok(1_000_000));
    }

    #[test]
    fn what_has_no_unit_or_no_number_is_refused() {
        for text in ["", "5", "s", "-1s", "1.5s", "1d", "1S", "s5", "99999999999999999999s", "169h", "5s5s", "５s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        for text in ["", "5", "MiB", "-1B", "1TiB", "1mib", "99999999999GiB", "1 MiB x"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
