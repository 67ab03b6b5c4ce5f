//! Frames on a pipe: cut out of whatever pieces its bytes come in, and written.

use bytes::{Buf, Bytes, BytesMut};
use evergate_core::config::process::Frames;
use evergate_core::{Error, Fault};

/// Bytes before a frame that say how long it is.
const PREFIX: usize = 4;

/// Takes bytes as they come, and gives frames as soon as they are whole. What is in a frame is looked at elsewhere.
pub(crate) struct Decoder {
    frames: Frames,
    bytes_max: usize,
    held: BytesMut,
    /// So many bytes of `held` have no line end in them.
    searched: usize,
}

impl Decoder {
    pub(crate) fn new(frames: Frames, bytes_max: u64) -> Self {
        let bytes_max = usize::try_from(bytes_max).unwrap_or(usize::MAX);
        Self { frames, bytes_max, held: BytesMut::new(), searched: 0 }
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
    }

    /// The next frame that is whole, without what sets it off from others.
    ///
    /// # Errors
    /// `AdapterProtocolError` for one that is too long, as soon as that is known (G17). Nothing after it can be read.
    pub(crate) fn next(&mut self) -> Result<Option<Bytes>, Error> {
        match self.frames {
            Frames::Lines => self.line(),
            Frames::Length => self.counted(),
        }
    }

    fn line(&mut self) -> Result<Option<Bytes>, Error> {
        let rest = self.held.get(self.searched..).unwrap_or_default();
        let length = memchr::memchr(b'\n', rest).map(|at| self.searched + at);
        if length.unwrap_or(self.held.len()) > self.bytes_max {
            return Err(self.too_long());
        }
        self.searched = if length.is_some() { 0 } else { self.held.len() };
        Ok(length.map(|length| {
            let line = self.held.split_to(length).freeze();
            self.held.advance(1);
            line
        }))
    }

    fn counted(&mut self) -> Result<Option<Bytes>, Error> {
        let Some(prefix) = self.held.first_chunk::<PREFIX>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
        if length > self.bytes_max {
            return Err(self.too_long());
        }
        if self.held.len() - PREFIX < length {
            return Ok(None);
        }
        self.held.advance(PREFIX);
        Ok(Some(self.held.split_to(length).freeze()))
    }

    fn too_long(&self) -> Error {
        let message = format!("the program of this model wrote a frame of more than {} bytes", self.bytes_max);
        Error::new(Fault::AdapterProtocolError, message)
    }
}

/// A frame as it is written. None for one that is longer than a prefix can say.
pub(crate) fn encode(frames: Frames, json: &[u8]) -> Option<Bytes> {
    Some(match frames {
        Frames::Lines => [json, b"\n"].concat().into(),
        Frames::Length => [&u32::try_from(json.len()).ok()?.to_be_bytes(), json].concat().into(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOTH: [Frames; 2] = [Frames::Lines, Frames::Length];

    /// All frames of the pieces, and whether it broke after them.
    fn decode<'a>(frames: Frames, max: u64, pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Bytes>, bool) {
        let (mut decoder, mut all) = (Decoder::new(frames, max), Vec::new());
        for piece in pieces {
            decoder.push(piece);
            loop {
                match decoder.next() {
                    Ok(Some(frame)) => all.push(frame),
                    Ok(None) => break,
                    Err(error) => {
                        assert_eq!(error.fault, Fault::AdapterProtocolError);
                        return (all, true);
                    }
                }
            }
        }
        (all, false)
    }

    fn encoded(frames: Frames, all: &[Vec<u8>]) -> Vec<u8> {
        all.iter().flat_map(|json| encode(frames, json).unwrap()).collect()
    }

    #[test]
    fn g17_a_frame_is_bounded_to_the_byte_and_refused_before_its_end() {
        for frames in BOTH {
            let exact = encoded(frames, &[vec![b'x'; 10], vec![b'y'; 10]]);
            assert_eq!(decode(frames, 10, exact.chunks(3)).0.len(), 2);
            let long = encoded(frames, &[vec![b'x'; 10], vec![b'y'; 11]]);
            let (all, is_broken) = decode(frames, 10, long.chunks(3));
            assert_eq!((all.len(), is_broken), (1, true), "{frames:?}");
        }
        assert!(decode(Frames::Lines, 10, [&[b'x'; 11][..]]).1, "without a line end");
        assert!(decode(Frames::Length, 10, [&[0xff; 4][..]]).1, "by its length alone");
    }

    #[test]
    fn every_split_in_three_gives_the_same_frames() {
        let all = [b"{}".to_vec(), Vec::new(), "é\u{1}".into(), b"{\"a\":1}".to_vec()];
        for frames in BOTH {
            let bytes = encoded(frames, &all);
            for first in 0..=bytes.len() {
                for second in first..=bytes.len() {
                    let pieces = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                    assert_eq!(decode(frames, 7, pieces), (all.iter().cloned().map(Bytes::from).collect(), false));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn frames_do_not_depend_on_how_their_bytes_come(
            all in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8),
            sizes in prop::collection::vec(1..20_usize, 1..60),
            is_lines in any::<bool>(),
        ) {
            let frames = if is_lines { Frames::Lines } else { Frames::Length };
            let all: Vec<Vec<u8>> =
                all.into_iter().map(|json| json.into_iter().filter(|byte| *byte != b'\n').collect()).collect();
            let bytes = encoded(frames, &all);
            let (mut pieces, mut rest) = (Vec::new(), &bytes[..]);
            for size in sizes.iter().cycle() {
                if rest.is_empty() { break }
                let (piece, after) = rest.split_at((*size).min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            prop_assert_eq!(decode(frames, 40, pieces), (all.into_iter().map(Bytes::from).collect(), false));
        }
    }
}
