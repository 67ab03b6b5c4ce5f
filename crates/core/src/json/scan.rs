//! The scanner: walks JSON (RFC 8259) byte by byte and builds nothing.
//!
//! Nothing here recurses on the input: `skip_value` keeps one bit per open bracket, and `members` and `items` nest only
//! as deep as the code that calls them. The small steps are inlined by order, and what is rare is called with values and not
//! with the scanner, so that a walk keeps its place in registers: each of the two makes it a quarter shorter (measured in
//! instructions).

use std::borrow::Cow;
use std::ops::Range;

use super::escape::{code_unit, inner, is_high, is_low, unescape};
use super::plain::{plain_length, unquoted_length};

/// The longest key that is compared with an escape in it: 32 characters of six bytes each. No key we read is longer.
const ESCAPED_KEY_BYTES_MAX: usize = 6 * 32;

/// Why bytes are not the JSON that is required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Offset of the first byte that cannot stand where it does.
    pub at: usize,
    /// What had to stand there instead.
    pub expected: &'static str,
}

/// Why a walk ended early.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stop {
    Broken(Broken),
    /// More brackets are open than allowed.
    TooDeep {
        at: usize,
    },
}

/// How exact the bytes have to be.
#[derive(Clone, Copy, Debug)]
struct Rules {
    /// Most open brackets.
    depth_max: u32,
    /// Whether lone surrogate escapes and raw control characters in strings are refused.
    is_strict: bool,
}

/// A member's key.
#[derive(Debug)]
pub(super) struct Key {
    /// Where it stands, quotes included.
    span: Range<usize>,
    /// It has no escapes, for certain.
    is_plain: bool,
}

impl Key {
    /// Where it begins, with its quote.
    pub(super) fn start(&self) -> usize {
        self.span.start
    }
}

/// A place in the bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: u32,
    rules: Rules,
    /// Whether strings have to be looked through for control characters: they are refused, and there are some.
    is_wary: bool,
}

impl<'a> Scanner<'a> {
    /// For answers: half an emoji, raw control characters and any depth (one bit a level) are passed through.
    pub(super) fn lenient(bytes: &'a [u8]) -> Self {
        let rules = Rules { depth_max: u32::MAX, is_strict: false };
        Self { bytes, at: 0, depth: 0, rules, is_wary: false }
    }

    /// For a text with control characters or without.
    pub(super) fn strict(bytes: &'a [u8], depth_max: u32, has_control: bool) -> Self {
        // Line ends between values make it wary too; what programs send has none.
        Self { bytes, at: 0, depth: 0, rules: Rules { depth_max, is_strict: true }, is_wary: has_control }
    }

    /// The next byte.
    #[inline]
    pub(super) fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    /// The bytes of a range that this scanner gave.
    pub(super) fn slice(&self, range: Range<usize>) -> &'a [u8] {
        self.bytes.get(range).unwrap_or_default()
    }

    /// Skips white space.
    #[inline(always)]
    pub(super) fn space(&mut self) {
        // What programs send has hardly any.
        if self.peek().is_none_or(|byte| byte <= b' ') {
            self.at = space_end(self.bytes, self.at);
        }
    }

    /// Checks that nothing but white space is left.
    pub(super) fn end(&mut self) -> Result<(), Stop> {
        self.space();
        if self.at < self.bytes.len() { self.broken("the end of the text") } else { Ok(()) }
    }

    /// Walks the members of the object that begins here. `each` gets a key and takes exactly one value.
    pub(super) fn members<E: From<Stop>>(
        &mut self,
        mut each: impl FnMut(&mut Self, Key) -> Result<(), E>,
    ) -> Result<(), E> {
        self.open(b'{', "an object")?;
        if self.close(b'}') {
            return Ok(());
        }
        loop {
            let key = self.key()?;
            self.space();
            each(self, key)?;
            self.space();
            if self.close(b'}') {
                return Ok(());
            }
            self.take(b',', "',' or '}'")?;
        }
    }

    /// Walks the items of the array that begins here. `each` takes exactly one value.
    pub(super) fn items<E: From<Stop>>(&mut self, mut each: impl FnMut(&mut Self) -> Result<(), E>) -> Result<(), E> {
        self.open(b'[', "an array")?;
        if self.close(b']') {
            return Ok(());
        }
        loop {
            self.space();
            each(self)?;
            self.space();
            if self.close(b']') {
                return Ok(());
            }
            self.take(b',', "',' or ']'")?;
        }
    }

    /// Takes one value of any kind and returns its span.
    #[inline(never)]
    pub(super) fn skip_value(&mut self) -> Result<Range<usize>, Stop> {
        let mut here = *self;
        let span = here.value()?;
        self.at = here.at;
        Ok(span)
    }

    #[inline(always)]
    fn value(&mut self) -> Result<Range<usize>, Stop> {
        self.space();
        let start = self.at;
        match self.peek() {
            Some(b'"') => return self.string(),
            Some(b'{' | b'[') => {}
            _ => return self.scalar().map(|()| start..self.at),
        }
        let mut nest = Nest::default();
        loop {
            if self.begin_value(&mut nest)? {
                continue;
            }
            if self.end_values(&mut nest)? {
                return Ok(start..self.at);
            }
        }
    }

    /// Takes a whole scalar, an empty bracket pair, or an opening bracket with what stands before its first value;
    /// says whether a value has to follow at once.
    #[inline(always)]
    fn begin_value(&mut self, nest: &mut Nest) -> Result<bool, Stop> {
        self.space();
        match self.peek() {
            Some(b'"') => self.string().map(|_| false),
            Some(b'{') => {
                self.open(b'{', "an object")?;
                if self.close(b'}') {
                    return Ok(false);
                }
                nest.push(true);
                self.key().map(|_| true)
            }
            Some(b'[') => {
                self.open(b'[', "an array")?;
                if self.close(b']') {
                    return Ok(false);
                }
                nest.push(false);
                Ok(true)
            }
            _ => self.scalar().map(|()| false),
        }
    }

    /// Takes a number or a literal.
    #[inline(always)]
    fn scalar(&mut self) -> Result<(), Stop> {
        match self.peek() {
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b't') => self.literal(b"true"),
            Some(b'f') => self.literal(b"false"),
            Some(b'n') => self.literal(b"null"),
            _ => self.broken("a value"),
        }
    }

    /// Takes what may stand after a value, closing brackets included; says whether the outermost one is closed.
    #[inline(always)]
    fn end_values(&mut self, nest: &mut Nest) -> Result<bool, Stop> {
        while let Some(is_object) = nest.last() {
            self.space();
            if self.peek() == Some(b',') {
                self.at += 1;
                if is_object {
                    self.key()?;
                }
                return Ok(false);
            }
            let (bracket, expected) = if is_object { (b'}', "',' or '}'") } else { (b']', "',' or ']'") };
            if !self.close(bracket) {
                return self.broken(expected);
            }
            nest.pop();
        }
        Ok(true)
    }

    /// Takes a string and returns its span, quotes included.
    #[inline(always)]
    pub(super) fn string(&mut self) -> Result<Range<usize>, Stop> {
        let start = self.at;
        self.text().map(|_| start..self.at)
    }

    /// Takes a string and says whether it stands for itself, without an escape; "no" is only a guess.
    #[inline(always)]
    fn text(&mut self) -> Result<bool, Stop> {
        self.take(b'"', "a string")?;
        if !self.is_wary {
            self.at += unquoted_length(self.bytes.get(self.at..).unwrap_or_default());
            if self.peek() == Some(b'"') {
                self.at += 1;
                return Ok(true);
            }
        }
        self.at = text_end(self.bytes, self.at, self.rules.is_strict)?;
        Ok(false)
    }

    #[inline(always)]
    fn number(&mut self) -> Result<(), Stop> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        match self.peek() {
            Some(b'0') => self.at += 1,
            _ => self.digits()?,
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    #[inline(always)]
    fn digits(&mut self) -> Result<(), Stop> {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        if self.at == start { self.broken("a digit") } else { Ok(()) }
    }

    /// Takes `word` if it stands here.
    #[inline(always)]
    pub(super) fn literal(&mut self, word: &'static [u8]) -> Result<(), Stop> {
        if !self.bytes.get(self.at..).is_some_and(|rest| rest.starts_with(word)) {
            return self.broken("a value");
        }
        self.at += word.len();
        Ok(())
    }

    /// Takes a key and its colon.
    #[inline(always)]
    fn key(&mut self) -> Result<Key, Stop> {
        self.space();
        if self.peek() != Some(b'"') {
            return self.broken("a key in quotes");
        }
        let start = self.at;
        let is_plain = self.text()?;
        let span = start..self.at;
        self.space();
        self.take(b':', "':'")?;
        Ok(Key { span, is_plain })
    }

    /// The name that a key stands for, escapes resolved; a key too long to matter is left as it is.
    #[inline]
    pub(super) fn name(&self, key: Key) -> Cow<'a, [u8]> {
        let inner = inner(self.slice(key.span));
        if key.is_plain || inner.len() > ESCAPED_KEY_BYTES_MAX || !inner.contains(&b'\\') {
            return Cow::Borrowed(inner);
        }
        Cow::Owned(unescape(inner).into_bytes())
    }

    /// The whole name that a key stands for, whatever its length.
    pub(super) fn full_name(&self, key: &Key) -> String {
        unescape(inner(self.slice(key.span.clone())))
    }

    #[inline(always)]
    fn open(&mut self, bracket: u8, expected: &'static str) -> Result<(), Stop> {
        let at = self.at;
        self.take(bracket, expected)?;
        if self.depth >= self.rules.depth_max {
            return Err(Stop::TooDeep { at });
        }
        self.depth += 1;
        self.space();
        Ok(())
    }

    /// Takes a closing bracket if it stands here.
    #[inline(always)]
    fn close(&mut self, bracket: u8) -> bool {
        let is_here = self.peek() == Some(bracket);
        if is_here {
            self.at += 1;
            self.depth = self.depth.saturating_sub(1);
        }
        is_here
    }

    #[inline(always)]
    fn take(&mut self, byte: u8, expected: &'static str) -> Result<(), Stop> {
        if self.peek() != Some(byte) {
            return self.broken(expected);
        }
        self.at += 1;
        Ok(())
    }

    #[inline(always)]
    fn broken<T>(&self, expected: &'static str) -> Result<T, Stop> {
        broken(self.at, expected)
    }
}

#[cold]
fn broken<T>(at: usize, expected: &'static str) -> Result<T, Stop> {
    Err(Stop::Broken(Broken { at, expected }))
}

/// Where white space ends that may begin at `at`.
#[inline(never)]
fn space_end(bytes: &[u8], mut at: usize) -> usize {
    while let Some(b' ' | b'\n' | b'\r' | b'\t') = bytes.get(at) {
        at += 1;
    }
    at
}

/// Where a string ends, behind its quote, of which the rest from `at` on has something in it besides plain bytes.
#[inline(never)]
fn text_end(bytes: &[u8], mut at: usize, is_strict: bool) -> Result<usize, Stop> {
    loop {
        at += plain_length(bytes.get(at..).unwrap_or_default());
        match bytes.get(at) {
            Some(b'"') => return Ok(at + 1),
            Some(b'\\') => at += escape_length(bytes, at, is_strict)?,
            Some(0..0x20) if is_strict => return broken(at, "no control character inside a string"),
            Some(_) => at += 1,
            None => return broken(at, "the end of a string"),
        }
    }
}

/// Length of the escape that begins at `at`.
fn escape_length(bytes: &[u8], at: usize, is_strict: bool) -> Result<usize, Stop> {
    match bytes.get(at + 1) {
        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => Ok(2),
        Some(b'u') => unicode_escape_length(bytes, at, is_strict),
        _ => broken(at, "an escape that JSON knows"),
    }
}

fn unicode_escape_length(bytes: &[u8], at: usize, is_strict: bool) -> Result<usize, Stop> {
    let rest = bytes.get(at..).unwrap_or_default();
    let Some(first) = code_unit(rest) else {
        return broken(at, "four hexadecimal digits after \\u");
    };
    let second = rest.get(6..).and_then(code_unit);
    let is_pair = is_high(first) && second.is_some_and(is_low);
    if is_strict && !is_pair && (is_high(first) || is_low(first)) {
        return broken(at, "both halves of a surrogate pair");
    }
    Ok(if is_pair { 12 } else { 6 })
}

/// Which brackets are open, one bit each: set for an object.
#[derive(Debug, Default)]
struct Nest {
    /// The innermost 64 at most.
    bits: u64,
    /// How many there are.
    depth: u32,
    /// What did not fit, in groups of 64.
    outer: Vec<u64>,
}

impl Nest {
    fn push(&mut self, is_object: bool) {
        if self.depth > 0 && self.depth.is_multiple_of(64) {
            self.outer.push(self.bits);
        }
        self.bits = self.bits << 1 | u64::from(is_object);
        self.depth += 1;
    }

    fn last(&self) -> Option<bool> {
        (self.depth > 0).then_some(self.bits & 1 == 1)
    }

    fn pop(&mut self) {
        self.bits >>= 1;
        self.depth = self.depth.saturating_sub(1);
        if self.depth > 0
            && self.depth.is_multiple_of(64)
            && let Some(bits) = self.outer.pop()
        {
            self.bits = bits;
        }
    }
}
