//! The gate of a worker: admits requests, knows the live ones, and holds each of them until its last byte.
//!
//! Holds INV-PASS-1, INV-RECORD-1 (ARCHITECTURE.md).

pub mod admission;
pub mod load;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use evergate_board::{Board, ChildRow, InflightPhase, InflightRows, InflightStart, Ticket, monotonic_ns};
use evergate_core::ids::RequestId;
use evergate_core::json::Usage;
use evergate_core::record::Access;
use evergate_core::{Cause, Deadline, Error, Fault};
use tokio::sync::{Notify, OwnedSemaphorePermit, watch};

use self::admission::Admission;
use self::load::{Load, Weight};
use crate::context::Token;
use crate::telemetry::access::AccessLog;
use crate::telemetry::names::{self, End};

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
    live: Mutex<HashMap<u32, Arc<Token>>>,
    empty: Notify,
    stage: watch::Sender<Stage>,
    access: AccessLog,
}

/// What is known of a request when it arrives.
#[derive(Clone, Debug, Default)]
pub struct Arrival {
    /// The client's well-formed request id, or empty.
    pub client_id: String,
    /// Name of the key it came with.
    pub tenant: String,
    /// Method.
    pub method: &'static str,
    /// Path as labelled.
    pub route: &'static str,
}

impl Gate {
    /// The gate of the child that owns `row`, with `slots` places and a line of at most `queue_max` before them.
    #[must_use]
    pub fn new(board: Board, row: u32, epoch: u32, (slots, queue_max): (u32, u32), access: AccessLog) -> Arc<Self> {
        let (rows, board_rows) = (board.inflight_rows(row), board.shape().slots);
        Arc::new(Self {
            admission: Admission::new(board.clone(), row, slots, queue_max),
            load: Arc::new(Load::new(board.clone(), row)),
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
            access,
        })
    }

    /// The board.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
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
        if stage == Stage::Cancelling {
            for token in self.lock_live().values() {
                token.cancel(Cause::Draining);
            }
        }
    }

    /// Live requests.
    #[must_use]
    pub fn live(&self) -> usize {
        self.lock_live().len()
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

    fn lock_live(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Arc<Token>>> {
        // Inserting and removing leave the map whole whatever happens between.
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
        self.lock_live().insert(id.seq, Arc::clone(token));
        if *self.stage.borrow() == Stage::Cancelling {
            token.cancel(Cause::Draining);
        }
        let record = Record { started: Instant::now(), ..Record::new(id, arrival) };
        Ok(Pass {
            gate: Arc::clone(self),
            ticket,
            token: Arc::clone(token),
            _permit: permit,
            record: Box::new(record),
            weight,
        })
    }

    /// Writes the record of a request that ended before it was admitted, or needed no admission.
    pub fn record_unadmitted(
        &self,
        id: RequestId,
        arrival: Arrival,
        started: Instant,
        (status, end): (u16, End),
        error: Option<&Error>,
    ) {
        let mut record = Record { started, ..Record::new(id, arrival) };
        record.end = Some((status, end));
        record.detail = error.and_then(|error| error.detail.clone()).unwrap_or_default();
        self.write(&record, None);
    }

    /// Counts a request and writes its record. With a row on the board, a death in the middle is made up for by the master:
    /// it counts what is not marked as counted, and the clerk drops its second record of one request.
    fn write(&self, record: &Record, ticket: Option<&Ticket>) {
        let (status, end) = record.end.unwrap_or((499, End::ClientGone));
        let Some(series) = self.board.series(self.row) else { return };
        let model_label = record.model_label;
        let end_code = names::status_and_end(status, end);
        if let Some(ticket) = ticket {
            ticket.set_end(end_code);
        }
        series.add(names::key(names::REQUESTS, model_label, record.backend_label, end_code), 1);
        if let Some(ticket) = ticket {
            ticket.set_counted();
        }
        if let Some(ms) = record.first_token_ms {
            series.add(names::key(names::FIRST_TOKEN_BUCKET, model_label, names::first_token_bucket(ms), 0), 1);
            series.add(names::key(names::FIRST_TOKEN_SUM_US, model_label, 0, 0), (ms * 1000.0) as u64);
        }
        if let Some(usage) = record.usage {
            let tenant = self.board.label(&record.arrival.tenant);
            series.add(names::key(names::TOKENS_IN, model_label, tenant, 0), usage.tokens_in);
            series.add(names::key(names::TOKENS_OUT, model_label, tenant, 0), usage.tokens_out);
        }
        let is_written = self.access.write(&Access {
            at_ms: evergate_sys::unix_ms(),
            request_id: record.id.text().as_str(),
            client_id: &record.arrival.client_id,
            tenant: &record.arrival.tenant,
            method: record.arrival.method,
            route: record.arrival.route,
            model: &record.model,
            backend: &record.backend,
            attempts: record.attempts,
            status,
            cause: end.name(),
            is_stream: record.is_stream,
            bytes_in: record.bytes_in,
            bytes_out: record.bytes_out,
            first_byte_ms: record.first_token_ms,
            duration_ms: record.started.elapsed().as_secs_f64() * 1000.0,
            tokens_in: record.usage.map(|usage| usage.tokens_in),
            tokens_out: record.usage.map(|usage| usage.tokens_out),
            detail: &record.detail,
            pid: self.child().map_or(0, ChildRow::pid),
            is_by_master: false,
        });
        if !is_written {
            series.add(names::key(names::ACCESS_DROPPED, 0, 0, 0), 1);
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

/// What the access record and the counters will say of a request.
#[derive(Debug)]
pub struct Record {
    id: RequestId,
    arrival: Arrival,
    started: Instant,
    /// Model as the client named it.
    pub model: String,
    /// Upstream that was called; see [`Pass::set_backend`].
    backend: String,
    /// Calls made.
    attempts: u32,
    /// Whether it is a stream.
    pub is_stream: bool,
    /// Request body.
    pub bytes_in: u64,
    /// Response body.
    pub bytes_out: u64,
    /// Milliseconds from admission to the first piece of the answer.
    pub first_token_ms: Option<f64>,
    /// As the upstream reported it.
    pub usage: Option<Usage>,
    /// Our note on the cause.
    pub detail: String,
    /// Status of a head that was sent while the end was still open.
    pub sent_status: Option<u16>,
    model_label: u16,
    backend_label: u16,
    end: Option<(u16, End)>,
    is_complete: bool,
}

impl Record {
    fn new(id: RequestId, arrival: Arrival) -> Self {
        Self {
            id,
            arrival,
            started: Instant::now(),
            model: String::new(),
            backend: String::new(),
            attempts: 0,
            is_stream: false,
            bytes_in: 0,
            bytes_out: 0,
            first_token_ms: None,
            usage: None,
            detail: String::new(),
            sent_status: None,
            model_label: 0,
            backend_label: 0,
            end: None,
            is_complete: false,
        }
    }
}

/// Whether a backend is called over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IsCall {
    /// An attempt.
    Yes,
    /// Answered within this process.
    No,
}

/// A live request. Dropped before its end was set, it counts as left by its client; its record is written and its row
/// on the board cleared when it goes.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
    ticket: Ticket,
    token: Arc<Token>,
    _permit: OwnedSemaphorePermit,
    /// For the access record.
    pub record: Box<Record>,
    weight: Weight,
}

impl Pass {
    /// Sets the phase on the board.
    pub fn enter(&self, phase: InflightPhase) {
        self.ticket.set_phase(phase);
    }

    /// Says which model it asks for: `name` as the client wrote it, `label` from the bounded set.
    pub fn set_model(&mut self, name: &str, label: &str) {
        self.record.model = name.to_owned();
        self.record.model_label = self.gate.board.label(label);
        self.ticket.set_model(self.record.model_label, name);
    }

    /// Says who answers it: an upstream, which is called now, or this process itself (`echo`).
    pub fn set_backend(&mut self, name: &str, is_call: IsCall) {
        self.record.backend = name.to_owned();
        self.record.backend_label = self.gate.board.label(name);
        self.record.attempts += u32::from(is_call == IsCall::Yes);
        self.ticket.set_backend(self.record.backend_label, self.record.attempts);
    }

    /// Shows on the board that this request is being worked on, until [`Pass::rest`].
    pub fn run(&self) {
        self.gate.set_running(self.record.id.seq);
    }

    /// The event loop goes on to something else.
    pub fn rest(&self) {
        self.gate.set_running(0);
    }

    /// Says that it is a stream, as soon as that is known: it counts as one while it waits for its first event.
    pub fn set_stream(&mut self) {
        self.record.is_stream = true;
        self.ticket.set_stream(true);
        self.weight.set_stream();
    }

    /// Notes the arrival of the answer's first piece.
    pub fn note_first_token(&mut self) {
        if self.record.first_token_ms.is_none() {
            self.record.first_token_ms = Some(self.record.started.elapsed().as_secs_f64() * 1000.0);
        }
    }

    /// Sets how it ends, with the status that the client was sent. The first call counts.
    pub fn set_end(&mut self, status: u16, end: End) {
        if self.record.end.is_none() {
            self.record.end = Some((status, end));
            self.ticket.set_end(names::status_and_end(status, end));
        }
    }

    /// As `set_end`, for an error.
    pub fn set_error(&mut self, status: u16, error: &Error) {
        if let Some(detail) = &error.detail
            && self.record.detail.is_empty()
        {
            self.record.detail.clone_from(detail);
        }
        self.set_end(status, End::Fault(error.fault));
    }

    /// Counts a caught panic on the owner's row.
    pub fn count_panic(&self, count: fn(&Board, u32)) {
        count(&self.gate.board, self.gate.row);
    }

    /// Its client reads nothing: what of the answer is not the kernel's yet never will be.
    pub fn stall(&self) {
        self.token.cancel(Cause::ClientStalled);
    }

    /// The last byte is the kernel's.
    pub fn complete(mut self) {
        self.ticket.set_phase(InflightPhase::Write);
        self.record.is_complete = true;
    }
}

impl Pass {
    /// Why a request went before its last byte did.
    fn early_end(&self) -> (u16, End) {
        let (status, end) = match self.token.cause() {
            _ if std::thread::panicking() => (500, End::Fault(Fault::Internal)),
            None | Some(Cause::ClientGone) => (499, End::ClientGone),
            Some(Cause::ClientStalled) => (499, End::ClientStalled),
            Some(cause) => (cause.fault().row().status, End::Fault(cause.fault())),
        };
        (self.record.sent_status.unwrap_or(status), end)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if !self.record.is_complete && matches!(self.record.end, None | Some((_, End::Ok))) {
            self.record.end = Some(self.early_end());
        }
        if let Some(child) = self.gate.child() {
            child.set_requests(child.requests() + 1);
        }
        // The record first, then the row: a death in between shows the request twice rather than never.
        self.gate.write(&self.record, Some(&self.ticket));
        let mut live = self.gate.lock_live();
        live.remove(&self.record.id.seq);
        if live.is_empty() {
            self.gate.empty.notify_waiters();
        }
    }
}
