//! How far a text needs no look at its single bytes.

const ONES: u64 = u64::from_ne_bytes([1; 8]);
const HIGHS: u64 = u64::from_ne_bytes([0x80; 8]);

/// How many of the first bytes are plain: no quote, no backslash, no control character (0x7f is one).
#[inline]
pub(super) fn plain_length(bytes: &[u8]) -> usize {
    // Most strings are keys and short words.
    match bytes.first_chunk::<8>().map(|group| special(u64::from_le_bytes(*group))) {
        Some(0) | None => long(bytes),
        Some(found) => (found.trailing_zeros() / 8) as usize,
    }
}

fn long(bytes: &[u8]) -> usize {
    // Thirty-two at a time without a branch inside becomes vector code; short strings never get there.
    let (groups, _) = bytes.as_chunks::<32>();
    let is_plain = |group: &&[u8; 32]| group.iter().fold(0, |any, byte| any | u8::from(is_special(*byte))) == 0;
    let mut at = groups.iter().take_while(is_plain).count() * 32;
    // Then eight, which tells the place too.
    while let Some(group) = bytes.get(at..).and_then(<[u8]>::first_chunk::<8>) {
        let found = special(u64::from_le_bytes(*group));
        if found != 0 {
            return at + (found.trailing_zeros() / 8) as usize;
        }
        at += 8;
    }
    let rest = bytes.get(at..).unwrap_or_default();
    at + rest.iter().position(|byte| is_special(*byte)).unwrap_or(rest.len())
}

#[inline]
fn is_special(byte: u8) -> bool {
    (byte < 0x20) | (byte == b'"') | (byte == b'\\') | (byte == 0x7f)
}

/// The high bit of each byte that is special, of the lowest such byte exactly: the borrow of a subtraction only reaches
/// bytes above one that is itself found.
#[inline]
fn special(word: u64) -> u64 {
    let is_zero = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
    let is_byte = |byte: u8| is_zero(word ^ (ONES * u64::from(byte)));
    let is_control = word.wrapping_sub(ONES * 0x20) & !word & HIGHS;
    is_control | is_byte(b'"') | is_byte(b'\\') | is_byte(0x7f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_judged_alike_at_every_place() {
        for byte in 0..=255_u8 {
            for before in 0..40 {
                let mut text = vec![b'a'; before];
                text.push(byte);
                text.extend([b'\n'; 9]);
                let expected = if is_special(byte) { before } else { before + 1 };
                assert_eq!(plain_length(&text), expected, "{byte:#x} after {before}");
                assert_eq!(
                    plain_length(text.get(..=before).unwrap()),
                    expected,
                    "{byte:#x} after {before}, at the end"
                );
            }
        }
    }

    #[test]
    fn bytes_above_a_special_one_do_not_move_it() {
        for above in [0x00, 0x1f, 0x21, 0x22, 0x23, 0x5b, 0x5d, 0x7e, 0x80, 0xff] {
            for special in [0x00, 0x1f, 0x22, 0x5c, 0x7f] {
                assert_eq!(plain_length(&[b'a', 0xff, special, above, above, above, above, above]), 2);
            }
        }
    }
}
