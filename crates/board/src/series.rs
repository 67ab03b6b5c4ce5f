//! Counters that outlive the process that counted: one open-addressed table per row, never reset.
//!
//! Holds INV-COUNT-1 (ARCHITECTURE.md).

use std::sync::atomic::Ordering;

use crate::atomic::{AtomicU64, planted};

/// Which counter: a metric's number and up to three labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeriesKey {
    /// The metric's number, given by the telemetry's list of names.
    pub metric: u8,
    /// First label.
    pub a: u16,
    /// Second label.
    pub b: u16,
    /// Third label.
    pub c: u16,
}

/// Set in every key, so that none is 0, which marks an empty cell.
const TAKEN: u64 = 1 << 63;

impl From<SeriesKey> for u64 {
    fn from(key: SeriesKey) -> Self {
        TAKEN | Self::from(key.metric) << 48 | Self::from(key.a) << 32 | Self::from(key.b) << 16 | Self::from(key.c)
    }
}

impl TryFrom<u64> for SeriesKey {
    type Error = ();

    fn try_from(word: u64) -> Result<Self, ()> {
        let [top, metric, a1, a0, b1, b0, c1, c0] = word.to_be_bytes();
        if top != 0x80 {
            return Err(());
        }
        Ok(Self {
            metric,
            a: u16::from_be_bytes([a1, a0]),
            b: u16::from_be_bytes([b1, b0]),
            c: u16::from_be_bytes([c1, c0]),
        })
    }
}

/// A row's head of its table.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct SeriesHead {
    used: AtomicU64,
    dropped: AtomicU64,
}

/// One counter.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Cell {
    key: AtomicU64,
    value: AtomicU64,
}

/// The counters of one row: of all processes that ever had it. Whatever dies, a sum over all rows never goes back.
#[derive(Clone, Copy, Debug)]
pub struct Series<'a> {
    head: &'a SeriesHead,
    cells: &'a [Cell],
}

impl<'a> Series<'a> {
    pub(crate) fn new(head: &'a SeriesHead, cells: &'a [Cell]) -> Self {
        Self { head, cells }
    }

    /// Counts. Meant for the row's owner (its child; the master once that is buried); more than one writer at a time is
    /// slower and still exact.
    pub fn add(&self, key: SeriesKey, n: u64) {
        match self.cell(u64::from(key)) {
            Some(cell) if planted!(AddsInTwo) => {
                let sum = cell.value.load(Ordering::Acquire) + n;
                cell.value.store(sum, Ordering::Release);
                sum
            }
            Some(cell) => cell.value.fetch_add(n, Ordering::Release),
            None => self.head.dropped.fetch_add(1, Ordering::Release),
        };
    }

    /// Counts one. Before that `note` is told where the counter stands, so that whoever finds this process dead in between
    /// can see whether it came to it; that needs one writer.
    pub fn add_one(&self, key: SeriesKey, note: impl FnOnce(u64)) {
        let cell = self.cell(u64::from(key));
        let before = cell.map_or(0, |cell| cell.value.load(Ordering::Acquire));
        if planted!(NotesLate) {
            self.add(key, 1);
            return note(before);
        }
        if !planted!(CountsUnnoted) {
            note(before);
        }
        match cell {
            Some(cell) => cell.value.fetch_add(1, Ordering::Release),
            None => self.head.dropped.fetch_add(1, Ordering::Release),
        };
    }

    /// The key's cell, taken for it if it had none; none when the table is full.
    #[inline]
    fn cell(&self, word: u64) -> Option<&'a Cell> {
        for cell in self.probe(word) {
            let mut there = cell.key.load(Ordering::Acquire);
            if there == 0 {
                match cell.key.compare_exchange(0, word, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => {
                        self.head.used.fetch_add(1, Ordering::Release);
                        there = word;
                    }
                    Err(_) if planted!(KeysBlindly) => there = word,
                    Err(other) => there = other,
                }
            }
            if there == word {
                return Some(cell);
            }
        }
        None
    }

    /// One counter; 0 if it was never counted.
    #[must_use]
    pub fn get(&self, key: SeriesKey) -> u64 {
        let word = u64::from(key);
        for cell in self.probe(word) {
            match cell.key.load(Ordering::Acquire) {
                0 => return 0,
                there if there == word => return cell.value.load(Ordering::Acquire),
                _ => {}
            }
        }
        0
    }

    /// All counters, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (SeriesKey, u64)> + use<'a> {
        // A row that never counted is skipped without touching its cells: reading a hole of a memfd allocates it.
        let cells = if self.head.used.load(Ordering::Acquire) == 0 { &[] } else { self.cells };
        cells.iter().filter_map(|cell| {
            let key = SeriesKey::try_from(cell.key.load(Ordering::Acquire)).ok()?;
            Some((key, cell.value.load(Ordering::Acquire)))
        })
    }

    /// Counts that found no place because the table was full.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.head.dropped.load(Ordering::Acquire)
    }

    /// The cells in which the key may stand, nearest first.
    fn probe(&self, word: u64) -> impl Iterator<Item = &'a Cell> + use<'a> {
        // Fibonacci hashing: the upper bits of the product are the mixed ones.
        let start = usize::try_from(word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40).unwrap_or(0);
        let count = self.cells.len();
        let start = start.checked_rem(count).unwrap_or(0);
        let (front, back) = self.cells.split_at_checked(start).unwrap_or((self.cells, &[]));
        back.iter().chain(front)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_the_word_and_are_never_zero() {
        for key in [
            SeriesKey { metric: 0, a: 0, b: 0, c: 0 },
            SeriesKey { metric: 255, a: 65_535, b: 1, c: 2 },
            SeriesKey { metric: 7, a: 1, b: 65_535, c: 65_535 },
        ] {
            let word = u64::from(key);
            assert_ne!(word, 0);
            assert_eq!(SeriesKey::try_from(word), Ok(key));
        }
        assert_eq!(SeriesKey::try_from(0), Err(()));
        assert_eq!(SeriesKey::try_from(u64::MAX), Err(()));
    }
}
