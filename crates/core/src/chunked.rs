//! The framing of a chunked body (RFC 9112, 7.1).

use std::ops::Range;

use bytes::Bytes;

use crate::error::{Error, Fault};

/// Follows a chunked body: where its data lies and where it ends.
#[derive(Debug, Default)]
pub struct Chunks {
    state: State,
    /// Bytes of size lines and trailers so far in the current one.
    line_bytes: usize,
    /// Bytes of extensions and trailers so far, in all.
    extra_bytes: usize,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    SizeStart,
    Size(u64),
    Extension(u64),
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    TrailerStart,
    Trailer,
    TrailerLf,
    EndLf,
    Done,
}

/// Longest size line with its extension, and longest trailer line.
const LINE_BYTES_MAX: usize = 4096;
/// Most bytes of all extensions and trailers of a body: nobody here reads them.
const EXTRA_BYTES_MAX: usize = 64 * 1024;
/// Most digits of a size, zeros in front counted: more are only sent to be read differently by others.
const DIGITS_MAX: usize = 16;

impl Chunks {
    /// Takes the bytes that belong to this body; returns how many, and whether the body is complete.
    ///
    /// # Errors
    /// `malformed_request` for a framing that RFC 9112, 7.1 does not allow.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(usize, bool), Error> {
        let mut at = 0;
        while self.data(bytes, &mut at)?.is_some() {}
        Ok((at, self.is_done()))
    }

    /// The next run of data in `bytes`, looked for from `at`, which goes behind it; none when the bytes or the body are at
    /// their end.
    ///
    /// # Errors
    /// As `take`.
    pub fn data(&mut self, bytes: &[u8], at: &mut usize) -> Result<Option<Range<usize>>, Error> {
        while *at < bytes.len() && !self.is_done() {
            if let State::Data(left) = self.state {
                let start = *at;
                let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - start);
                *at += here;
                let left = left - here as u64;
                self.state = if left == 0 { State::DataCr } else { State::Data(left) };
                return Ok(Some(start..*at));
            }
            let Some(byte) = bytes.get(*at) else { break };
            self.step(*byte)?;
            *at += 1;
        }
        Ok(None)
    }

    /// All data in `piece` as one, and how many of its bytes belong to the body. Data in one run is not copied.
    ///
    /// # Errors
    /// As `take`; what came before the mistake is given first, and the next look finds the same again.
    pub fn joined(&mut self, piece: &Bytes) -> Result<(Option<Bytes>, usize), Error> {
        let (mut at, mut first, mut joined) = (0, None, Vec::new());
        loop {
            let run = match self.data(piece, &mut at) {
                Ok(Some(run)) => run,
                Ok(None) => break,
                Err(_) if first.is_some() => break,
                Err(error) => return Err(error),
            };
            let Some(before) = first.replace(run.clone()) else { continue };
            if joined.is_empty() {
                joined.reserve(piece.len() - before.start);
                joined.extend_from_slice(piece.get(before).unwrap_or_default());
            }
            joined.extend_from_slice(piece.get(run).unwrap_or_default());
        }
        let data = match first {
            Some(_) if !joined.is_empty() => Some(joined.into()),
            Some(run) => Some(piece.slice(run)),
            None => None,
        };
        Ok((data, at))
    }

    /// Whether the body is complete.
    #[must_use]
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    fn step(&mut self, byte: u8) -> Result<(), Error> {
        use State as S;
        self.line_bytes += 1;
        if self.line_bytes > LINE_BYTES_MAX {
            return Err(refuse("a chunk's size line or a trailer is too long"));
        }
        if matches!(self.state, S::Extension(_) | S::TrailerStart | S::Trailer) {
            self.extra_bytes += 1;
            if self.extra_bytes > EXTRA_BYTES_MAX {
                return Err(refuse("the chunked body has too many extensions or trailers"));
            }
        }
        let next = match (&self.state, byte) {
            (S::SizeStart, _) => S::Size(hex(0, byte)?),
            (S::Size(n), b'\r') => S::SizeLf(*n),
            (S::Size(n), b';' | b' ' | b'\t') => S::Extension(*n),
            (S::Size(n), _) if self.line_bytes <= DIGITS_MAX => S::Size(hex(*n, byte)?),
            (S::Extension(n), b'\r') => S::SizeLf(*n),
            (S::Extension(n), byte) if is_text(byte) => S::Extension(*n),
            (S::SizeLf(0), b'\n') => S::TrailerStart,
            (S::SizeLf(n), b'\n') => S::Data(*n),
            (S::DataCr, b'\r') => S::DataLf,
            (S::DataLf, b'\n') => S::SizeStart,
            (S::TrailerStart, b'\r') => S::EndLf,
            (S::Trailer, b'\r') => S::TrailerLf,
            (S::TrailerStart | S::Trailer, byte) if is_text(byte) => S::Trailer,
            (S::TrailerLf, b'\n') => S::TrailerStart,
            (S::EndLf, b'\n') => S::Done,
            _ => return Err(refuse("the chunked body breaks its own framing")),
        };
        if matches!(next, S::SizeStart | S::Data(_) | S::TrailerStart) {
            self.line_bytes = 0;
        }
        self.state = next;
        Ok(())
    }
}

/// No control character but a tab.
fn is_text(byte: u8) -> bool {
    byte == b'\t' || (byte >= 0x20 && byte != 0x7f)
}

fn hex(so_far: u64, byte: u8) -> Result<u64, Error> {
    let digit = char::from(byte).to_digit(16).ok_or_else(|| refuse("a chunk's size is not a hexadecimal number"))?;
    if so_far >> 60 != 0 {
        return Err(refuse("a chunk's size is too large"));
    }
    Ok(so_far << 4 | u64::from(digit))
}

fn refuse(message: &'static str) -> Error {
    Error::new(Fault::MalformedRequest, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_end_where_they_end_for_every_split() {
        let body = b"5;ext=1\r\nhello\r\n0\r\nTrailer: x\r\n\r\nGET /next";
        let end = body.len() - "GET /next".len();
        for split in 0..=body.len() {
            let mut chunks = Chunks::default();
            let (first, done) = chunks.take(&body[..split]).unwrap();
            let total = if done { first } else { first + chunks.take(&body[split..]).unwrap().0 };
            assert_eq!(total, end, "{split}");
        }
    }

    #[test]
    fn the_data_is_the_same_for_every_split() {
        let body = b"5;ext=1\r\nhello\r\n1\r\n \r\n6\r\nworld!\r\n0\r\n\r\n";
        for split in 0..=body.len() {
            let (mut chunks, mut text) = (Chunks::default(), Vec::new());
            for part in [&body[..split], &body[split..]] {
                let mut at = 0;
                while let Some(run) = chunks.data(part, &mut at).unwrap() {
                    text.extend_from_slice(&part[run]);
                }
                assert_eq!(at, part.len(), "{split}");
            }
            assert!(chunks.is_done());
            assert_eq!(text, b"hello world!", "{split}");
        }
    }

    #[test]
    fn broken_chunks_are_refused() {
        for bad in [
            &b"x\r\n"[..],
            b"\r\n",
            b"5\nhello",
            b"1\r\nab\r\n",
            b"fffffffffffffffff\r\n",
            b"0\r\n\n",
            b"-1\r\n",
            b"1;\0\r\n",
            b"00000000000000001\r\n",
        ] {
            assert!(Chunks::default().take(bad).is_err(), "{bad:?}");
        }
        let long = [b"1;".to_vec(), vec![b'x'; LINE_BYTES_MAX]].concat();
        assert!(Chunks::default().take(&long).is_err());
        // Each short enough, and never an end.
        let extended = [b"1;".to_vec(), vec![b'x'; 4000], b"\r\na\r\n".to_vec()].concat().repeat(20);
        let trailers = [b"0\r\n".to_vec(), b"a:b\r\n".repeat(30_000)].concat();
        for endless in [extended, trailers] {
            let said = Chunks::default().take(&endless).unwrap_err().message;
            assert!(said.contains("too many"), "{said}");
        }
    }
}
