//! One process of a pool, from its start to its burial.

use std::sync::Arc;
use std::time::{Duration, Instant};

use evergate_core::{Error, Fault};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep_until, timeout_at};

use super::frames::Decoder;
use super::pool::{Place, Shared};
use super::rule::Number;
use super::said::{self, Last, Piece, Said};
use super::serving::Serving;
use crate::ask::{Ask, Refusal};
use crate::cause::Cause;
use crate::program::{LINGER, Output, Program, Wiring};
use crate::tasks::within;
use crate::{command, tell};

/// What a process is to do.
pub(crate) enum Order {
    Request(Box<Work>),
    /// Nobody waits for it any more.
    Cancel(u64),
    Drain,
}

/// A request on its way to a process.
pub(crate) struct Work {
    pub(crate) id: u64,
    pub(crate) ask: Ask,
    pub(crate) place: Place,
    pub(crate) to: mpsc::Sender<Heard>,
    pub(crate) end: oneshot::Sender<Lost>,
}

/// What comes of a request.
#[derive(Debug)]
pub(crate) enum Heard {
    Piece(Piece),
    Last(Last),
}

/// Why nothing more comes of a request.
#[derive(Debug)]
pub(crate) enum Lost {
    /// No process has seen anything of it: another may.
    Unseen,
    Refused(Refusal),
}

/// Says that a process is gone, whatever became of its task.
struct Gone(Arc<Shared>, Number);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.gone(self.1);
    }
}

/// All of a process's life.
pub(crate) async fn live(shared: Arc<Shared>, number: Number, mut orders: mpsc::Receiver<Order>) {
    let gone = Gone(Arc::clone(&shared), number);
    let (mut program, output, decoder, in_flight) = match start(&shared, number, &mut orders).await {
        Some(started) => started,
        None => return,
    };
    let input = program.take_input();
    shared.tell(|rule| rule.ready(number, in_flight, Instant::now()));
    let mut serving = Serving::new(&shared, number, program.pid(), input);
    let over = serving.run(output, decoder, &mut orders).await;
    let error = over.error(&mut program).await;
    match &error {
        Some(error) => program.blame(error),
        None => program.blame("it was drained, and did not end by itself"),
    }
    // First nobody else is sent here, then those who were are sent elsewhere.
    shared.ending(number, error.as_ref().map(|error| Cause::new(error, &program.tail())));
    orders.close();
    serving.finish(&error.unwrap_or_else(|| said::broken("is being ended")));
    while let Ok(order) = orders.try_recv() {
        if let Order::Request(work) = order {
            let _ = work.end.send(Lost::Unseen);
        }
    }
    drop(serving);
    program.end();
    program.ended().await;
    drop(gone);
}

/// Why a process serves no more.
pub(crate) enum Over {
    /// It has ended, or at least its output.
    Ended,
    /// It was drained, and has until then.
    Drained(Instant),
    /// It did not do what it must.
    Failed(Error),
}

impl Over {
    /// What those are told who still waited. A drained process has time to end by itself.
    async fn error(self, program: &mut Program) -> Option<Error> {
        match self {
            Self::Failed(error) => Some(error),
            Self::Drained(until) => {
                let _ = timeout_at(until.into(), program.exited()).await;
                None
            }
            Self::Ended => match within(LINGER, program.exited()).await {
                Some(status) => Some(tell::exited(status)),
                None => Some(said::broken("closed its output")),
            },
        }
    }
}

type Started = (Program, Output, Decoder, u32);

/// Starts a program, and waits until it is ready; sees one to its end that does not come so far.
async fn start(shared: &Arc<Shared>, number: Number, orders: &mut mpsc::Receiver<Order>) -> Option<Started> {
    let until = Instant::now() + shared.start_timeout;
    let wiring = Wiring { has_input: true, has_output: true, ..Wiring::default() };
    let mut program = match shared.programs.start(&shared.plan, wiring, until).await {
        Ok(program) => program,
        Err(error) => {
            shared.failed(number, Cause::new(&command::not_started(&error), b""));
            return None;
        }
    };
    let mut decoder = Decoder::new(shared.frames, shared.output_bytes_max);
    let output = program.take_output();
    let ready = tokio::select! {
        // A start that is cut short is not gone on with.
        ready = ready(&mut program, output, &mut decoder, until, shared.start_timeout) => ready,
        // There is no other order before it is ready.
        _ = orders.recv() => Err(Error::new(Fault::ServerShuttingDown, "this model is being stopped")),
    };
    match ready {
        Ok((output, in_flight)) => Some((program, output, decoder, in_flight)),
        Err(error) => {
            if program.exit_status().is_some() {
                // Until then its last words may be on their way.
                program.ended().await;
            }
            program.blame(&error);
            shared.failed(number, Cause::new(&error, &program.tail()));
            program.end();
            program.ended().await;
            None
        }
    }
}

/// Waits for the first frame, and keeps what comes behind it.
async fn ready(
    program: &mut Program,
    output: Option<Output>,
    decoder: &mut Decoder,
    until: Instant,
    limit: Duration,
) -> Result<(Output, u32), Error> {
    let mut output = output.ok_or_else(|| Error::new(Fault::Internal, "the program of this model has no output"))?;
    loop {
        if let Some(frame) = decoder.next()? {
            return match said::parse(&frame)? {
                Said::Ready { in_flight } => Ok((output, in_flight)),
                _ => Err(said::broken("did not say first that it is ready")),
            };
        }
        let chunk = tokio::select! {
            // Both are cancel-safe.
            chunk = output.chunk() => chunk.map_err(|error| lost("read from", error))?,
            () = sleep_until(until.into()) => {
                let ms = limit.as_millis();
                let message = format!("the program of this model was not ready within {ms} ms (process.start_timeout)");
                return Err(Error::new(Fault::ModelLoading, message));
            }
        };
        match chunk {
            Some(chunk) => decoder.push(&chunk),
            None => {
                return Err(match within(LINGER, program.exited()).await {
                    Some(status) => tell::exited(status),
                    None => said::broken("closed its output"),
                });
            }
        }
    }
}

pub(crate) fn lost(what: &str, error: impl std::fmt::Display) -> Error {
    Error::new(Fault::Internal, format!("cannot {what} the program of this model")).detail(error)
}
