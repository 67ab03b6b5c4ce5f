//! What becomes of a call whose client has left. By default it is dropped, which stops the upstream; a model's
//! `on_disconnect` may have it read on, for a while or to its end, so that what it costs is known. Nothing is begun for a
//! client that is gone: no call that was not sent yet, and no further target.
//!
//! The work goes on as a task of its own and takes the request's pass along: its place, its row on the board, its record.
//!
//! Holds INV-LEFT-1 (ARCHITECTURE.md).

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use evergate_core::config::OnDisconnect;
use evergate_core::{Cause, Error, Fault};
use http::Response;

use super::app::App;
use super::body::{Body, Stream};
use crate::context::Token;
use crate::gate::Stage;
use crate::gate::pass::Pass;

/// What is said of work that went to its own end.
const FINISHED: &str = "finished";

/// How one request goes on without its client.
#[derive(Clone, Debug)]
pub struct Left {
    app: Arc<App>,
    policy: OnDisconnect,
    token: Arc<Token>,
    /// The request's own number, for the board.
    seq: u32,
    /// Whether the call under way was sent.
    begun: Arc<AtomicBool>,
    /// Whether it goes on without its client.
    gone: Arc<AtomicBool>,
}

/// A request under way: its answer's head or its failure, and its pass.
pub type Work = Pin<Box<dyn Future<Output = (Result<Response<Body>, Error>, Pass)> + Send>>;

/// Work that may outlive its client.
pub struct Watched {
    work: Option<Work>,
    left: Left,
}

impl Left {
    /// For one request of a model with that policy.
    #[must_use]
    pub fn new(app: &Arc<App>, policy: OnDisconnect, token: &Arc<Token>, seq: u32) -> Self {
        Self {
            app: Arc::clone(app),
            policy,
            token: Arc::clone(token),
            seq,
            begun: Arc::default(),
            gone: Arc::default(),
        }
    }

    /// Set while a call is sent that has no end yet.
    #[must_use]
    pub fn begun(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.begun)
    }

    /// An attempt has failed: until the next one is sent, there is nothing to go on with.
    pub fn rest(&self) {
        self.begun.store(false, Ordering::Relaxed);
    }

    /// Whether the client has left, so that nothing more is begun.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Whether what is being dropped should go on: its client is why, and there is somebody who can.
    fn is_wanted(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
            && matches!(self.token.cause(), None | Some(Cause::ClientGone))
            && !std::thread::panicking()
            && *self.app.gate.stage().borrow() != Stage::Cancelling
            && tokio::runtime::Handle::try_current().is_ok()
    }

    /// Goes on with `work`, which gives what is said of its end.
    fn go_on(self, work: impl Future<Output = (&'static str, Pass)> + Send + 'static) {
        self.gone.store(true, Ordering::Relaxed);
        let tasks = self.app.tasks.clone();
        drop(tasks.spawn("finish", self.finish(Box::pin(work))));
    }

    /// Until the work's own end, the model's time, or the end of the worker's. A death of the process finds the request in
    /// its row, as any other.
    async fn finish(self, mut work: Pin<Box<dyn Future<Output = (&'static str, Pass)> + Send>>) {
        let mut stage = self.app.gate.stage();
        let gate = &self.app.gate;
        let working = poll_fn(|cx| {
            gate.set_running(self.seq);
            let polled = work.as_mut().poll(cx);
            gate.set_running(0);
            polled
        });
        let time = async {
            match self.policy {
                OnDisconnect::Drain(time) => self.app.clock.sleep(time).await,
                OnDisconnect::Cancel | OnDisconnect::Finish => std::future::pending().await,
            }
        };
        let (end, pass) = tokio::select! {
            // What loses is dropped or owned outside; waiting for a time or a stage is cancel-safe.
            biased;
            (end, pass) = working => (end, Some(pass)),
            () = time => ("out of time", None),
            _ = stage.wait_for(|stage| *stage == Stage::Cancelling) => (Fault::ServerShuttingDown.row().code, None),
        };
        // Before the pass goes, here or with the work: its record takes the note.
        self.token.note(end);
        drop((pass, work));
    }
}

impl Watched {
    /// Watches over `work`.
    #[must_use]
    pub fn new(work: Work, left: Left) -> Self {
        Self { work: Some(work), left }
    }
}

impl Future for Watched {
    type Output = (Result<Response<Body>, Error>, Pass);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(work) = &mut self.work else { return Poll::Pending };
        let done = std::task::ready!(work.as_mut().poll(cx));
        self.work = None;
        Poll::Ready(done)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(work) = self.work.take().filter(|_| self.left.is_wanted()) {
            self.left.clone().go_on(async move {
                match work.await {
                    (Ok(mut response), pass) => match response.body_mut().take_stream() {
                        Some(stream) => read_on(stream, pass).await,
                        None => (FINISHED, pass),
                    },
                    (Err(error), pass) => (error.fault.row().code, pass),
                }
            });
        }
    }
}

/// Takes over a stream whose client has left, if its model wants that; gives back what is to be dropped.
pub(super) fn take_over(mut stream: Box<Stream>, pass: Option<Pass>) -> (Option<Box<Stream>>, Option<Pass>) {
    match (stream.left.take_if(|left| left.is_wanted()), pass) {
        (Some(left), Some(pass)) => {
            left.go_on(read_on(stream, pass));
            (None, None)
        }
        (_, pass) => (Some(stream), pass),
    }
}

/// Reads a stream to its end, for what it says of its cost.
async fn read_on(mut stream: Box<Stream>, mut pass: Pass) -> (&'static str, Pass) {
    let end = poll_fn(|cx| {
        loop {
            let piece = std::task::ready!(stream.relay.poll_next(cx));
            pass.record.usage = stream.relay.usage().or(pass.record.usage);
            match piece {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(error.fault.row().code),
                None => return Poll::Ready(FINISHED),
            }
        }
    })
    .await;
    (end, pass)
}
