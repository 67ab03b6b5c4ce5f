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

/// Where in the client's frames the reader is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frames {
    /// Bytes of the preface or of a payload that are still to come.
    left: u32,
    /// Bytes of the next frame's head so far.
    head_bytes: u8,
    /// The payload's length as far as that head has said it.
    length: u32,
}

impl Frames {
    /// A connection of which nothing has been handed on, with that many bytes of preface.
    pub(super) fn after_preface(bytes: usize) -> Self {
        Self { left: u32::try_from(bytes).unwrap_or(u32::MAX), head_bytes: 0, length: 0 }
    }

    /// Follows bytes that are handed on.
    pub(super) fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let here = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
                self.left -= here as u32;
                bytes = bytes.get(here..).unwrap_or_default();
                continue;
            }
            let Some((byte, rest)) = bytes.split_first() else { return };
            if self.head_bytes < 3 {
                self.length = self.length << 8 | u32::from(*byte);
            }
            self.head_bytes += 1;
            if self.head_bytes == HEAD_BYTES {
                *self = Self { left: self.length, head_bytes: 0, length: 0 };
            }
            bytes = rest;
        }
    }

    /// Whether the next byte begins a frame.
    pub(super) fn is_between(self) -> bool {
        self.left == 0 && self.head_bytes == 0
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
}
