//! W3C Trace Context: whether a `traceparent` may be forwarded.

/// Whether `value` is a valid `traceparent` (W3C Trace Context, section 3.2).
///
/// Version `ff` is refused, version `00` has an exact length, a later version may carry more after a dash. Ids are
/// lowercase hexadecimal and not all zero.
#[must_use]
pub fn is_valid(value: &[u8]) -> bool {
    let Some((head, rest)) = value.split_at_checked(55) else {
        return false;
    };
    let mut fields = head.split(|byte| *byte == b'-');
    let mut field = |length: usize| fields.next().filter(|field| field.len() == length && field.iter().all(is_hex));
    let (Some(version), Some(trace), Some(parent), Some(_flags)) = (field(2), field(32), field(16), field(2)) else {
        return false;
    };
    version != b"ff"
        && !is_zero(trace)
        && !is_zero(parent)
        && (rest.is_empty() || (version != b"00" && rest.first() == Some(&b'-')))
}

fn is_hex(byte: &u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

fn is_zero(field: &[u8]) -> bool {
    field.iter().all(|byte| *byte == b'0')
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn what_the_recommendation_allows_is_valid() {
        assert!(is_valid(GOOD.as_bytes()));
        assert!(is_valid(GOOD.replace("-01", "-00").as_bytes()));
        let later = GOOD.replacen("00", "cc", 1);
        assert!(is_valid(later.as_bytes()));
        assert!(is_valid(format!("{later}-what-the-future-brings").as_bytes()));
    }

    #[test]
    fn everything_else_is_not() {
        for bad in [
            String::new(),
            GOOD.to_uppercase(),
            GOOD.replacen("00", "ff", 1),
            format!("{GOOD}-more"),
            format!("{GOOD} "),
            format!("{}.more", GOOD.replacen("00", "cc", 1)),
            GOOD.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            GOOD.replace("b7ad6b7169203331", &"0".repeat(16)),
            GOOD.replace('-', "_"),
            GOOD.replace("0af7", "0ag7"),
            GOOD.replace("-01", "-0"),
            format!(" {GOOD}"),
        ] {
            assert!(!is_valid(bad.as_bytes()), "{bad:?}");
        }
    }

    #[test]
    fn no_prefix_of_a_valid_one_is_valid() {
        for end in 0..GOOD.len() {
            assert!(!is_valid(&GOOD.as_bytes()[..end]));
        }
    }
}
