//! How long a client is ready to wait: `x-request-timeout`.

use std::time::Duration;

/// The header.
pub const NAME: &str = "x-request-timeout";

/// Longest value: more digits say nothing that a limit of ours does not cut.
const BYTES_MAX: usize = 16;

/// Reads a value: seconds, `30` or `1.5` or `30s`, or milliseconds, `500ms`; more than zero.
#[must_use]
pub fn parse(value: &[u8]) -> Option<Duration> {
    let text = std::str::from_utf8(value).ok().filter(|text| text.len() <= BYTES_MAX)?;
    let (digits, unit) = match text.strip_suffix("ms") {
        Some(digits) => (digits, Duration::from_millis(1)),
        None => (text.strip_suffix('s').unwrap_or(text), Duration::from_secs(1)),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) {
        return None;
    }
    // Of sixteen bytes at most, so both fit; nothing below a nanosecond counts.
    let whole = u32::try_from(whole.parse::<u64>().ok()?).unwrap_or(u32::MAX);
    let nanos: u32 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    let part = unit.as_nanos() * u128::from(nanos) / 1_000_000_000;
    let time = unit.checked_mul(whole)? + Duration::from_nanos(u64::try_from(part).ok()?);
    (!time.is_zero()).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_and_milliseconds_are_read() {
        let cases = [
            ("30", 30_000_000),
            ("30s", 30_000_000),
            ("1.5", 1_500_000),
            ("0.25s", 250_000),
            ("500ms", 500_000),
            ("0.5ms", 500),
            ("007", 7_000_000),
            ("2.0000000009999", 2_000_000),
            ("99999999999", u64::from(u32::MAX) * 1_000_000),
        ];
        for (text, us) in cases {
            assert_eq!(parse(text.as_bytes()), Some(Duration::from_micros(us)), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        let cases = [
            "",
            "0",
            "0ms",
            "0.0",
            "-1",
            "+1",
            "1e3",
            " 1",
            "1 ",
            "1 s",
            "s",
            "ms",
            ".5",
            "5.",
            "1.2.3",
            "1m",
            "1h",
            "5S",
            "5000u",
            "inf",
            "NaN",
            "0x10",
            "1_000",
            "1,5",
            "99999999999999999",
            "soon",
        ];
        for text in cases {
            assert_eq!(parse(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(parse(&[0xff, b'1']), None);
        assert_eq!(parse("٣".as_bytes()), None);
    }
}
