//! Permits: how many calls to one upstream may be under way, over all workers.
//!
//! A table per upstream has a word per permit, which holds its owner or 0. Taking is a compare-and-swap of 0 for oneself,
//! giving back the reverse, and the master frees what a dead owner held at its burial: a SIGKILL at any point leaks none.
//! Beside them each worker shows how many of its requests wait for a permit and since when the oldest does, so that nobody
//! takes a permit before a peer that has waited longer. All values may be nonsense: an owner that is nobody is freed with
//! the next burial, and whoever gives back what is not his any more changes nothing.
//!
//! Holds INV-PERMIT-1 (ARCHITECTURE.md).

use std::sync::atomic::{AtomicU32, Ordering};

use crate::atomic::{AtomicU64, planted};
use crate::board::Board;
use crate::labels::OTHER;
use crate::rows::{ChildRow, Phase};

/// The highest limit.
pub const PERMITS_MAX: u32 = 4096;
/// Upstreams with a limit, those of earlier generations too: places are not given back.
pub(crate) const TABLES: usize = 128;
pub(crate) const SLOTS: usize = PERMITS_MAX as usize;
pub(crate) const SLOTS_BYTES: usize = SLOTS * size_of::<AtomicU64>();

/// What belongs to the whole table.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct TableHead {
    /// The upstream's label; 0 while the table is free.
    label: AtomicU64,
    /// The limit in force.
    max: AtomicU64,
    /// Permits from this one on were never used.
    high: AtomicU64,
    /// Rows from this one on never waited.
    rows_high: AtomicU64,
}

/// Those of one child that wait.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Line {
    waiting: AtomicU64,
    /// Since when the oldest does, monotonic nanoseconds; 0 when none does.
    since_ns: AtomicU64,
}

/// One upstream's table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table<'a> {
    pub(crate) head: &'a TableHead,
    pub(crate) slots: &'a [AtomicU64],
    pub(crate) lines: &'a [Line],
}

/// What can be seen of an upstream's permits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PermitsSeen {
    /// The upstream.
    pub upstream: String,
    /// The limit in force.
    pub max: u32,
    /// Permits that are held.
    pub held: u32,
    /// Requests that wait for one.
    pub waiting: u64,
}

fn is_alive(board: &Board, row: u32) -> bool {
    board.child(row).is_some_and(|child| child.phase() != Phase::Empty)
}

fn owner_word(row: u32, epoch: u32) -> u64 {
    u64::from(epoch) << 32 | u64::from(row)
}

impl<'a> Table<'a> {
    pub(crate) fn is_taken(&self) -> bool {
        self.head.label.load(Ordering::Acquire) != 0
    }

    /// Whether this table is the label's, after taking it if it was free.
    pub(crate) fn settle(&self, label: u16) -> bool {
        // Upstreams whose names found no place among the labels would share one limit.
        if matches!(label, 0 | OTHER) {
            return false;
        }
        let label = u64::from(label);
        match self.head.label.compare_exchange(0, label, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(other) => other == label,
        }
    }

    fn max(&self) -> u32 {
        u32::try_from(self.head.max.load(Ordering::Acquire)).unwrap_or(PERMITS_MAX).min(PERMITS_MAX)
    }

    /// Permits that were ever used: the others' memory is left alone.
    fn used(&self) -> &'a [AtomicU64] {
        let high = usize::try_from(self.head.high.load(Ordering::Acquire)).unwrap_or(SLOTS).min(SLOTS);
        self.slots.get(..high).unwrap_or(self.slots)
    }

    fn held(&self) -> u32 {
        let held = self.used().iter().filter(|slot| slot.load(Ordering::Acquire) != 0).count();
        u32::try_from(held).unwrap_or(u32::MAX)
    }

    /// Children that have waited once, and those of them that wait now.
    fn waiting(&self) -> impl Iterator<Item = (u32, u64, u64)> + use<'a> {
        let rows = usize::try_from(self.head.rows_high.load(Ordering::Acquire)).unwrap_or(usize::MAX);
        (0..).zip(self.lines.iter().take(rows)).filter_map(|(row, line)| {
            let since_ns = line.since_ns.load(Ordering::Acquire);
            (since_ns != 0).then(|| (row, line.waiting.load(Ordering::Acquire), since_ns))
        })
    }

    pub(crate) fn seen(&self, board: &Board) -> PermitsSeen {
        let label = u16::try_from(self.head.label.load(Ordering::Acquire)).unwrap_or(OTHER);
        PermitsSeen {
            upstream: board.label_text(label),
            max: self.max(),
            held: self.held(),
            waiting: self
                .waiting()
                .filter(|(row, ..)| is_alive(board, *row))
                .fold(0, |sum, (_, n, _)| n.saturating_add(sum)),
        }
    }

    /// Frees what the dead child of a row held, and what nobody holds. The master's alone: it gives rows to children, so
    /// that nobody moves in meanwhile.
    pub(crate) fn bury(&self, board: &Board, row: u32) {
        for slot in self.used() {
            let word = slot.load(Ordering::Acquire);
            let owner = u32::try_from(word & 0xffff_ffff).unwrap_or(u32::MAX);
            let is_left = owner == row || !is_alive(board, owner) || planted!(FreesAll);
            if word != 0 && is_left && !planted!(FreesNone) {
                // Whoever comes between is the owner, who gives it back.
                let _ = slot.compare_exchange(word, 0, Ordering::AcqRel, Ordering::Acquire);
            }
        }
        if let Some(line) = usize::try_from(row).ok().and_then(|row| self.lines.get(row)) {
            // Behind the mark it was never written, and is not now.
            if line.since_ns.load(Ordering::Acquire) != 0 {
                line.since_ns.store(0, Ordering::Release);
                line.waiting.store(0, Ordering::Release);
            }
        }
    }
}

/// A permit that is held; whoever has it gives it back with [`Permits::give`].
#[derive(Debug)]
#[must_use]
pub struct Slot(u32);

/// One child's side of the permits of one upstream.
#[derive(Debug)]
pub struct Permits {
    board: Board,
    place: usize,
    row: u32,
    word: u64,
    /// Where the next look for a free one begins.
    hint: AtomicU32,
}

impl Permits {
    pub(crate) fn new(board: Board, place: usize, (row, epoch): (u32, u32)) -> Self {
        Self { board, place, row, word: owner_word(row, epoch), hint: AtomicU32::new(0) }
    }

    fn table(&self) -> Option<Table<'_>> {
        self.board.permit_table(self.place)
    }

    /// The limit in force; 0 before anybody has said one.
    #[must_use]
    pub fn max(&self) -> u32 {
        self.table().map_or(0, |table| table.max())
    }

    /// Says the limit, at most [`PERMITS_MAX`].
    pub fn set_max(&self, max: u32) {
        if let Some(table) = self.table() {
            let max = u64::from(max.min(PERMITS_MAX));
            // Before the limit: whoever finds that looks no further than this mark.
            table.head.high.fetch_max(max, Ordering::AcqRel);
            table.head.max.store(max, Ordering::Release);
        }
    }

    /// A permit, if fewer than the limit are held. Whoever has read a limit that is lowered at that moment still takes one by it.
    #[must_use]
    pub fn take(&self) -> Option<Slot> {
        let table = self.table()?;
        let max = table.max();
        let slots = table.used();
        // After the limit was lowered some may be held beyond it, and are to come back first.
        if slots.len() > usize::try_from(max).ok()? && table.held() >= max {
            return None;
        }
        let slots = slots.get(..usize::try_from(max).ok()?).unwrap_or(slots);
        let hint = usize::try_from(self.hint.load(Ordering::Relaxed)).ok()?.checked_rem(slots.len())?;
        let order = (hint..slots.len()).chain(0..hint);
        let free = |index: &usize| {
            slots.get(*index).is_some_and(|slot| {
                if planted!(TakesBlindly) && slot.load(Ordering::Relaxed) == 0 {
                    slot.store(self.word, Ordering::Release);
                    return true;
                }
                slot.load(Ordering::Relaxed) == 0
                    && slot.compare_exchange(0, self.word, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            })
        };
        let index = u32::try_from(order.into_iter().find(free)?).ok()?;
        self.hint.store(index.wrapping_add(1), Ordering::Relaxed);
        Some(Slot(index))
    }

    /// Gives a permit back.
    pub fn give(&self, Slot(index): Slot) {
        let Some(table) = self.table() else { return };
        if let Some(slot) = usize::try_from(index).ok().and_then(|index| table.slots.get(index)) {
            if planted!(GivesBlindly) {
                slot.store(0, Ordering::Release);
            }
            // One that somebody has freed is not ours any more.
            let _ = slot.compare_exchange(self.word, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
        self.hint.store(index, Ordering::Relaxed);
    }

    /// How many could be taken now.
    #[must_use]
    pub fn free(&self) -> u32 {
        self.table().map_or(0, |table| table.max().saturating_sub(table.held()))
    }

    /// How many this child holds.
    #[must_use]
    pub fn held_here(&self) -> u32 {
        let is_ours = |slot: &&AtomicU64| slot.load(Ordering::Acquire) == self.word;
        let held = self.table().map_or(0, |table| table.used().iter().filter(is_ours).count());
        u32::try_from(held).unwrap_or(u32::MAX)
    }

    /// Says how many requests of this child wait, and since when the oldest does: monotonic nanoseconds, 0 for none.
    pub fn show_waiting(&self, waiting: u32, since_ns: u64) {
        let Some(table) = self.table() else { return };
        let Some(line) = usize::try_from(self.row).ok().and_then(|row| table.lines.get(row)) else { return };
        let rows = u64::from(self.row).saturating_add(1);
        if table.head.rows_high.load(Ordering::Relaxed) < rows {
            table.head.rows_high.fetch_max(rows, Ordering::AcqRel);
        }
        line.waiting.store(waiting.into(), Ordering::Release);
        line.since_ns.store(since_ns, Ordering::Release);
    }

    /// The other children that have requests waiting: their row, how many, and since when the oldest waits.
    pub fn peers_waiting(&self) -> impl Iterator<Item = (&ChildRow, u64, u64)> {
        let waiting = self.table().map(|table| table.waiting()).into_iter().flatten();
        waiting.filter(|(row, ..)| *row != self.row).filter_map(|(row, waiting, since_ns)| {
            let child = self.board.child(row).filter(|child| child.phase() != Phase::Empty)?;
            Some((child, waiting, since_ns))
        })
    }
}
