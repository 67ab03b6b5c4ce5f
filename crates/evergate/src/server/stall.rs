//! Notices a client that does not read.
//!
//! Bytes that do not go into the socket prove little: with a large send buffer the kernel takes more only when a third
//! of it is free, which a slow but willing reader may need minutes for. So the measure is what the client's kernel has
//! acknowledged: as long as that grows, somebody reads.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use evergate_upstream::clock::{Clock, Sleep};

use super::stream::Stream;

/// Watches one direction of one connection.
#[derive(Debug, Default)]
pub(super) struct Stall {
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    timer: Sleep,
    unsent: u32,
}

impl Stall {
    /// The socket has taken bytes, or has nothing to take.
    pub(super) fn reset(&mut self) {
        self.running = None;
    }

    /// To be asked when the socket takes nothing: ready when the client has taken nothing either for `limit`.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, stream: &Stream, clock: &Clock, limit: Duration) -> Poll<()> {
        let running =
            self.running.get_or_insert_with(|| Running { timer: clock.sleep(limit), unsent: stream.unsent() });
        while Pin::new(&mut running.timer).poll(cx).is_ready() {
            let unsent = stream.unsent();
            if unsent >= running.unsent {
                return Poll::Ready(());
            }
            running.unsent = unsent;
            running.timer = clock.sleep(limit);
        }
        Poll::Pending
    }
}
