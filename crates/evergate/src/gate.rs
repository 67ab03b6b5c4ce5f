//! The gate of a worker: admits requests, knows the live ones, and holds each of them until its last byte.

pub mod admission;
mod idle;
mod incoming;
pub mod load;
pub mod memory;
pub mod pass;
pub mod permits;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use evergate_board::{Board, ChildRow, InflightPhase, InflightRows, InflightStart, Ticket, monotonic_ns};
use evergate_core::cancel::CauseCell;
use evergate_core::ids::RequestId;
use evergate_core::{Cause, Deadline, Error, Fault};
use tokio::sync::{Notify, watch};

use self::admission::{Admission, Tell};
use self::load::{Load, Weight};
use self::pass::{Admitted, Pass, Record};
use crate::context::Token;
use crate::telemetry::access::AccessLog;
use crate::telemetry::names::{self, End};

/// How long after a failed accept a worker is short of descriptors: some pauses between two tries.
const SHORT_NS: u64 = 1_000_000_000;

/// How far a worker is on its way to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Serving.
    Serving,
    /// No new connections; what is there may finish.
    Draining,
    /// Live requests are told to end.
    Cancelling,
}

/// Admits requests and keeps them in view.
#[derive(Debug)]
pub struct Gate {
    board: Board,
    row: u32,
    epoch: u32,
    rows: InflightRows,
    admission: Admission,
    load: Arc<Load>,
    announced_max: u32,
    reading: AtomicU32,
    seq: AtomicU32,
    live: Mutex<Live>,
    empty: Notify,
    stage: watch::Sender<Stage>,
    /// Why live requests are told to end.
    ending: CauseCell,
    access: AccessLog,
    /// When accepting last failed for want of descriptors; 0 for never.
    short_ns: AtomicU64,
    idle: idle::Idle,
    incoming: incoming::Incoming,
}

/// Live requests by their rows.
#[derive(Debug, Default)]
struct Live {
    by_row: Vec<Option<Arc<Token>>>,
    count: usize,
}

impl Live {
    fn insert(&mut self, row: u32, token: Arc<Token>) {
        let row = row as usize;
        if self.by_row.len() <= row {
            self.by_row.resize(row + 1, None);
        }
        if let Some(slot) = self.by_row.get_mut(row) {
            self.count += usize::from(slot.replace(token).is_none());
        }
    }

    fn remove(&mut self, row: u32) {
        let gone = self.by_row.get_mut(row as usize).and_then(Option::take);
        self.count -= usize::from(gone.is_some());
    }

    fn tokens(&self) -> impl Iterator<Item = &Arc<Token>> {
        self.by_row.iter().flatten()
    }
}

/// What is known of a request when it arrives.
#[derive(Clone, Debug, Default)]
pub struct Arrival {
    /// The client's well-formed request id, or empty.
    pub client_id: String,
    /// Name of the key it came with.
    pub tenant: Arc<str>,
    /// Method.
    pub method: &'static str,
    /// Path as labelled.
    pub route: &'static str,
}

impl Gate {
    /// The gate of the child that owns `row`, with `slots` places and a line of at most `queue_max` before them; `tell`
    /// wakes the master when requests begin to wait.
    #[must_use]
    pub fn new(
        board: Board,
        (row, epoch): (u32, u32),
        (slots, queue_max): (u32, u32),
        access: AccessLog,
        tell: Tell,
    ) -> Arc<Self> {
        let (rows, board_rows) = (board.inflight_rows(row), board.shape().slots);
        Arc::new(Self {
            admission: Admission::new(board.clone(), row, (slots, queue_max), tell),
            load: Arc::new(Load::new(board.clone(), row, slots)),
            board,
            row,
            epoch,
            rows,
            // Whoever has a place has a row, too.
            announced_max: board_rows.saturating_sub(slots),
            reading: AtomicU32::new(0),
            seq: AtomicU32::new(0),
            live: Mutex::default(),
            empty: Notify::new(),
            stage: watch::Sender::new(Stage::Serving),
            ending: CauseCell::default(),
            access,
            short_ns: AtomicU64::new(0),
            idle: idle::Idle::default(),
            incoming: incoming::Incoming::default(),
        })
    }

    /// The board.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// The owner's number within the run.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The owner's row number.
    #[must_use]
    pub fn row(&self) -> u32 {
        self.row
    }

    fn child(&self) -> Option<&ChildRow> {
        self.board.child(self.row)
    }

    /// What the worker has to do, beside its peers.
    #[must_use]
    pub fn load(&self) -> &Arc<Load> {
        &self.load
    }

    /// Whether kept connections should be told to go to another worker; see [`Load::is_far_above_peers`].
    #[must_use]
    pub fn is_far_above_peers(&self) -> bool {
        self.load.is_far_above_peers()
    }

    /// Accepting has failed for want of descriptors: for a while each answer closes its connection.
    pub fn run_short(&self) {
        self.short_ns.store(monotonic_ns(), Ordering::Relaxed);
    }

    /// Connections are short, and others wait: those that have idled the longest, of `idle_max` at most, are to end. Called
    /// again within a second, it asks for more of them.
    pub fn shed_idle(&self, idle_max: Duration) {
        if self.idle.shed(idle_max, Instant::now()) {
            // Whoever follows the stage looks.
            self.stage.send_modify(|_| {});
        }
    }

    /// Who has been idle since then or before is to end; none unless that was asked for.
    #[must_use]
    pub fn shed_before(&self) -> Option<Instant> {
        self.idle.shed_before()
    }

    /// Counts a connection that has ended for that.
    pub fn count_shed_idle(&self) {
        if let Some(series) = self.board.series(self.row) {
            series.add(names::key(names::IDLE_SHED, 0, 0, 0), 1);
        }
    }

    /// Whether that was a moment ago.
    #[must_use]
    pub fn is_short(&self) -> bool {
        let then = self.short_ns.load(Ordering::Relaxed);
        then > 0 && monotonic_ns().saturating_sub(then) < SHORT_NS
    }

    /// A new request's own id.
    #[must_use]
    pub fn next_id(&self) -> RequestId {
        let seq = self.seq.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        RequestId { run: self.board.run_id(), epoch: self.epoch, seq }
    }

    /// Follows the stage.
    #[must_use]
    pub fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    /// Whether the worker is on its way out.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        *self.stage.borrow() != Stage::Serving
    }

    /// Goes to a later stage; never back.
    pub fn enter(&self, stage: Stage) {
        self.stage.send_if_modified(|now| {
            let is_later = stage > *now;
            if is_later {
                *now = stage;
            }
            is_later
        });
    }

    /// Tells all live requests to end, and those that are still on their way in.
    pub fn cancel(&self, cause: Cause) {
        self.ending.set(cause);
        self.enter(Stage::Cancelling);
        for token in self.lock_live().tokens() {
            token.cancel(self.ending());
        }
    }

    /// Why requests are told to end in [`Stage::Cancelling`].
    #[must_use]
    pub fn ending(&self) -> Cause {
        self.ending.get().unwrap_or(Cause::Draining)
    }

    /// Ends the request that holds the most memory, if one holds much, be it live or still being read; says whether there was
    /// one.
    pub fn end_most(&self) -> bool {
        let live =
            self.lock_live().tokens().filter(|token| token.cause().is_none()).max_by_key(|token| token.held()).cloned();
        let most = live.into_iter().chain(self.incoming.most()).max_by_key(|token| token.held());
        let most = most.filter(|token| token.held() > memory::LARGE_BYTES);
        most.inspect(|token| token.cancel(Cause::Memory)).is_some()
    }

    /// Live requests.
    #[must_use]
    pub fn live(&self) -> usize {
        self.lock_live().count
    }

    /// Waits until no request is live.
    pub async fn wait_empty(&self) {
        loop {
            let emptied = self.empty.notified();
            if self.live() == 0 {
                return;
            }
            emptied.await;
        }
    }

    fn lock_live(&self) -> std::sync::MutexGuard<'_, Live> {
        // Inserting and removing leave it whole whatever happens between.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request whose body is still to be read, and puts it on the board, so that the worker's death names it
    /// too. It takes no place: a slow body must not keep others out. When the rows run short those for admitted requests
    /// stay free, and it is only counted.
    #[must_use]
    pub fn announce(self: &Arc<Self>, id: RequestId, arrival: &Arrival) -> Announced {
        let mut announced = Announced::new(self);
        if self.reading.load(Ordering::Relaxed) <= self.announced_max {
            announced.ticket = self.take_row(id, arrival);
        }
        if let Some(ticket) = &announced.ticket {
            ticket.set_phase(InflightPhase::Body);
        }
        announced
    }

    fn take_row(&self, id: RequestId, arrival: &Arrival) -> Option<Ticket> {
        self.rows.admit(InflightStart {
            seq: id.seq,
            epoch: self.epoch,
            client_id: &arrival.client_id,
            route: self.board.label(arrival.route),
            key: self.board.label(&arrival.tenant),
            method: self.board.label(arrival.method),
            started_ns: monotonic_ns(),
        })
    }

    /// Refuses what would be refused now; see [`Admission::check_room`].
    ///
    /// # Errors
    /// `overloaded`.
    pub fn check_room(&self) -> Result<(), Error> {
        self.admission.check_room()
    }

    /// Admits a request, waiting for a place until its deadline.
    ///
    /// # Errors
    /// `overloaded` when as many requests wait as may, or no place was free in time.
    pub async fn admit(
        self: &Arc<Self>,
        id: RequestId,
        arrival: Arrival,
        mut announced: Announced,
        deadline: Deadline,
        token: &Arc<Token>,
    ) -> Result<Pass, Error> {
        let permit = match self.admission.take() {
            Some(permit) => permit,
            None => {
                announced.weight.set_waiting(true);
                self.admission.wait(deadline).await?
            }
        };
        let (ticket, mut weight) = announced.into_parts();
        weight.set_waiting(false);
        let ticket = ticket.or_else(|| self.take_row(id, &arrival));
        let Some(ticket) = ticket else {
            // There are rows for twice the places.
            return Err(Error::new(Fault::Overloaded, "the board has no row left for the request; try again"));
        };
        ticket.set_phase(InflightPhase::Route);
        token.account();
        self.lock_live().insert(ticket.index(), Arc::clone(token));
        if *self.stage.borrow() == Stage::Cancelling {
            token.cancel(self.ending());
        }
        Ok(Pass::new(
            Arc::clone(self),
            Admitted { ticket, permit, weight },
            Arc::clone(token),
            Record::new(id, arrival),
        ))
    }

    /// Writes the record of a request that ended before it was admitted, or needed no admission. It has a row for that long,
    /// so that a death in the middle leaves as many counts as records. (When the rows have run short it has none.)
    pub fn record_unadmitted(
        &self,
        id: RequestId,
        arrival: Arrival,
        started: Instant,
        (status, end): (u16, End),
        error: Option<&Error>,
    ) {
        let ticket = self.take_row(id, &arrival);
        let mut record = Record::ended(id, arrival, started, (status, end), error);
        self.write(&mut record, ticket.as_ref());
    }

    /// Counts the time that an answer's first byte took.
    pub fn count_first_byte(&self, time: Duration) {
        if let Some(series) = self.board.series(self.row) {
            names::count_first_byte(&series, time);
        }
    }

    /// Shows on the board which request is being polled, 0 for none: a death then names the one that was running.
    pub fn set_running(&self, seq: u32) {
        if let Some(child) = self.child() {
            child.set_running(seq.into());
        }
    }
}

/// A request that is not admitted yet.
#[derive(Debug)]
pub struct Announced {
    ticket: Option<Ticket>,
    weight: Weight,
    _reading: Reading,
}

impl Announced {
    fn new(gate: &Arc<Gate>) -> Self {
        gate.reading.fetch_add(1, Ordering::Relaxed);
        Self { ticket: None, weight: Weight::new(&gate.load), _reading: Reading(Arc::clone(gate)) }
    }

    fn into_parts(self) -> (Option<Ticket>, Weight) {
        (self.ticket, self.weight)
    }
}

/// Counts a request before its admission.
#[derive(Debug)]
struct Reading(Arc<Gate>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.reading.fetch_sub(1, Ordering::Relaxed);
    }
}
