//! One request, its targets one after the other: each is called once at most, within the request's one deadline, until
//! one answers or the rule of `core/attempts.rs` says that no other may be asked.
//!
//! Holds INV-ATTEMPT-1 (ARCHITECTURE.md).

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_board::{HostState, InflightPhase, InflightPlace};
use evergate_core::attempts::{Ended, How, Next, Reached, Verdict, name_tried, next};
use evergate_core::deadline::Limit;
use evergate_core::router::Fallback;
use evergate_core::{Deadline, Error, Fault, json};
use evergate_upstream::{Client, Phase};
use http::Response;

use super::body::Body;
use super::left::Left;
use super::local::Local;
use super::model_call::ModelCall;
use crate::context::cancelled;
use crate::gate::pass::{IsCall, Pass};
use crate::gate::permits::Permit;
use crate::telemetry::names::Shed;

/// Hosts that a request is sent to, of which each dies before its program sees it.
const HOSTS_MAX: u32 = 3;

/// On the path, in place of a fault: the upstream's limit was reached, and it was not called.
const FULL: &str = "upstream_full";

/// A failed attempt.
#[derive(Debug)]
pub struct Failure {
    /// For the client and the records.
    pub error: Error,
    /// Decides whether another target may be asked.
    pub how: How,
}

impl Failure {
    /// A failure whose error tells, with how far the attempt came, what kind it is.
    #[must_use]
    pub fn new(reached: Reached, error: Error) -> Self {
        Self { how: How::of(reached, error.fault), error }
    }
}

/// What a program's host says of itself: nothing has reached it.
impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(Reached::Nothing, error)
    }
}

impl From<evergate_upstream::Failure> for Failure {
    fn from(failure: evergate_upstream::Failure) -> Self {
        let reached = match failure.phase {
            Phase::Connect => Reached::Nothing,
            Phase::Sent => Reached::Request,
        };
        Self::new(reached, failure.error)
    }
}

/// What a client has asked for.
pub(super) struct Asked<'a> {
    /// Its body.
    pub(super) body: &'a Bytes,
    /// What was read of it.
    pub(super) request: &'a json::Request,
    /// The request's end: one for all attempts.
    pub(super) deadline: Deadline,
}

/// One attempt under way.
pub(super) struct Attempt<'a> {
    /// The upstream's connections.
    pub(super) client: Arc<Client>,
    /// The upstream's name.
    pub(super) name: &'a str,
    /// The request's body with the target's name of the model.
    pub(super) body: Bytes,
    /// The request's end.
    pub(super) deadline: Deadline,
    /// The right to this call, of an upstream with a limit.
    pub(super) permit: Option<Box<Permit>>,
    /// The same, or the end of the model's `attempt` where that is earlier: until the first byte.
    pub(super) first_by: Deadline,
    /// Whether a stream ends with a chunk of usage.
    pub(super) wants_usage: bool,
    /// The request's place on the board, where the upstream is a program of this machine: its host says there whether the
    /// program has seen anything of it, and is told how much time there is.
    pub(super) local: Option<InflightPlace>,
}

impl Attempt<'_> {
    /// The same once more.
    fn again(&self) -> Self {
        let Self { client, name, body, deadline, first_by, wants_usage, local, .. } = self;
        Self {
            client: Arc::clone(client),
            name,
            body: body.clone(),
            deadline: *deadline,
            // No program has a limit of this kind.
            permit: None,
            first_by: *first_by,
            wants_usage: *wants_usage,
            local: *local,
        }
    }
}

/// One target's turn.
struct Turn<'a> {
    /// The upstream, and the model's name there.
    target: (&'a str, &'a str),
    /// Whether no other target is left.
    is_last: bool,
    /// The model's `attempt`.
    attempt: Option<Duration>,
}

impl ModelCall {
    /// Begins an attempt. Every call to an upstream comes this way, and from here on it is on the board.
    pub(super) fn begin<'a>(
        &self,
        (name, model): (&'a str, &str),
        asked: &Asked<'_>,
        pass: &mut Pass,
    ) -> Result<Attempt<'a>, Error> {
        let client = self.app.clients.get(name).map(Arc::clone).ok_or_else(|| {
            Error::new(Fault::Internal, "the model's upstream is not there").detail(format!("{model} of {name}"))
        })?;
        let body = if *model == *asked.request.model {
            asked.body.clone()
        } else {
            json::splice(asked.body, asked.request.model_span.clone(), model).into()
        };
        pass.set_backend(name, IsCall::Yes);
        pass.enter(InflightPhase::Wait);
        let (deadline, wants_usage) = (asked.deadline, asked.request.wants_usage);
        Ok(Attempt { client, name, body, deadline, permit: None, first_by: deadline, wants_usage, local: None })
    }

    /// The right to call an upstream; none is needed where it has no limit. Only the last target's line is waited in.
    async fn permit(
        &self,
        name: &str,
        is_last: bool,
        deadline: Deadline,
        pass: &mut Pass,
    ) -> Result<Option<Box<Permit>>, Failure> {
        let Some(limit) = self.app.limits.get(name) else { return Ok(None) };
        pass.turn_to(name);
        if let Some(permit) = limit.take() {
            return Ok(Some(permit));
        }
        let waited = if is_last {
            pass.enter(InflightPhase::Queued);
            pass.set_parked(true);
            let waited = limit.wait(deadline).await;
            pass.set_parked(false);
            waited
        } else {
            Err(Shed::NextTarget)
        };
        waited.map(Some).map_err(|shed| {
            limit.count(shed);
            if shed == Shed::OutOfTime && deadline.limit() == Limit::Client {
                // Its own time is over, wherever it was spent.
                let error = Limit::Client.overrun(name, "had no place for the call within");
                return Failure { error, how: How::OutOfTime };
            }
            Failure { error: shed.error(name), how: How::Full }
        })
    }

    /// Makes one attempt.
    async fn attempt(
        &self,
        turn: Turn<'_>,
        asked: &Asked<'_>,
        head_by: &mut Instant,
        pass: &mut Pass,
    ) -> Result<Response<Body>, Failure> {
        let began = Instant::now();
        let permit = self.permit(turn.target.0, turn.is_last, asked.deadline, pass).await?;
        if permit.is_some() {
            // The line is no part of the time that the upstream has for the head.
            *head_by += began.elapsed();
        }
        let ours = |error| Failure { error, how: How::Ours };
        let mut attempt = self.begin(turn.target, asked, pass).map_err(ours)?;
        attempt.permit = permit;
        if let Some(limit) = turn.attempt.filter(|_| !turn.is_last) {
            attempt.first_by = asked.deadline.min(Deadline::new(Instant::now(), limit, Limit::Attempt));
        }
        if let Some(local) = self.app.locals.get(turn.target.0) {
            return Box::pin(self.attempt_local(local, attempt, head_by, pass)).await;
        }
        if pass.record.is_stream { self.stream(attempt, *head_by, pass).await } else { self.whole(attempt, pass).await }
    }

    /// An attempt at a program of this machine, which may have to be started for it. When its host dies before the program
    /// has seen anything of it, the next host has it.
    async fn attempt_local(
        &self,
        local: &Local,
        mut attempt: Attempt<'_>,
        head_by: &mut Instant,
        pass: &mut Pass,
    ) -> Result<Response<Body>, Failure> {
        attempt.local = Some(pass.place());
        for _ in 1..HOSTS_MAX {
            let outcome = self.call_local(local, attempt.again(), head_by, pass).await;
            match outcome {
                Err(Failure { how: How::Unanswered, .. }) if !pass.is_taken() => {}
                outcome => return outcome,
            }
        }
        self.call_local(local, attempt, head_by, pass).await
    }

    async fn call_local(
        &self,
        local: &Local,
        mut attempt: Attempt<'_>,
        head_by: &mut Instant,
        pass: &mut Pass,
    ) -> Result<Response<Body>, Failure> {
        let (began, clock, until) = (Instant::now(), &self.app.clock, attempt.first_by);
        let (mut section, state) = local.place();
        if state != HostState::Ready {
            pass.enter(InflightPhase::Start);
            let started = local.ready(clock, until).await;
            pass.note_start_wait(began.elapsed());
            section = started?;
            pass.enter(InflightPhase::Wait);
            *head_by += began.elapsed();
        }
        if section != local.fingerprint() {
            attempt.client = self.app.client_of_section(attempt.name, section)?;
        }
        let outcome = if pass.record.is_stream {
            local.watch((clock, until), section, self.stream(attempt, *head_by, pass)).await
        } else {
            local.watch((clock, until), section, self.whole(attempt, pass)).await
        };
        // A host knows better what the time was spent on, but it may be too busy to say so before ours is over.
        outcome.map_err(|failure| match failure.how {
            How::OutOfTime if !pass.is_taken() => Failure { error: local.unseen(), ..failure },
            _ => failure,
        })
    }

    /// Calls the targets in order. Dropping it between two of them, or within one, leaves no call behind.
    pub(super) async fn attempt_each(
        &self,
        first: (&str, &str),
        fallback: Fallback<'_>,
        asked: &Asked<'_>,
        pass: &mut Pass,
    ) -> Result<Response<Body>, Error> {
        let mut targets = fallback.targets.iter().map(|target| (&*target.upstream, &*target.model));
        let mut target = first;
        let mut verdict = Verdict::default();
        // One time for the head, too: a second attempt does not keep a client waiting for a second `head_hold`.
        let mut head_by = Instant::now() + self.app.sealed.config.timeouts.head_hold;
        loop {
            let following = targets.next();
            if !fallback.targets.is_empty() {
                pass.begin_attempt();
            }
            let turn = Turn { target, is_last: following.is_none(), attempt: fallback.attempt };
            let Failure { error, how } = match self.attempt(turn, asked, &mut head_by, pass).await {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            self.left.iter().for_each(Left::rest);
            let fault = error.fault;
            pass.end_attempt(if how == How::Full { FULL } else { fault.row().code });
            let next = next(&Ended {
                how,
                // Whatever the client has seen of a stream, that stream's body has taken over.
                is_visible: false,
                is_last: following.is_none() || self.left.as_ref().is_some_and(Left::is_gone),
                cancelled: self.token.cause(),
                has_time: !asked.deadline.is_past(Instant::now()),
                retry_unknown: fallback.retry_unknown,
            });
            let told = match (next, following) {
                (Next::Target, Some(following)) => {
                    pass.go_on((how != How::Full).then_some(fault));
                    verdict.add(error);
                    target = following;
                    continue;
                }
                (Next::Cancelled(cause), _) => cancelled(cause),
                (Next::OutOfTime, _) => out_of_time(asked.deadline),
                (Next::Best, _) => {
                    verdict.add(error);
                    verdict.into_error()
                }
                (Next::This | Next::Target, _) => error,
            };
            return Err(explained(told, pass));
        }
    }
}

fn out_of_time(deadline: Deadline) -> Error {
    let message = format!("{} was over before the next upstream could be called", deadline.limit().key());
    Error::new(Fault::DeadlineExceeded, message)
}

/// Names the attempts, if there were several.
fn explained(mut error: Error, pass: &Pass) -> Error {
    if let path @ [_, _, ..] = pass.path() {
        name_tried(&mut error, path.iter().map(|step| (&*step.upstream, step.cause)));
    }
    error
}
