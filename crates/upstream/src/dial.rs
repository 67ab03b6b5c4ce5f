//! One TCP connection to whichever of several addresses answers first (RFC 8305, Happy Eyeballs).

use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::net::TcpStream;

use crate::clock::{Clock, Sleep};

/// How long an address is tried alone (RFC 8305, 5: the recommended delay between two attempts).
const HEAD_START: Duration = Duration::from_millis(250);

/// Connects to the first address that answers: they are tried in turn, the next one as soon as one has failed or after
/// [`HEAD_START`], and the first connection closes the others. The caller bounds the whole.
///
/// # Errors
/// The last attempt's, when all have failed.
pub(crate) async fn dial(addresses: &[IpAddr], port: u16, clock: &Clock) -> io::Result<TcpStream> {
    if let [address] = addresses {
        return TcpStream::connect((*address, port)).await;
    }
    let order: Vec<SocketAddr> = in_turn(addresses).into_iter().map(|address| (address, port).into()).collect();
    let mut race = Race { left: order.into_iter(), running: Vec::new(), timer: None, last: None };
    poll_fn(|cx| race.poll(clock, cx)).await
}

/// The resolver's order (RFC 6724), but with the families in turn (RFC 8305, 4), so that one that is broken as a whole costs
/// one head start and not one for each of its addresses.
fn in_turn(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let is_first_family =
        |address: &&IpAddr| addresses.first().is_some_and(|first| first.is_ipv4() == address.is_ipv4());
    let mut firsts = addresses.iter().filter(is_first_family);
    let mut seconds = addresses.iter().filter(|address| !is_first_family(address));
    let mut order = Vec::with_capacity(addresses.len());
    while order.len() < addresses.len() {
        order.extend(firsts.next().into_iter().chain(seconds.next()));
    }
    order
}

type Attempt = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;

struct Race {
    left: std::vec::IntoIter<SocketAddr>,
    running: Vec<Attempt>,
    /// Runs while the youngest attempt is tried alone.
    timer: Option<Sleep>,
    last: Option<io::Error>,
}

impl Race {
    fn poll(&mut self, clock: &Clock, cx: &mut Context<'_>) -> Poll<io::Result<TcpStream>> {
        loop {
            let before = self.running.len();
            if let Some(won) = self.poll_running(cx) {
                return Poll::Ready(Ok(won));
            }
            let has_failed = self.running.len() < before;
            let is_due = match &mut self.timer {
                Some(timer) => Pin::new(timer).poll(cx).is_ready(),
                None => true,
            };
            let next = if has_failed || is_due { self.left.next() } else { None };
            match next {
                Some(address) => {
                    self.running.push(Box::pin(TcpStream::connect(address)));
                    self.timer = Some(clock.sleep(HEAD_START));
                }
                None if self.running.is_empty() && self.left.len() == 0 => {
                    let none = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                    return Poll::Ready(Err(self.last.take().unwrap_or_else(none)));
                }
                None => return Poll::Pending,
            }
        }
    }

    /// The first that is connected; those that failed are gone.
    fn poll_running(&mut self, cx: &mut Context<'_>) -> Option<TcpStream> {
        let (mut won, last) = (None, &mut self.last);
        self.running.retain_mut(|attempt| match attempt.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(Ok(stream)) => {
                won.get_or_insert(stream);
                false
            }
            Poll::Ready(Err(error)) => {
                *last = Some(error);
                false
            }
        });
        won
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(text: &[&str]) -> Vec<IpAddr> {
        text.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn families_take_turns_and_keep_their_order() {
        let order = in_turn(&addresses(&["::1", "::2", "::3", "10.0.0.1", "10.0.0.2"]));
        assert_eq!(order, addresses(&["::1", "10.0.0.1", "::2", "10.0.0.2", "::3"]));
        let order = in_turn(&addresses(&["10.0.0.1", "::1", "10.0.0.2"]));
        assert_eq!(order, addresses(&["10.0.0.1", "::1", "10.0.0.2"]));
        assert!(in_turn(&[]).is_empty());
    }
}
