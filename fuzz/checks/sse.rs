//! A stream of events, however it is cut, against the standard's rules line by line.

use bytes::Bytes;
use evergate_core::json::scan_chunk;
use evergate_core::sse::Splitter;

/// One event: data, name, whether it has data, whether it is comments only.
type Seen = (Vec<u8>, Option<Vec<u8>>, bool, bool);

/// What a whole stream came to.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    events: Vec<Seen>,
    /// Bytes of completed events.
    passed: Vec<u8>,
    is_too_large: bool,
}

/// The first byte chooses where the rest is cut.
pub fn check(bytes: &[u8]) {
    let Some((cut, stream)) = bytes.split_first() else { return };
    for limit in [1 << 20, 48] {
        let whole = read(stream, &[], limit);
        assert!(stream.starts_with(&whole.passed), "other bytes came out");
        let steps: Vec<Vec<usize>> =
            [1, 2, 3, 5, usize::from(*cut) + 1].iter().map(|step| every(stream.len(), *step)).collect();
        let single = (stream.len() < 80).then(|| (1..stream.len()).map(|at| vec![at]).collect::<Vec<_>>());
        for cuts in steps.into_iter().chain(single.unwrap_or_default()) {
            let pieces = read(stream, &cuts, limit);
            // Of an event that is too large, the limit may be passed sooner or later by the LF of its last CRLF.
            if limit < 1 << 20 && pieces.is_too_large != whole.is_too_large {
                continue;
            }
            assert_eq!(pieces, whole, "cut at {cuts:?}, limit {limit}");
        }
        if limit == 1 << 20 {
            assert_eq!(whole.events, by_the_standard(stream, whole.passed.len()));
        }
    }
}

fn every(length: usize, step: usize) -> Vec<usize> {
    (step..length).step_by(step).collect()
}

fn read(stream: &[u8], cuts: &[usize], limit: usize) -> Outcome {
    let mut splitter = Splitter::new(limit);
    let mut outcome = Outcome { events: Vec::new(), passed: Vec::new(), is_too_large: false };
    let mut start = 0;
    for end in cuts.iter().copied().chain([stream.len()]) {
        let piece = Bytes::copy_from_slice(&stream[start..end]);
        let mut raw = 0;
        let pushed = splitter.push(piece, &mut |event| {
            assert!(event.raw.start >= raw && event.raw.end > event.raw.start, "events overlap");
            raw = event.raw.end;
            let _ = (scan_chunk(&event.data), event.is_done());
            let seen = (event.data.to_vec(), event.event.map(<[u8]>::to_vec), event.has_data, event.is_comment);
            outcome.events.push(seen);
        });
        match pushed {
            Ok(bytes) => {
                assert!(raw <= bytes.len(), "an event beyond what was returned");
                outcome.passed.extend_from_slice(&bytes);
            }
            Err(too_large) => {
                outcome.passed.extend_from_slice(&too_large.completed);
                outcome.is_too_large = true;
                assert!(
                    splitter.push(Bytes::from_static(b"\n\n"), &mut |_| panic!("an event behind the end")).is_err()
                );
                return outcome;
            }
        }
        start = end;
    }
    assert_eq!(outcome.passed.len() + splitter.finish(), stream.len(), "bytes were lost");
    assert!(splitter.finish() <= limit);
    outcome
}

/// WHATWG HTML, 9.2.6, over the bytes of completed events.
fn by_the_standard(stream: &[u8], length: usize) -> Vec<Seen> {
    let mut rest = &stream[..length];
    rest = rest.strip_prefix(b"\xef\xbb\xbf").unwrap_or(rest);
    let (mut events, mut fields) = (Vec::new(), Vec::<(Vec<u8>, Vec<u8>)>::new());
    while !rest.is_empty() {
        let length = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n')).expect("completed events end lines");
        let line = &rest[..length];
        let end = length + 1 + usize::from(rest[length..].starts_with(b"\r\n"));
        rest = &rest[end..];
        if line.is_empty() {
            events.push(event(&std::mem::take(&mut fields)));
            continue;
        }
        let colon = line.iter().position(|byte| *byte == b':');
        let (name, value) = colon.map_or((line, &[][..]), |at| (&line[..at], &line[at + 1..]));
        if colon != Some(0) {
            fields.push((name.to_vec(), value.strip_prefix(b" ").unwrap_or(value).to_vec()));
        }
    }
    events
}

fn event(fields: &[(Vec<u8>, Vec<u8>)]) -> Seen {
    let named = |wanted: &[u8]| -> Vec<&[u8]> {
        fields.iter().filter(|(name, _)| name == wanted).map(|(_, value)| value.as_slice()).collect()
    };
    let data = named(b"data");
    let name = named(b"event").last().filter(|name| !name.is_empty()).map(|name| name.to_vec());
    (data.join(&b"\n"[..]), name, !data.is_empty(), fields.is_empty())
}
