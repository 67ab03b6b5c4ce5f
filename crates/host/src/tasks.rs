//! The only place of this crate that starts tasks. Each ends by itself: it belongs to one program, whose end it follows.

use std::future::Future;

/// Starts a task that finishes its work whoever has left (kind Finish). A panic in it ends nothing else.
pub(crate) fn finish(future: impl Future<Output = ()> + Send + 'static) {
    #[allow(clippy::disallowed_methods, reason = "this is the one place that may")]
    drop(tokio::spawn(future));
}
