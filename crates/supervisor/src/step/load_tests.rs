//! The number of workers under load, and recycling, on a virtual clock. Numbers are lines of the specification.

use evergate_core::exit::{Initiator, Kind, Status};

use super::tests::{GIVEN, T0, beat, die, initiator, rules, signals, spawned};
use super::{Action, Event, MS, Ns, Order, Rules, SECOND, Seen, Sig, State, Tally, step};

/// A gateway with a load that the test sets, whose children do at once what they are told.
struct Gateway {
    state: State,
    now: Ns,
    alive: Vec<u32>,
    target: u32,
    queue: u32,
    seen: Seen,
    downs: Vec<Ns>,
    said: Vec<String>,
}

impl Gateway {
    fn new(rules: Rules) -> Self {
        let mut gateway = Self {
            state: State::new(rules, GIVEN, T0),
            now: T0,
            alive: Vec::new(),
            target: 0,
            queue: 0,
            seen: Seen { is_ready: true, ..Seen::default() },
            downs: Vec::new(),
            said: Vec::new(),
        };
        gateway.tell(Event::Start);
        gateway.pass(2 * SECOND);
        gateway
    }

    fn tell(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            for action in step(&mut self.state, event, self.now) {
                match action {
                    Action::Spawn(birth) => self.alive.push(birth.epoch),
                    Action::Send { epoch, signal: Sig::Term } => {
                        self.alive.retain(|alive| *alive != epoch);
                        events.push(Event::Exited { epoch, status: Status::Code(0), note: String::new() });
                    }
                    Action::SetTarget(target) => {
                        if target < self.target {
                            self.downs.push(self.now);
                        }
                        self.target = target;
                    }
                    Action::Say(text) => self.said.push(text),
                    _ => {}
                }
            }
        }
    }

    /// Lets time pass as the shell does.
    fn pass(&mut self, time: Ns) {
        let end = self.now + time;
        while self.now < end {
            self.turn(end);
        }
    }

    /// One turn of the shell's loop, at the latest at `end`.
    fn turn(&mut self, end: Ns) {
        self.now = self.state.due().min(end).max(self.now + MS);
        self.look();
    }

    /// What the shell does in each turn.
    fn look(&mut self) {
        let children = self.alive.iter().map(|epoch| Seen { epoch: *epoch, beat: self.now, ..self.seen }).collect();
        if self.state.is_quiet() && self.queue > 0 {
            self.tell(Event::Knock);
        }
        self.tell(Event::Seen { children, queue: self.queue });
    }

    /// How long until the target is that.
    fn until(&mut self, target: u32) -> Ns {
        let begun = self.now;
        while self.target != target {
            self.turn(Ns::MAX);
            assert!(self.now < begun + 3600 * SECOND, "the target stays {}", self.target);
        }
        self.now - begun
    }
}

fn wide() -> Rules {
    Rules { workers_min: 1, workers_max: 16, ..rules() }
}

#[test]
fn s13_each_need_adds_workers_in_time_and_in_doubling_steps() {
    // A queue, however short, in two samples; requests that wait count as much.
    for queue in [true, false] {
        let mut gateway = Gateway::new(wide());
        (gateway.queue, gateway.seen.waiting) = if queue { (1, 0) } else { (0, 1) };
        let took = gateway.until(2);
        assert!((100 * MS..=600 * MS).contains(&took), "{took}");
        // 1, 2, 4, 8 more, each when those before are there and the need is seen twice again.
        for target in [4, 8, 16] {
            let took = gateway.until(target);
            assert!(took <= 300 * MS, "{target}: {took}");
        }
        gateway.pass(10 * SECOND);
        assert_eq!(gateway.target, 16);
    }
    // A worker that wakes the master says so once; also right behind the last look the need is seen again in time.
    for after in [0, 1, 50, 89, 100, 250, 499] {
        let mut gateway = Gateway::new(wide());
        gateway.pass(5 * SECOND);
        gateway.turn(Ns::MAX);
        gateway.now += after * MS;
        gateway.seen.waiting = 1;
        let begun = gateway.now;
        gateway.look();
        gateway.until(2);
        let took = gateway.now - begun;
        assert!(took <= 300 * MS, "{after}: {took}");
    }
    // Ten are a need at first sight.
    let mut gateway = Gateway::new(wide());
    gateway.queue = 10;
    assert!(gateway.until(2) <= 500 * MS);
    // More than four fifths of the places.
    let mut gateway = Gateway::new(wide());
    gateway.seen.load = 8;
    gateway.pass(60 * SECOND);
    assert_eq!(gateway.target, 1, "eight of ten are not more than 80 %");
    gateway.seen.load = 9;
    assert!(gateway.until(2) <= 600 * MS);
    // Loops that are late for a second.
    let mut gateway = Gateway::new(wide());
    gateway.seen.lag = 21 * MS;
    let took = gateway.until(2);
    assert!((SECOND..=1600 * MS).contains(&took), "{took}");
    // Late for less than that, or a queue in one sample only: nothing.
    let mut gateway = Gateway::new(wide());
    for _ in 0..20 {
        gateway.seen.lag = 50 * MS;
        gateway.pass(800 * MS);
        gateway.seen.lag = 0;
        gateway.pass(300 * MS);
    }
    assert_eq!(gateway.target, 1);
}

#[test]
fn s13_an_idle_gateway_is_looked_at_twice_a_second_and_a_busy_one_ten_times() {
    let looks = |gateway: &mut Gateway| {
        let end = gateway.now + 10 * SECOND;
        let mut count = 0;
        while gateway.now < end {
            gateway.turn(end);
            count += 1;
        }
        count
    };
    let mut gateway = Gateway::new(wide());
    assert!((18..=22).contains(&looks(&mut gateway)));
    assert!(gateway.state.is_quiet());
    gateway.seen.load = 1;
    assert!((90..=110).contains(&looks(&mut gateway)));
    assert!(!gateway.state.is_quiet());
    // With a fixed number there is nothing to decide.
    let mut gateway = Gateway::new(Rules { workers_min: 2, workers_max: 2, ..rules() });
    gateway.seen.load = 1;
    assert!((18..=22).contains(&looks(&mut gateway)));
    assert!(!gateway.state.is_quiet(), "and no connection is waited for");
}

#[test]
fn s14_one_goes_after_half_a_minute_of_little_load() {
    let mut gateway = Gateway::new(wide());
    gateway.queue = 1;
    gateway.until(4);
    (gateway.queue, gateway.seen.load) = (0, 3);
    gateway.pass(120 * SECOND);
    assert_eq!(gateway.target, 4, "three of ten places are more than a quarter");
    gateway.seen.load = 2;
    assert_eq!(gateway.until(3) / SECOND, 30);
    assert_eq!(gateway.until(2) / SECOND, 30);
    // A moment of load, and the time begins again.
    gateway.pass(20 * SECOND);
    gateway.seen.load = 4;
    gateway.pass(SECOND);
    gateway.seen.load = 0;
    assert_eq!(gateway.until(1) / SECOND, 30);
    gateway.pass(300 * SECOND);
    assert_eq!(gateway.target, 1);
}

#[test]
fn s14_a_need_that_returns_within_a_minute_doubles_the_time() {
    let mut gateway = Gateway::new(wide());
    let mut waits = Vec::new();
    for _ in 0..7 {
        gateway.queue = 1;
        gateway.until(2);
        gateway.queue = 0;
        waits.push(gateway.until(1).div_ceil(SECOND));
    }
    for (at, (wait, expected)) in waits.iter().zip([30, 60, 120, 240, 480, 600, 600]).enumerate() {
        assert!((expected..=expected + 2).contains(wait), "{at}: {waits:?}");
    }
    // After twenty quiet minutes it is as at the beginning.
    gateway.pass(1300 * SECOND);
    gateway.queue = 1;
    gateway.until(2);
    gateway.queue = 0;
    assert_eq!(gateway.until(1).div_ceil(SECOND), 31);
}

#[test]
fn s14_the_one_with_the_least_to_do_goes_of_those_the_oldest() {
    let mut state = State::new(Rules { workers_min: 1, workers_max: 4, ..rules() }, GIVEN, T0);
    step(&mut state, Event::Start, T0);
    beat(&mut state, &[1, 2], T0 + MS);
    step(&mut state, Event::Order(Order::Scale { workers: 4, caller: 1 }), T0 + SECOND);
    let seen = |epoch, load| Seen { epoch, is_ready: true, beat: T0 + SECOND, load, ..Seen::default() };
    let children = vec![seen(1, 0), seen(2, 2), seen(3, 1), seen(4, 1), seen(5, 3)];
    step(&mut state, Event::Seen { children, queue: 0 }, T0 + SECOND);
    let actions = step(&mut state, Event::Order(Order::Fewer), T0 + SECOND);
    assert_eq!(signals(&actions), [(3, Sig::Term)]);
}

#[test]
fn s15_a_square_wave_does_not_flap() {
    for period in [20, 80, 140] {
        let mut gateway = Gateway::new(wide());
        let end = gateway.now + 600 * SECOND;
        while gateway.now < end {
            gateway.seen.load = 10;
            gateway.pass(period / 2 * SECOND);
            gateway.seen.load = 0;
            gateway.pass(period / 2 * SECOND);
        }
        assert!(gateway.downs.len() <= 4, "period {period} s: {} steps down", gateway.downs.len());
        assert!(gateway.target <= 16);
    }
}

#[test]
fn s16_memory_of_all_stops_the_growth_and_says_so_once() {
    let mut gateway = Gateway::new(Rules { rss_total_max_kib: 100_000, ..wide() });
    gateway.seen.rss_kib = 30_000;
    gateway.queue = 1;
    gateway.pass(60 * SECOND);
    assert_eq!(gateway.target, 4, "a fifth one would be started with 120,000 KiB there");
    assert_eq!(gateway.said.iter().filter(|text| text.contains("rss_total_max")).count(), 1);
}

#[test]
fn s16_workers_are_recycled_one_at_a_time_with_their_own_shares_of_the_limit() {
    let mut state = State::new(Rules { requests_max: 1000, ..rules() }, GIVEN, T0);
    step(&mut state, Event::Start, T0);
    beat(&mut state, &[1, 2, 3], T0 + MS);
    let look = |state: &mut State, epochs: &[u32], requests, now: Ns| {
        let seen = |epoch: &u32| Seen { epoch: *epoch, is_ready: *epoch < 4, beat: now, requests, ..Seen::default() };
        step(state, Event::Seen { children: epochs.iter().map(seen).collect(), queue: 0 }, now)
    };
    let mut now = T0 + MS;
    // Not in the first ten seconds, however many.
    while now < T0 + 10 * SECOND {
        assert!(spawned(&look(&mut state, &[1, 2, 3], 5000, now)).is_empty());
        now += 500 * MS;
    }
    now = T0 + 11 * SECOND;
    assert!(spawned(&look(&mut state, &[1, 2, 3], 899, now)).is_empty(), "none below nine tenths");
    let actions = look(&mut state, &[1, 2, 3], 1101, now);
    assert_eq!((spawned(&actions).len(), signals(&actions).len()), (1, 0), "the old one serves on");
    // Nothing else while the successor is on its way.
    for _ in 0..10 {
        now += 500 * MS;
        let actions = look(&mut state, &[1, 2, 3, 4], 1101, now);
        assert!(spawned(&actions).is_empty() && signals(&actions).is_empty());
    }
    let seen = |epoch: u32, requests| Seen { epoch, is_ready: true, beat: now, requests, ..Seen::default() };
    let children = vec![seen(1, 0), seen(2, 1101), seen(3, 1101), seen(4, 0)];
    let actions = step(&mut state, Event::Seen { children, queue: 0 }, now);
    let [(old, Sig::Term)] = signals(&actions)[..] else { panic!("{actions:?}") };
    assert!(spawned(&actions).is_empty(), "one at a time");
    let actions = die(&mut state, old, Status::Code(0), now);
    assert_eq!(initiator(&actions), Some(Initiator::Requests));
    // Now it is the other one's turn.
    assert_eq!((spawned(&actions).len(), signals(&actions).len()), (1, 0));
}

#[test]
fn s16_of_two_that_are_too_large_the_larger_goes_first() {
    // The first is the clerk.
    for (one, two, goes) in [(120_000, 150_000, 3), (150_000, 120_000, 2)] {
        let mut state = State::new(Rules { rss_max_kib: 100_000, ..rules() }, GIVEN, T0);
        step(&mut state, Event::Start, T0);
        beat(&mut state, &[1, 2, 3], T0 + MS);
        let now = T0 + 12 * SECOND;
        let seen = |(epoch, rss_kib)| Seen { epoch, is_ready: true, beat: now, rss_kib, ..Seen::default() };
        let children = [(1, 200_000), (2, one), (3, two)].map(seen).into();
        assert_eq!(spawned(&step(&mut state, Event::Seen { children, queue: 0 }, now)).len(), 1);
        assert_eq!(state.succession.as_ref().map(|succession| succession.old), Some(goes));
    }
}

/// H9.
#[test]
fn h9_a_worker_that_loses_descriptors_is_recycled_when_it_is_old_enough() {
    let mut state = State::new(rules(), GIVEN, T0);
    step(&mut state, Event::Start, T0);
    beat(&mut state, &[1, 2, 3], T0 + MS);
    let mut look = |now: Ns| {
        let seen = |epoch| Seen { epoch, is_ready: true, beat: now, is_leaking: epoch == 3, ..Seen::default() };
        step(&mut state, Event::Seen { children: [1, 2, 3].map(seen).into(), queue: 0 }, now)
    };
    assert!(spawned(&look(T0 + 9 * SECOND)).is_empty(), "not in its first ten seconds");
    let actions = look(T0 + 11 * SECOND);
    assert_eq!((spawned(&actions).len(), signals(&actions).len()), (1, 0), "the old one serves on");
    let tally = Tally::Respawn { kind: Kind::Worker, cause: Initiator::Descriptors };
    assert!(actions.iter().any(|action| matches!(action, Action::Count(counted) if *counted == tally)), "{actions:?}");
}

#[test]
fn s16_a_successor_that_fails_leaves_the_old_one_and_one_that_dies_is_succeeded_at_once() {
    let recycling = || {
        let mut state = State::new(Rules { lifetime_max: 20 * SECOND, ..rules() }, GIVEN, T0);
        step(&mut state, Event::Start, T0);
        let mut now = T0;
        loop {
            now += 500 * MS;
            let actions = beat(&mut state, &[1, 2, 3], now);
            if let [(epoch, row)] = spawned(&actions)[..] {
                let old = state.succession.as_ref().map(|succession| succession.old).unwrap();
                return (state, now, epoch, row, old);
            }
            assert!(now < T0 + 30 * SECOND);
        }
    };
    let (mut state, now, successor, _, _) = recycling();
    let actions = die(&mut state, successor, Status::Code(1), now + MS);
    assert!(signals(&actions).is_empty() && spawned(&actions).is_empty());
    assert!(spawned(&beat(&mut state, &[1, 2, 3], now + 29 * SECOND)).is_empty());
    let (mut state, now, successor, row, old) = recycling();
    let actions = die(&mut state, old, Status::Signal { number: 9, core: false }, now + MS);
    assert!(spawned(&actions).is_empty(), "the successor is there already");
    let at = state.slots.iter().find(|slot| slot.child.as_ref().is_some_and(|child| child.epoch == successor));
    assert_eq!(at.map(|slot| slot.row), Some(row));
}
