//! One row per admitted request, so that a death names exactly the requests that died with it.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use evergate_core::ids::{CLIENT_ID_BYTES_MAX, RequestId};

use crate::atomic::{AtomicU64, planted};
use crate::board::Board;

const ID_WORDS: usize = CLIENT_ID_BYTES_MAX / 8;
/// Bytes kept of the model's name as the client gave it.
pub const MODEL_BYTES_MAX: usize = 64;
const MODEL_WORDS: usize = MODEL_BYTES_MAX / 8;

/// A row in the mapping.
///
/// `id` is epoch and sequence number, 0 while the row is empty. No two requests of a run share it, so it is the row's
/// version at the same time: a reader that finds the same `id` before and after has read one request's values. It is
/// written last at admission and cleared first at the end, so that a process killed between two stores leaves either
/// no request or a whole one, and no reader ever waits.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct InflightRow {
    id: AtomicU64,
    started_ns: AtomicU64,
    /// Route (16 bits), key (16), method (16), length of the client's id (8).
    labels: AtomicU64,
    client_id: [AtomicU64; ID_WORDS],
    // Changed while the request runs; each one word, so that any value is a true one.
    phase: AtomicU64,
    model: AtomicU64,
    is_stream: AtomicU64,
    backend: AtomicU64,
    attempts: AtomicU64,
    end: AtomicU64,
    /// One more than how far the ring of records was written when this request's was about to be shown; 0 before that.
    recording: AtomicU64,
    /// Length of the model's name; written once, after the name, so that whoever finds a length finds the name.
    name_length: AtomicU64,
    name: [AtomicU64; MODEL_WORDS],
    /// The last request here, by its `id`, that a host has given to its program. The hosts', and only ever higher.
    taken: AtomicU64,
}

/// Where a request's row is, and which request is meant; it travels as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightPlace {
    row: u32,
    index: u32,
    id: u64,
}

impl fmt::Display for InflightPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.row, self.index, self.id)
    }
}

impl FromStr for InflightPlace {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        let mut words = text.splitn(3, '.');
        let mut word = || words.next().unwrap_or_default();
        Ok(Self { row: word().parse()?, index: word().parse()?, id: word().parse()? })
    }
}

impl Board {
    /// Says that a program has, or may have, seen something of a request from now on.
    pub fn mark_taken(&self, place: InflightPlace) {
        let index = usize::try_from(place.index).unwrap_or(usize::MAX);
        if let Some(row) = self.inflight_table(place.row).get(index)
            && row.id.load(Ordering::Acquire) == place.id
        {
            // Numbers grow: a mark that comes late takes no other request's back.
            if planted!(MarksBack) {
                row.taken.store(place.id, Ordering::Release);
            } else {
                row.taken.fetch_max(place.id, Ordering::AcqRel);
            }
        }
    }
}

/// In [`InflightRow::end`]: an end is there; it was counted; it is being counted, and the lower half of what its counter was
/// before stands in the upper half.
const ENDED: u64 = 1 << 16;
const COUNTED: u64 = 1 << 17;
const COUNTING: u64 = 1 << 18;
const LOWER_HALF: u64 = 0xffff_ffff;
/// In [`InflightRow::recording`], less one: a place that no ring comes to.
const NEVER: u64 = u64::MAX - 1;

/// What a request was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum InflightPhase {
    /// Its body is being read.
    Body = 1,
    /// A target is being chosen.
    Route = 2,
    /// The upstream is being connected to.
    Connect = 3,
    /// The upstream has the request and has not answered.
    Wait = 4,
    /// The answer is passing through.
    Stream = 5,
    /// The answer is being written to the client.
    Write = 6,
    /// It waits for a permit of its upstream.
    Queued = 7,
    /// It waits for its upstream's program to start.
    Start = 8,
}

impl InflightPhase {
    /// The word in records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Body => "body",
            Self::Route => "route",
            Self::Connect => "connect",
            Self::Wait => "wait",
            Self::Stream => "stream",
            Self::Write => "write",
            Self::Queued => "queued",
            Self::Start => "start",
        }
    }

    fn from_word(word: u64) -> Self {
        [Self::Body, Self::Route, Self::Connect, Self::Wait, Self::Stream, Self::Write, Self::Queued, Self::Start]
            .into_iter()
            .find(|phase| *phase as u64 == word)
            .unwrap_or(Self::Body)
    }
}

/// A request in flight, as read from the board.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inflight {
    /// Its row among the child's.
    pub index: u32,
    /// Its number within the child.
    pub seq: u32,
    /// The child's number within the run.
    pub epoch: u32,
    /// The client's id, at most 64 bytes; empty if it gave none.
    pub client_id: String,
    /// Label of its route.
    pub route: u16,
    /// Label of its model; 0 before it was read.
    pub model: u16,
    /// Label of the key it came with; 0 without.
    pub key: u16,
    /// Label of its method.
    pub method: u16,
    /// Label of the upstream that was called last; 0 before that.
    pub backend: u16,
    /// Calls made to upstreams.
    pub attempts: u32,
    /// Model as the client named it, at most 64 bytes; empty before it was read.
    pub model_name: String,
    /// How it ended, in the owner's own code, once that is known; the last byte may still be on its way.
    pub end: Option<u16>,
    /// Whether the owner has added it to its counters and said so.
    pub is_counted: bool,
    /// The lower half of what its counter was before the owner began to add it.
    pub counter_before: Option<u32>,
    /// How far the owner's ring of records was written when this request's was about to be shown in it.
    pub ring_before: Option<u64>,
    /// What it was doing.
    pub phase: InflightPhase,
    /// Whether it is a stream.
    pub is_stream: bool,
    /// When it was admitted, monotonic nanoseconds.
    pub started_ns: u64,
}

impl Inflight {
    /// Whether it was over but for its books: the last byte of its answer was on its way to the kernel, or it was being counted.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.phase == InflightPhase::Write || self.is_counted || self.counter_before.is_some()
    }

    /// Whether its last bytes were being written, or had been a moment ago: which of both, only its owner knew.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.phase == InflightPhase::Write && !self.is_counted && self.counter_before.is_none()
    }

    /// Whether a dead owner has added it to its counter, which stands at `now`.
    #[must_use]
    pub fn was_counted(&self, now: u64) -> bool {
        let is_beyond = |before: u32| u64::from(before) != now & LOWER_HALF || planted!(TrustsNote);
        self.is_counted || self.counter_before.is_some_and(is_beyond)
    }

    /// Whether a dead owner has shown its record in its ring, which is written as far as `now`.
    #[must_use]
    pub fn was_recorded(&self, now: u64) -> bool {
        // Nothing else was shown there since: a row ends before its owner's next record.
        self.ring_before.is_some_and(|before| before != now || planted!(TrustsShownNote))
    }

    /// Our own id of it.
    #[must_use]
    pub fn request_id(&self, run: u64) -> RequestId {
        RequestId { run, epoch: self.epoch, seq: self.seq }
    }
}

/// What is known of a request at its admission.
#[derive(Clone, Copy, Debug)]
pub struct InflightStart<'a> {
    /// Its number within the child, from 1, never used twice.
    pub seq: u32,
    /// The child's number within the run.
    pub epoch: u32,
    /// The client's id; what is beyond 64 bytes is cut off.
    pub client_id: &'a str,
    /// Label of its route.
    pub route: u16,
    /// Label of the key it came with.
    pub key: u16,
    /// Label of its method.
    pub method: u16,
    /// Now, monotonic nanoseconds.
    pub started_ns: u64,
}

impl InflightRow {
    fn write(&self, start: &InflightStart<'_>) {
        // The row is empty (`id` is 0); whoever sees one of the stores below sees that as well.
        fence(Ordering::Release);
        let id = u64::from(start.epoch) << 32 | u64::from(start.seq);
        if planted!(IdFirst) {
            self.id.store(id, Ordering::Release);
        }
        let length = store_text(&self.client_id, cut(start.client_id, CLIENT_ID_BYTES_MAX));
        let [route, key, method] = [start.route, start.key, start.method].map(u64::from);
        self.labels.store(route << 48 | key << 32 | method << 16 | length, Ordering::Relaxed);
        self.started_ns.store(start.started_ns, Ordering::Relaxed);
        self.phase.store(InflightPhase::Body as u64, Ordering::Relaxed);
        self.model.store(0, Ordering::Relaxed);
        for word in [&self.is_stream, &self.backend, &self.attempts, &self.end, &self.recording, &self.name_length] {
            word.store(0, Ordering::Relaxed);
        }
        self.id.store(id, Ordering::Release);
    }

    /// The request in this row; none when it is empty.
    pub(crate) fn read(&self, index: u32) -> Option<Inflight> {
        // A row changes hands at most as often as its owner can admit; a few tries meet a quiet moment, and a row that
        // is never quiet is left out of this reading.
        for _ in 0..16 {
            let id = self.id.load(Ordering::Acquire);
            if id == 0 {
                return None;
            }
            let inflight = self.read_once(index, id);
            fence(Ordering::Acquire);
            if self.id.load(Ordering::Relaxed) == id || planted!(TrustsFirstLook) {
                return Some(inflight);
            }
        }
        None
    }

    fn read_once(&self, index: u32, id: u64) -> Inflight {
        let labels = self.labels.load(Ordering::Relaxed);
        let [route1, route0, key1, key0, method1, method0, _, length] = labels.to_be_bytes();
        let short = |word: &AtomicU64| u16::try_from(word.load(Ordering::Relaxed)).unwrap_or(0);
        let name_length = self.name_length.load(Ordering::Acquire);
        let end = self.end.load(Ordering::Relaxed);
        let [e3, e2, e1, e0, s3, s2, s1, s0] = id.to_be_bytes();
        Inflight {
            index,
            seq: u32::from_be_bytes([s3, s2, s1, s0]),
            epoch: u32::from_be_bytes([e3, e2, e1, e0]),
            client_id: load_text(&self.client_id, length.into()),
            route: u16::from_be_bytes([route1, route0]),
            model: short(&self.model),
            key: u16::from_be_bytes([key1, key0]),
            method: u16::from_be_bytes([method1, method0]),
            backend: short(&self.backend),
            attempts: u32::try_from(self.attempts.load(Ordering::Relaxed)).unwrap_or(0),
            model_name: load_text(&self.name, name_length),
            end: (end & ENDED != 0).then(|| u16::try_from(end & 0xffff).unwrap_or(0)),
            is_counted: end & COUNTED != 0,
            counter_before: (end & COUNTING != 0).then(|| u32::try_from(end >> 32).unwrap_or(0)),
            ring_before: self.recording.load(Ordering::Relaxed).checked_sub(1),
            phase: InflightPhase::from_word(self.phase.load(Ordering::Relaxed)),
            is_stream: self.is_stream.load(Ordering::Relaxed) == 1,
            started_ns: self.started_ns.load(Ordering::Relaxed),
        }
    }

    /// Empties the row.
    pub(crate) fn clear(&self) {
        self.id.store(0, Ordering::Release);
    }
}

fn cut(text: &str, bytes_max: usize) -> &str {
    let end = (0..=text.len().min(bytes_max)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.get(..end).unwrap_or("")
}

/// Puts a text that fits into words; gives its length.
fn store_text(words: &[AtomicU64], text: &str) -> u64 {
    for (word, chunk) in words.iter().zip(text.as_bytes().chunks(8)) {
        let mut bytes = [0; 8];
        bytes.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
        word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
    }
    u64::try_from(text.len()).unwrap_or(0)
}

fn load_text(words: &[AtomicU64], length: u64) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
    let length = usize::try_from(length).unwrap_or(0).min(bytes.len());
    String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).into_owned()
}

/// The owner's side of a child's in-flight rows. Which rows are free is known to this process only; a child makes one
/// of these, at its start, when the master has emptied the rows.
#[derive(Clone, Debug)]
pub struct InflightRows(Arc<Owner>);

#[derive(Debug)]
struct Owner {
    board: Board,
    row: u32,
    free: Mutex<Free>,
}

/// Rows from `fresh` on were never used; used and empty ones are in `empty`, last used first, so that few rows of a
/// large board are ever touched.
#[derive(Debug, Default)]
struct Free {
    fresh: u32,
    empty: Vec<u32>,
}

impl InflightRows {
    pub(crate) fn new(board: Board, row: u32) -> Self {
        Self(Arc::new(Owner { board, row, free: Mutex::default() }))
    }

    /// Enters a request; none when all rows are taken.
    #[must_use]
    pub fn admit(&self, start: InflightStart<'_>) -> Option<Ticket> {
        let owner = &*self.0;
        let index = {
            let mut free = owner.free.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(index) = free.empty.pop() {
                index
            } else {
                let index = free.fresh;
                owner.slot(index)?;
                free.fresh = index.saturating_add(1);
                // Before the row is written: a reader looks at the rows below this mark only.
                owner.board.child(owner.row)?.set_inflight_high(free.fresh);
                index
            }
        };
        owner.slot(index)?.write(&start);
        Some(Ticket { rows: self.clone(), index })
    }

    /// How many rows are taken.
    #[must_use]
    pub fn occupied(&self) -> u32 {
        let free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.fresh.saturating_sub(u32::try_from(free.empty.len()).unwrap_or(u32::MAX))
    }
}

impl Owner {
    fn slot(&self, index: u32) -> Option<&InflightRow> {
        self.board.inflight_table(self.row).get(usize::try_from(index).ok()?)
    }
}

/// A request's place on the board; dropping it empties the row.
#[derive(Debug)]
pub struct Ticket {
    rows: InflightRows,
    index: u32,
}

impl Ticket {
    /// Which of its process's rows it is.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Where it is, for whoever works for it elsewhere.
    #[must_use]
    pub fn place(&self) -> InflightPlace {
        let id = self.rows.0.slot(self.index).map_or(0, |row| row.id.load(Ordering::Relaxed));
        InflightPlace { row: self.rows.0.row, index: self.index, id }
    }

    /// Whether a host has given it to its program: the board knows, even if the host is dead.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        let is_own = |row: &InflightRow| row.taken.load(Ordering::Acquire) == row.id.load(Ordering::Relaxed);
        self.rows.0.slot(self.index).is_none_or(is_own)
    }

    /// Says what the request is doing.
    pub fn set_phase(&self, phase: InflightPhase) {
        if let Some(row) = self.rows.0.slot(self.index) {
            row.phase.store(phase as u64, Ordering::Relaxed);
        }
    }

    /// Says its model's label and, once, its name as the client gave it, of which 64 bytes are kept.
    pub fn set_model(&self, label: u16, name: &str) {
        if let Some(row) = self.rows.0.slot(self.index) {
            row.model.store(label.into(), Ordering::Relaxed);
            if row.name_length.load(Ordering::Relaxed) == 0 {
                if planted!(LengthFirst) {
                    row.name_length.store(u64::try_from(name.len()).unwrap_or(0), Ordering::Release);
                }
                let length = store_text(&row.name, cut(name, MODEL_BYTES_MAX));
                row.name_length.store(length, Ordering::Release);
            }
        }
    }

    /// Says which upstream is called now, and which call that is.
    pub fn set_backend(&self, label: u16, attempts: u32) {
        if let Some(row) = self.rows.0.slot(self.index) {
            row.backend.store(label.into(), Ordering::Relaxed);
            row.attempts.store(attempts.into(), Ordering::Relaxed);
        }
    }

    /// Says how it ended, in the owner's own code.
    pub fn set_end(&self, end: u16) {
        if let Some(row) = self.rows.0.slot(self.index) {
            row.end.store(ENDED | u64::from(end), Ordering::Relaxed);
        }
    }

    /// Says how it ended, and that it is being counted: its counter stands at `before`.
    pub fn set_counting(&self, end: u16, before: u64) {
        if let Some(row) = self.rows.0.slot(self.index) {
            row.end.store(before << 32 | COUNTING | ENDED | u64::from(end), Ordering::Relaxed);
        }
    }

    /// Says that it is in the counters now.
    pub fn set_counted(&self) {
        if let Some(row) = self.rows.0.slot(self.index) {
            // One writer, so this is no lost update; not before what was added.
            row.end.store(row.end.load(Ordering::Relaxed) | COUNTED, Ordering::Release);
        }
    }

    /// Says that its record is about to be shown in the owner's ring, which is written as far as `before`.
    pub fn set_recording(&self, before: u64) {
        if let Some(row) = self.rows.0.slot(self.index) {
            row.recording.store(before.wrapping_add(1), Ordering::Relaxed);
        }
    }

    /// Says that its record was counted as dropped: nobody has to write one.
    pub fn set_dropped(&self) {
        self.set_recording(NEVER);
    }

    /// Says whether it is a stream.
    pub fn set_stream(&self, is_stream: bool) {
        if let Some(row) = self.rows.0.slot(self.index) {
            row.is_stream.store(is_stream.into(), Ordering::Relaxed);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let owner = &*self.rows.0;
        if let Some(row) = owner.slot(self.index) {
            row.clear();
        }
        owner.free.lock().unwrap_or_else(PoisonError::into_inner).empty.push(self.index);
    }
}
