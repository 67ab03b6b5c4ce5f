//! Follows the frames of an HTTP/2 client (RFC 9113, 4.1) to know where one ends.
//!
//! The HTTP library shuts a connection down in two steps: GOAWAY with the highest id and a PING; at the PING's
//! acknowledgement GOAWAY with the last id it took. A client that never acknowledges would keep the connection, and
//! with it the worker, for as long as it likes. So after a bounded time the acknowledgement is put into what the library
//! reads, between two frames.

/// The acknowledgement of the PING that h2 sends between its two GOAWAY frames; the payload is `Ping::SHUTDOWN` of its
/// `frame/ping.rs`. `drain_http2` in the tests shows that it still is.
pub(super) const SHUTDOWN_ACK: [u8; 17] = [0, 0, 8, 6, 1, 0, 0, 0, 0, 0x0b, 0x7b, 0xa2, 0xf0, 0x8b, 0x9b, 0xfe, 0x54];

const HEAD_BYTES: u8 = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// Where in the client's frames the reader is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Frames {
    /// Bytes of the preface or of a payload that are still to come.
    left: u32,
    /// Bytes of the next frame's head so far.
    head_bytes: u8,
    /// The payload's length as far as that head has said it.
    length: u32,
    /// Of the frame at hand, or the last one.
    kind: u8,
    flags: u8,
    stream: u32,
    /// The highest stream that a request's head has opened, and whether the frame or header block at hand is that head.
    opened: u32,
    is_opening: bool,
    /// Frames that have ended, those of one header block together.
    ended: u32,
}

impl Frames {
    /// A connection of which nothing has been handed on, with that many bytes of preface.
    pub(super) fn after_preface(bytes: usize) -> Self {
        Self { left: u32::try_from(bytes).unwrap_or(u32::MAX), ..Self::default() }
    }

    /// Follows bytes that are handed on.
    pub(super) fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let here = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
                self.left -= here as u32;
                bytes = bytes.get(here..).unwrap_or_default();
                self.count();
                continue;
            }
            let Some((byte, rest)) = bytes.split_first() else { return };
            match self.head_bytes {
                0..3 => self.length = self.length << 8 | u32::from(*byte),
                3 => self.kind = *byte,
                4 => self.flags = *byte,
                _ => self.stream = self.stream << 8 | u32::from(*byte),
            }
            self.head_bytes += 1;
            if self.head_bytes == HEAD_BYTES {
                (self.left, self.head_bytes, self.length) = (self.length, 0, 0);
                self.open();
                self.count();
            }
            bytes = rest;
        }
    }

    /// A client's streams have odd numbers that grow (RFC 9113, 5.1.1); HEADERS of an earlier one are trailers. The
    /// highest bit means nothing.
    fn open(&mut self) {
        let stream = self.stream & (u32::MAX >> 1);
        if self.kind == HEADERS && stream % 2 == 1 && stream > self.opened {
            (self.opened, self.is_opening) = (stream, true);
        }
    }

    fn count(&mut self) {
        if self.is_between() {
            self.is_opening = false;
            self.ended = self.ended.wrapping_add(1);
        }
    }

    /// Whether the next byte begins a frame that may be any.
    pub(super) fn is_between(self) -> bool {
        let is_block_open = matches!(self.kind, HEADERS | CONTINUATION) && self.flags & END_HEADERS == 0;
        self.left == 0 && self.head_bytes == 0 && !is_block_open
    }

    /// Whether what is missing are bytes of a body.
    pub(super) fn is_in_data(self) -> bool {
        self.left > 0 && self.kind == DATA && self.ended > 0
    }

    /// Whether what is missing is the rest of a request's head.
    pub(super) fn is_in_request_head(self) -> bool {
        self.is_opening
    }

    /// Changes when a frame ends, or a header block.
    pub(super) fn ended(self) -> u32 {
        self.ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: u32) -> Vec<u8> {
        let mut frame = length.to_be_bytes()[1..].to_vec();
        frame.extend([0, 0, 0, 0, 0, 1]);
        frame.resize(9 + length as usize, 0xff);
        frame
    }

    #[test]
    fn ends_are_found_however_the_bytes_are_split() {
        let frames = [frame(0), frame(300), frame(8), frame(0)];
        let mut bytes = vec![b'P'; 24];
        let mut ends = vec![24];
        for frame in &frames {
            bytes.extend(frame);
            ends.push(bytes.len());
        }
        for step in [1, 2, 7, 24, 64, bytes.len()] {
            let (mut follower, mut seen) = (Frames::after_preface(24), 0);
            for piece in bytes.chunks(step) {
                follower.take(piece);
                seen += piece.len();
                assert_eq!(follower.is_between(), ends.contains(&seen), "{step} {seen}");
            }
        }
    }

    /// A header block is one thing, whatever its frames; the rest of a body is another than the rest of anything else.
    #[test]
    fn header_blocks_and_bodies_are_told_from_other_frames() {
        let head = |length: u8, kind: u8, flags: u8| [0, 0, length, kind, flags, 0, 0, 0, 1];
        let mut follower = Frames::after_preface(24);
        let mut look = |bytes: &[u8]| {
            follower.take(bytes);
            (follower.is_between(), follower.is_in_data(), follower.ended())
        };
        assert_eq!(look(&[b'P'; 23]), (false, false, 0));
        assert_eq!(look(b"P"), (true, false, 1));
        assert_eq!(look(&head(1, HEADERS, 0)), (false, false, 1));
        assert_eq!(look(b"x"), (false, false, 1));
        assert_eq!(look(&head(0, CONTINUATION, 0)), (false, false, 1));
        assert_eq!(look(&head(1, CONTINUATION, END_HEADERS)), (false, false, 1));
        assert_eq!(look(b"x"), (true, false, 2));
        assert_eq!(look(&head(2, DATA, 0)[..8]), (false, false, 2));
        assert_eq!(look(&[1]), (false, true, 2));
        assert_eq!(look(b"x"), (false, true, 2));
        assert_eq!(look(b"x"), (true, false, 3));
        assert_eq!(look(&head(8, 6, 0)), (false, false, 3));
        assert_eq!(look(&[0; 8]), (true, false, 4));
        // A head without END_HEADERS, then the end of it: never between.
        assert_eq!(look(&head(0, HEADERS, 0)), (false, false, 4));
    }

    #[test]
    fn a_requests_head_is_told_from_trailers_and_all_else() {
        let head =
            |length: u8, kind: u8, flags: u8, stream: [u8; 4]| [&[0, 0, length, kind, flags], &stream[..]].concat();
        let mut follower = Frames::after_preface(24);
        let mut look = |bytes: &[u8]| {
            follower.take(bytes);
            follower.is_in_request_head()
        };
        assert!(!look(&[b'P'; 24]));
        assert!(!look(&head(2, HEADERS, 0, [0, 0, 1, 1])[..8]), "of which stream is not known");
        assert!(look(&[1]) && look(b"x") && look(b"x"));
        assert!(look(&head(1, CONTINUATION, END_HEADERS, [0, 0, 1, 1])[..5]) && look(&[0, 0, 1, 1]));
        assert!(!look(b"x"), "it is whole");
        for (kind, stream) in [(HEADERS, 1), (HEADERS, 0), (HEADERS, 2), (DATA, 1), (6, 0)] {
            assert!(!look(&head(1, kind, 0, [0, 0, 1, stream])), "{kind} {stream}");
            assert!(!look(b"x") && !look(&head(0, CONTINUATION, END_HEADERS, [0, 0, 1, stream])));
        }
        assert!(look(&head(1, HEADERS, END_HEADERS, [0x80, 0, 1, 3])) && !look(b"x"));
        assert!(!look(&head(0, HEADERS, END_HEADERS, [0, 0, 1, 5])));
    }
}
