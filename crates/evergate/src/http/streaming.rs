//! A stream from its call to its response head.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use evergate_core::attempts::Reached;
use evergate_core::deadline::Limit;
use evergate_core::json::scan_answer;
use evergate_core::{Deadline, Error, Fault, chat};
use evergate_upstream::{AnswerBody, Kind};
use http::Response;
use http::header::HeaderMap;

use super::attempts::{Attempt, Failure};
use super::body::{Body, Stream};
use super::fault::{Bomb, Planted, planted};
use super::model_call::{Endpoint, ModelCall};
use super::relay::{Called, Calling, Limits, Relay};
use super::{refusal, respond};
use crate::gate::Arrival;
use crate::gate::pass::Pass;

impl ModelCall {
    pub(super) fn limits(&self, deadline: Deadline) -> Limits {
        let timeouts = &self.app.sealed.config.timeouts;
        let now = Instant::now();
        let stream_total = Deadline::new(self.started, timeouts.stream_total, Limit::StreamTotal);
        Limits {
            total: deadline,
            first_token: Deadline::new(now, timeouts.first_token, Limit::FirstToken),
            // A client that says how long it waits means the whole answer.
            stream_total: self.client_by.map_or(stream_total, |by| stream_total.min(by)),
            idle: timeouts.idle,
            clock: self.app.clock.clone(),
            event_bytes: usize::try_from(self.app.sealed.config.limits.event_bytes).unwrap_or(usize::MAX),
        }
    }

    pub(super) async fn stream(
        &self,
        attempt: Attempt<'_>,
        head_by: Instant,
        pass: &mut Pass,
    ) -> Result<Response<Body>, Failure> {
        let Attempt { client, name, body, deadline, permit, first_by, wants_usage, local } = attempt;
        let limits = self.limits(first_by);
        let stream_total = limits.stream_total;
        let call = self.call_within(body, first_by.min(stream_total), (stream_total, local));
        let asking = Self {
            app: Arc::clone(&self.app),
            headers: HeaderMap::new(),
            arrival: Arrival::default(),
            token: Arc::clone(&self.token),
            own_id: None,
            left: None,
            ..*self
        };
        let upstream = name.to_owned();
        let calling: Calling = Box::pin(async move {
            let mut answer = client.call(call).await?;
            if let Some(permit) = permit {
                answer.body.hold(permit);
            }
            if !answer.status.is_success() {
                return Err(asking.refused(&upstream, answer, deadline).await);
            }
            let body = match answer.kind {
                Kind::Events => return Ok(Called::Events(answer.body)),
                Kind::Json => Some(answer.body),
                Kind::Other => None,
            };
            asking.told_as_events(&upstream, body, deadline, wants_usage).await
        });
        let (app, upstream) = (Arc::clone(&self.app), name.to_owned());
        let on_error_event =
            Box::new(move |event: &[u8]| match local.and_then(|_| refusal::of_host_event(&app, event)) {
                Some(Error { fault: Fault::DeadlineExceeded, .. }) => {
                    stream_total.limit().overrun(&upstream, "did not finish within")
                }
                Some(error) => error,
                None => {
                    let message = scan_answer(event).ok().and_then(|seen| seen.error_message);
                    refusal::of_object(&app, &upstream, message.as_deref())
                }
            });
        self.hold_head(Relay::new(calling, name.to_owned(), on_error_event, limits), head_by, pass).await
    }

    /// F19: the whole answer of an upstream that does not heed `stream: true`, told as a stream.
    async fn told_as_events(
        &self,
        name: &str,
        body: Option<AnswerBody>,
        deadline: Deadline,
        wants_usage: bool,
    ) -> Result<Called, Failure> {
        let broken = |error| Failure::new(Reached::Answer, error);
        let other = || {
            let message = format!("the upstream \"{name}\" answered a stream request with something else");
            broken(Error::new(Fault::UpstreamBadResponse, message))
        };
        let mut body = body.ok_or_else(other)?;
        let body = self.read_whole(&mut body, name, deadline, self.app.sealed.config.limits.answer_bytes).await?;
        let seen = scan_answer(&body).map_err(|_| other())?;
        if seen.has_error {
            return Err(broken(refusal::of_object(&self.app, name, seen.error_message.as_deref())));
        }
        let events = chat::as_events(&body, self.endpoint == Endpoint::Chat, wants_usage).ok_or_else(other)?;
        Ok(Called::Whole { events, usage: seen.usage })
    }

    /// Waits with the response head until the first event, so that an early failure has a real status, or another
    /// target its turn; not beyond `head_by`, so that clients and proxies see the answer begin.
    pub(super) async fn hold_head(
        &self,
        mut relay: Relay,
        head_by: Instant,
        pass: &mut Pass,
    ) -> Result<Response<Body>, Failure> {
        let timeouts = &self.app.sealed.config.timeouts;
        let first = std::future::poll_fn(|cx| {
            loop {
                match std::task::ready!(relay.poll_next(cx)) {
                    // Comments alone do not commit: what follows may still be a refusal.
                    Some(Ok(_)) if !relay.has_begun() => {}
                    first => return std::task::Poll::Ready(first),
                }
            }
        });
        let first = match self.app.clock.timeout_at(head_by, first).await {
            Ok(Some(Ok(first))) => {
                pass.note_first_token();
                Some(first)
            }
            Ok(Some(Err(error))) => return Err(Failure { error, how: relay.how() }),
            Ok(None) => {
                let message = format!("the upstream \"{}\" sent a stream without an event", relay.upstream());
                return Err(Failure::new(Reached::Answer, Error::new(Fault::UpstreamBadResponse, message)));
            }
            Err(_) => Some(Bytes::from_static(b": waiting for the model\n\n")),
        };
        pass.record.usage = relay.usage().or(pass.record.usage);
        Ok(respond::stream(Body::stream(Stream {
            relay,
            first,
            token: Arc::clone(&self.token),
            keepalive: timeouts.keepalive,
            planted: planted(&self.headers),
            bomb: Bomb::new(planted(&self.headers), Planted::PanicDropStream),
            pinger: None,
            written_at: Instant::now(),
            clock: self.app.clock.clone(),
            left: self.left.clone(),
        })))
    }
}
