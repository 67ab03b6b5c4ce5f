//! Server-sent events: where each one ends and what it says, for every way its bytes may arrive.
//!
//! The rules are those of the WHATWG HTML standard, section 9.2.6 "Interpreting an event stream": lines end with LF,
//! CRLF or CR, a blank line ends an event, a byte order mark may begin the stream. Nothing is decoded: what passes
//! through stays the bytes it was.
//!
//! Holds INV-STREAM-2 (ARCHITECTURE.md).

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;

/// One completed event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The `data` fields joined with LF; borrowed when there is at most one.
    pub data: Cow<'a, [u8]>,
    /// Whether there is a `data` field at all; without one, a reader of events dispatches nothing.
    pub has_data: bool,
    /// The last `event` field, unless it is empty.
    pub event: Option<&'a [u8]>,
    /// Whether there is no field at all: comments and blank lines only.
    pub is_comment: bool,
    /// Where its bytes stand in what `push` returns, blank line included.
    pub raw: Range<usize>,
}

impl Event<'_> {
    /// Whether it is OpenAI's end mark.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.data.trim_ascii() == b"[DONE]"
    }
}

/// An event is longer than the limit; the stream cannot be read on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// The limit, bytes.
    pub bytes_max: usize,
    /// What `push` would have returned without the large event: the events completed before it, which `each` has seen.
    pub completed: Bytes,
}

/// Cuts a stream into events. Holds the bytes of one unfinished event, never more than the limit.
#[derive(Debug)]
pub struct Splitter {
    bytes_max: usize,
    /// Bytes of the unfinished event, from chunks before.
    carry: Vec<u8>,
    lines: Lines,
    is_first: bool,
    is_spent: bool,
}

impl Splitter {
    /// A splitter that refuses events of more than `event_bytes_max` bytes, line ends included.
    #[must_use]
    pub fn new(event_bytes_max: usize) -> Self {
        let lines = Lines { is_empty: true, after_cr: false };
        Self { bytes_max: event_bytes_max, carry: Vec::new(), lines, is_first: true, is_spent: false }
    }

    /// Takes the next bytes of the stream and returns those of all events that they complete, exactly as received and
    /// in one piece: a slice of `chunk` if no event was unfinished before, otherwise a copy. Calls `each` once per
    /// completed event, in order, before it returns.
    ///
    /// An event is complete with the CR of its blank line. If that stands at the end of a chunk and an LF begins the
    /// next one, the LF is returned then, and is no event.
    ///
    /// # Errors
    /// `TooLarge` when an event, finished or not, is longer than the limit, and for every push after that.
    pub fn push(&mut self, chunk: Bytes, each: &mut dyn FnMut(Event<'_>)) -> Result<Bytes, TooLarge> {
        let bytes_max = self.bytes_max;
        if self.is_spent {
            return Err(TooLarge { bytes_max, completed: Bytes::new() });
        }
        let mut cut = Cut { carried: 0, start: self.owed_lf(&chunk) };
        while let Some(border) = self.lines.next_border(&chunk, cut.start) {
            if self.unfinished(cut) + (border - cut.start) > bytes_max {
                return Err(self.too_large(&chunk, cut));
            }
            let end = self.lines.after_lf(&chunk, border);
            self.complete(&chunk, &mut cut, end, each);
        }
        let rest = chunk.get(cut.start..).unwrap_or_default();
        if self.unfinished(cut) + rest.len() > bytes_max {
            return Err(self.too_large(&chunk, cut));
        }
        if cut.start == 0 && cut.carried == 0 {
            self.carry.extend_from_slice(rest);
            return Ok(Bytes::new());
        }
        let rest = rest.to_vec();
        Ok(self.completed(chunk, cut, rest))
    }

    /// Bytes of an event that the stream's end leaves unfinished. They are not part of what `push` returned, and a
    /// reader of events discards them.
    #[must_use]
    pub fn finish(&self) -> usize {
        self.carry.len()
    }

    /// One, if the chunk begins with the LF of a CRLF whose CR completed an event before.
    fn owed_lf(&mut self, chunk: &[u8]) -> usize {
        if self.carry.is_empty() { self.lines.after_lf(chunk, 0) } else { 0 }
    }

    /// Hands over the event that ends at `end`, the bytes carried before it included.
    fn complete(&mut self, chunk: &[u8], cut: &mut Cut, end: usize, each: &mut dyn FnMut(Event<'_>)) {
        let bytes = chunk.get(cut.start..end).unwrap_or_default();
        if cut.carried == 0 && !self.carry.is_empty() {
            self.carry.extend_from_slice(bytes);
            cut.carried = self.carry.len() - end;
            let is_first = std::mem::take(&mut self.is_first);
            each(parse(&self.carry, is_first, 0..self.carry.len()));
        } else {
            let is_first = std::mem::take(&mut self.is_first);
            each(parse(bytes, is_first, cut.carried + cut.start..cut.carried + end));
        }
        cut.start = end;
    }

    /// How much of the unfinished event was carried: nothing, once the carry is part of a completed one.
    fn unfinished(&self, cut: Cut) -> usize {
        if cut.carried == 0 { self.carry.len() } else { 0 }
    }

    /// Joins what is complete and keeps `rest` for the next push.
    fn completed(&mut self, mut chunk: Bytes, cut: Cut, rest: Vec<u8>) -> Bytes {
        if cut.carried == 0 {
            self.carry = rest;
            chunk.truncate(cut.start);
            return chunk;
        }
        let mut joined = std::mem::replace(&mut self.carry, rest);
        let copied = joined.len() - cut.carried;
        joined.extend_from_slice(chunk.get(copied..cut.start).unwrap_or_default());
        Bytes::from(joined)
    }

    #[cold]
    fn too_large(&mut self, chunk: &Bytes, cut: Cut) -> TooLarge {
        self.is_spent = true;
        let completed = if cut.start == 0 { Bytes::new() } else { self.completed(chunk.clone(), cut, Vec::new()) };
        self.carry = Vec::new();
        TooLarge { bytes_max: self.bytes_max, completed }
    }
}

/// How far one push has come.
#[derive(Clone, Copy)]
struct Cut {
    /// Bytes from chunks before, within what will be returned; 0 until they are part of a completed event.
    carried: usize,
    /// Where in the chunk the unfinished event begins.
    start: usize,
}

/// Where lines end: all the state that lies between two chunks.
#[derive(Debug)]
struct Lines {
    /// Nothing stands on the line yet.
    is_empty: bool,
    /// The byte before was a CR, whose LF may follow.
    after_cr: bool,
}

impl Lines {
    /// Where the next blank line ends, at or after `from`, an LF that may still belong to it not counted.
    fn next_border(&mut self, chunk: &[u8], from: usize) -> Option<usize> {
        let mut at = self.after_lf(chunk, from);
        loop {
            let rest = chunk.get(at..).filter(|rest| !rest.is_empty())?;
            let Some(length) = memchr::memchr2(b'\n', b'\r', rest) else {
                self.is_empty = false;
                return None;
            };
            let is_blank = self.is_empty && length == 0;
            self.is_empty = true;
            self.after_cr = rest.get(length) == Some(&b'\r');
            at += length + 1;
            if is_blank {
                return Some(at);
            }
            at = self.after_lf(chunk, at);
        }
    }

    /// Steps over an LF at `at` that belongs to a CR before it.
    fn after_lf(&mut self, chunk: &[u8], at: usize) -> usize {
        match chunk.get(at) {
            None => at,
            Some(byte) => {
                let is_pair = self.after_cr && *byte == b'\n';
                self.after_cr = false;
                at + usize::from(is_pair)
            }
        }
    }
}

/// Reads the fields of one event; the stream's first may begin with a byte order mark.
fn parse(bytes: &[u8], is_first: bool, raw: Range<usize>) -> Event<'_> {
    let mut event = Event { data: Cow::Borrowed(&[]), has_data: false, event: None, is_comment: true, raw };
    let mut rest = if is_first { bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes) } else { bytes };
    while !rest.is_empty() {
        // The LF of a CRLF makes one more blank line, which says nothing.
        let length = memchr::memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
        let (line, after) = rest.split_at(length);
        rest = after.get(1..).unwrap_or_default();
        if line.first().is_none_or(|byte| *byte == b':') {
            continue;
        }
        event.is_comment = false;
        let (name, value) = field(line);
        match name {
            b"data" => event.add_data(value),
            b"event" => event.event = (!value.is_empty()).then_some(value),
            _ => {}
        }
    }
    event
}

impl<'a> Event<'a> {
    fn add_data(&mut self, value: &'a [u8]) {
        if self.has_data {
            let data = self.data.to_mut();
            data.push(b'\n');
            data.extend_from_slice(value);
        } else {
            self.data = Cow::Borrowed(value);
            self.has_data = true;
        }
    }
}

/// A line's name and value; one space after the colon is not part of the value.
fn field(line: &[u8]) -> (&[u8], &[u8]) {
    match memchr::memchr(b':', line) {
        None => (line, &[]),
        Some(at) => {
            let (name, value) = line.split_at(at);
            let value = value.get(1..).unwrap_or_default();
            (name, value.strip_prefix(b" ").unwrap_or(value))
        }
    }
}

#[cfg(test)]
mod tests;
