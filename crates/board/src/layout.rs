//! Where everything stands in the mapping, computed alike by whoever creates and whoever attaches.

use std::mem::size_of;

use evergate_core::plan::Plan;

use crate::hosts::{HOSTS_MAX, HostRow};
use crate::inflight::InflightRow;
use crate::labels::LabelRow;
use crate::permits::{self, TableHead};
use crate::records::{RING_BYTES, RingHead};
use crate::rows::{ChildRow, MasterRow};
use crate::series::{Cell, SeriesHead};

/// First word of a board.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"evergate");
/// Changes with every change of the layout, so that two builds never misread each other.
pub(crate) const VERSION: u64 = 13;

/// In-flight rows beyond twice the places, for what waits: address space, until they are needed.
const WAITING_ROWS: u32 = 1024;
/// Twice the most places that a worker may have, and those.
const SLOTS_MAX: u32 = 2 * 65_536 + WAITING_ROWS;

/// How large a board is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows for children, 1 to 1,152.
    pub children: u32,
    /// In-flight rows per child, 1 to 132,096.
    pub slots: u32,
    /// Counters per child, a power of two up to 65,536.
    pub series: u32,
    /// Labels, 2 to 65,535.
    pub labels: u32,
}

impl Shape {
    /// The shape for a configuration. Memory is taken as it is touched, so the size costs address space only.
    #[must_use]
    pub fn for_plan(plan: &Plan) -> Self {
        // The clerk; the workers that serve, that come with a reload, that drain of three generations before, and that
        // go for other reasons. Some are there for a reload with more workers than the start had, and for those that were
        // killed and do not end (`supervisor/src/step/ghosts.rs`).
        let children = plan.workers_max.saturating_mul(6).saturating_add(8).clamp(64, 1024);
        let children = children.saturating_add(Self::host_rows(plan));
        // More than places: a request whose body is still being read, or that waits, has a row but no place yet.
        let slots = plan.slots.saturating_mul(2).saturating_add(WAITING_ROWS).clamp(1, SLOTS_MAX);
        Self { children, slots, series: 2048, labels: 2048 }
    }

    /// Of the rows for children, those at the end that are for hosts: twice as many as there are programs, for those that
    /// a reload replaces, and some for programs that a reload brings.
    #[must_use]
    pub fn host_rows(plan: &Plan) -> u32 {
        u32::try_from(plan.hosts.len()).unwrap_or(u32::MAX).saturating_mul(2).clamp(8, 128)
    }

    pub(crate) fn is_valid(self) -> bool {
        (1..=1152).contains(&self.children)
            && (1..=SLOTS_MAX).contains(&self.slots)
            && (1..=65_536).contains(&self.series)
            && self.series.is_power_of_two()
            && (2..=65_535).contains(&self.labels)
    }
}

/// The header: what an attaching process checks.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Head {
    pub(crate) magic: crate::atomic::AtomicU64,
    pub(crate) version: crate::atomic::AtomicU64,
    pub(crate) size: crate::atomic::AtomicU64,
    pub(crate) run_id: crate::atomic::AtomicU64,
    pub(crate) children: crate::atomic::AtomicU64,
    pub(crate) slots: crate::atomic::AtomicU64,
    pub(crate) series: crate::atomic::AtomicU64,
    pub(crate) labels: crate::atomic::AtomicU64,
}

/// Byte offsets; every region starts on a page, so that idle ones take no memory of busy ones' pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) shape: Shape,
    pub(crate) master: usize,
    pub(crate) hosts: usize,
    pub(crate) children: usize,
    pub(crate) labels: usize,
    inflight: usize,
    inflight_stride: usize,
    series: usize,
    series_stride: usize,
    permits: usize,
    permits_stride: usize,
    ring_heads: usize,
    rings: usize,
    pub(crate) size: usize,
}

const PAGE: usize = 4096;

impl Layout {
    /// The layout of a valid shape; none for another.
    pub(crate) fn new(shape: Shape) -> Option<Self> {
        if !shape.is_valid() {
            return None;
        }
        // In range on every target: checked by `is_valid`.
        let wide = |count: u32| usize::try_from(count).ok();
        let pages = |bytes: usize| bytes.checked_next_multiple_of(PAGE);
        let (children, slots) = (wide(shape.children)?, wide(shape.slots)?);
        let (cells, labels) = (wide(shape.series)?, wide(shape.labels)?);
        let master = PAGE;
        let hosts = pages(master.checked_add(size_of::<MasterRow>())?)?;
        let hosts_end = hosts.checked_add(size_of::<HostRow>().checked_mul(wide(HOSTS_MAX)?)?)?;
        let children_at = pages(hosts_end)?;
        let labels_at = pages(children_at.checked_add(size_of::<ChildRow>().checked_mul(children)?)?)?;
        let inflight = pages(labels_at.checked_add(size_of::<LabelRow>().checked_mul(labels)?)?)?;
        let inflight_stride = pages(size_of::<InflightRow>().checked_mul(slots)?)?;
        let series = inflight.checked_add(inflight_stride.checked_mul(children)?)?;
        let series_stride = pages(size_of::<Cell>().checked_mul(cells)?.checked_add(size_of::<SeriesHead>())?)?;
        // The master's own counters come after the children's.
        let permits = series.checked_add(series_stride.checked_mul(children.checked_add(1)?)?)?;
        let lines = size_of::<permits::Line>().checked_mul(children)?;
        let permits_stride = pages(size_of::<TableHead>().checked_add(permits::SLOTS_BYTES)?.checked_add(lines)?)?;
        // A ring for each child, and the master's. The heads lie together: who looks at all of them touches few pages.
        let ring_heads = permits.checked_add(permits_stride.checked_mul(permits::TABLES)?)?;
        let ring_count = children.checked_add(1)?;
        let rings = pages(ring_heads.checked_add(size_of::<RingHead>().checked_mul(ring_count)?)?)?;
        let size = pages(rings.checked_add(RING_BYTES.checked_mul(ring_count)?)?)?;
        Some(Self {
            shape,
            master,
            hosts,
            children: children_at,
            labels: labels_at,
            inflight,
            inflight_stride,
            series,
            series_stride,
            permits,
            permits_stride,
            ring_heads,
            rings,
            size,
        })
    }

    /// Where a child's in-flight rows start.
    pub(crate) fn inflight_of(&self, row: u32) -> Option<usize> {
        if row >= self.shape.children {
            return None;
        }
        self.inflight.checked_add(self.inflight_stride.checked_mul(usize::try_from(row).ok()?)?)
    }

    /// Where a child's counters start; the row after the last child's is the master's.
    pub(crate) fn series_of(&self, row: u32) -> Option<usize> {
        if row > self.shape.children {
            return None;
        }
        self.series.checked_add(self.series_stride.checked_mul(usize::try_from(row).ok()?)?)
    }

    /// Where the permits of one upstream start.
    pub(crate) fn permits_of(&self, table: usize) -> Option<usize> {
        if table >= permits::TABLES {
            return None;
        }
        self.permits.checked_add(self.permits_stride.checked_mul(table)?)
    }

    /// Where the head of a child's ring of records is, and its words; the ring after the last child's is the master's.
    pub(crate) fn ring_of(&self, row: u32) -> Option<(usize, usize)> {
        if row > self.shape.children {
            return None;
        }
        let row = usize::try_from(row).ok()?;
        let head = self.ring_heads.checked_add(size_of::<RingHead>().checked_mul(row)?)?;
        Some((head, self.rings.checked_add(RING_BYTES.checked_mul(row)?)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_do_not_overlap_and_odd_shapes_are_refused() {
        let shape = Shape { children: 3, slots: 5, series: 8, labels: 4 };
        let layout = Layout::new(shape).unwrap();
        assert!(layout.hosts >= layout.master + size_of::<MasterRow>());
        assert!(layout.children >= layout.hosts + usize::try_from(HOSTS_MAX).unwrap() * size_of::<HostRow>());
        let mut last = layout.labels + 4 * size_of::<LabelRow>();
        for row in 0..3 {
            let at = layout.inflight_of(row).unwrap();
            assert!(at >= last && at.is_multiple_of(128));
            last = at + 5 * size_of::<InflightRow>();
        }
        for row in 0..4 {
            let at = layout.series_of(row).unwrap();
            assert!(at >= last && at.is_multiple_of(128));
            last = at + 8 * size_of::<Cell>() + size_of::<SeriesHead>();
        }
        for table in 0..permits::TABLES {
            let at = layout.permits_of(table).unwrap();
            assert!(at >= last && at.is_multiple_of(128));
            last = at + size_of::<TableHead>() + permits::SLOTS_BYTES + 3 * size_of::<permits::Line>();
        }
        let (heads, words): (Vec<_>, Vec<_>) = (0..4).map(|row| layout.ring_of(row).unwrap()).unzip();
        for (at, size) in
            heads.into_iter().map(|at| (at, size_of::<RingHead>())).chain(words.into_iter().map(|at| (at, RING_BYTES)))
        {
            assert!(at >= last && at.is_multiple_of(64));
            last = at + size;
        }
        assert_eq!(layout.ring_of(4), None);
        assert!(last <= layout.size);
        assert_eq!(layout.permits_of(permits::TABLES), None);
        assert_eq!(layout.inflight_of(3), None);
        assert_eq!(layout.series_of(4), None);
        for odd in [
            Shape { children: 0, ..shape },
            Shape { slots: 140_000, ..shape },
            Shape { series: 7, ..shape },
            Shape { labels: 1, ..shape },
        ] {
            assert_eq!(Layout::new(odd), None);
        }
    }
}
