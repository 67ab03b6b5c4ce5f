//! A live request's hold on its worker, and what is said of it when it is over.
//!
//! Holds INV-PASS-1, INV-RECORD-1 (ARCHITECTURE.md).

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use evergate_board::{ChildRow, InflightPhase, InflightPlace, Ticket};
use evergate_core::ids::RequestId;
use evergate_core::json::Usage;
use evergate_core::record::{Access, Step};
use evergate_core::{Cause, Error, Fault};
use tokio::sync::OwnedSemaphorePermit;

use super::load::Weight;
use super::{Arrival, Gate};
use crate::context::Token;
use crate::http::fault::{Books, Place, die_in_books, pass_by};
use crate::panics;
use crate::tasks::caught;
use crate::telemetry::names::{self, End};

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
    /// Attempts that have failed, of a request with several targets.
    path: Vec<Step>,
    /// When the attempt that is not on the path yet began; none with a single target.
    attempt_began: Option<Instant>,
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
    is_counted: bool,
}

impl Record {
    /// Of a request whose time begins now.
    pub(super) fn new(id: RequestId, arrival: Arrival) -> Self {
        Self {
            id,
            arrival,
            started: Instant::now(),
            model: String::new(),
            backend: String::new(),
            attempts: 0,
            path: Vec::new(),
            attempt_began: None,
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
            is_counted: false,
        }
    }

    /// Milliseconds since the request came.
    #[must_use]
    pub fn elapsed_ms(&self) -> f64 {
        self.started.elapsed().as_secs_f64() * 1000.0
    }

    /// Puts the attempt under way on the path, if it belongs there.
    fn close_attempt(&mut self, cause: &'static str) {
        if let Some(began) = self.attempt_began.take() {
            let ms = began.elapsed().as_secs_f64() * 1000.0;
            self.path.push(Step { upstream: self.backend.clone(), cause, ms });
        }
    }

    /// Of a request that is over without having been admitted.
    pub(super) fn ended(
        id: RequestId,
        arrival: Arrival,
        started: Instant,
        end: (u16, End),
        error: Option<&Error>,
    ) -> Self {
        let detail = error.and_then(|error| error.detail.clone()).unwrap_or_default();
        Self { started, detail, end: Some(end), ..Self::new(id, arrival) }
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

/// What an admitted request holds of its worker.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) ticket: Ticket,
    pub(super) permit: OwnedSemaphorePermit,
    pub(super) weight: Weight,
}

/// A live request. Dropped before its end was set, it counts as left by its client; its record is written and its row
/// on the board cleared when it goes.
#[derive(Debug)]
pub struct Pass(Box<Held>);

/// What a pass is made of. In a box, since a pass goes from hand to hand.
#[derive(Debug)]
pub struct Held {
    gate: Arc<Gate>,
    ticket: Ticket,
    token: Arc<Token>,
    _permit: OwnedSemaphorePermit,
    /// For the access record.
    pub record: Record,
    weight: Weight,
}

impl Deref for Pass {
    type Target = Held;

    fn deref(&self) -> &Held {
        &self.0
    }
}

impl DerefMut for Pass {
    fn deref_mut(&mut self) -> &mut Held {
        &mut self.0
    }
}

impl Pass {
    pub(super) fn new(gate: Arc<Gate>, admitted: Admitted, token: Arc<Token>, record: Record) -> Self {
        let Admitted { ticket, permit, weight } = admitted;
        Self(Box::new(Held { gate, ticket, token, _permit: permit, record, weight }))
    }

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

    /// Its place on the board, for a program's host.
    #[must_use]
    pub fn place(&self) -> InflightPlace {
        self.ticket.place()
    }

    /// Whether a host has given it to its program.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        self.ticket.is_taken()
    }

    /// Counts how long it has waited for the program that is its upstream to start.
    pub fn note_start_wait(&self, time: Duration) {
        if let Some(series) = self.gate.board.series(self.gate.row) {
            names::count_host_wait(&series, self.record.backend_label, time);
        }
    }

    /// Says that an attempt of several that may come begins now.
    pub fn begin_attempt(&mut self) {
        self.record.attempt_began = Some(Instant::now());
    }

    /// Says which upstream is to be called next, while that is not certain yet: it is no attempt.
    pub fn turn_to(&mut self, name: &str) {
        self.record.backend = name.to_owned();
        self.record.backend_label = 0;
        self.ticket.set_backend(0, self.record.attempts);
    }

    /// Says that it waits for an upstream, or does not any more.
    pub fn set_parked(&mut self, is_parked: bool) {
        self.weight.set_parked(is_parked);
    }

    /// Notes how the attempt under way has failed.
    pub fn end_attempt(&mut self, cause: &'static str) {
        self.record.close_attempt(cause);
    }

    /// The attempts that have failed so far.
    #[must_use]
    pub fn path(&self) -> &[Step] {
        &self.record.path
    }

    /// Another attempt follows one that failed, with `fault` if the upstream was called: what that one had begun is not the
    /// answer's, and it is counted here, since the request's own count tells of the last one only.
    pub fn go_on(&mut self, fault: Option<Fault>) {
        self.record.first_token_ms = None;
        if let Some(fault) = fault
            && let Some(series) = self.gate.board.series(self.gate.row)
        {
            let end = names::status_and_end(0, End::Fault(fault));
            series.add(names::key(names::ATTEMPTS, 0, self.record.backend_label, end), 1);
        }
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
            self.note_first_token_at(self.record.elapsed_ms());
        }
    }

    /// The same, so many milliseconds after the request.
    pub fn note_first_token_at(&mut self, ms: f64) {
        self.record.first_token_ms.get_or_insert(ms);
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

    /// What cancels it.
    #[must_use]
    pub fn token(&self) -> &Arc<Token> {
        &self.token
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

    /// Why a request went before its last byte did.
    fn early_end(&self) -> (u16, End) {
        let (status, end) = match self.token.cause() {
            _ if std::thread::panicking() => (500, End::Fault(Fault::Internal)),
            // What went on without its client is not ended by what ends it then.
            _ if self.token.noted().is_some() => (499, End::ClientGone),
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
        if self.record.end.is_some_and(|(_, end)| end == End::ClientStalled) && self.record.detail.is_empty() {
            self.record.detail = "timeouts.client_stall".into();
        }
        if self.token.cause() == Some(Cause::Memory) && self.record.detail.is_empty() {
            self.record.detail = "memory".into();
        }
        if let Some(end) = self.token.noted() {
            self.record.detail = format!("on_disconnect: {end}");
        }
        if let Some(child) = self.gate.child() {
            child.set_requests(child.requests() + 1);
            if self.record.end.is_some_and(|(_, end)| end.is_error()) {
                child.set_errors(child.errors() + 1);
            }
        }
        if let Some((_, end)) = self.record.end.filter(|_| !self.record.path.is_empty()) {
            self.record.close_attempt(end.name());
        }
        if std::thread::panicking() && self.record.detail.is_empty() {
            self.record.detail = panics::last();
        }
        // The record first, then the row, which tells the master of a death in between. A panic in it
        // would end the connection, and with it the other requests on it.
        let Held { gate, record, ticket, .. } = &mut *self.0;
        let is_written = caught(|| {
            pass_by(Place::Pass);
            gate.write(record, Some(ticket));
        });
        if !is_written {
            gate.write_off(record, ticket);
        }
        let mut live = self.gate.lock_live();
        live.remove(self.ticket.index());
        if live.count == 0 {
            self.gate.empty.notify_waiters();
        }
    }
}

impl Gate {
    /// Counts a request, once, and says how it ended.
    fn count(&self, record: &mut Record, ticket: Option<&Ticket>) -> (u16, End) {
        let (status, end) = record.end.unwrap_or((499, End::ClientGone));
        let end_code = names::status_and_end(status, end);
        if let Some(series) = self.board.series(self.row)
            && !std::mem::replace(&mut record.is_counted, true)
        {
            let key = names::key(names::REQUESTS, record.model_label, record.backend_label, end_code);
            series.add_one(key, |before| {
                if let Some(ticket) = ticket {
                    ticket.set_counting(end_code, before);
                }
                die_in_books(Books::Noted);
            });
            die_in_books(Books::Added);
        }
        if let Some(ticket) = ticket {
            ticket.set_counted();
        }
        (status, end)
    }

    /// Counts a request whose record could not be written for a panic.
    fn write_off(&self, record: &mut Record, ticket: &Ticket) {
        let _ = self.count(record, Some(ticket));
        if let Some(series) = self.board.series(self.row) {
            series.add(names::key(names::ACCESS_DROPPED, 0, 0, 0), 1);
        }
    }

    /// Counts a request and writes its record. With a row on the board, a death in the middle is made up for by the master:
    /// it counts what has not been counted, which the row and the counter tell, and records what has not been recorded, which the
    /// row and the ring tell.
    pub(super) fn write(&self, record: &mut Record, ticket: Option<&Ticket>) {
        let (status, end) = self.count(record, ticket);
        die_in_books(Books::Counted);
        let Some(series) = self.board.series(self.row) else { return };
        let model_label = record.model_label;
        if let Some(ms) = record.first_token_ms {
            series.add(names::key(names::FIRST_TOKEN_BUCKET, model_label, names::first_token_bucket(ms), 0), 1);
            series.add(names::key(names::FIRST_TOKEN_SUM_US, model_label, 0, 0), (ms * 1000.0) as u64);
        }
        if let Some(usage) = record.usage {
            let tenant = self.board.label(&record.arrival.tenant);
            series.add(names::key(names::TOKENS_IN, model_label, tenant, 0), usage.tokens_in);
            series.add(names::key(names::TOKENS_OUT, model_label, tenant, 0), usage.tokens_out);
            if usage.is_suspect {
                series.add(names::key(names::USAGE_SUSPECT, model_label, 0, 0), 1);
            }
        }
        let request_id = record.id.text();
        let access = Access {
            at_ms: evergate_sys::unix_ms(),
            request_id: request_id.as_str(),
            client_id: &record.arrival.client_id,
            tenant: &record.arrival.tenant,
            method: record.arrival.method,
            route: record.arrival.route,
            model: &record.model,
            backend: &record.backend,
            attempts: record.attempts,
            path: if record.path.len() > 1 { &record.path } else { &[] },
            status,
            cause: end.name(),
            is_stream: record.is_stream,
            bytes_in: record.bytes_in,
            bytes_out: record.bytes_out,
            first_byte_ms: record.first_token_ms,
            duration_ms: record.elapsed_ms(),
            tokens_in: record.usage.map(|usage| usage.tokens_in),
            tokens_out: record.usage.map(|usage| usage.tokens_out),
            is_usage_suspect: record.usage.is_some_and(|usage| usage.is_suspect),
            detail: &record.detail,
            pid: self.child().map_or(0, ChildRow::pid),
            is_by_master: false,
        };
        let is_written = self.access.write(&access, |before| {
            if let Some(ticket) = ticket {
                ticket.set_recording(before);
            }
            die_in_books(Books::Recording);
        });
        if !is_written {
            series.add(names::key(names::ACCESS_DROPPED, 0, 0, 0), 1);
            if let Some(ticket) = ticket {
                ticket.set_dropped();
            }
        }
        die_in_books(Books::Written);
    }
}
