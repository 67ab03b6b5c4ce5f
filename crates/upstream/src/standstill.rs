//! Notices a peer that does not read.
//!
//! Bytes that do not go into the socket prove little: with a large send buffer the kernel takes more only when a third
//! of it is free, which a slow but willing reader may need minutes for. So the measure is what the peer's kernel has
//! acknowledged: as long as that grows, somebody reads.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::clock::{Clock, Sleep};

/// Watches one direction of one connection.
#[derive(Debug, Default)]
pub struct Standstill {
    /// Runs while nothing is taken; and the bytes that the peer had not acknowledged when it began.
    running: Option<(Sleep, u32)>,
}

impl Standstill {
    /// The socket has taken bytes, or has nothing to take.
    pub fn reset(&mut self) {
        self.running = None;
    }

    /// To be asked when the socket takes nothing: ready when the peer has taken nothing either for `limit`. `unsent` tells
    /// the bytes that it has not acknowledged.
    pub fn poll(&mut self, cx: &mut Context<'_>, clock: &Clock, limit: Duration, unsent: impl Fn() -> u32) -> Poll<()> {
        let (timer, left) = self.running.get_or_insert_with(|| (clock.sleep(limit), unsent()));
        while Pin::new(&mut *timer).poll(cx).is_ready() {
            let now = unsent();
            if now >= *left {
                return Poll::Ready(());
            }
            *left = now;
            *timer = clock.sleep(limit);
        }
        Poll::Pending
    }
}
