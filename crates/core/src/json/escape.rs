//! Escapes in JSON strings (RFC 8259, section 7): what they stand for.

/// What stands between a value's first and last byte: its quotes or brackets.
pub(super) fn inner(value: &[u8]) -> &[u8] {
    value.get(1..value.len().saturating_sub(1)).unwrap_or_default()
}

/// Resolves the escapes of a string that has been scanned. What is not text (a lone surrogate, invalid UTF-8, both
/// possible in answers only) becomes U+FFFD.
pub(super) fn unescape(inner: &[u8]) -> String {
    let mut out = Vec::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(at) = memchr::memchr(b'\\', rest) {
        let (plain, escape) = rest.split_at(at);
        out.extend_from_slice(plain);
        let (character, length) = resolve(escape);
        out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
        rest = escape.get(length..).unwrap_or_default();
    }
    out.extend_from_slice(rest);
    String::from_utf8(out).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// The character that an escape stands for, and the escape's length.
fn resolve(escape: &[u8]) -> (char, usize) {
    let simple = match escape.get(1) {
        Some(b'u') => return resolve_unicode(escape),
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(other) => char::from(*other),
        None => char::REPLACEMENT_CHARACTER,
    };
    (simple, 2)
}

fn resolve_unicode(escape: &[u8]) -> (char, usize) {
    let first = code_unit(escape);
    let second = escape.get(6..).and_then(code_unit);
    let units = [first.unwrap_or(0xfffd), second.unwrap_or(0xfffd)];
    match char::decode_utf16(units).next() {
        Some(Ok(character)) => (character, if character > '\u{ffff}' { 12 } else { 6 }),
        _ => (char::REPLACEMENT_CHARACTER, 6),
    }
}

/// The UTF-16 code unit of the `\uXXXX` that begins here.
pub(super) fn code_unit(escape: &[u8]) -> Option<u16> {
    let digits = escape.strip_prefix(b"\\u")?.get(..4)?;
    digits.iter().try_fold(0, |unit: u16, digit| {
        let value = char::from(*digit).to_digit(16)?;
        Some(unit << 4 | u16::try_from(value).ok()?)
    })
}

pub(super) fn is_high(unit: u16) -> bool {
    (0xd800..0xdc00).contains(&unit)
}

pub(super) fn is_low(unit: u16) -> bool {
    (0xdc00..0xe000).contains(&unit)
}
