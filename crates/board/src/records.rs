//! Access records on their way to the clerk: a ring per child and one for the master, each with one writer.
//!
//! A record is one word with its length, then its bytes. The writer shows it by moving `written` behind it, the clerk lets go of
//! it by moving `taken`: a death of either at any word loses nothing that was shown, and shows nothing that is not whole. What a
//! writer that runs wild leaves here costs its own ring's records and no more.
//!
//! Holds INV-RING-1 (ARCHITECTURE.md).

use std::sync::atomic::Ordering;

use evergate_core::record::LINE_BYTES_MAX;

use crate::atomic::{AtomicU64, planted};
use crate::board::Board;

/// Words of a ring: a MiB, two to three thousand records. Memory is taken as it is touched.
#[cfg(not(test))]
pub(crate) const RING_WORDS: usize = (1 << 20) / 8;
/// Room for three small records, so that the checker sees a full ring and its turn.
#[cfg(test)]
pub(crate) const RING_WORDS: usize = 8;

const ROOM: u64 = RING_WORDS as u64;

/// Bytes that a ring holds, with a word for each record's length.
pub const RING_BYTES: usize = RING_WORDS * 8;

/// A word with a cache line of its own: the two ends belong to two processes.
#[derive(Debug)]
#[repr(C, align(64))]
struct End(AtomicU64);

/// How far a ring's writer and reader are: words since the start of the run.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct RingHead {
    written: End,
    taken: End,
}

/// One ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring<'a> {
    pub(crate) head: &'a RingHead,
    pub(crate) words: &'a [AtomicU64],
}

fn place(position: u64) -> usize {
    usize::try_from(position % ROOM).unwrap_or(0)
}

/// The words from a position on: those up to the ring's end, and those behind its turn.
fn from(words: &[AtomicU64], position: u64) -> [&[AtomicU64]; 2] {
    let at = place(position);
    let (before, after) = words.split_at_checked(at).unwrap_or_default();
    [after, before]
}

fn word(words: &[AtomicU64], position: u64) -> Option<&AtomicU64> {
    words.get(place(position))
}

fn put(value: u64, word: Option<&AtomicU64>) {
    if let Some(word) = word {
        word.store(value, Ordering::Relaxed);
    }
}

/// How many words the bytes of a record take, without that of its length.
fn words_of(bytes: usize) -> u64 {
    u64::try_from(bytes.div_ceil(8)).unwrap_or(u64::MAX)
}

impl Ring<'_> {
    /// Whether there was room. Before the record is shown, `note` is told how far the ring is written.
    fn write(&self, record: &[u8], note: impl FnOnce(u64)) -> bool {
        let written = self.head.written.0.load(Ordering::Relaxed);
        let used = written.wrapping_sub(self.head.taken.0.load(Ordering::Acquire));
        let needed = words_of(record.len()).saturating_add(1);
        let is_full = used > ROOM || needed > ROOM - used;
        if record.is_empty() || record.len() > LINE_BYTES_MAX || (is_full && !planted!(WritesOver)) {
            return false;
        }
        let end = written.wrapping_add(needed);
        if planted!(ShowsFirst) {
            self.head.written.0.store(end, Ordering::Release);
        }
        put(u64::try_from(record.len()).unwrap_or(0), word(self.words, written));
        let (mut pieces, rest) = record.as_chunks::<8>();
        // Two plain loops: this is on the way of every request.
        for part in from(self.words, written.wrapping_add(1)) {
            let (here, after) = pieces.split_at(pieces.len().min(part.len()));
            part.iter().zip(here).for_each(|(to, piece)| to.store(u64::from_le_bytes(*piece), Ordering::Relaxed));
            pieces = after;
        }
        if !rest.is_empty() {
            let mut last = [0; 8];
            last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
            put(u64::from_le_bytes(last), word(self.words, end.wrapping_sub(1)));
        }
        if planted!(NotesShownLate) {
            self.head.written.0.store(end, Ordering::Release);
        }
        if !planted!(ShowsUnnoted) {
            note(written);
        }
        self.head.written.0.store(end, Ordering::Release);
        true
    }

    /// Appends the records from `taken` to `written`, up to the first that is none; says whether there was no such. Each is a line.
    fn copy(&self, (taken, written): (u64, u64), out: &mut Vec<u8>) -> bool {
        let mut at = taken;
        while at != written {
            let length = word(self.words, at).map_or(0, |word| word.load(Ordering::Relaxed));
            let left = written.wrapping_sub(at).wrapping_sub(1);
            let Some(bytes) = usize::try_from(length).ok().filter(|bytes| (1..=LINE_BYTES_MAX).contains(bytes)) else {
                return false;
            };
            let count = words_of(bytes);
            if count > left {
                return false;
            }
            let start = out.len();
            let end = start.saturating_add(bytes);
            let mut more = usize::try_from(count).unwrap_or(0);
            for part in from(self.words, at.wrapping_add(1)) {
                let here = part.get(..more.min(part.len())).unwrap_or_default();
                here.iter().for_each(|word| out.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes()));
                more -= here.len();
            }
            out.truncate(end);
            if out.last() != Some(&b'\n') {
                out.truncate(start);
                return false;
            }
            at = at.wrapping_add(count).wrapping_add(1);
        }
        true
    }

    fn shown(&self) -> (u64, u64) {
        (self.head.taken.0.load(Ordering::Relaxed), self.head.written.0.load(Ordering::Acquire))
    }
}

/// The writing end of a ring: one at a time for each row, in the process that the row belongs to.
#[derive(Debug)]
pub struct RecordWriter {
    board: Board,
    ring: u32,
}

impl RecordWriter {
    pub(crate) fn new(board: Board, ring: u32) -> Self {
        Self { board, ring }
    }

    /// Puts a record, a line of at most [`LINE_BYTES_MAX`] bytes, into the ring; `false` if there is no room, or nothing to be written.
    pub fn write(&mut self, record: &[u8]) -> bool {
        self.write_noted(record, |_| ())
    }

    /// The same; before the record is shown, `note` is told how far the ring is written, so that whoever finds this process dead
    /// knows by [`Board::records_written`] whether it was shown. Not called where nothing is written.
    pub fn write_noted(&mut self, record: &[u8], note: impl FnOnce(u64)) -> bool {
        self.board.ring(self.ring).is_some_and(|ring| ring.write(record, note))
    }
}

/// What a look has found.
#[derive(Debug, Default)]
pub struct Records {
    /// One record after the other, the master's last.
    pub bytes: Vec<u8>,
    /// Rings that held something else than records; what they showed from there on is not among the bytes.
    pub broken: u32,
    /// Words shown in the ring that had the most.
    pub fullest: usize,
    /// Rings with something shown, and how far that goes.
    ends: Vec<(u32, u64)>,
}

impl Board {
    /// What is shown in all rings at this moment; it stays until it is [taken](Board::take_records).
    ///
    /// The master writes of a request when its worker is dead. Its ring is looked at first, so that what such a worker has
    /// written before is found by the same look or was by one before it.
    #[must_use]
    pub fn records(&self) -> Records {
        let mut found = Records::default();
        let masters = self.shape().children;
        let shown = |ring: Ring<'_>| ring.shown();
        let mut shown_by_master = self.ring(masters).map(shown);
        for number in 0..masters {
            if let Some(ring) = self.ring(number) {
                found.add(number, ring, ring.shown());
            }
        }
        if planted!(LooksAtMasterLast) {
            shown_by_master = self.ring(masters).map(shown);
        }
        if let Some((ring, shown)) = self.ring(masters).zip(shown_by_master) {
            found.add(masters, ring, shown);
        }
        found
    }

    /// How far a child's ring is written: words since the start of the run.
    #[must_use]
    pub fn records_written(&self, row: u32) -> u64 {
        self.ring(row).map_or(0, |ring| ring.head.written.0.load(Ordering::Acquire))
    }

    /// Lets go of what was looked at, for its writers to write over. In the order in which it was written to the file: whoever dies
    /// in between leaves what stands at the end of that.
    pub fn take_records(&self, looked_at: &Records) {
        for (number, end) in &looked_at.ends {
            if let Some(ring) = self.ring(*number).filter(|_| !planted!(NeverTakes)) {
                ring.head.taken.0.store(*end, Ordering::Release);
            }
        }
    }
}

impl Records {
    /// Whether there was nothing, not even what is broken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    fn add(&mut self, number: u32, ring: Ring<'_>, (taken, written): (u64, u64)) {
        if taken == written {
            return;
        }
        if planted!(TakesFirst) {
            ring.head.taken.0.store(written, Ordering::Release);
        }
        self.ends.push((number, written));
        let shown = written.wrapping_sub(taken);
        if shown > ROOM || !ring.copy((taken, written), &mut self.bytes) {
            self.broken += 1;
        }
        self.fullest = self.fullest.max(usize::try_from(shown).unwrap_or(RING_WORDS));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Shape;

    fn board() -> Board {
        Board::create(Shape { children: 2, slots: 1, series: 2, labels: 2 }, 1).unwrap()
    }

    #[test]
    fn records_come_whole_in_order_and_stay_until_they_are_taken() {
        let board = board();
        let (mut one, mut two) = (board.record_writer(0), board.record_writer(1));
        let mut master = board.master_record_writer();
        assert!(master.write(b"m\n") && two.write(b"1234567\n") && one.write(b"123456789\n") && one.write(b"x\n"));
        assert!(!one.write(b"123456789 123456789 123\n"), "five words are used of eight");
        assert!(!one.write(b"") && !one.write(&[b'x'; LINE_BYTES_MAX + 1]));
        let looked_at = board.records();
        assert_eq!(looked_at.bytes, b"123456789\nx\n1234567\nm\n");
        assert_eq!((looked_at.broken, looked_at.fullest), (0, 5));
        assert_eq!(board.records().bytes, looked_at.bytes);
        board.take_records(&looked_at);
        assert!(board.records().bytes.is_empty());
        // Over the ring's end, again and again, by the next process of that row.
        for count in 0..40 {
            let line = format!("{count}{}\n", "y".repeat(count % 30));
            assert!(board.record_writer(0).write(line.as_bytes()));
            let looked_at = board.records();
            assert_eq!(looked_at.bytes, line.as_bytes());
            board.take_records(&looked_at);
        }
    }

    #[test]
    fn nonsense_costs_what_its_own_ring_showed_and_no_more() {
        for (written, length) in [(1, 0), (1, 8), (3, 100), (8, u64::MAX), (9, 1), (u64::MAX, 1), (2, 1 << 40)] {
            let board = board();
            let (mut wild, mut good) = (board.record_writer(0), board.record_writer(1));
            assert!(good.write(b"good\n"));
            let ring = board.ring(0).unwrap();
            ring.words[0].store(length, Ordering::Relaxed);
            ring.head.written.0.store(written, Ordering::Release);
            let looked_at = board.records();
            assert_eq!((looked_at.bytes.as_slice(), looked_at.broken), (b"good\n".as_slice(), 1), "{written} {length}");
            board.take_records(&looked_at);
            assert!(wild.write(b"again\n"), "{written} {length}");
            let looked_at = board.records();
            assert_eq!((looked_at.bytes.as_slice(), looked_at.broken), (b"again\n".as_slice(), 0));
        }
    }

    #[test]
    fn what_stands_before_the_nonsense_is_kept_and_a_line_has_its_end() {
        let board = board();
        let mut writer = board.record_writer(0);
        assert!(writer.write(b"good\n") && writer.write(b"its end is gone\n"));
        board.ring(0).unwrap().words[4].store(0, Ordering::Relaxed);
        let looked_at = board.records();
        assert_eq!((looked_at.bytes.as_slice(), looked_at.broken), (b"good\n".as_slice(), 1));
        board.take_records(&looked_at);
        assert!(board.records().is_empty());
    }

    #[test]
    fn a_reader_that_runs_wild_costs_records_and_no_more() {
        let board = board();
        let ring = board.ring(0).unwrap();
        ring.head.taken.0.store(77, Ordering::Release);
        assert!(!board.record_writer(0).write(b"lost\n"));
        board.take_records(&board.records());
        assert!(board.record_writer(0).write(b"again\n"));
    }
}
