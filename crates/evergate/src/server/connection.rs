//! One client connection: HTTP/1.1 or HTTP/2, from its first byte to its end, drain included.
//!
//! Holds INV-DRAIN-1 (ARCHITECTURE.md).

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use evergate_board::MasterPhase;
use evergate_core::config::Config;
use evergate_core::head::HeadLimits;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::watch;

use super::client_io::{ClientIo, IoLimits};
use super::h1;
use super::shared::{Leaving, Refused, Shared};
use super::stream::Stream;
use super::streams::Streams;
use crate::gate::{Arrival, Gate, Stage};
use crate::http::app::App;
use crate::http::h2::H2Service;
use crate::http::service::Service;
use crate::tasks::Tasks;
use crate::telemetry::names::End;

/// How long an idle connection of a worker that drains stays readable while others serve on: a client that does not
/// look whether its kept connection has ended, and thinks for up to a second, still gets an answer, with
/// `Connection: close` (measured: closing at once loses requests). As long a second for the ways of a busy machine.
/// An HTTP/2 client has the same time to acknowledge.
const IDLE_LINGER: Duration = Duration::from_secs(2);

/// The same when the whole gateway stops: there is no other worker to send the next request to, so that only those are
/// worth waiting for which are on their way.
const STOP_LINGER: Duration = Duration::from_millis(500);

/// The limits that a configuration sets for connections.
#[must_use]
pub fn limits(config: &Config) -> IoLimits {
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    IoLimits {
        head: HeadLimits {
            bytes: size(config.limits.header_bytes),
            fields: config.limits.headers as usize,
            uri_bytes: size(config.limits.uri_bytes).min(URI_BYTES_MAX),
        },
        header_timeout: config.timeouts.header,
        idle_timeout: config.timeouts.client_idle,
        stall_timeout: config.timeouts.client_stall,
    }
}

/// Longest request target that the type for it takes (`http::Uri`).
const URI_BYTES_MAX: usize = u16::MAX as usize - 1;

/// Of HTTP/2 (A14), said here so that no other version of the library says otherwise. Streams that a client opened and reset
/// before they were looked at; streams that this side reset for a mistake of the client's: beyond either the client is told
/// to calm down (GOAWAY) and the connection ends.
const H2_PENDING_RESETS_MAX: usize = 20;
const H2_OUR_RESETS_MAX: usize = 1024;
/// The least that the protocol allows (RFC 9113, 6.5.2).
const H2_FRAME_BYTES_MAX: u32 = 16 * 1024;
/// Of an answer's bytes, per stream, that wait for the client's window.
const H2_SEND_BYTES_MAX: usize = 400 * 1024;

/// Of a request's header list, as HTTP/2 counts it: 32 bytes more per field (RFC 9113, 6.5.2). Beyond it the library answers 431 by
/// itself, without a word, an id or a record, so it is well above what is refused here.
fn h2_header_list_bytes(config: &Config) -> u32 {
    let limits = &config.limits;
    u32::try_from(2 * limits.header_bytes + 32 * u64::from(limits.headers) + 16 * 1024).unwrap_or(u32::MAX)
}

/// Serves a connection to its end. Errors are the connection's own: the requests on it have their records.
pub async fn serve(app: Arc<App>, tasks: Tasks, stream: Stream, stage: watch::Receiver<Stage>) {
    let config = &app.sealed.config;
    let mut io = ClientIo::new(stream, limits(config), app.clock.clone());
    io.read_ahead();
    let shared = io.shared();
    let mut drain = Drain { app: &app, shared: Arc::clone(&shared), stage };
    drain.look();
    let is_h2 = drain.during(io.is_h2()).await;
    let Ok(is_h2) = is_h2 else { return };
    let service = Service::new(Arc::clone(&app), shared);
    let shared = Arc::clone(&drain.shared);
    match is_h2 {
        None => io.close().await,
        Some(true) => {
            serve_h2(config, tasks, io, service, drain).await;
            if let Some(cut) = shared.take_refusal() {
                record(&app.gate, &cut);
            }
        }
        // Draining, answers say `Connection: close`; one that awaits a request ends when its patience is over.
        Some(false) => {
            let connection = pin!(h1::Connection::new(io, service));
            drain.during(connection).await;
        }
    }
    if shared.was_shed() {
        app.gate.count_shed_idle();
    }
}

/// Writes the record of a head that was cut: it has no handler that would.
fn record(gate: &Gate, Refused { error, since, .. }: &Refused) {
    let arrival = Arrival { method: "other", route: "other", ..Arrival::default() };
    let end = (error.status(), End::Fault(error.fault));
    gate.record_unadmitted(gate.next_id(), arrival, *since, end, Some(error));
}

/// Tells a connection's I/O type what the stages of the worker mean for it.
struct Drain<'a> {
    app: &'a App,
    shared: Arc<Shared>,
    stage: watch::Receiver<Stage>,
}

impl Drain<'_> {
    /// Takes over the present stage; says whether the connection is to end.
    fn look(&mut self) -> bool {
        let stage = *self.stage.borrow_and_update();
        let is_stop = matches!(self.app.gate.board().master().phase(), MasterPhase::Draining | MasterPhase::Stopped);
        let (linger, owes_first) = match stage {
            Stage::Serving => {
                self.shared.shed(self.app.gate.shed_before());
                return false;
            }
            Stage::Draining if is_stop => (STOP_LINGER, false),
            Stage::Draining => (IDLE_LINGER, true),
            Stage::Cancelling => (Duration::ZERO, false),
        };
        self.shared.leave(Leaving { since: Instant::now(), linger, owes_first });
        true
    }

    /// Waits for the next word of the gate; says whether the connection is to end.
    async fn changed(&mut self) -> bool {
        if self.stage.changed().await.is_err() {
            // The gate is gone, and the process with it.
            std::future::pending::<()>().await;
        }
        self.look()
    }

    /// Waits for `future`, which reads from the connection and so has to be polled again at each stage.
    async fn during<T>(&mut self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        loop {
            let mut seen = self.stage.clone();
            let mut changed = pin!(self.changed());
            let mut asked: Option<Waker> = None;
            let done = poll_fn(|cx| {
                if let Poll::Ready(done) = future.as_mut().poll(cx) {
                    return Poll::Ready(Some(done));
                }
                // Each turn of a busy connection comes here: who will be woken need not ask again.
                let is_asked = asked.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
                if is_asked && !seen.has_changed().unwrap_or_default() {
                    return Poll::Pending;
                }
                seen.mark_unchanged();
                asked = Some(cx.waker().clone());
                changed.as_mut().poll(cx).map(|_| None)
            });
            if let Some(done) = done.await {
                return done;
            }
        }
    }
}

/// An HTTP/2 connection ends by two GOAWAY frames with a PING between: streams on their way here are still taken (RFC
/// 9113, 6.8). The same is done when this worker has far more to do than its peers.
async fn serve_h2(config: &Config, tasks: Tasks, io: ClientIo, service: Service, mut drain: Drain<'_>) {
    let streams = Streams {
        tasks,
        clock: drain.app.clock.clone(),
        limit: config.timeouts.client_stall,
        patience: config.shutdown.cancel / 2,
        shared: Arc::clone(&drain.shared),
    };
    let connection = http2::Builder::new(streams)
        .timer(TokioTimer::new())
        .max_concurrent_streams(config.limits.h2_streams)
        .max_header_list_size(h2_header_list_bytes(config))
        .max_pending_accept_reset_streams(H2_PENDING_RESETS_MAX)
        .max_local_error_reset_streams(H2_OUR_RESETS_MAX)
        .max_frame_size(H2_FRAME_BYTES_MAX)
        .max_send_buf_size(H2_SEND_BYTES_MAX)
        .keep_alive_interval(config.timeouts.client_idle)
        .serve_connection(TokioIo::new(io), H2Service(service));
    let mut connection = pin!(connection);
    let shared = Arc::clone(&drain.shared);
    let mut is_leaving = drain.look();
    while !is_leaving {
        tokio::select! {
            // Pinned outside, and two that are cancel-safe.
            _ = connection.as_mut() => return,
            is_to_end = drain.changed() => is_leaving = is_to_end,
            () = shared.sent_elsewhere() => {
                shared.leave(Leaving { since: Instant::now(), linger: IDLE_LINGER, owes_first: true });
                is_leaving = true;
            }
        }
    }
    connection.as_mut().graceful_shutdown();
    let _ = drain.during(connection).await;
}
