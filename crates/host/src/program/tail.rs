//! What programs say: the last of it kept for records, all of it told line by line, within limits.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use evergate_sys::Pid;

use crate::report::{Line, Report, Stream};

/// What is kept of standard error for the record of a program's end: a long traceback.
pub const TAIL_BYTES: usize = 16 << 10;
/// Longer lines are cut.
const LINE_BYTES: usize = 8 << 10;
/// Lines told within each second; more than a log is read for, and so few that writing them costs nobody anything.
const LINES_PER_SECOND: u32 = 500;

/// The last bytes of a stream.
#[derive(Debug, Default)]
pub(crate) struct Tail(VecDeque<u8>);

impl Tail {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let kept = bytes.get(bytes.len().saturating_sub(TAIL_BYTES)..).unwrap_or_default();
        let too_many = (self.0.len() + kept.len()).saturating_sub(TAIL_BYTES);
        self.0.drain(..too_many);
        self.0.extend(kept);
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let (first, second) = self.0.as_slices();
        [first, second].concat()
    }
}

/// Cuts a stream into lines and tells them.
pub(crate) struct Lines {
    program: Pid,
    stream: Stream,
    /// The beginning of a line whose end has not come, up to [`LINE_BYTES`].
    begun: Vec<u8>,
    is_cut: bool,
    second: Instant,
    told: u32,
    dropped: u64,
}

impl Lines {
    pub(crate) fn new(program: Pid, stream: Stream, now: Instant) -> Self {
        Self { program, stream, begun: Vec::new(), is_cut: false, second: now, told: 0, dropped: 0 }
    }

    pub(crate) fn push(&mut self, mut bytes: &[u8], now: Instant, report: &dyn Report) {
        if now.saturating_duration_since(self.second) >= Duration::from_secs(1) {
            (self.second, self.told) = (now, 0);
        }
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            if self.told >= LINES_PER_SECOND {
                // Only counted, at memory's speed: a program that floods its log must not take our time.
                let last = memchr::memrchr(b'\n', bytes).unwrap_or(end);
                let (lines, rest) = bytes.split_at(last + 1);
                let count = memchr::memchr_iter(b'\n', lines).count();
                self.dropped = self.dropped.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
                self.begun.clear();
                self.is_cut = false;
                bytes = rest;
                break;
            }
            let (line, rest) = bytes.split_at(end);
            self.keep(line);
            self.tell(report);
            bytes = rest.get(1..).unwrap_or_default();
        }
        self.keep(bytes);
    }

    /// The last line may have no end.
    pub(crate) fn finish(&mut self, report: &dyn Report) {
        if !self.begun.is_empty() || self.dropped > 0 {
            self.tell(report);
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = LINE_BYTES.saturating_sub(self.begun.len());
        self.is_cut |= bytes.len() > room;
        self.begun.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
    }

    fn tell(&mut self, report: &dyn Report) {
        self.told = self.told.saturating_add(1);
        report.line(Line {
            program: self.program,
            stream: self.stream,
            text: &self.begun,
            is_cut: std::mem::take(&mut self.is_cut),
            dropped: std::mem::take(&mut self.dropped),
        });
        self.begun.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::program::{Ended, Failed};

    #[derive(Default)]
    struct Heard(Mutex<Vec<(Vec<u8>, bool, u64)>>);

    impl Report for Heard {
        fn started(&self, _: Pid) {}
        fn failed(&self, _: &Failed) {}
        fn listens(&self, _: Option<&str>) {}
        fn serves(&self, _: bool) {}
        fn load(&self, _: u32, _: u32) {}
        fn ended(&self, _: &Ended) {}
        fn line(&self, line: Line<'_>) {
            self.0.lock().unwrap().push((line.text.to_vec(), line.is_cut, line.dropped));
        }
    }

    fn lines(now: Instant) -> Lines {
        Lines::new(Pid::from_raw(1).unwrap(), Stream::Error, now)
    }

    #[test]
    fn the_tail_keeps_the_last_bytes_however_they_come() {
        let text: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8).collect();
        for size in [1, 7, 4096, TAIL_BYTES, TAIL_BYTES + 1, text.len()] {
            let mut tail = Tail::default();
            text.chunks(size).for_each(|chunk| tail.push(chunk));
            assert_eq!(tail.bytes(), text[text.len() - TAIL_BYTES..], "{size}");
        }
    }

    #[test]
    fn lines_are_the_same_however_they_come() {
        let now = Instant::now();
        let text = b"one\n\ntwo \xff\nthree";
        for size in 1..text.len() {
            let (heard, mut lines) = (Heard::default(), lines(now));
            text.chunks(size).for_each(|chunk| lines.push(chunk, now, &heard));
            lines.finish(&heard);
            let heard: Vec<_> = heard.0.into_inner().unwrap().into_iter().map(|(text, ..)| text).collect();
            assert_eq!(heard, [&b"one"[..], b"", b"two \xff", b"three"]);
        }
    }

    #[test]
    fn a_long_line_is_cut_and_says_so() {
        let (now, heard) = (Instant::now(), Heard::default());
        let mut lines = lines(now);
        for _ in 0..100 {
            lines.push(&[b'x'; 1000], now, &heard);
        }
        lines.push(b"\nshort\n", now, &heard);
        let heard = heard.0.into_inner().unwrap();
        assert_eq!(heard, [(vec![b'x'; LINE_BYTES], true, 0), (b"short".to_vec(), false, 0)]);
    }

    #[test]
    fn too_many_lines_are_counted_instead() {
        let (now, heard) = (Instant::now(), Heard::default());
        let mut lines = lines(now);
        let max = u64::from(LINES_PER_SECOND);
        for _ in 0..max + 70 {
            lines.push(b"x\n", now, &heard);
        }
        assert_eq!(heard.0.lock().unwrap().len() as u64, max);
        lines.push(b"y\n", now + Duration::from_secs(1), &heard);
        assert_eq!(heard.0.into_inner().unwrap().last(), Some(&(b"y".to_vec(), false, 70)));
    }
}
