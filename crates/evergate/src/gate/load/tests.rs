use evergate_board::{Claim, Phase, Shape};

use super::*;

/// Places of each worker: more than anybody asks for.
const SLOTS: u32 = 1_000;

fn share(load: u32, connections: u32) -> Share {
    Share { load, connections, spare: 1 }
}

fn full(load: u32, connections: u32) -> Share {
    Share { load, connections, spare: 0 }
}

/// A board with that many workers that accept and beat.
fn workers(count: u32) -> (Board, Vec<Arc<Load>>) {
    workers_with(count, SLOTS)
}

fn workers_with(count: u32, slots: u32) -> (Board, Vec<Arc<Load>>) {
    let board = Board::create(Shape { children: 8, slots: 4, series: 8, labels: 8 }, 7).unwrap();
    let start = |row: u32| {
        let child = board.child(row).unwrap();
        child.claim(&Claim { kind: Kind::Worker, slot: row, epoch: row, generation: 1, spawned_ns: 1 });
        child.set_phase(Phase::Ready);
        child.set_beat_ns(monotonic_ns());
        child.set_accepting(true);
        Arc::new(Load::new(board.clone(), row, slots))
    };
    let loads = (1..=count).map(start).collect();
    (board, loads)
}

impl Load {
    fn stuck(&self) -> Vec<u32> {
        self.peers_before().iter().filter(|peer| self.are_stuck(&[**peer])).map(|peer| peer.row).collect()
    }
}

fn accept(load: &Load) {
    load.change_connections(1);
    load.count_accepted();
}

#[test]
fn the_less_loaded_goes_before_and_then_the_one_with_fewer_connections() {
    assert!(share(0, 9).goes_before(share(2, 0)));
    assert!(!share(1, 0).goes_before(share(2, 1)));
    assert!(share(3, 1).goes_before(share(3, 3)));
    assert!(!share(4, 0).goes_before(share(3, 99)), "fewer connections do not outweigh more load");
    assert!(share(0, 0).goes_before(share(u32::MAX, u32::MAX)));
    assert!(!share(u32::MAX, u32::MAX).goes_before(share(u32::MAX, u32::MAX)));
}

#[test]
fn who_has_a_place_goes_before_who_has_none() {
    assert!(share(1, 9).goes_before(full(1, 1)) && share(9, 9).goes_before(full(1, 1)));
    assert!(!full(0, 0).goes_before(share(9, 9)), "it would wait there");
    assert!(full(0, 0).goes_before(full(2, 0)) && !full(1, 0).goes_before(full(2, 1)), "as ever where both have none");
    let (board, loads) = workers_with(2, 2);
    let spare = |row: u32| board.child(row).unwrap().spare();
    loads.iter().for_each(|load| load.beat());
    assert_eq!((spare(1), spare(2)), (2, 2));
    let first = Weight::new(&loads[0]);
    accept(&loads[0]);
    assert_eq!((spare(1), loads[0].peers_before().len()), (0, 1), "a request, and a connection that has not asked yet");
    let others = [Weight::new(&loads[1]), Weight::new(&loads[1])];
    assert!(loads[0].peers_before().is_empty(), "nobody has a place");
    drop((first, others));
    assert_eq!((spare(1), spare(2)), (1, 2));
}

/// Connections whose next requests would wait are sent to who has a place.
#[test]
fn while_requests_wait_connections_go_where_a_place_is() {
    let (board, loads) = workers_with(2, 1);
    let _own = Weight::new(&loads[0]);
    loads.iter().for_each(|load| load.beat());
    assert!(!loads[0].is_far_above_peers(), "none waits");
    board.child(1).unwrap().set_waiting(1);
    loads[0].far_at.store(0, Ordering::Relaxed);
    assert!(loads[0].is_far_above_peers());
    let _others = Weight::new(&loads[1]);
    loads[0].far_at.store(0, Ordering::Relaxed);
    assert!(!loads[0].is_far_above_peers(), "there is no place elsewhere");
}

/// Whatever they have, one of them takes the next connection.
#[test]
fn never_does_everybody_wait_for_another() {
    let mut random = 42_u64;
    let mut draw = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from((random >> 33) % below).unwrap()
    };
    for _ in 0..20_000 {
        let count = 2 + draw(5);
        let share = |_| Share { load: draw(6), connections: draw(12), spare: draw(2) };
        let all: Vec<Share> = (0..count).map(share).collect();
        let waits = |own: &Share| all.iter().any(|peer| peer.goes_before(*own));
        assert!(!all.iter().all(waits), "{all:?}");
    }
}

#[test]
fn a_burst_is_spread_evenly_whoever_wakes_first() {
    let (_, loads) = workers(4);
    let mut weights = Vec::new();
    let mut taken = [0_u32; 4];
    for _ in 0..64 {
        let at = loads.iter().position(|load| load.peers_before().is_empty()).unwrap();
        accept(&loads[at]);
        taken[at] += 1;
        let mut weight = Weight::new(&loads[at]);
        weight.set_stream();
        weights.push(weight);
    }
    assert!(taken.iter().max().unwrap() - taken.iter().min().unwrap() <= 1, "{taken:?}");
}

#[test]
fn only_those_who_accept_and_beat_are_waited_for() {
    let (board, loads) = workers(3);
    let names = |load: &Load| load.peers_before().iter().map(|peer| peer.row).collect::<Vec<_>>();
    (0..4).for_each(|_| accept(&loads[0]));
    assert_eq!(names(&loads[0]), [2, 3]);
    board.child(2).unwrap().set_accepting(false);
    assert_eq!(names(&loads[0]), [3]);
    board.child(3).unwrap().set_beat_ns(monotonic_ns() - FRESH_NS - 1);
    assert!(names(&loads[0]).is_empty() && !loads[0].has_peers(), "alone it takes everything");
}

#[test]
fn who_was_held_up_does_not_count_the_silence_of_its_peers() {
    const STILL: u64 = 3_000_000_000;
    let (board, loads) = workers(3);
    let load = &loads[0];
    let names = || load.peers_before().iter().map(|peer| peer.row).collect::<Vec<_>>();
    let beat = |row: u32, ns| board.child(row).unwrap().set_beat_ns(ns);
    (0..4).for_each(|_| accept(load));
    // All stand still for three seconds; the third was silent before that.
    let stop = monotonic_ns() - STILL;
    load.note_beat(stop);
    beat(2, stop - FRESH_NS / 3);
    beat(3, stop - FRESH_NS - 1);
    assert_eq!(names(), [2]);
    load.show_beat();
    assert_eq!(names(), [2], "its own beat goes before the peer's");
    load.allows_until.store(monotonic_ns(), Ordering::Relaxed);
    assert!(names().is_empty(), "the peer has had its time");
    // A pause of an idle worker is none.
    load.note_beat(monotonic_ns() - 250_000_000);
    load.show_beat();
    assert!(names().is_empty());
    beat(2, monotonic_ns());
    assert_eq!(names(), [2]);
}

#[test]
fn who_was_waited_for_in_vain_is_stuck_until_it_moves() {
    let (board, loads) = workers(3);
    (0..4).for_each(|_| accept(&loads[0]));
    loads[0].waited_for(&loads[0].peers_before(), STUCK / 2);
    assert!(loads[0].stuck().is_empty());
    // One of them takes it after all; the other is frozen. The waits for it add up.
    accept(&loads[1]);
    loads[0].waited_for(&loads[0].peers_before(), STUCK / 2);
    assert_eq!(loads[0].stuck(), [3]);
    board.child(3).unwrap().set_beat_ns(monotonic_ns() + 1);
    assert!(loads[0].stuck().is_empty(), "it beats: it is there again");
}

#[test]
fn a_request_counts_from_its_head_to_its_last_byte() {
    let (board, loads) = workers(1);
    let (load, row) = (&loads[0], board.child(1).unwrap());
    accept(load);
    assert_eq!((row.load(), row.fresh(), row.connections(), row.accepted()), (0, 1, 1, 1));
    let newcomer = Newcomer::new(load);
    newcomer.has_sent();
    newcomer.has_sent();
    let mut weight = Weight::new(load);
    assert_eq!((row.load(), row.fresh(), row.held()), (1, 0, 0));
    weight.set_waiting(true);
    assert_eq!((row.load(), row.held()), (1, 1));
    weight.set_waiting(false);
    assert_eq!((row.load(), row.held()), (1, 0));
    weight.set_stream();
    assert_eq!((row.load(), row.held()), (2, 2));
    drop(weight);
    assert_eq!((row.load(), row.fresh(), row.held()), (0, 0, 0));
    drop(newcomer);
    load.change_connections(-1);
    assert_eq!((row.load(), row.fresh(), row.connections()), (0, 0, 0));
    assert!(load.is_idle());
}

#[test]
fn a_moments_crowd_is_no_reason_to_close_connections_and_a_lasting_one_is() {
    let (_, loads) = workers(2);
    let load = &loads[0];
    let crowd: Vec<Weight> = (0..40).map(|_| Weight::new(load)).collect();
    assert!(!load.is_far_above_peers());
    load.beat();
    drop(crowd);
    (0..4).for_each(|_| load.beat());
    load.far_at.store(0, Ordering::Relaxed);
    assert!(!load.is_far_above_peers(), "it has passed");
    let _crowd: Vec<Weight> = (0..40).map(|_| Weight::new(load)).collect();
    (0..8).for_each(|_| load.beat());
    load.far_at.store(0, Ordering::Relaxed);
    assert!(load.is_far_above_peers());
}

#[test]
fn far_above_needs_four_streams_and_half_as_much_again() {
    assert!(!is_far_above(7, 0) && is_far_above(8, 0));
    assert!(!is_far_above(149, 100) && is_far_above(150, 100));
    let (_, loads) = workers(2);
    let streams = |load, count| -> Vec<Weight> {
        let stream = |_| {
            let mut weight = Weight::new(load);
            weight.set_stream();
            weight
        };
        (0..count).map(stream).collect()
    };
    let mine = streams(&loads[0], 4);
    assert!(loads[0].is_far_above_peers() && !loads[1].is_far_above_peers());
    // The answer is kept for some milliseconds.
    let _others = streams(&loads[1], 1);
    loads[0].far_at.store(0, Ordering::Relaxed);
    assert!(!loads[0].is_far_above_peers());
    drop(mine);
    let (_, alone) = workers(1);
    let _mine = streams(&alone[0], 100);
    assert!(!alone[0].is_far_above_peers(), "there is nobody else");
}
