//! Token counts as upstreams report them, made safe to add up.

use super::scan::{Scanner, Stop};

/// The most tokens one answer is believed to have.
pub const TOKENS_MAX: u64 = 10_000_000;

/// Tokens, as an upstream reports them, each within `0..=TOKENS_MAX`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// `prompt_tokens`.
    pub tokens_in: u64,
    /// `completion_tokens`; 0 where there are none (embeddings).
    pub tokens_out: u64,
    /// Whether a count was negative, absurd or no integer, and was clamped, or the total is not the sum of its parts.
    pub is_suspect: bool,
}

/// Takes the value of `usage`: none unless it is an object with at least one count.
pub(super) fn read(scanner: &mut Scanner<'_>) -> Result<Option<Usage>, Stop> {
    if scanner.peek() != Some(b'{') {
        scanner.skip_value()?;
        return Ok(None);
    }
    let [mut prompt, mut completion, mut total] = [None, None, None];
    scanner.members::<Stop>(|scanner, key| {
        let name = scanner.name(key);
        let span = scanner.skip_value()?;
        let slot = match &*name {
            b"prompt_tokens" => &mut prompt,
            b"completion_tokens" => &mut completion,
            b"total_tokens" => &mut total,
            _ => return Ok(()),
        };
        *slot = count(scanner.slice(span));
        Ok(())
    })?;
    if prompt.is_none() && completion.is_none() && total.is_none() {
        return Ok(None);
    }
    let is_odd = [prompt, completion, total].into_iter().flatten().any(|count| count.is_suspect);
    let [prompt, completion, total] = [prompt, completion, total].map(|count| count.map(|count| count.tokens));
    let is_suspect = is_odd || !adds_up(prompt, completion, total);
    // A missing part is what the total leaves for it.
    let tokens_in = prompt.unwrap_or_else(|| total.unwrap_or(0).saturating_sub(completion.unwrap_or(0)));
    let tokens_out = completion.unwrap_or_else(|| total.unwrap_or(0).saturating_sub(tokens_in));
    Ok(Some(Usage { tokens_in, tokens_out, is_suspect }))
}

/// Whether a total can be that of its parts.
fn adds_up(prompt: Option<u64>, completion: Option<u64>, total: Option<u64>) -> bool {
    match (prompt, completion, total) {
        (Some(prompt), Some(completion), Some(total)) => prompt + completion == total,
        (Some(part), None, Some(total)) | (None, Some(part), Some(total)) => part <= total,
        _ => true,
    }
}

#[derive(Clone, Copy)]
struct Count {
    tokens: u64,
    is_suspect: bool,
}

/// Reads one count from a value's bytes; null counts as absent.
fn count(value: &[u8]) -> Option<Count> {
    if value == b"null" {
        return None;
    }
    let suspect = |tokens| Some(Count { tokens, is_suspect: true });
    if value.iter().all(u8::is_ascii_digit) {
        let tokens = digits(value);
        return if tokens <= TOKENS_MAX { Some(Count { tokens, is_suspect: false }) } else { suspect(TOKENS_MAX) };
    }
    // `12.0` is 12 from a sloppy server; an exponent, a sign or a string is nothing to bill by.
    let point = value.iter().position(|byte| *byte == b'.').unwrap_or(value.len());
    match value.split_at(point) {
        (whole, [b'.', part @ ..]) if whole.iter().chain(part).all(u8::is_ascii_digit) => {
            suspect(digits(whole).min(TOKENS_MAX))
        }
        _ => suspect(0),
    }
}

/// The number that ASCII digits stand for, or the largest if it is larger.
fn digits(digits: &[u8]) -> u64 {
    digits.iter().fold(0, |value: u64, digit| value.saturating_mul(10).saturating_add(u64::from(digit & 15)))
}

#[cfg(test)]
mod tests {
    use super::super::scan_answer;
    use super::*;

    #[test]
    fn absurd_counts_are_clamped_and_flagged() {
        for (value, tokens, is_suspect) in [
            ("0", 0, false),
            ("10000000", TOKENS_MAX, false),
            ("10000001", TOKENS_MAX, true),
            ("1000000000000000000000000000000", TOKENS_MAX, true),
            ("-5", 0, true),
            ("-5.5", 0, true),
            ("12.0", 12, true),
            ("99999999999999999999.5", TOKENS_MAX, true),
            ("1e18", 0, true),
            ("\"12\"", 0, true),
            ("[1]", 0, true),
            ("true", 0, true),
        ] {
            let body = format!("{{\"usage\":{{\"prompt_tokens\":{value},\"completion_tokens\":1}}}}");
            let usage = scan_answer(body.as_bytes()).unwrap().usage.unwrap();
            assert_eq!(usage, Usage { tokens_in: tokens, tokens_out: 1, is_suspect }, "{value}");
        }
    }

    #[test]
    fn a_total_that_is_not_the_sum_is_flagged_and_its_parts_are_believed() {
        for (usage, tokens, is_suspect) in [
            (r#"{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}"#, (3, 4), false),
            (r#"{"prompt_tokens":3,"completion_tokens":4,"total_tokens":8}"#, (3, 4), true),
            (r#"{"prompt_tokens":3,"completion_tokens":4,"total_tokens":0}"#, (3, 4), true),
            (r#"{"prompt_tokens":3,"total_tokens":3}"#, (3, 0), false),
            (r#"{"prompt_tokens":3,"total_tokens":2}"#, (3, 0), true),
            (r#"{"completion_tokens":3,"total_tokens":2}"#, (0, 3), true),
            (
                r#"{"prompt_tokens":10000000,"completion_tokens":10000000,"total_tokens":20000000}"#,
                (TOKENS_MAX, TOKENS_MAX),
                true,
            ),
        ] {
            let found = scan_answer(format!("{{\"usage\":{usage}}}").as_bytes()).unwrap().usage.unwrap();
            assert_eq!(((found.tokens_in, found.tokens_out), found.is_suspect), (tokens, is_suspect), "{usage}");
        }
    }

    #[test]
    fn a_missing_part_comes_from_the_total() {
        for (usage, expected) in [
            (r#"{"total_tokens":9}"#, Some((9, 0))),
            (r#"{"total_tokens":9,"completion_tokens":4}"#, Some((5, 4))),
            (r#"{"total_tokens":9,"prompt_tokens":4,"completion_tokens":null}"#, Some((4, 5))),
            (r#"{"queue_time":1}"#, None),
            ("{}", None),
            ("7", None),
        ] {
            let body = format!("{{\"usage\":{usage}}}");
            let found = scan_answer(body.as_bytes()).unwrap().usage;
            assert_eq!(found.map(|usage| (usage.tokens_in, usage.tokens_out)), expected, "{usage}");
        }
    }
}
