//! A stream's bytes as whole events, unchanged.

use bytes::{Bytes, BytesMut};

/// Holds back an event until its blank line has come, so that an error can follow what was sent at any time.
#[derive(Debug, Default)]
pub(super) struct Whole {
    held: BytesMut,
}

impl Whole {
    /// What is whole now.
    pub(super) fn push(&mut self, bytes: Bytes) -> Option<Bytes> {
        if self.held.is_empty() && end(&bytes, 0) == Some(bytes.len()) {
            return Some(bytes);
        }
        // A blank line may have begun in what was there before.
        let from = self.held.len().saturating_sub(3);
        self.held.extend_from_slice(&bytes);
        let end = end(&self.held, from)?;
        Some(self.held.split_to(end).freeze())
    }

    /// Bytes of an event whose end has not come.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// What is left at the end of the stream.
    pub(super) fn finish(&mut self) -> Option<Bytes> {
        (!self.held.is_empty()).then(|| self.held.split().freeze())
    }
}

/// Where the last blank line ends, looked for behind `from`.
fn end(bytes: &[u8], from: usize) -> Option<usize> {
    let tail = bytes.get(from..)?;
    let ends = memchr::memrchr_iter(b'\n', tail).map(|at| from + at);
    let is_blank = |at: &usize| {
        let before = bytes.get(..*at).unwrap_or_default();
        before.ends_with(b"\n") || before.ends_with(b"\n\r")
    };
    ends.into_iter().find(is_blank).map(|at| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_whole_and_their_bytes_the_same_however_they_come() {
        for text in ["data: a\n\ndata: b\n\n", "data: a\r\n\r\n: c\r\n\r\ndata: b\r\n\r\n", "a\nb\n\nc\n\n\n\nd"] {
            for size in 1..=text.len() {
                let (mut whole, mut all) = (Whole::default(), Vec::new());
                for piece in text.as_bytes().chunks(size) {
                    if let Some(events) = whole.push(Bytes::copy_from_slice(piece)) {
                        assert!(events.ends_with(b"\n\n") || events.ends_with(b"\n\r\n"));
                        all.extend_from_slice(&events);
                    }
                }
                assert_eq!(all.len() + whole.len(), text.len());
                all.extend(whole.finish().unwrap_or_default());
                assert_eq!(all, text.as_bytes());
            }
        }
    }

    #[test]
    fn half_an_event_is_held_back() {
        let mut whole = Whole::default();
        assert_eq!(whole.push(Bytes::from_static(b"data: a\n\ndata: ")).unwrap(), "data: a\n\n");
        assert_eq!(whole.push(Bytes::from_static(b"b\n")), None);
        assert_eq!(whole.push(Bytes::from_static(b"\n")).unwrap(), "data: b\n\n");
    }
}
