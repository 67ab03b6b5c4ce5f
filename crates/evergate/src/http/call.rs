//! One call to an upstream: what it is sent of the client's request, and its whole answer or its refusal.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use evergate_board::InflightPlace;
use evergate_core::attempts::{How, Reached};
use evergate_core::deadline::Limit;
use evergate_core::json::scan_answer;
use evergate_core::{Deadline, Error, Fault, traceparent};
use evergate_upstream::{Answer, AnswerBody, Call, Fields};
use http::Response;
use http::header::{HeaderMap, HeaderName};

use super::attempts::{Attempt, Failure};
use super::body::Body;
use super::left::Left;
use super::model_call::ModelCall;
use super::{local, refusal, respond};
use crate::gate::pass::Pass;

/// Client headers that travel on to an upstream; all others stay here.
static FORWARDED: [HeaderName; 3] = [
    HeaderName::from_static("openai-beta"),
    HeaderName::from_static("anthropic-beta"),
    HeaderName::from_static("idempotency-key"),
];
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Most bytes of an upstream's error answer that are read.
const REFUSAL_BYTES_MAX: u64 = 64 * 1024;
/// How long they may take: the status is known, and another target may be waiting for its turn.
const REFUSAL_TIME: Duration = Duration::from_secs(2);

impl ModelCall {
    fn call(&self, body: Bytes, deadline: Deadline) -> Call {
        let mut fields = Fields::default();
        let (mut parent, mut state, mut parents) = (None, None, 0);
        let mut forwarded = [None; 3];
        // One walk over the few that there are, instead of a look-up for each that might be.
        for (name, value) in &self.headers {
            if *name == TRACEPARENT {
                parent = Some(value);
                parents += 1;
            } else if *name == TRACESTATE {
                state = state.or(Some(value));
            } else if let Some((_, first)) = FORWARDED.iter().zip(&mut forwarded).find(|(one, _)| *one == name) {
                first.get_or_insert(value);
            }
        }
        for (name, value) in FORWARDED.iter().zip(forwarded) {
            value.iter().for_each(|value| fields.push(name, value));
        }
        // Two cannot both be the parent.
        if let Some(parent) = parent.filter(|parent| parents == 1 && traceparent::is_valid(parent.as_bytes())) {
            fields.push(&TRACEPARENT, parent);
            state.iter().for_each(|state| fields.push(&TRACESTATE, state));
        }
        self.own_id.iter().for_each(|id| fields.push(&respond::REQUEST_ID, id));
        let begun = self.left.as_ref().map(Left::begun);
        Call { path: self.endpoint.upstream_path(), fields, body, deadline, first_byte: None, begun }
    }

    /// The same for an upstream that may be a program of this machine, which is told how much time there is.
    pub(super) fn call_within(
        &self,
        body: Bytes,
        until: Deadline,
        (end, local): (Deadline, Option<InflightPlace>),
    ) -> Call {
        let mut call = self.call(body, until);
        if let Some(place) = local {
            local::tell(&mut call, end, place);
        }
        call
    }

    /// A unary call: the answer is read whole, checked and passed on byte for byte.
    pub(super) async fn whole(&self, attempt: Attempt<'_>, pass: &mut Pass) -> Result<Response<Body>, Failure> {
        let Attempt { client, name, body, deadline, permit, first_by, local, .. } = attempt;
        let mut answer = client.call(self.call_within(body, first_by, (deadline, local))).await?;
        if let Some(permit) = permit {
            answer.body.hold(permit);
        }
        let first_token_ms = pass.record.elapsed_ms();
        if !answer.status.is_success() {
            return Err(Box::pin(self.refused(name, answer, deadline)).await);
        }
        let limits = &self.app.sealed.config.limits;
        let body = self.read_whole(&mut answer.body, name, deadline, limits.answer_bytes).await?;
        let broken = |error| Failure::new(Reached::Answer, error);
        let bad = |message: String| Error::new(Fault::UpstreamBadResponse, message);
        let seen = scan_answer(&body).map_err(|found| {
            let error = bad(format!("the upstream \"{name}\" sent an answer that is not JSON"));
            broken(error.detail(format!("byte {}: expected {}", found.at, found.expected)))
        })?;
        if seen.has_error {
            return Err(broken(refusal::of_object(&self.app, name, seen.error_message.as_deref())));
        }
        if !seen.has_choices_or_data {
            return Err(broken(bad(format!("the upstream \"{name}\" sent an answer without choices or data"))));
        }
        // Of answers only: a refusal has no first token, and comes sooner than any.
        pass.note_first_token_at(first_token_ms);
        pass.record.usage = seen.usage;
        let mut response = respond::json(answer.status, body);
        pass_headers(&answer.headers, response.headers_mut());
        Ok(response)
    }

    pub(super) async fn read_whole(
        &self,
        body: &mut AnswerBody,
        name: &str,
        deadline: Deadline,
        bytes_max: u64,
    ) -> Result<Bytes, Failure> {
        let mut first = Bytes::new();
        let mut rest = BytesMut::new();
        loop {
            let mut until = deadline;
            let from = || {
                let idle = Deadline::new(Instant::now(), self.app.sealed.config.timeouts.idle, Limit::Idle);
                until = deadline.min(idle);
                until.at()
            };
            let data = match self.app.clock.timeout_from(from, body.data()).await {
                Ok(Some(data)) => data.map_err(|error| Failure::new(Reached::Answer, error))?,
                Ok(None) => break,
                Err(_) => {
                    let error = until.limit().overrun(name, "did not finish its answer within");
                    return Err(Failure::new(Reached::Answer, error));
                }
            };
            if (first.len() + rest.len() + data.len()) as u64 > bytes_max {
                let message = format!("the upstream \"{name}\" sent more than {bytes_max} bytes (limits.answer)");
                let error = Error::new(Fault::UpstreamBadResponse, message);
                return Err(Failure { error, how: How::TooLarge });
            }
            if first.is_empty() && rest.is_empty() {
                first = data;
            } else {
                self.token.hold(data.len() as u64);
                // One piece needs no copy; the second begins one.
                if !first.is_empty() {
                    rest.extend_from_slice(&std::mem::take(&mut first));
                }
                rest.extend_from_slice(&data);
            }
        }
        Ok(if rest.is_empty() { first } else { rest.freeze() })
    }

    /// The failure for an answer that is not a 2xx. Its body only adds words, so no failure to read it matters.
    pub(super) async fn refused(&self, name: &str, answer: Answer, deadline: Deadline) -> Failure {
        let Answer { status, headers, mut body, .. } = answer;
        let until = deadline.min(Deadline::new(Instant::now(), REFUSAL_TIME, Limit::Idle));
        let read = self.read_whole(&mut body, name, until, REFUSAL_BYTES_MAX).await.unwrap_or_default();
        if self.app.locals.contains_key(name)
            && let Some((error, is_dispatched)) = refusal::of_host(&self.app, status, &headers, &read)
        {
            // Nothing has reached the program, whatever its host has seen; a mistake of the client's stays one.
            let is_undone = !is_dispatched && !status.is_client_error();
            if error.fault == Fault::DeadlineExceeded {
                // It knows the time that there was, and not whose limit that is.
                let error = deadline.limit().overrun(name, "did not answer within");
                return Failure { error, how: How::OutOfTime };
            }
            let how = if is_undone { How::of(Reached::Nothing, error.fault) } else { How::Status(status.as_u16()) };
            return Failure { error, how };
        }
        let error = refusal::of(&self.app, name, status, &headers, &read);
        let is_our_key = error.fault == Fault::UpstreamAuthFailed;
        Failure { error, how: if is_our_key { How::NotAccepted } else { How::Status(status.as_u16()) } }
    }
}

/// Headers of an upstream's answer that travel on.
fn pass_headers(from: &HeaderMap, to: &mut HeaderMap) {
    for (name, value) in from {
        let text = name.as_str();
        if text.starts_with("x-ratelimit-") || text == "openai-processing-ms" || text == "openai-version" {
            to.append(name.clone(), value.clone());
        }
    }
}
