use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, ready};

use evergate_board::{Claim, Shape};
use evergate_core::deadline::Limit as Which;
use evergate_core::exit::Kind;

use super::*;

const MS: u64 = 1_000_000;

#[test]
fn a_free_permit_is_left_to_who_came_earlier_for_a_moment_only() {
    let mut line = Line::default();
    assert_eq!(turn(&mut line, 0, 0, 7), Turn::Ours, "nobody came earlier");
    assert_eq!(turn(&mut line, 2, 1, 7), Turn::Ours, "there is one for each");
    assert_eq!(turn(&mut line, 0, 1, 7), Turn::Theirs, "nothing to be had");
    assert_eq!(turn(&mut line, 1, 1, 10 * MS), Turn::Theirs);
    assert_eq!(turn(&mut line, 1, 1, 14 * MS), Turn::Theirs);
    assert_eq!(turn(&mut line, 1, 1, 15 * MS), Turn::Ours, "the grace is over");
    assert_eq!(turn(&mut line, 1, 1, 64 * MS), Turn::Ours, "who did not move is not waited for again");
    assert_eq!(turn(&mut line, 1, 1, 65 * MS), Turn::Theirs, "but not for ever");
    assert_eq!(turn(&mut line, 0, 1, 67 * MS), Turn::Theirs, "somebody has taken it");
    assert_eq!(turn(&mut line, 1, 1, 71 * MS), Turn::Theirs, "the grace is each permit's");
}

#[test]
fn the_wait_is_foretold_by_how_long_calls_have_taken() {
    let mut hold = Hold::default();
    for _ in 0..7 {
        hold.add(50 * MS);
        assert_eq!(hold.wait_ns(100, 20), None);
    }
    hold.add(50 * MS);
    assert_eq!((hold.wait_ns(0, 20), hold.wait_ns(39, 20)), (Some(2_500_000), Some(100 * MS)));
    assert_eq!(hold.wait_ns(3, 0), None);
    for _ in 0..40 {
        hold.add(100 * MS);
    }
    let ms = hold.wait_ns(19, 20).unwrap() / MS;
    assert!((98..=100).contains(&ms), "it follows a change: {ms}");
}

/// A board with so many workers, their limits with a line of four each, and a runtime whose clock runs.
fn with_limits<T>(workers: u32, max: u32, test: impl AsyncFnOnce(Board, Vec<Arc<Limit>>) -> T) -> T {
    let board = Board::create(Shape { children: 4, slots: 4, series: 64, labels: 64 }, 7).unwrap();
    board.master().set_generation(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    runtime.block_on(async {
        let clock = Clock::new().unwrap();
        let limits = (0..workers).map(|row| {
            let child = board.child(row).unwrap();
            child.claim(&Claim { kind: Kind::Worker, slot: row, epoch: row + 1, generation: 1, spawned_ns: 1 });
            child.set_beat_ns(monotonic_ns());
            Limit::new(&board, (row, row + 1), "slow", (max, 4), clock.clone()).unwrap()
        });
        let limits = limits.collect();
        tokio::select! {
            result = test(board, limits) => result,
            end = clock.run() => panic!("the clock ended: {end:?}"),
        }
    })
}

/// All workers are alive now: a crowded machine may have taken long until here.
fn beat(board: &Board) {
    board.children().for_each(|(_, child)| child.set_beat_ns(monotonic_ns()));
}

fn within(time: Duration) -> Deadline {
    Deadline::new(Instant::now(), time, Which::Total)
}

const LONG: Duration = Duration::from_secs(60);

/// A waiter that has been polled once.
async fn enter<'a>(limit: &'a Arc<Limit>) -> Pin<Box<dyn Future<Output = Result<Box<Permit>, Shed>> + 'a>> {
    let mut waiting: Pin<Box<dyn Future<Output = _> + 'a>> = Box::pin(limit.wait(within(LONG)));
    assert!(poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx))).await.is_pending());
    waiting
}

fn seen(board: &Board) -> (u32, u64) {
    board.permits_seen().next().map(|seen| (seen.held, seen.waiting)).unwrap()
}

#[test]
fn the_line_is_served_in_order_and_who_leaves_wakes_the_next() {
    with_limits(1, 1, async |board, limits| {
        let limit = &limits[0];
        let held = limit.take().unwrap();
        let (first, second, third) = (enter(limit).await, enter(limit).await, enter(limit).await);
        assert_eq!((seen(&board), limit.take().is_none()), ((1, 3), true));
        drop(second);
        drop(held);
        assert!(limit.take().is_none(), "it is the first one's");
        let one = first.await.unwrap();
        assert_eq!(seen(&board), (1, 1));
        drop(one);
        // Nobody looks at it but the line.
        drop(third.await.unwrap());
        assert_eq!(seen(&board), (0, 0));
        assert!(limit.take().is_some());
    });
}

/// Whether somebody was woken.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn one_that_leaves_as_the_first_does_not_take_the_permit_with_it() {
    with_limits(1, 1, async |_, limits| {
        let limit = &limits[0];
        let held = limit.take().unwrap();
        let (first, mut second) = (enter(limit).await, enter(limit).await);
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        assert!(second.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        drop(held);
        // The first has the permit and has not been polled; the second looks for those of peers now.
        assert!(second.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        woken.0.store(false, Ordering::Relaxed);
        drop(first);
        assert!(woken.0.load(Ordering::Relaxed));
        assert!(second.await.is_ok());
    });
}

#[test]
fn who_cannot_wait_is_told_at_once_and_who_waits_in_vain_at_the_end() {
    with_limits(1, 1, async |board, limits| {
        let limit = &limits[0];
        let held = limit.take().unwrap();
        let began = Instant::now();
        let short = Duration::from_millis(30);
        assert_eq!(limit.wait(within(short)).await.err(), Some(Shed::OutOfTime));
        assert!(began.elapsed() >= short);
        let line = [enter(limit).await, enter(limit).await, enter(limit).await, enter(limit).await];
        assert_eq!(limit.wait(within(LONG)).await.err(), Some(Shed::QueueFull));
        drop(line);
        for _ in 0..8 {
            limit.lock().hold.add(1_000 * MS);
        }
        assert_eq!(limit.wait(within(short)).await.err(), Some(Shed::TooLate));
        assert_eq!(seen(&board), (1, 0));
        drop(held);
    });
}

#[test]
fn a_permit_of_another_worker_is_found_by_looking() {
    with_limits(2, 1, async |_, limits| {
        let held = limits[0].take().unwrap();
        let waiting = enter(&limits[1]).await;
        drop(held);
        let began = Instant::now();
        drop(waiting.await.unwrap());
        assert!(began.elapsed() < Duration::from_secs(5));
    });
}

/// Both workers have a line; each time the one that came earlier by more than a little is first, whoever gives.
#[test]
fn between_workers_the_older_line_is_served_first() {
    with_limits(2, 1, async |board, limits| {
        let held = limits[0].take().unwrap();
        let mut older = enter(&limits[1]).await;
        limits[0].clock.sleep(Duration::from_millis(25)).await;
        let mut newer = enter(&limits[0]).await;
        beat(&board);
        drop(held);
        // The newer one is looked at first: it could take it.
        let order = poll_fn(|cx| {
            if let Poll::Ready(permit) = newer.as_mut().poll(cx) {
                return Poll::Ready(("newer", permit));
            }
            Poll::Ready(("older", ready!(older.as_mut().poll(cx))))
        });
        let (who, permit) = order.await;
        assert_eq!((who, permit.is_ok()), ("older", true));
    });
}

/// The earlier one is there and does not move: a worker that stands still.
#[test]
fn a_peer_that_does_not_move_starves_nobody() {
    with_limits(2, 1, async |board, limits| {
        let held = limits[0].take().unwrap();
        let stuck = enter(&limits[1]).await;
        limits[0].clock.sleep(Duration::from_millis(25)).await;
        let waiting = enter(&limits[0]).await;
        beat(&board);
        drop(held);
        let began = Instant::now();
        let held = waiting.await.unwrap();
        assert!(began.elapsed() >= Duration::from_nanos(GRACE_NS), "it was left to the peer: {:?}", began.elapsed());
        // A beat that is old is nobody's.
        board.child(1).unwrap().set_beat_ns(1);
        limits[0].lock().rude_until = 0;
        let waiting = enter(&limits[0]).await;
        drop(held);
        assert!(waiting.await.is_ok() && limits[0].lock().yields_since.is_none());
        drop(stuck);
    });
}

#[test]
fn the_number_of_the_generation_in_force_counts() {
    with_limits(2, 4, async |board, limits| {
        let old: Vec<_> = (0..4).map(|_| limits[0].take().unwrap()).collect();
        let child = board.child(1).unwrap();
        child.claim(&Claim { kind: Kind::Worker, slot: 1, epoch: 9, generation: 2, spawned_ns: 1 });
        let new = Limit::new(&board, (1, 9), "slow", (2, 4), limits[0].clock.clone()).unwrap();
        assert!(new.take().is_none() && board.permits_seen().next().unwrap().max == 4, "not in force yet");
        board.master().set_generation(2);
        assert!(new.take().is_none() && board.permits_seen().next().unwrap().max == 2);
        let mut old = old.into_iter();
        drop((old.next(), old.next()));
        assert!(limits[0].take().is_none() && new.take().is_none(), "two are held beyond the new number");
        drop(old.next());
        let one = limits[0].take().unwrap();
        assert!(new.take().is_none());
        drop((one, old.next()));
        let both = [new.take(), new.take()];
        assert!(both.iter().all(Option::is_some) && limits[0].take().is_none());
    });
}
