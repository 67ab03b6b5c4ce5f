//! The reading end of the rings on the board that records come by: whole lines, many at a time, looked at first and let go once
//! they are written. What a clerk that dies had in its hands is still in the rings.

use std::os::fd::OwnedFd;
use std::time::Duration;

use evergate_board::{Board, RING_BYTES, Records};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Between two looks at rings that have something. They are looked at by the clock: a word to the clerk with every record
/// would cost the workers a third of their time (measured, with a pipe).
const PAUSE_MIN: Duration = Duration::from_millis(25);
/// The same while little comes: a look costs the same for one line as for many.
const PAUSE_FEW: Duration = Duration::from_millis(100);
/// Between two looks at rings that have had nothing for a while.
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// All rings.
#[derive(Debug)]
pub(super) struct Rings {
    board: Board,
    /// Read end of a pipe whose write end all have that write records; nothing is ever written to it.
    writers: OwnedFd,
    pause: Duration,
}

impl Rings {
    pub(super) fn new(board: Board, writers: OwnedFd) -> Self {
        Self { board, writers, pause: Duration::ZERO }
    }

    /// What there is, something at least, which stays until it is [taken](Rings::take); none when nobody can write any more.
    /// May be dropped at any await.
    pub(super) async fn next(&mut self) -> Option<Records> {
        loop {
            tokio::time::sleep(self.pause).await;
            // In this order: what the last writer has written is seen.
            let is_over = self.has_no_writer();
            let found = self.look();
            if found.is_some() {
                let part = found.as_ref().map_or(0, |found| found.fullest.saturating_mul(8));
                self.pause = next_pause(self.pause, part);
                return found;
            }
            if is_over {
                return None;
            }
            self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        }
    }

    /// What there is at this moment, if anything; it stays.
    pub(super) fn look(&self) -> Option<Records> {
        let found = self.board.records();
        (!found.is_empty()).then_some(found)
    }

    /// Lets go of what was looked at.
    pub(super) fn take(&self, looked_at: &Records) {
        self.board.take_records(looked_at);
    }

    fn has_no_writer(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.writers, PollFlags::empty())];
        // An error, such as a signal's, says nothing: it is asked again.
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

/// After a look that has found a ring with so many bytes.
fn next_pause(pause: Duration, bytes: usize) -> Duration {
    match bytes {
        few if few < RING_BYTES / 8 => (pause * 2).clamp(PAUSE_MIN, PAUSE_FEW),
        some if some < RING_BYTES / 4 => pause.clamp(PAUSE_MIN, PAUSE_FEW),
        much if much < RING_BYTES / 2 => PAUSE_MIN,
        // Under a load that fills a ring within a pause there is none.
        _ => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use evergate_board::Shape;
    use rustix::pipe::{PipeFlags, pipe_with};

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), future).await.unwrap() })
    }

    fn rings() -> (Rings, Board, OwnedFd) {
        let board = Board::create(Shape { children: 2, slots: 1, series: 2, labels: 2 }, 1).unwrap();
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        (Rings::new(board.clone(), read), board, write)
    }

    #[test]
    fn records_stay_until_they_are_taken_and_the_last_ones_come_before_the_end() {
        block_on(async {
            let (mut rings, board, write) = rings();
            assert!(board.record_writer(0).write(b"one\n") && board.record_writer(1).write(b"two\n"));
            let found = rings.next().await.unwrap();
            assert_eq!(found.bytes, b"one\ntwo\n");
            assert_eq!(rings.look().unwrap().bytes, found.bytes);
            // Another clerk's look.
            assert_eq!(Rings::new(board.clone(), write.try_clone().unwrap()).look().unwrap().bytes, found.bytes);
            rings.take(&found);
            assert!(rings.look().is_none());
            assert!(board.record_writer(1).write(b"last\n"));
            drop(write);
            let found = rings.next().await.unwrap();
            assert_eq!(found.bytes, b"last\n");
            rings.take(&found);
            assert!(rings.next().await.is_none());
        });
    }

    #[test]
    fn records_of_a_pause_come_together() {
        block_on(async {
            let (mut rings, board, _write) = rings();
            let mut writer = board.record_writer(0);
            assert!(writer.write(b"a\n"));
            let found = rings.next().await.unwrap();
            rings.take(&found);
            for _ in 0..3 {
                assert!(writer.write(b"b\n"));
                tokio::task::yield_now().await;
            }
            assert_eq!(rings.next().await.unwrap().bytes, b"b\nb\nb\n");
        });
    }

    #[test]
    fn pauses_follow_how_full_the_fullest_ring_gets() {
        assert_eq!(next_pause(Duration::ZERO, 1), PAUSE_MIN);
        assert_eq!(next_pause(PAUSE_MAX, 1), PAUSE_FEW);
        assert_eq!(next_pause(PAUSE_MIN * 2, RING_BYTES / 6), PAUSE_MIN * 2);
        assert_eq!(next_pause(PAUSE_FEW, RING_BYTES / 3), PAUSE_MIN);
        assert_eq!(next_pause(PAUSE_FEW, RING_BYTES), Duration::ZERO);
    }
}
