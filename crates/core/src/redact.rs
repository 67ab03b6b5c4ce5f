//! Takes secrets out of texts that come from outside, by their values: as they are, and in the encodings in which an
//! upstream may hand them back. Only errors pay for it.
//!
//! A secret is found whole or in part: its first or last eight characters are enough, since upstreams quote keys
//! shortened. Within base64 it is found wherever it begins, as in the `user:secret` of Basic authentication.
//!
//! Holds INV-SECRET-1 (ARCHITECTURE.md).

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

/// What stands in a secret's place.
pub const GONE: &str = "[redacted]";
/// Shorter secrets are words, which nobody could take out without harm; the configuration warns about them.
const SECRET_BYTES_MIN: usize = 8;
/// Bytes by which a form is found.
const KEY_BYTES: usize = 8;
/// From this length on a part of a secret is taken for it: half of one that is shorter may be a word.
const PART_BYTES_MIN: usize = 2 * KEY_BYTES;
/// What is a part of a secret in a client's word, where nobody shortens keys for show.
const PART_OF_WORD: usize = 16;
/// Before what is a key though none of ours, such as that of a client's other provider; and the fewest characters that
/// make one.
const MARKS: [&str; 6] = ["sk-", "AIza", "bearer ", "key=", "api-key: ", "api_key="];
const MARKED_BYTES_MIN: usize = 16;

/// Knows the secrets of a configuration. It has no `Debug` form.
#[derive(Default)]
pub struct Redactor {
    forms: Vec<Vec<u8>>,
    /// Forms by their first bytes and by their last.
    starts: HashMap<[u8; KEY_BYTES], Vec<usize>>,
    ends: HashMap<[u8; KEY_BYTES], Vec<usize>>,
    /// The pairs with which any of these begins: most places of a text need no other look.
    pairs: Pairs,
}

/// A set of pairs of bytes.
#[derive(Default)]
struct Pairs(Vec<u64>);

impl Pairs {
    fn place([first, second, ..]: &[u8; KEY_BYTES]) -> (usize, u64) {
        let pair = usize::from(*first) << 8 | usize::from(*second);
        (pair / 64, 1 << (pair % 64))
    }

    fn add(&mut self, key: &[u8; KEY_BYTES]) {
        let (word, bit) = Self::place(key);
        self.0.resize(1 << 10, 0);
        self.0.iter_mut().skip(word).take(1).for_each(|bits| *bits |= bit);
    }

    fn has(&self, key: &[u8; KEY_BYTES]) -> bool {
        let (word, bit) = Self::place(key);
        self.0.get(word).is_some_and(|bits| bits & bit != 0)
    }
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redactor({} forms)", self.forms.len())
    }
}

impl Redactor {
    /// Knows these secrets from now on.
    pub fn new<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Self {
        let mut redactor = Self::default();
        for secret in secrets {
            if secret.len() >= SECRET_BYTES_MIN {
                forms(secret.as_bytes()).into_iter().for_each(|form| redactor.add(form));
            }
        }
        redactor
    }

    fn add(&mut self, form: Vec<u8>) {
        if self.forms.contains(&form) {
            return;
        }
        if let (Some(first), Some(last)) = (form.first_chunk(), form.last_chunk()) {
            self.pairs.add(first);
            self.pairs.add(last);
            self.starts.entry(*first).or_default().push(self.forms.len());
            self.ends.entry(*last).or_default().push(self.forms.len());
            self.forms.push(form);
        }
    }

    /// The text without what is, or looks like, a secret.
    #[must_use]
    pub fn redact(&self, text: &str) -> String {
        let mut found = self.known(text.as_bytes(), KEY_BYTES);
        found.extend(MARKS.iter().flat_map(|mark| marked(text, mark)));
        if found.is_empty() {
            return text.to_owned();
        }
        found.sort_unstable_by_key(|range| range.start);
        let (mut out, mut at) = (String::with_capacity(text.len()), 0);
        for range in found {
            if range.start >= at {
                // Secrets are ASCII, so that their ends are those of characters.
                out.push_str(text.get(at..range.start).unwrap_or_default());
                out.push_str(GONE);
            }
            at = at.max(range.end);
        }
        out.push_str(text.get(at..).unwrap_or_default());
        out
    }

    /// Whether a client's word has something in it that is, or looks like, a secret. Of a part it takes more than in a
    /// text of an upstream's: eight characters, as of "sk-team-production", are soon those of a good name.
    #[must_use]
    pub fn finds(&self, text: &str) -> bool {
        !self.known(text.as_bytes(), PART_OF_WORD).is_empty()
            || MARKS.iter().any(|mark| marked(text, mark).next().is_some())
    }

    /// What is a form, or at least so many bytes of its beginning or its end.
    fn known(&self, text: &[u8], part: usize) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        for (at, window) in text.windows(KEY_BYTES).enumerate() {
            let Some(key) = window.first_chunk::<KEY_BYTES>() else { break };
            if !self.pairs.has(key) {
                continue;
            }
            let (before, after) = text.split_at_checked(at).unwrap_or_default();
            for form in self.starts.get(key).into_iter().flatten().filter_map(|index| self.forms.get(*index)) {
                let common = form.iter().zip(after).take_while(|(ours, theirs)| ours == theirs).count();
                if is_enough(common, form, part) {
                    found.push(at..at + common);
                }
            }
            let (upto, _) = text.split_at_checked(at + KEY_BYTES).unwrap_or((before, &[]));
            for form in self.ends.get(key).into_iter().flatten().filter_map(|index| self.forms.get(*index)) {
                let common =
                    form.iter().rev().zip(upto.iter().rev()).take_while(|(ours, theirs)| ours == theirs).count();
                if is_enough(common, form, part) {
                    found.push(upto.len() - common..upto.len());
                }
            }
        }
        found
    }
}

/// Whether a token, which may be none of ours, stands in a client's word: in no encoding, whole or by one of its ends.
#[must_use]
pub fn is_quoted(token: &[u8], text: &str) -> bool {
    let stands = |part: &[u8]| text.as_bytes().windows(part.len()).any(|window| window == part);
    match (token.first_chunk::<PART_OF_WORD>(), token.last_chunk::<PART_OF_WORD>()) {
        (Some(first), Some(last)) => stands(first) || stands(last),
        // A shorter one than the least secret is a word.
        _ => token.len() >= SECRET_BYTES_MIN && stands(token),
    }
}

fn is_enough(common: usize, form: &[u8], part: usize) -> bool {
    common == form.len() || (common >= part && form.len() >= PART_BYTES_MIN)
}

/// What follows a mark, if it is long enough for a key.
fn marked<'a>(text: &'a str, mark: &'a str) -> impl Iterator<Item = Range<usize>> + 'a {
    let is_of_key = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.~+/=".contains(byte);
    text.as_bytes().windows(mark.len()).enumerate().filter_map(move |(at, window)| {
        let is_mark = window.eq_ignore_ascii_case(mark.as_bytes());
        if !is_mark || (at > 0 && text.as_bytes().get(at - 1).is_some_and(u8::is_ascii_alphanumeric)) {
            return None;
        }
        let start = at + mark.len();
        let length = text.as_bytes().get(start..)?.iter().take_while(|byte| is_of_key(byte)).count();
        (length >= MARKED_BYTES_MIN).then_some(start..start + length)
    })
}

/// A secret as it is, and in every encoding that is looked for.
fn forms(secret: &[u8]) -> Vec<Vec<u8>> {
    let mut forms = vec![secret.to_vec()];
    for digits in [b"0123456789ABCDEF", b"0123456789abcdef"] {
        forms.push(percent(secret, digits, |byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)));
        forms.push(percent(secret, digits, |_| false));
    }
    forms.push(escaped(secret, |byte| match byte {
        b'"' => Some("\\\""),
        b'\\' => Some("\\\\"),
        _ => None,
    }));
    forms.push(escaped(secret, |byte| match byte {
        b'"' => Some("\\\""),
        b'\\' => Some("\\\\"),
        b'/' => Some("\\/"),
        _ => None,
    }));
    forms.push(escaped(secret, |byte| match byte {
        b'&' => Some("&amp;"),
        b'<' => Some("&lt;"),
        b'>' => Some("&gt;"),
        b'"' => Some("&quot;"),
        b'\'' => Some("&#39;"),
        _ => None,
    }));
    for last in [b"+/", b"-_"] {
        forms.extend((0..3).map(|before| base64_core(secret, before, *last)));
    }
    forms
}

/// Percent-encoded (RFC 3986, 2.1) but for some.
fn percent(secret: &[u8], digits: &[u8; 16], is_plain: impl Fn(u8) -> bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(secret.len());
    for byte in secret {
        if is_plain(*byte) {
            out.push(*byte);
        } else {
            out.push(b'%');
            out.extend([byte >> 4, byte & 15].iter().filter_map(|digit| digits.get(usize::from(*digit))));
        }
    }
    out
}

fn escaped(secret: &[u8], escape: impl Fn(u8) -> Option<&'static str>) -> Vec<u8> {
    let mut out = Vec::with_capacity(secret.len());
    for byte in secret {
        match escape(*byte) {
            Some(text) => out.extend_from_slice(text.as_bytes()),
            None => out.push(*byte),
        }
    }
    out
}

/// The characters of a base64 text that tell of the secret alone, when it stands `before` bytes behind a multiple of three
/// in what is encoded (RFC 4648; `last` are the characters for 62 and 63).
fn base64_core(secret: &[u8], before: usize, last: [u8; 2]) -> Vec<u8> {
    let character = |value: u8| match value {
        0..26 => b'A' + value,
        26..52 => b'a' + (value - 26),
        52..62 => b'0' + (value - 52),
        62 => last[0],
        _ => last[1],
    };
    let bytes: Vec<u8> = std::iter::repeat_n(0, before).chain(secret.iter().copied()).collect();
    // Six bits begin in byte 6n/8; those that end within the secret are its own.
    let (first_bit, end_bit) = (before * 8, bytes.len() * 8);
    (first_bit.div_ceil(6)..end_bit / 6)
        .map(|sextet| {
            let (at, shift) = (sextet * 6 / 8, sextet * 6 % 8);
            let byte = |at: usize| u16::from(bytes.get(at).copied().unwrap_or(0));
            let pair = byte(at) << 8 | byte(at + 1);
            character((pair >> (10 - shift) & 63) as u8)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECRET: &str = "k/9+\"se&cret<=x\\Q2w7";

    fn redactor() -> Redactor {
        Redactor::new([SECRET])
    }

    #[test]
    fn every_form_is_found() {
        let forms = [
            SECRET,
            "k%2F9%2B%22se%26cret%3C%3Dx%5CQ2w7",
            "k%2f9%2b%22se%26cret%3c%3dx%5cQ2w7",
            "k/9+\\\"se&cret<=x\\\\Q2w7",
            "k\\/9+\\\"se&cret<=x\\\\Q2w7",
            "k/9+&quot;se&amp;cret&lt;=x\\Q2w7",
            // base64 of the secret: padding may stay.
            "ay85KyJzZSZjcmV0PD14XFEydzc",
        ];
        for form in forms {
            let left = redactor().redact(&format!("it said <{form}> twice: {form}"));
            assert!(left.starts_with("it said <[redacted]") && left.matches(GONE).count() == 2, "{left}");
            assert!(left.len() < 50, "{form}: {left}");
        }
    }

    #[test]
    fn base64_is_known_from_the_rfc() {
        // RFC 4648, 10, and the same one byte later, which leaves out what the byte before has a part in.
        assert_eq!(base64_core(b"foobar", 0, *b"+/"), b"Zm9vYmFy");
        assert_eq!(base64_core(b"fooba", 0, *b"+/"), b"Zm9vYm");
        assert_eq!(base64_core(b"\xfb\xff\xbf", 0, *b"-_"), b"-_-_");
    }

    #[test]
    fn parts_are_enough_from_eight_characters_on() {
        let redactor = Redactor::new(["abcdefghijklmnopqrstuvwxyz"]);
        assert_eq!(redactor.redact("abcdefgh***stuvwxyz"), "[redacted]***[redacted]");
        assert_eq!(redactor.redact("abcdefghijk... klmnopqrstuvwxyz!"), "[redacted]... [redacted]!");
        assert_eq!(redactor.redact("abcdefg***tuvwxyz"), "abcdefg***tuvwxyz");
        // Half of a short one may be a word.
        let short = Redactor::new(["password1234"]);
        assert_eq!(short.redact("the password: password1234"), "the password: [redacted]");
        assert_eq!(Redactor::new(["short"]).redact("too short"), "too short");
    }

    #[test]
    fn a_text_with_a_secret_is_told_from_one_without() {
        for text in [SECRET, "ay85KyJzZSZjcmV0PD14XFEydzc", "sk-0123456789abcdef", "openai/sk-0123456789abcdef"] {
            assert!(redactor().finds(text), "{text}");
        }
        for text in ["", "gpt-4o-mini", "openai/gpt-4o-mini", "0f8fad5b-d9cb-469f-a165-70867728950e", "x-k/9+\"se&c"] {
            assert!(!redactor().finds(text), "{text}");
        }
    }

    #[test]
    fn a_token_of_nobodys_is_found_as_it_is() {
        let token = b"my-own-token-0123";
        for text in ["my-own-token-0123", "fake/my-own-token-0123", "a my-own-token-012...", "...y-own-token-0123"] {
            assert!(is_quoted(token, text), "{text}");
        }
        assert!(!is_quoted(token, "my-own-token-1") && !is_quoted(token, "token-0123-a") && !is_quoted(token, ""));
        assert!(is_quoted(b"tokentoken", "a tokentoken") && !is_quoted(b"tokentoken", "a tokentok"));
        assert!(!is_quoted(b"token", "a token") && !is_quoted(b"", "a token"));
    }

    #[test]
    fn keys_of_others_are_known_by_what_stands_before_them() {
        let redactor = Redactor::default();
        for (text, left) in [
            ("Incorrect key: sk-proj-0123456789abcdef.", "Incorrect key: sk-[redacted]"),
            ("Authorization: Bearer 0123456789abcdef0", "Authorization: Bearer [redacted]"),
            ("GET /v1?key=AIzaSy0123456789abcdef&x", "GET /v1?key=[redacted]&x"),
            ("x-api-key: 0123456789abcdef", "x-api-key: [redacted]"),
            (
                "sk-short, a risk-0123456789abcdef01, bearer of news",
                "sk-short, a risk-0123456789abcdef01, bearer of news",
            ),
        ] {
            assert_eq!(redactor.redact(text), left);
        }
    }

    fn base64(bytes: &[u8]) -> String {
        let mut padded = bytes.to_vec();
        padded.extend(std::iter::repeat_n(0, (3 - bytes.len() % 3) % 3));
        String::from_utf8(base64_core(&padded, 0, *b"+/")).unwrap()
    }

    proptest! {
        #[test]
        fn a_secret_is_found_wherever_it_stands_in_base64(before in "[ -~é]{0,9}", after in "[ -~é]{0,9}", secret in "[!-~]{8,40}") {
            let text = base64(format!("{before}{secret}{after}").as_bytes());
            let left = Redactor::new([secret.as_str()]).redact(&text);
            prop_assert!(left.contains(GONE), "{} in {}: {}", secret, text, left);
        }

        #[test]
        fn what_is_no_secret_stays(text in "[ -~é]{0,80}", secret in "[!-~]{8,40}") {
            let left = Redactor::new([secret.as_str()]).redact(&format!("{text}{secret}{text}"));
            prop_assert!(!left.contains(&secret) || text.contains(&secret));
            let redactor = Redactor::new(["not in there at all!"]);
            if !MARKS.iter().any(|mark| text.to_ascii_lowercase().contains(&mark.to_ascii_lowercase())) {
                prop_assert_eq!(redactor.redact(&text), text);
            }
        }
    }
}
