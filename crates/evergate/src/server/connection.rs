//! One client connection: HTTP/1.1 or HTTP/2, from its first byte to its end, drain included.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use evergate_core::config::Config;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::watch;

use super::client_io::{ClientIo, IoLimits, Stream};
use super::head::HeadLimits;
use crate::gate::Stage;
use crate::http::app::App;
use crate::http::service::Service;
use crate::tasks::Tasks;

/// How long an idle connection of a draining worker stays readable: a client that is just sending its next request
/// gets an answer with `Connection: close` instead of a reset (measured: closing at once loses requests).
const IDLE_LINGER: Duration = Duration::from_millis(500);

/// The limits that a configuration sets for connections.
#[must_use]
pub fn limits(config: &Config) -> IoLimits {
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    IoLimits {
        head: HeadLimits {
            bytes: size(config.limits.header_bytes),
            fields: config.limits.headers as usize,
            uri_bytes: size(config.limits.uri_bytes),
        },
        header_timeout: config.timeouts.header,
        idle_timeout: config.timeouts.client_idle,
    }
}

/// Serves a connection to its end. Errors are the connection's own: the requests on it have their records.
pub async fn serve(app: Arc<App>, tasks: Tasks, stream: Stream, mut stage: watch::Receiver<Stage>) {
    let config = &app.sealed.config;
    let mut io = ClientIo::new(stream, limits(config));
    io.read_ahead();
    let is_h2 = tokio::select! {
        // Cancel-safe or not does not matter: the loser ends the connection.
        is_h2 = io.is_h2() => is_h2,
        () = drained(&mut stage) => return,
    };
    let Ok(Some(is_h2)) = is_h2 else { return };
    let service = Service::new(Arc::clone(&app), io.shared());
    if is_h2 { serve_h2(config, tasks, io, service, stage).await } else { serve_h1(config, io, service, stage).await }
}

/// Waits until the worker drains and the linger is over.
async fn drained(stage: &mut watch::Receiver<Stage>) {
    // An error means that the gate is gone, and the process with it.
    let _ = stage.wait_for(|stage| *stage != Stage::Serving).await;
    tokio::time::sleep(IDLE_LINGER).await;
}

async fn serve_h1(config: &Config, io: ClientIo, service: Service, mut stage: watch::Receiver<Stage>) {
    let buffer = usize::try_from(config.limits.header_bytes).unwrap_or(usize::MAX).clamp(64 * 1024, 1 << 20);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // `ClientIo` has the timers of heads.
        .header_read_timeout(None)
        .max_headers(config.limits.headers as usize)
        .max_buf_size(buffer)
        .serve_connection(TokioIo::new(io), service);
    let mut connection = pin!(connection);
    tokio::select! {
        // Both are pinned outside or end with this function.
        _ = connection.as_mut() => return,
        () = drained(&mut stage) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

async fn serve_h2(config: &Config, tasks: Tasks, io: ClientIo, service: Service, mut stage: watch::Receiver<Stage>) {
    let connection = http2::Builder::new(tasks)
        .timer(TokioTimer::new())
        .max_concurrent_streams(config.limits.h2_streams)
        .max_header_list_size(u32::try_from(config.limits.header_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(config.timeouts.client_idle)
        .serve_connection(TokioIo::new(io), service);
    let mut connection = pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stage.wait_for(|stage| *stage != Stage::Serving) => {}
    }
    // Two GOAWAY frames with a ping between: streams on their way here are still taken (RFC 9113, 6.8).
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        drop(self.spawn("h2_stream", future));
    }
}
