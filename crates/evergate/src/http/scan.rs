//! What a request's body says about where it goes, read without holding up other requests.

use std::sync::Arc;

use bytes::Bytes;
use evergate_core::deadline::Limit;
use evergate_core::json::{self, Request, scan_request};
use evergate_core::{Deadline, Error, Fault};

use super::app::App;
use crate::tasks::{Panicked, aside};

/// Bodies up to this are read on the event loop: a millisecond for messages, 6 ms for one made to be slow (measured). 20 MiB
/// of messages take 17 ms and of nothing but escapes 110 ms, which no other request of the worker should wait for.
const SCAN_HERE_BYTES_MAX: usize = 1 << 20;

/// What a body says about where it goes. A large one is read beside the event loop, one at a time.
///
/// # Errors
/// Those of `scan_request`; `overloaded` when its turn does not come in time, `deadline_exceeded` when that was its client's.
pub async fn scan(app: &App, body: &Bytes, deadline: Deadline) -> Result<Request, Error> {
    let limits = &app.sealed.config.limits;
    let limits = json::Limits { depth: limits.json_depth, choices: limits.choices };
    if body.len() <= SCAN_HERE_BYTES_MAX {
        return scan_request(body, &limits);
    }
    let body = body.clone();
    Box::pin(scan_aside(app, move || scan_request(&body, &limits), deadline)).await
}

async fn scan_aside(
    app: &App,
    scan: impl FnOnce() -> Result<Request, Error> + Send + 'static,
    deadline: Deadline,
) -> Result<Request, Error> {
    let Ok(Ok(permit)) = app.clock.timeout_at(deadline.at(), Arc::clone(&app.large).acquire_owned()).await else {
        let key = deadline.limit().key();
        let message = format!("other large bodies were read until this one's time was up ({key}); try again");
        // Its client's own time is over, or ours was not enough for what there was to do.
        let fault = if deadline.limit() == Limit::Client { Fault::DeadlineExceeded } else { Fault::Overloaded };
        return Err(Error::new(fault, message).detail(key));
    };
    match aside(permit, scan).await {
        Ok(scanned) => scanned,
        Err(Panicked) => Err(Error::new(Fault::Internal, "an internal error ended the request")),
    }
}
