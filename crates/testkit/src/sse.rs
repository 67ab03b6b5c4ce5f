//! Reading server-sent events with the moment each came in.

use std::time::Instant;

use serde_json::Value;

/// One event, or one group of comment lines.
#[derive(Clone, Debug)]
pub struct Event {
    /// When its last byte was there.
    pub at: Instant,
    /// The `event` field.
    pub name: Option<String>,
    /// The `data` lines, joined with line feeds.
    pub data: String,
    /// Whether it held comments only.
    pub is_comment: bool,
    /// All its bytes, the blank line included.
    pub raw: Vec<u8>,
}

impl Event {
    /// Whether it is `[DONE]`.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.data.trim() == "[DONE]"
    }

    /// Its data as JSON.
    ///
    /// # Panics
    /// When it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("{error} in {:?}", self.data))
    }

    /// `choices[0].delta.content` or `choices[0].text`, empty if there is none.
    #[must_use]
    pub fn text(&self) -> String {
        let Ok(value) = serde_json::from_str::<Value>(&self.data) else { return String::new() };
        let choice = &value["choices"][0];
        choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str()).unwrap_or_default().to_owned()
    }

    /// The error's code, if it is an error event.
    #[must_use]
    pub fn error_code(&self) -> Option<String> {
        let value: Value = serde_json::from_str(&self.data).ok()?;
        let error = value.get("error").filter(|error| !error.is_null())?;
        Some(error["code"].as_str().unwrap_or_default().to_owned())
    }
}

/// Collects bytes and gives the events they complete, by the rules of the WHATWG HTML standard, 9.2.6. It is slow and
/// plain on purpose, so that it can judge the gateway's own.
#[derive(Debug, Default)]
pub struct Reader {
    rest: Vec<u8>,
    has_begun: bool,
}

impl Reader {
    /// Takes bytes and returns the events that are whole now. A blank line alone is none.
    pub fn push(&mut self, bytes: &[u8], at: Instant) -> Vec<Event> {
        self.rest.extend_from_slice(bytes);
        let mut events = Vec::new();
        let mut start = 0;
        while let Some(length) = event_end(&self.rest[start..]) {
            let raw = &self.rest[start..start + length];
            start += length;
            let text = if self.has_begun { raw } else { raw.strip_prefix(b"\xef\xbb\xbf").unwrap_or(raw) };
            self.has_begun = true;
            if !text.iter().all(|byte| matches!(byte, b'\r' | b'\n')) {
                events.push(parse(raw, text, at));
            }
        }
        self.rest.drain(..start);
        events
    }

    /// Bytes of an event that is not whole.
    #[must_use]
    pub fn rest(&self) -> &[u8] {
        &self.rest
    }
}

/// Text of all events together.
#[must_use]
pub fn text_of(events: &[Event]) -> String {
    events.iter().map(Event::text).collect()
}

/// Where the first blank line ends. Lines end with LF, CRLF or CR.
fn event_end(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(length) = bytes[at..].iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
        let end = at + length;
        let is_pair = bytes[end..].starts_with(b"\r\n");
        at = end + 1 + usize::from(is_pair);
        if length == 0 {
            return Some(at);
        }
    }
    None
}

fn parse(raw: &[u8], text: &[u8], at: Instant) -> Event {
    let text = String::from_utf8_lossy(text);
    let (mut name, mut data, mut is_comment) = (None, Vec::new(), true);
    for line in text.split(['\r', '\n']).filter(|line| !line.is_empty()) {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        is_comment &= field.is_empty();
        match field {
            "event" => name = Some(value.to_owned()),
            "data" => data.push(value.to_owned()),
            _ => {}
        }
    }
    Event { at, name, data: data.join("\n"), is_comment, raw: raw.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let stream = ": hi\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"é\"}}]}\r\n\r\nevent: x\ndata: 1\ndata:2\n\ndata: [DO";
        for size in 1..=stream.len() {
            let (mut reader, at) = (Reader::default(), Instant::now());
            let events: Vec<Event> = stream.as_bytes().chunks(size).flat_map(|piece| reader.push(piece, at)).collect();
            assert_eq!(events.len(), 3);
            assert!(events[0].is_comment && !events[1].is_comment);
            assert_eq!(text_of(&events), "é");
            assert_eq!((events[2].name.as_deref(), events[2].data.as_str()), (Some("x"), "1\n2"));
            assert_eq!(reader.rest(), b"data: [DO");
        }
    }
}
