//! The only place of this crate that starts tasks. Each ends by itself: it belongs to one program, whose end it follows.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use tokio::time::timeout;

/// Starts a task that finishes its work whoever has left (kind Finish). A panic in it ends nothing else.
pub(crate) fn finish(future: impl Future<Output = ()> + Send + 'static) {
    #[allow(clippy::disallowed_methods, reason = "this is the one place that may")]
    drop(tokio::spawn(future));
}

/// Steps of a wait.
const STEPS: u32 = 10;

/// Waits for what must come soon, if it comes at all, so long at most. In steps: a time in which this process was given no
/// processor, while what it waits for has long happened, is one of them and not the whole wait.
pub(crate) async fn within<F: Future>(time: Duration, what: F) -> Option<F::Output> {
    let mut what = pin!(what);
    for _ in 0..STEPS {
        if let Ok(found) = timeout(time / STEPS, what.as_mut()).await {
            return Some(found);
        }
    }
    None
}
