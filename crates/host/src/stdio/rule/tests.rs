use super::*;

/// A pool whose clock is moved by hand.
struct World {
    rule: Rule,
    start: Instant,
    now: Instant,
}

const SETTINGS: Settings =
    Settings { min: 1, max: 1, in_flight_max: 64, queue: 8, requests_max: 0, lifetime_max: Duration::ZERO, rss_max: 0 };

impl World {
    fn new(settings: Settings) -> Self {
        let now = Instant::now();
        Self { rule: Rule::new(settings, now, 7), start: now, now }
    }

    fn after(&mut self, ms: u64) -> Vec<Action> {
        self.now += Duration::from_millis(ms);
        self.rule.decide(self.now)
    }

    fn decide(&mut self) -> Vec<Action> {
        self.after(0)
    }

    /// Lets what is being started be ready, with so many places.
    fn ready(&mut self, places: u32) -> Vec<Number> {
        let started = starts(&self.decide());
        for number in &started {
            self.rule.ready(*number, places, self.now);
        }
        started
    }

    fn enter(&mut self) -> Vec<Action> {
        self.rule.enter(false).unwrap();
        self.decide()
    }

    /// Serves one request; with whom, and what comes of it.
    fn serve(&mut self, rss: u64) -> (Number, Vec<Action>) {
        let mut actions = self.enter();
        let Action::Give { to, .. } = actions.remove(0) else { panic!("{actions:?}") };
        self.rule.answered();
        self.rule.free(to, rss, self.now);
        actions.extend(self.decide());
        (to, actions)
    }
}

fn starts(actions: &[Action]) -> Vec<Number> {
    let start = |action: &Action| if let Action::Start(number) = action { Some(*number) } else { None };
    actions.iter().filter_map(start).collect()
}

fn gives(actions: &[Action]) -> Vec<Number> {
    let give = |action: &Action| if let Action::Give { to, .. } = action { Some(*to) } else { None };
    actions.iter().filter_map(give).collect()
}

#[test]
fn the_fewest_are_started_at_once_and_more_for_a_line_up_to_the_most() {
    let mut world = World::new(Settings { min: 2, max: 4, ..SETTINGS });
    let first = world.ready(1);
    assert_eq!(first.len(), 2);
    assert_eq!(gives(&world.enter()), [first[0]]);
    assert_eq!(gives(&world.enter()), [first[1]], "to the one with the least to do");
    assert_eq!(starts(&world.enter()).len(), 1);
    assert_eq!(starts(&world.enter()).len(), 1, "one for each that waits");
    assert_eq!(world.enter(), [], "no more than the most");
    assert_eq!(world.rule.load(), (2, 3));
}

#[test]
fn the_line_is_bounded_and_kept_in_order() {
    let mut world = World::new(Settings { queue: 2, ..SETTINGS });
    let first = world.ready(1)[0];
    world.enter();
    let second = world.rule.enter(false).unwrap();
    let third = world.rule.enter(false).unwrap();
    assert_eq!(world.rule.enter(false), None);
    let again = world.rule.enter(true).expect("one that had its turn is not sent away");
    world.rule.leave(second);
    for ticket in [again, third] {
        world.rule.free(first, 0, world.now);
        assert_eq!(world.decide(), [Action::Give { ticket, to: first }]);
    }
}

#[test]
fn requests_at_once_are_bounded_over_all_processes() {
    let mut world = World::new(Settings { in_flight_max: 3, max: 2, min: 2, ..SETTINGS });
    world.ready(4);
    let given: usize = (0..6).map(|_| gives(&world.enter()).len()).sum();
    assert_eq!((given, world.rule.load()), (3, (3, 3)));
}

#[test]
fn g19_with_room_for_it_a_successor_comes_first() {
    let mut world = World::new(Settings { max: 2, requests_max: 10, ..SETTINGS });
    let old = world.ready(1)[0];
    let mut served = 0;
    let new = loop {
        let (by, actions) = world.serve(0);
        assert_eq!(by, old);
        served += 1;
        if let [new] = starts(&actions)[..] {
            break new;
        }
        assert!(served < 12, "{actions:?}");
    };
    assert!((9..=11).contains(&served), "{served}: ten, and ten per cent");
    assert_eq!(world.serve(0).0, old, "it serves until there is another");
    world.rule.ready(new, 1, world.now);
    assert_eq!(world.decide(), [Action::Drain(old)]);
    assert_eq!(world.serve(0).0, new);
}

#[test]
fn g19_without_room_the_old_one_goes_first_and_between_two_requests() {
    let mut world = World::new(Settings { lifetime_max: Duration::from_secs(10), ..SETTINGS });
    let old = world.ready(2)[0];
    world.enter();
    let wake = world.rule.wake(world.now).unwrap() - world.start;
    assert!((Duration::from_secs(9)..=Duration::from_secs(11)).contains(&wake), "{wake:?}");
    assert_eq!(world.after(11_001), [], "it has a request");
    assert_eq!(world.enter(), [], "and gets no other");
    world.rule.free(old, 0, world.now);
    assert_eq!(world.decide(), [Action::Drain(old)]);
    world.rule.gone(old);
    let new = world.ready(1);
    assert_eq!(gives(&world.decide()), new);
}

#[test]
fn g19_memory_is_looked_at_after_each_request() {
    let mut world = World::new(Settings { rss_max: 100, ..SETTINGS });
    let old = world.ready(1)[0];
    assert_eq!(world.serve(100), (old, vec![]));
    assert_eq!(world.serve(101), (old, vec![Action::Drain(old)]));
}

#[test]
fn jitter_spreads_within_ten_per_cent() {
    let mut rule = World::new(SETTINGS).rule;
    let all: Vec<u64> = (0..1000).map(|_| rule.jitter()).collect();
    assert!(all.iter().all(|scale| (900..=1100).contains(scale)));
    assert!(all.iter().any(|scale| *scale < 920) && all.iter().any(|scale| *scale > 1080));
}

#[test]
fn starts_that_fail_are_tried_at_longer_and_longer_pauses() {
    let mut world = World::new(SETTINGS);
    let mut number = starts(&world.decide())[0];
    for pause in [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000] {
        world.rule.failed(number, world.now);
        world.rule.gone(number);
        assert_eq!(world.after(pause - 1), [], "{pause}");
        number = starts(&world.after(1))[0];
    }
    world.rule.ready(number, 1, world.now);
    world.serve(0);
    world.enter();
    world.rule.ending(number, world.now);
    world.rule.gone(number);
    assert_eq!(starts(&world.decide()).len(), 1, "a request was answered: the program works");
}

#[test]
fn one_that_is_ready_and_ends_without_a_request_has_failed_too() {
    let mut world = World::new(SETTINGS);
    let number = world.ready(1)[0];
    world.rule.ending(number, world.now);
    world.rule.gone(number);
    assert_eq!((world.decide(), starts(&world.after(500)).len()), (vec![], 1));
}

#[test]
fn who_waits_is_refused_when_no_process_will_come_soon() {
    let mut world = World::new(SETTINGS);
    let number = starts(&world.decide())[0];
    let ticket = world.rule.enter(false).unwrap();
    assert_eq!(world.decide(), [], "one is being started");
    world.rule.failed(number, world.now);
    assert_eq!(world.decide(), [Action::Refuse(ticket)]);
    world.rule.gone(number);
    let late = world.rule.enter(false).unwrap();
    assert_eq!(world.decide(), [Action::Refuse(late)], "at once, for another target to be asked");
}

#[test]
fn more_than_the_fewest_end_when_they_have_had_nothing_to_do() {
    let mut world = World::new(Settings { max: 2, ..SETTINGS });
    let first = world.ready(1)[0];
    world.enter();
    world.rule.enter(false).unwrap();
    let second = world.ready(1)[0];
    assert_eq!(gives(&world.decide()), [second]);
    for number in [first, second] {
        world.rule.free(number, 0, world.now);
    }
    assert_eq!(world.after(59_999), []);
    let drained = world.after(1);
    assert!(matches!(drained[..], [Action::Drain(_)]), "{drained:?}");
    assert_eq!(world.after(100_000), [], "the fewest stay");
}

#[test]
fn a_stop_drains_what_is_idle_refuses_who_waits_and_starts_nothing() {
    let mut world = World::new(Settings { min: 3, max: 3, ..SETTINGS });
    let all = starts(&world.decide());
    world.rule.ready(all[0], 1, world.now);
    world.rule.ready(all[1], 1, world.now);
    world.enter();
    world.rule.stop();
    let ticket = world.rule.enter(true).unwrap();
    assert_eq!(world.decide(), [Action::Refuse(ticket), Action::Drain(all[1]), Action::Drain(all[2])]);
    world.rule.free(all[0], 0, world.now);
    assert_eq!(world.decide(), [Action::Drain(all[0])]);
    all.into_iter().for_each(|number| world.rule.gone(number));
    assert!(world.after(100_000).is_empty() && world.rule.is_empty());
}
