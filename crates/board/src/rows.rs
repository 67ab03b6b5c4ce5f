//! The rows of the master and of the children.

use evergate_core::exit::Kind;

use crate::text::Text;
use crate::word::{Word, row};

/// What the master is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MasterPhase {
    /// No worker was ready yet.
    Starting = 1,
    /// Serving.
    Serving = 2,
    /// Serving, while `/readyz` says 503.
    Settling = 3,
    /// Children are finishing.
    Draining = 4,
    /// All children are gone.
    Stopped = 5,
}

impl MasterPhase {
    /// The word in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Settling => "settling",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
        }
    }
}

impl Word for MasterPhase {
    fn to_word(self) -> u64 {
        self as u64
    }
    fn from_word(word: u64) -> Self {
        [Self::Starting, Self::Serving, Self::Settling, Self::Draining]
            .into_iter()
            .find(|phase| *phase as u64 == word)
            .unwrap_or(Self::Stopped)
    }
}

/// What a child is doing. Written by the child itself, except for `Empty`, `Booting` and `Ghost`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// No child has the row.
    Empty = 0,
    /// Started, not ready yet.
    Booting = 1,
    /// Doing its work.
    Ready = 2,
    /// Told to stop; finishing what it has.
    Draining = 3,
    /// The drain time is over; what is left is being cancelled.
    Cancelling = 4,
    /// Stopping its resources.
    Cleaning = 5,
    /// It was killed and hangs in the kernel; it will do nothing more, and is not buried yet. The master writes this.
    Ghost = 6,
}

impl Phase {
    /// The word in tables and records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Booting => "booting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Cancelling => "cancelling",
            Self::Cleaning => "cleaning",
            Self::Ghost => "ghost",
        }
    }
}

impl Word for Phase {
    fn to_word(self) -> u64 {
        self as u64
    }
    fn from_word(word: u64) -> Self {
        [Self::Booting, Self::Ready, Self::Draining, Self::Cancelling, Self::Cleaning, Self::Ghost]
            .into_iter()
            .find(|phase| *phase as u64 == word)
            .unwrap_or(Self::Empty)
    }
}

impl Word for Option<Kind> {
    fn to_word(self) -> u64 {
        self.map_or(0, |kind| kind as u64)
    }
    fn from_word(word: u64) -> Self {
        u8::try_from(word).ok().and_then(Kind::from_byte)
    }
}

row! {
    /// The master's row; the master writes, everybody reads.
    MasterRow {
        /// Its process id.
        pid set_pid i32;
        /// Its start, in clock ticks since boot.
        start_ticks set_start_ticks u64;
        /// When its loop last turned, monotonic nanoseconds; at most half a second apart.
        beat_ns set_beat_ns u64;
        /// What it is doing.
        phase set_phase MasterPhase;
        /// Generation of the configuration that new children get.
        generation set_generation u32;
        /// Fewest workers.
        workers_min set_workers_min u32;
        /// Most workers.
        workers_max set_workers_max u32;
        /// Workers wanted at this moment.
        workers_target set_workers_target u32;
        /// When it started, Unix milliseconds.
        started_unix_ms set_started_unix_ms u64;
        /// Slots whose child keeps dying.
        degraded set_degraded u32;
        /// Connections in the listeners' accept queues, as last looked at.
        queue set_queue u32;
        /// Connects that the listeners' full queues turned away since the start.
        queue_overflows set_queue_overflows u64;
        /// Connections in the accept queues, and requests that wait in a worker for a slot.
        backlog set_backlog u64;
        /// Whether a reload is under way.
        reloading set_reloading bool;
        /// Reloads that came into force.
        reloads set_reloads u64;
        /// Reloads that left everything as it was.
        reloads_failed set_reloads_failed u64;
        /// Workers added after the start.
        scale_ups set_scale_ups u64;
        /// Workers taken away.
        scale_downs set_scale_downs u64;
        /// Access records of lost requests that the full ring did not take.
        access_dropped set_access_dropped u64;
        /// Lines for standard error that it could not take.
        talk_dropped set_talk_dropped u64;
        /// Whether the listeners are closed for good: who accepts now takes what the master turns away.
        is_closed set_is_closed bool;
        /// Processes reaped that were no child of ours.
        strangers set_strangers u64;
        /// Ends of children that were noted.
        exits set_exits u64;
    } with {
        last_exits: [Text; EXITS],
    }
}

/// Ends that are kept on the board.
const EXITS: usize = 8;

impl MasterRow {
    /// Notes the end of a child, a text of at most 256 bytes; the last eight are kept.
    pub fn note_exit(&self, text: &str) {
        let count = self.exits();
        let at = usize::try_from(count).unwrap_or(0) % EXITS;
        if let Some(place) = self.last_exits.get(at) {
            place.set(text);
        }
        self.set_exits(count.wrapping_add(1));
    }

    /// The last ends of children, eight at most, the newest first.
    #[must_use]
    pub fn last_exits(&self) -> Vec<String> {
        let count = usize::try_from(self.exits()).unwrap_or(0);
        let newest_first = (count.saturating_sub(EXITS)..count).rev();
        newest_first.filter_map(|at| Some(self.last_exits.get(at % EXITS)?.get())).collect()
    }
}

row! {
    /// A child's row. The master claims and clears it; in between the child writes, everybody reads.
    ChildRow {
        /// Process id; 0 while the row is empty.
        pid set_pid i32;
        /// Its start, in clock ticks since boot.
        start_ticks set_start_ticks u64;
        /// What it is.
        kind set_kind Option<Kind>;
        /// Its slot among its kind.
        slot set_slot u32;
        /// Its number within the run, from 1.
        epoch set_epoch u32;
        /// Generation of its configuration.
        generation set_generation u32;
        /// What it is doing.
        phase set_phase Phase;
        /// Its last beat, monotonic nanoseconds; 0 before the first.
        beat_ns set_beat_ns u64;
        /// When it was started, monotonic nanoseconds.
        spawned_ns set_spawned_ns u64;
        /// When it became ready, monotonic nanoseconds; 0 before.
        ready_ns set_ready_ns u64;
        /// Whether it accepts connections.
        accepting set_accepting bool;
        /// Whether it found the accept queue empty after it was told to stop.
        took_queue set_took_queue bool;
        /// Requests it has, from their heads on, a stream for more than one (`evergate::gate::load`).
        load set_load u32;
        /// Connections it accepted that have not sent a request yet.
        fresh set_fresh u32;
        /// Requests that it could begin at once: places that nobody has or is about to ask for.
        spare set_spare u32;
        /// The part of its load that lasts: streams, requests that wait, and the rest as a mean over some beats.
        held set_held u32;
        /// Connections it accepted since its start.
        accepted set_accepted u64;
        /// Client connections open.
        connections set_connections u32;
        /// Upstream connections open.
        upstream_connections set_upstream_connections u32;
        /// The part of its load that waits for an upstream which has no permit left: more workers do not help it.
        parked set_parked u32;
        /// Tasks of its runtime that have not ended.
        tasks set_tasks u32;
        /// Requests waiting for a slot.
        waiting set_waiting u32;
        /// Since when the oldest of them waits, monotonic nanoseconds; 0 when none does.
        waiting_since_ns set_waiting_since_ns u64;
        /// How late its event loop was lately, microseconds.
        loop_lag_us set_loop_lag_us u32;
        /// Resident set, KiB.
        rss_kib set_rss_kib u64;
        /// How much it gives up for want of memory (`core::memory::Rung`).
        memory_rung set_memory_rung u32;
        /// Bytes of large request bodies that it has let in and that have not come yet.
        coming set_coming u64;
        /// Descriptors it has open.
        descriptors set_descriptors u32;
        /// Whether it has so many that nothing accounts for that it should be replaced.
        is_leaking set_leaking bool;
        /// Number (`seq`) of the request that is being polled at this moment; 0 for none.
        running set_running u64;
        /// Requests it has taken since its start.
        requests set_requests u64;
        /// Of those, the ones that have ended with an error that was not their client's.
        errors set_errors u64;
        /// In-flight rows from this one on were never used by this child.
        inflight_high set_inflight_high u32;
        /// When it last panicked, monotonic nanoseconds; 0 for never.
        panic_ns set_panic_ns u64;
    } with {
        note: Text,
        panic_place: Text,
        panic_offsets: Text,
    }
}

/// What the master knows of a child when it starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// What it is.
    pub kind: Kind,
    /// Its slot among its kind.
    pub slot: u32,
    /// Its number within the run.
    pub epoch: u32,
    /// Generation of its configuration.
    pub generation: u32,
    /// Now, monotonic nanoseconds.
    pub spawned_ns: u64,
}

impl ChildRow {
    /// Takes the row for a child that is about to start: everything of the process before is reset. The row's counters
    /// ([`crate::Series`]) are not.
    pub fn claim(&self, claim: &Claim) {
        self.clear();
        self.set_kind(Some(claim.kind));
        self.set_slot(claim.slot);
        self.set_epoch(claim.epoch);
        self.set_generation(claim.generation);
        self.set_spawned_ns(claim.spawned_ns);
        self.set_phase(Phase::Booting);
    }

    /// Empties the row at its child's burial. [`crate::Board::bury`] does that and empties the in-flight rows.
    pub fn clear(&self) {
        self.set_phase(Phase::Empty);
        self.set_accepting(false);
        self.set_pid(0);
        self.set_start_ticks(0);
        self.set_kind(None);
        self.set_slot(0);
        self.set_epoch(0);
        self.set_generation(0);
        self.set_beat_ns(0);
        self.set_spawned_ns(0);
        self.set_ready_ns(0);
        self.set_took_queue(false);
        self.set_load(0);
        self.set_fresh(0);
        self.set_spare(0);
        self.set_held(0);
        self.set_accepted(0);
        self.set_connections(0);
        self.set_upstream_connections(0);
        self.set_parked(0);
        self.set_tasks(0);
        self.set_waiting(0);
        self.set_waiting_since_ns(0);
        self.set_loop_lag_us(0);
        self.set_rss_kib(0);
        self.set_memory_rung(0);
        self.set_coming(0);
        self.set_descriptors(0);
        self.set_leaking(false);
        self.set_running(0);
        self.set_requests(0);
        self.set_errors(0);
        self.set_inflight_high(0);
        self.set_panic_ns(0);
        self.panic_place.set("");
        self.panic_offsets.set("");
        self.set_note("");
    }

    /// What the child says about itself, such as the reason of a failed start. At most 256 bytes.
    #[must_use]
    pub fn note(&self) -> String {
        self.note.get()
    }

    /// Says something about oneself; what is beyond 256 bytes is cut off. One writer at a time.
    pub fn set_note(&self, text: &str) {
        self.note.set(text);
    }

    /// Where the child last panicked: `FILE:LINE:COLUMN`.
    #[must_use]
    pub fn panic_place(&self) -> String {
        self.panic_place.get()
    }

    /// The calls that led there, as hexadecimal offsets into the program.
    #[must_use]
    pub fn panic_offsets(&self) -> String {
        self.panic_offsets.get()
    }

    /// Notes a panic, at a time in monotonic nanoseconds. Allocates nothing, as a panic hook must not.
    pub fn set_panic(&self, place: &str, offsets: &str, now: u64) {
        self.panic_place.set(place);
        self.panic_offsets.set(offsets);
        self.set_panic_ns(now);
    }
}
