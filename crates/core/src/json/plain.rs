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

/// How many of the first bytes are neither quote nor backslash.
#[inline]
pub(super) fn unquoted_length(bytes: &[u8]) -> usize {
    // Most strings are keys and short words: four groups, then the vector search, whose call alone costs as much.
    let mut at = 0;
    while let Some(group) = bytes.get(at..).and_then(<[u8]>::first_chunk::<8>) {
        let word = u64::from_le_bytes(*group);
        let found = is_byte(word, b'"') | is_byte(word, b'\\');
        if found != 0 {
            return at + (found.trailing_zeros() / 8) as usize;
        }
        at += 8;
        if at == 32 {
            break;
        }
    }
    let rest = bytes.get(at..).unwrap_or_default();
    at + memchr::memchr2(b'"', b'\\', rest).unwrap_or(rest.len())
}

/// What kinds of bytes a text has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kinds {
    /// All are below 0x80, so that it is UTF-8 too.
    pub is_ascii: bool,
    /// Some are control characters below the blank.
    pub has_control: bool,
}

/// Looks at every byte once.
pub(super) fn kinds(bytes: &[u8]) -> Kinds {
    let (groups, rest) = bytes.as_chunks::<64>();
    let (mut lowest, mut any) = ([u8::MAX; 64], [0_u8; 64]);
    for group in groups {
        for ((low, any), byte) in lowest.iter_mut().zip(&mut any).zip(group) {
            *low = (*low).min(*byte);
            *any |= *byte;
        }
    }
    let low = lowest.iter().chain(rest).fold(u8::MAX, |low, byte| low.min(*byte));
    let any = any.iter().chain(rest).fold(0, |any, byte| any | *byte);
    Kinds { is_ascii: any < 0x80, has_control: low < 0x20 }
}

#[inline]
fn is_special(byte: u8) -> bool {
    (byte < 0x20) | (byte == b'"') | (byte == b'\\') | (byte == 0x7f)
}

/// The high bit of each byte that is special, of the lowest such byte exactly: the borrow of a subtraction only reaches
/// bytes above one that is itself found.
#[inline]
fn special(word: u64) -> u64 {
    let is_control = word.wrapping_sub(ONES * 0x20) & !word & HIGHS;
    is_control | is_byte(word, b'"') | is_byte(word, b'\\') | is_byte(word, 0x7f)
}

/// As `special`, for one byte.
#[inline]
fn is_byte(word: u64, byte: u8) -> u64 {
    let word = word ^ (ONES * u64::from(byte));
    word.wrapping_sub(ONES) & !word & HIGHS
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
    fn quotes_and_controls_are_found_at_every_place() {
        for length in 0..200 {
            let mut text = vec![b' '; length];
            assert_eq!(kinds(&text), Kinds { is_ascii: true, has_control: false });
            assert_eq!(unquoted_length(&text), length);
            for at in 0..length {
                for byte in [b'"', b'\\', b'!', b'#', b'[', b']', 0xa2, 0xdc] {
                    text[at] = byte;
                    let expected = if matches!(byte, b'"' | b'\\') { at } else { length };
                    assert_eq!(unquoted_length(&text), expected, "{byte:#x} at {at} of {length}");
                }
                text[at] = 0x1f;
                assert_eq!(kinds(&text), Kinds { is_ascii: true, has_control: true });
                text[at] = 0x80;
                assert_eq!(kinds(&text), Kinds { is_ascii: false, has_control: false });
                text[at] = b' ';
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
