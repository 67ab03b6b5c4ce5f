//! Numbers with their nouns.

/// `1 request`, `2 requests`, `3 processes`: a number with a regular noun.
#[must_use]
pub fn count(number: impl TryInto<u64>, noun: &str) -> String {
    let number = number.try_into().unwrap_or(u64::MAX);
    let ending = match number {
        1 => "",
        _ if noun.ends_with('s') => "es",
        _ => "s",
    };
    format!("{number} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nouns_follow_their_number() {
        let texts = [count(0_u32, "request"), count(1_usize, "request"), count(2_u64, "process")];
        assert_eq!(texts, ["0 requests", "1 request", "2 processes"]);
    }
}
