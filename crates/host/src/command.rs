//! `mode = "command"`: one process per request.

mod output;
mod prompt;
mod run;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_core::chat::{self, Reply};
use evergate_core::config::process::{Command as Config, Input, Output};
use evergate_core::{Error, Fault};
use tokio::sync::mpsc;

use crate::ask::{Answer, Ask, Endpoint, Mode, Refusal};
use crate::gate::Gate;
use crate::program::{Plan, Programs, StartError, Wiring};
use crate::{tasks, tell};
use output::{Collector, Piece};
use run::{Limits, Run};

/// Longest text as an argument: the kernel's own limit for one (`MAX_ARG_STRLEN`), its final NUL counted.
const ARGUMENT_BYTES_MAX: usize = (128 << 10) - 1;
/// Events that wait for the client; a program waits at its pipe for the rest.
const EVENTS: usize = 4;

/// Serves requests with a process each.
pub struct Command {
    programs: Programs,
    plan: Plan,
    config: Config,
    start_timeout: Duration,
    output_bytes_max: u64,
    gate: Gate,
}

/// What there is to know besides the mode's own section.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Until a program is executed.
    pub start_timeout: Duration,
    /// Bytes of one answer.
    pub output_bytes_max: u64,
}

impl Command {
    /// A mode that runs `plan` for each request that `gate` lets in.
    #[must_use]
    pub fn new(programs: Programs, plan: Plan, config: Config, bounds: Bounds, gate: Gate) -> Self {
        let Bounds { start_timeout, output_bytes_max } = bounds;
        Self { programs, plan, config, start_timeout, output_bytes_max, gate }
    }

    /// Starts the program with what it gets of the request.
    async fn begin(&self, ask: &Ask) -> Result<Run, Refusal> {
        let (args, input) = self.given(ask).map_err(Refusal::before)?;
        let latest = |after: Duration| {
            let own = Instant::now() + after;
            ask.deadline.map_or(own, |deadline| deadline.min(own))
        };
        let place = self.gate.enter(latest(self.config.timeout)).await.map_err(Refusal::before)?;
        let wiring = Wiring {
            args: &args,
            request: Some(&ask.id),
            has_input: input.is_some(),
            has_output: true,
            ..Wiring::default()
        };
        ask.mark.set();
        let program = self.programs.start(&self.plan, wiring, latest(self.start_timeout)).await;
        let program = program.map_err(|error| Refusal::before(not_started(&error)))?;
        let limits = Limits {
            first_output: self.config.first_output,
            idle: self.config.idle,
            total: self.config.timeout,
            deadline: ask.deadline,
        };
        // A place is taken for as long as there is anything of the program, not only while somebody wants its answer.
        let gone = program.gone();
        tasks::finish(async move {
            gone.await;
            drop(place);
        });
        Ok(Run::new(program, input, limits))
    }

    /// Arguments and standard input.
    fn given(&self, ask: &Ask) -> Result<(Vec<OsString>, Option<Bytes>), Error> {
        let text = match &self.config.input {
            Input::Json => {
                let line: Vec<u8> = [&ask.body[..], b"\n"].concat();
                return Ok((Vec::new(), Some(line.into())));
            }
            Input::Text(template) => prompt::text(&ask.body, template.as_deref())?,
        };
        if !self.config.prompt_arg {
            return Ok((Vec::new(), Some(text.into())));
        }
        if text.contains('\0') {
            return Err(Error::new(Fault::InvalidValue, "this model takes no text with a NUL character in it"));
        }
        if text.len() > ARGUMENT_BYTES_MAX {
            let message = format!("this model takes no text longer than {ARGUMENT_BYTES_MAX} bytes");
            return Err(Error::new(Fault::InvalidValue, message));
        }
        // Whatever it looks like, it is no option.
        Ok((vec!["--".into(), OsString::from_vec(text.into_bytes())], None))
    }

    /// Reads everything, and makes one answer of it.
    async fn whole(&self, ask: &Ask, run: &mut Run) -> Result<Bytes, Error> {
        let mut collector = Collector::new(self.config.output, self.output_bytes_max);
        let mut text = String::new();
        while let Some(bytes) = run.next().await? {
            text.extend(collector.push(&bytes)?);
        }
        run.exit().await?;
        match collector.finish()? {
            Piece::Text(rest) => text.push_str(&rest),
            Piece::Answer(answer) => return Ok(answer),
        }
        self.not_empty(&text)?;
        Ok(match ask.endpoint {
            Endpoint::Chat => chat::completion(&Reply { text, ..tell::reply(ask) }),
            Endpoint::Completions => chat::text_completion(&Reply { text, ..tell::reply(ask) }),
            Endpoint::Embeddings => return Err(no_embeddings()),
        }
        .into())
    }

    fn not_empty(&self, text: &str) -> Result<(), Error> {
        if text.is_empty() && self.config.output != Output::Json {
            return Err(Error::new(Fault::AdapterProtocolError, "the program of this model ended without an answer"));
        }
        Ok(())
    }

    /// Reads piece by piece, and sends each on as it comes. Returns when the stream is over, however.
    async fn stream(&self, ask: &Ask, run: &mut Run, to: &mpsc::Sender<Result<Bytes, Error>>) -> Result<(), Error> {
        let reply = tell::reply(ask);
        let events =
            if ask.endpoint == Endpoint::Chat { chat::Events::chat(&reply) } else { chat::Events::text(&reply) };
        let mut told = Told { to, events, tokens: 0, has_begun: false };
        let mut collector = Collector::new(self.config.output, self.output_bytes_max);
        loop {
            let bytes = tokio::select! {
                // Both are cancel-safe; who has gone needs nothing more.
                bytes = run.next() => bytes?,
                () = to.closed() => return Ok(()),
            };
            let Some(bytes) = bytes else { break };
            for piece in collector.push(&bytes)? {
                told.tell(&piece).await;
            }
        }
        run.exit().await?;
        match collector.finish()? {
            Piece::Text(rest) => told.tell(&rest).await,
            Piece::Answer(answer) => told.tell(&output::content_of(&answer)?).await,
        }
        if !told.has_begun {
            self.not_empty("")?;
        }
        told.finish(&reply).await;
        Ok(())
    }
}

impl Mode for Command {
    async fn call(self: Arc<Self>, ask: Ask) -> Result<Answer, Refusal> {
        if ask.endpoint == Endpoint::Embeddings && self.config.output != Output::Json {
            return Err(Refusal::before(no_embeddings()));
        }
        let mut run = self.begin(&ask).await?;
        if !ask.request.is_stream || ask.endpoint == Endpoint::Embeddings {
            let whole = self.whole(&ask, &mut run).await;
            return run.over(whole).map(Answer::Whole).map_err(Refusal::after);
        }
        let (send, mut rest) = mpsc::channel(EVENTS);
        tasks::finish(async move {
            let streamed = self.stream(&ask, &mut run, &send).await;
            if let Err(error) = run.over(streamed) {
                // Who has gone hears nothing.
                let _ = send.send(Err(error)).await;
            }
        });
        // Until there is a first word, a failure is an answer of its own.
        match rest.recv().await {
            Some(Ok(first)) => Ok(Answer::Events { first, rest }),
            Some(Err(error)) => Err(Refusal::after(error)),
            None => Err(Refusal::after(Error::new(Fault::Internal, "the answer was lost"))),
        }
    }
}

/// A stream as far as it was told.
struct Told<'a> {
    to: &'a mpsc::Sender<Result<Bytes, Error>>,
    events: chat::Events,
    tokens: u64,
    has_begun: bool,
}

impl Told<'_> {
    /// Sends a piece; who has gone is noticed elsewhere.
    async fn tell(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        let is_first = !std::mem::replace(&mut self.has_begun, true);
        if let Some(role) = self.events.role().filter(|_| is_first) {
            self.send(role).await;
        }
        self.tokens = self.tokens.saturating_add(chat::count_tokens(text));
        self.send(self.events.piece(text)).await;
    }

    async fn finish(self, reply: &Reply) {
        self.send(self.events.finish()).await;
        if reply.wants_usage {
            self.send(self.events.usage(reply.tokens_in.unwrap_or(0), self.tokens)).await;
        }
        self.send(chat::DONE.to_owned()).await;
    }

    async fn send(&self, event: String) {
        let _ = self.to.send(Ok(event.into())).await;
    }
}

fn no_embeddings() -> Error {
    Error::new(Fault::InvalidValue, "this model gives texts, not embeddings").param("model")
}

/// What a client is told of a start that failed. The program's name is for the records only.
pub(crate) fn not_started(error: &StartError) -> Error {
    match error {
        StartError::Failed(failed) => {
            Error::new(Fault::AdapterSpawnFailed, "the program of this model cannot be started").detail(failed)
        }
        StartError::Io(error) => {
            Error::new(Fault::AdapterSpawnFailed, "the program of this model cannot be started").detail(error)
        }
        StartError::NoRoom(error) => {
            Error::new(Fault::Overloaded, "the machine has no room for one more process").detail(error)
        }
        StartError::TooLate => Error::new(Fault::AdapterTimeout, "the program of this model did not start in time"),
        StartError::Stopping => Error::new(Fault::ServerShuttingDown, "this model is being stopped"),
    }
}
