//! Creating, attaching and looking at a board.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::SealFlags;

use crate::atomic::AtomicU64;
use crate::hosts::{HOSTS_MAX, HostRow};
use crate::inflight::{Inflight, InflightRow, InflightRows};
use crate::labels::{self, LabelRow};
use crate::layout::{Head, Layout, MAGIC, Shape, VERSION};
use crate::map::Map;
use crate::permits::{self, Permits, PermitsSeen, Table};
use crate::records::{RING_WORDS, RecordWriter, Ring};
use crate::rows::{ChildRow, MasterRow};
use crate::series::Series;

/// Why there is no board.
#[derive(Debug)]
pub enum Error {
    /// A size outside the limits of [`Shape`].
    Shape(Shape),
    /// The system refused.
    System {
        /// What was attempted.
        attempt: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// What was given is no board of this build.
    Foreign(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape(shape) => write!(f, "no board can have this size: {shape:?}"),
            Self::System { attempt, .. } => write!(f, "cannot {attempt} the board"),
            Self::Foreign(what) => write!(f, "not a board of this build: {what}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::System { source, .. } => Some(source),
            Self::Shape(_) | Self::Foreign(_) => None,
        }
    }
}

/// The shared memory of one run. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Board(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    map: Map,
    fd: OwnedFd,
    layout: Layout,
    run_id: u64,
}

fn failed(attempt: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::System { attempt, source }
}

impl Board {
    /// A new board, all rows empty.
    ///
    /// # Errors
    /// A size outside the limits, or the system's refusal.
    pub fn create(shape: Shape, run_id: u64) -> Result<Self, Error> {
        let layout = Layout::new(shape).ok_or(Error::Shape(shape))?;
        let fd = evergate_sys::memfd(c"evergate-board").map_err(failed("create"))?;
        let size = u64::try_from(layout.size).map_err(|_| Error::Shape(shape))?;
        rustix::fs::ftruncate(&fd, size).map_err(|error| failed("size")(error.into()))?;
        evergate_sys::seal_size(&fd).map_err(failed("seal"))?;
        let map = Map::new(&fd, layout.size).map_err(failed("map"))?;
        let head: &Head = map.at(0).ok_or(Error::Foreign("too short"))?;
        for (word, value) in [
            (&head.version, VERSION),
            (&head.size, size),
            (&head.run_id, run_id),
            (&head.children, shape.children.into()),
            (&head.slots, shape.slots.into()),
            (&head.series, shape.series.into()),
            (&head.labels, shape.labels.into()),
            // Last: who finds it finds the rest.
            (&head.magic, MAGIC),
        ] {
            word.store(value, Ordering::Release);
        }
        let board = Self(Arc::new(Inner { map, fd, layout, run_id }));
        labels::prepare(board.label_table());
        Ok(board)
    }

    /// The board behind an inherited or received descriptor.
    ///
    /// # Errors
    /// [`Error::Foreign`] when the size can change, or when magic, layout version, shape or size are not what this build
    /// would have made; else the system's refusal.
    pub fn attach(fd: OwnedFd) -> Result<Self, Error> {
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|_| Error::Foreign("it cannot be sealed"))?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(Error::Foreign("its size is not sealed"));
        }
        let stat = rustix::fs::fstat(&fd).map_err(|error| failed("measure")(error.into()))?;
        let size = usize::try_from(stat.st_size).map_err(|_| Error::Foreign("its size is negative"))?;
        if size < 4096 {
            return Err(Error::Foreign("too short"));
        }
        let map = Map::new(&fd, size).map_err(failed("map"))?;
        let head: &Head = map.at(0).ok_or(Error::Foreign("too short"))?;
        let (layout, run_id) = check(head, size)?;
        Ok(Self(Arc::new(Inner { map, fd, layout, run_id })))
    }

    /// The descriptor, to be inherited or sent.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }

    /// Its size.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.0.layout.shape
    }

    /// The run of the master that made it; part of every request's id.
    #[must_use]
    pub fn run_id(&self) -> u64 {
        self.0.run_id
    }

    /// The master's row.
    #[must_use]
    pub fn master(&self) -> &MasterRow {
        match self.0.map.at(self.0.layout.master) {
            Some(row) => row,
            // The layout's size was checked against the mapping's when it was made.
            None => unreachable!("the master's row lies within every board"),
        }
    }

    /// A child's row.
    #[must_use]
    pub fn child(&self, row: u32) -> Option<&ChildRow> {
        self.child_table().get(usize::try_from(row).ok()?)
    }

    /// All children's rows, empty ones too.
    pub fn children(&self) -> impl Iterator<Item = (u32, &ChildRow)> {
        (0..).zip(self.child_table())
    }

    /// A host's row.
    #[must_use]
    pub fn host(&self, row: u32) -> Option<&HostRow> {
        self.host_table().get(usize::try_from(row).ok()?)
    }

    /// All hosts' rows, empty ones too.
    pub fn hosts(&self) -> impl Iterator<Item = (u32, &HostRow)> {
        (0..).zip(self.host_table())
    }

    /// The requests a child has in flight, each read whole.
    pub fn inflight(&self, row: u32) -> impl Iterator<Item = Inflight> {
        let high = self.child(row).map_or(0, ChildRow::inflight_high);
        let high = usize::try_from(high).unwrap_or(usize::MAX);
        (0..).zip(self.inflight_table(row).iter().take(high)).filter_map(|(index, row)| row.read(index))
    }

    /// The owner's side of a child's in-flight rows: one per process and row.
    #[must_use]
    pub fn inflight_rows(&self, row: u32) -> InflightRows {
        InflightRows::new(self.clone(), row)
    }

    /// A child's side of the limit of an upstream; none when the board has no room for one more.
    #[must_use]
    pub fn permits(&self, upstream: &str, (row, epoch): (u32, u32)) -> Option<Permits> {
        let label = self.label(upstream);
        let place =
            (0..permits::TABLES).find(|place| self.permit_table(*place).is_some_and(|one| one.settle(label)))?;
        Some(Permits::new(self.clone(), place, (row, epoch)))
    }

    /// What is held and who waits, of every upstream that has ever had a limit.
    pub fn permits_seen(&self) -> impl Iterator<Item = PermitsSeen> {
        self.permit_tables().map(|table| table.seen(self))
    }

    fn permit_tables(&self) -> impl Iterator<Item = Table<'_>> {
        (0..permits::TABLES).map_while(|place| self.permit_table(place)).take_while(Table::is_taken)
    }

    /// Empties a dead child's row, its in-flight rows and the permits it held; its counters stay.
    pub fn bury(&self, row: u32) {
        // Rows above the mark were never written; touching them would allocate their pages.
        let Some(child) = self.child(row) else { return };
        let high = usize::try_from(child.inflight_high()).unwrap_or(usize::MAX);
        for slot in self.inflight_table(row).iter().take(high) {
            slot.clear();
        }
        child.clear();
        self.permit_tables().for_each(|table| table.bury(self, row));
    }

    /// The writing end of a child's ring of access records: one per process and row.
    #[must_use]
    pub fn record_writer(&self, row: u32) -> RecordWriter {
        RecordWriter::new(self.clone(), row)
    }

    /// The master's own.
    #[must_use]
    pub fn master_record_writer(&self) -> RecordWriter {
        RecordWriter::new(self.clone(), self.shape().children)
    }

    pub(crate) fn ring(&self, row: u32) -> Option<Ring<'_>> {
        let (head, words) = self.0.layout.ring_of(row)?;
        Some(Ring { head: self.0.map.at(head)?, words: self.0.map.slice(words, RING_WORDS) })
    }

    /// A row's counters.
    #[must_use]
    pub fn series(&self, row: u32) -> Option<Series<'_>> {
        if row < self.0.layout.shape.children { self.series_table(row) } else { None }
    }

    /// The master's own counters.
    #[must_use]
    pub fn master_series(&self) -> Option<Series<'_>> {
        self.series_table(self.0.layout.shape.children)
    }

    /// The number of a label, which is added if it is new: 0 for the empty text, 1 (`other`) when there is no place
    /// left. At most 63 bytes of the text are kept. From a bounded set, never a client's text: places are not freed.
    #[must_use]
    pub fn label(&self, text: &str) -> u16 {
        labels::intern(self.label_table(), text)
    }

    /// A label's text; empty for 0 and for a number that nobody was given.
    #[must_use]
    pub fn label_text(&self, id: u16) -> String {
        labels::text(self.label_table(), id)
    }

    fn host_table(&self) -> &[HostRow] {
        self.0.map.slice(self.0.layout.hosts, wide(HOSTS_MAX))
    }

    fn child_table(&self) -> &[ChildRow] {
        let layout = &self.0.layout;
        self.0.map.slice(layout.children, wide(layout.shape.children))
    }

    pub(crate) fn inflight_table(&self, row: u32) -> &[InflightRow] {
        let layout = &self.0.layout;
        layout.inflight_of(row).map_or(&[], |offset| self.0.map.slice(offset, wide(layout.shape.slots)))
    }

    pub(crate) fn permit_table(&self, place: usize) -> Option<Table<'_>> {
        let (layout, map) = (&self.0.layout, &self.0.map);
        let offset = layout.permits_of(place)?;
        let slots = offset.checked_add(size_of::<permits::TableHead>())?;
        let lines = slots.checked_add(permits::SLOTS_BYTES)?;
        Some(Table {
            head: map.at(offset)?,
            slots: map.slice(slots, permits::SLOTS),
            lines: map.slice(lines, wide(layout.shape.children)),
        })
    }

    fn label_table(&self) -> &[LabelRow] {
        let layout = &self.0.layout;
        self.0.map.slice(layout.labels, wide(layout.shape.labels))
    }

    fn series_table(&self, row: u32) -> Option<Series<'_>> {
        let layout = &self.0.layout;
        let offset = layout.series_of(row)?;
        let cells = offset.checked_add(size_of::<crate::series::SeriesHead>())?;
        Some(Series::new(self.0.map.at(offset)?, self.0.map.slice(cells, wide(layout.shape.series))))
    }
}

fn wide(count: u32) -> usize {
    usize::try_from(count).unwrap_or(0)
}

fn check(head: &Head, size: usize) -> Result<(Layout, u64), Error> {
    let word = |word: &AtomicU64| word.load(Ordering::Acquire);
    let count = |value: &AtomicU64| u32::try_from(word(value)).map_err(|_| Error::Foreign("its shape is out of range"));
    if word(&head.magic) != MAGIC {
        return Err(Error::Foreign("wrong magic"));
    }
    if word(&head.version) != VERSION {
        return Err(Error::Foreign("another layout version"));
    }
    let shape = Shape {
        children: count(&head.children)?,
        slots: count(&head.slots)?,
        series: count(&head.series)?,
        labels: count(&head.labels)?,
    };
    let layout = Layout::new(shape).ok_or(Error::Foreign("its shape is out of range"))?;
    if layout.size != size || word(&head.size) != u64::try_from(size).unwrap_or(0) {
        return Err(Error::Foreign("its size does not fit its shape"));
    }
    Ok((layout, word(&head.run_id)))
}
