//! Single rules, each in a small life of its own.

use evergate_core::exit::{Initiator, Status};
use evergate_core::plan::Plan;

use super::ghosts::GHOST_TIME;
use super::{Action, Circumstances, Event, MS, Ns, Order, Rules, SECOND, Seen, Sig, State, step};

pub(super) const T0: Ns = 100 * SECOND;

pub(super) const GIVEN: Circumstances =
    Circumstances { rows: 32, host_rows: 4, has_orphans: false, halts_on_boot_error: false, seed: 1 };

pub(super) fn rules() -> Rules {
    Rules {
        workers_min: 2,
        workers_max: 3,
        slots: 10,
        backlog_high: 10,
        idle_after: 30 * SECOND,
        requests_max: 0,
        lifetime_max: 0,
        rss_max_kib: 0,
        rss_total_max_kib: 0,
        boot_timeout: 30 * SECOND,
        hang_timeout: 10 * SECOND,
        settle: 0,
        drain: 20 * SECOND,
        cancel: SECOND,
        cleanup: 3 * SECOND,
    }
}

/// A master whose clerk (1) and workers (2, 3) are ready.
pub(super) fn serving(rules: Rules) -> State {
    let mut state = State::new(rules, GIVEN, T0);
    step(&mut state, Event::Start, T0);
    let actions = beat(&mut state, &[1, 2, 3], T0 + MS);
    assert!(actions.contains(&Action::Announce));
    state
}

pub(super) fn beat(state: &mut State, epochs: &[u32], now: Ns) -> Vec<Action> {
    let seen = |epoch: &u32| Seen { epoch: *epoch, is_ready: true, beat: now, ..Seen::default() };
    step(state, Event::Seen { children: epochs.iter().map(seen).collect(), queue: 0 }, now)
}

pub(super) fn die(state: &mut State, epoch: u32, status: Status, now: Ns) -> Vec<Action> {
    step(state, Event::Exited { epoch, status, note: String::new() }, now)
}

pub(super) fn initiator(actions: &[Action]) -> Option<Initiator> {
    actions.iter().find_map(|action| match action {
        Action::Bury { initiator, .. } => Some(*initiator),
        _ => None,
    })
}

pub(super) fn spawned(actions: &[Action]) -> Vec<(u32, u32)> {
    let births = actions.iter().filter_map(|action| match action {
        Action::Spawn(birth) => Some((birth.epoch, birth.row)),
        _ => None,
    });
    births.collect()
}

pub(super) fn signals(actions: &[Action]) -> Vec<(u32, Sig)> {
    let sent = actions.iter().filter_map(|action| match action {
        Action::Send { epoch, signal } => Some((*epoch, *signal)),
        _ => None,
    });
    sent.collect()
}

pub(super) fn exit(actions: &[Action]) -> Option<u8> {
    actions.iter().find_map(|action| match action {
        Action::Exit(code) => Some(*code),
        _ => None,
    })
}

const KILLED: Status = Status::Signal { number: 9, core: false };

#[test]
fn a_killed_worker_is_buried_and_replaced_at_once_in_its_row() {
    let mut state = serving(rules());
    let actions = die(&mut state, 2, KILLED, T0 + SECOND);
    assert!(matches!(actions[0], Action::Bury { epoch: 2, initiator: Initiator::Unknown }));
    assert_eq!(spawned(&actions), [(4, 1)]);
}

#[test]
fn s07_a_well_worker_that_is_killed_is_replaced_at_once_however_often() {
    let mut state = serving(rules());
    let (mut now, mut epoch) = (T0 + SECOND, 2);
    for _ in 0..100 {
        let actions = die(&mut state, epoch, KILLED, now);
        assert!(!actions.contains(&Action::SetDegraded(1)));
        epoch = spawned(&actions)[0].0;
        beat(&mut state, &[1, 3, epoch], now + 10 * MS);
        now += 100 * MS;
    }
    // One that is killed before it was well is not, or somebody would have us start processes without a pause.
    for pause in [0, 0, 80] {
        let mut actions = die(&mut state, epoch, KILLED, now);
        let died = now;
        while spawned(&actions).is_empty() {
            now = state.due();
            actions.extend(beat(&mut state, &[1, 3], now));
        }
        assert!((now - died) / MS >= pause, "{} {pause}", (now - died) / MS);
        epoch = spawned(&actions)[0].0;
        beat(&mut state, &[1, 3, epoch], now);
    }
}

#[test]
fn the_initiator_is_what_the_facts_allow() {
    for (status, expected) in [
        (KILLED, Initiator::Unknown),
        (Status::Signal { number: 15, core: false }, Initiator::Unknown),
        (Status::Signal { number: 11, core: true }, Initiator::Crash),
        (Status::Signal { number: 6, core: false }, Initiator::Crash),
        (Status::Code(70), Initiator::Crash),
        (Status::Code(0), Initiator::Unknown),
    ] {
        let actions = die(&mut serving(rules()), 3, status, T0 + SECOND);
        assert_eq!(initiator(&actions), Some(expected), "{status:?}");
    }
    // The replacement was not ready yet.
    let mut state = serving(rules());
    die(&mut state, 3, KILLED, T0 + SECOND);
    assert_eq!(initiator(&die(&mut state, 4, KILLED, T0 + SECOND)), Some(Initiator::Boot));
    // Told to stop, it does; but a mistake of its own stays one.
    for (status, expected) in [(Status::Code(0), Initiator::Operator), (KILLED, Initiator::Operator)] {
        let mut state = serving(rules());
        step(&mut state, Event::Order(Order::Term), T0 + SECOND);
        assert_eq!(initiator(&die(&mut state, 2, status, T0 + SECOND)), Some(expected));
        let crash = Status::Signal { number: 11, core: true };
        assert_eq!(initiator(&die(&mut state, 3, crash, T0 + SECOND)), Some(Initiator::Crash));
    }
}

#[test]
fn a_crash_loop_slows_down_is_shown_and_forgiven() {
    let mut state = serving(rules());
    let mut now = T0 + SECOND;
    let (mut epoch, mut pauses, mut degraded) = (2, Vec::new(), 0);
    for _ in 0..12 {
        let died = now;
        let mut actions = die(&mut state, epoch, Status::Code(1), now);
        while spawned(&actions).is_empty() {
            now = state.due();
            actions.extend(beat(&mut state, &[1, 3], now));
        }
        degraded += actions.iter().filter(|action| **action == Action::SetDegraded(1)).count();
        pauses.push((now - died) / MS);
        epoch = spawned(&actions)[0].0;
        beat(&mut state, &[1, 3, epoch], now);
    }
    assert_eq!((pauses[0], degraded), (0, 1));
    for (at, pause) in pauses.iter().enumerate().skip(1) {
        let base = (100 << (at - 1)).min(10_000);
        assert!((base * 80 / 100..=base * 120 / 100).contains(pause), "{pauses:?}");
    }
    let mut forgiven = false;
    for _ in 0..70 {
        now = state.due();
        forgiven |= beat(&mut state, &[1, 3, epoch], now).contains(&Action::SetDegraded(0));
    }
    assert!(forgiven);
    assert_eq!(spawned(&die(&mut state, epoch, Status::Code(1), now)).len(), 1, "at once again");
}

#[test]
fn a_start_fails_with_the_childs_own_code() {
    for (status, code) in
        [(Status::Code(78), 78), (Status::Code(71), 71), (Status::Code(3), 70), (Status::Code(0), 70), (KILLED, 70)]
    {
        let mut state = State::new(rules(), GIVEN, T0);
        step(&mut state, Event::Start, T0);
        // The other worker may still become ready; this one is tried again.
        let actions = die(&mut state, 3, status, T0 + MS);
        assert_eq!((initiator(&actions), spawned(&actions)), (Some(Initiator::Boot), vec![(4, 2)]));
        let actions = die(&mut state, 2, status, T0 + MS);
        assert_eq!(signals(&actions), [(4, Sig::Quit)]);
        assert_eq!(signals(&die(&mut state, 4, Status::Code(0), T0 + 2 * MS)), [(1, Sig::Term)]);
        assert_eq!(exit(&die(&mut state, 1, Status::Code(0), T0 + 3 * MS)), Some(code));
    }
}

#[test]
fn s07_one_boot_that_fails_ends_the_start_if_it_is_told_to() {
    let given = Circumstances { halts_on_boot_error: true, ..GIVEN };
    let starting = || {
        let mut state = State::new(rules(), given, T0);
        step(&mut state, Event::Start, T0);
        state
    };
    let mut state = starting();
    assert_eq!(signals(&die(&mut state, 3, Status::Code(1), T0 + MS)), [(2, Sig::Quit)]);
    // Also when another is ready already, until all have been.
    let mut state = starting();
    beat(&mut state, &[1, 2], T0 + MS);
    assert_eq!(signals(&die(&mut state, 3, Status::Code(1), T0 + MS)), [(2, Sig::Quit)]);
    let mut state = starting();
    beat(&mut state, &[1, 2, 3], T0 + MS);
    die(&mut state, 3, Status::Code(1), T0 + MS);
    assert!(signals(&die(&mut state, 4, Status::Code(1), T0 + MS)).is_empty());
}

#[test]
fn a_child_that_is_not_ready_in_time_is_killed() {
    let mut state = serving(rules());
    die(&mut state, 2, KILLED, T0 + SECOND);
    let mut now = T0 + SECOND;
    let mut sent = Vec::new();
    while sent.is_empty() {
        now = state.due();
        sent = signals(&beat(&mut state, &[1, 3], now));
    }
    assert_eq!(sent, [(4, Sig::Kill)]);
    assert!((now - T0) / SECOND == 31, "{}", now - T0);
    assert_eq!(initiator(&die(&mut state, 4, KILLED, now)), Some(Initiator::Boot));
}

#[test]
fn a_child_that_stops_beating_is_aborted_then_killed() {
    let mut state = serving(rules());
    let last = T0 + MS;
    let frozen = |now: Ns| {
        let seen = |epoch, beat| Seen { epoch, is_ready: true, beat, ..Seen::default() };
        Event::Seen { children: vec![seen(1, now), seen(2, last), seen(3, now)], queue: 0 }
    };
    let mut now;
    let mut sent = Vec::new();
    loop {
        now = state.due();
        for signal in signals(&step(&mut state, frozen(now), now)) {
            sent.push((signal, (now - last) / SECOND));
        }
        if sent.len() == 2 {
            break;
        }
    }
    assert_eq!(sent, [((2, Sig::Abort), 9), ((2, Sig::Kill), 10)]);
    assert_eq!(initiator(&die(&mut state, 2, KILLED, now)), Some(Initiator::Hang));
}

/// A connect that wakes a quiet master comes before its look at the board: until then nobody knows who has beaten meanwhile.
#[test]
fn s04_nobody_is_judged_by_an_old_look() {
    let mut state = serving(rules());
    let (mut now, beat_at) = (T0 + MS, T0 + MS);
    let silent = |now, beat_at| {
        let seen = |epoch, beat| Seen { epoch, is_ready: true, beat, ..Seen::default() };
        Event::Seen { children: vec![seen(1, now), seen(2, beat_at), seen(3, now)], queue: 0 }
    };
    while now < beat_at + 8_800 * MS {
        now += 400 * MS;
        step(&mut state, silent(now, beat_at), now);
    }
    now += 300 * MS;
    assert_eq!(signals(&step(&mut state, Event::Knock, now)), []);
    assert_eq!(state.due(), now, "the look is due");
    assert_eq!(signals(&step(&mut state, silent(now, now), now)), []);
}

/// Workers that were killed and do not end: each has its successor two seconds later in a row of its own, and is buried when
/// it has ended. The fifth one is waited for.
#[test]
fn s04_a_killed_worker_that_does_not_end_is_succeeded() {
    let mut state = serving(rules());
    let (mut ghost, mut ghosts, mut now) = (2, Vec::new(), T0 + SECOND);
    let mut others = vec![1, 3];
    loop {
        // It does not beat, and does not end when it is killed.
        let (mut killed_at, mut births) = (None, Vec::new());
        while births.is_empty() && killed_at.is_none_or(|at| now - at < 30 * SECOND) {
            now = state.due();
            let actions = beat(&mut state, &others, now);
            if signals(&actions).contains(&(ghost, Sig::Kill)) {
                killed_at = Some(now);
            }
            if actions.contains(&Action::ShowGhost { epoch: ghost }) {
                assert_eq!(now - killed_at.unwrap(), 2 * SECOND);
            }
            births = spawned(&actions);
        }
        let Some((epoch, row)) = births.pop() else { break };
        ghosts.push(ghost);
        // Rows 0 to 2 are the clerk's and the first two workers'; those of the ghosts stay theirs.
        assert_eq!(usize::try_from(row).unwrap(), 2 + ghosts.len());
        beat(&mut state, &[1, 3, epoch], now + MS);
        (ghost, others) = (epoch, vec![1, 3]);
        now += SECOND;
    }
    assert_eq!(ghosts.len(), 4);
    // One is buried at last: whose doing it was is not forgotten, and the fifth one can be succeeded.
    let actions = die(&mut state, ghosts[0], KILLED, now);
    assert_eq!(initiator(&actions), Some(Initiator::Hang));
    assert!(actions.contains(&Action::ShowGhost { epoch: ghost }), "{actions:?}");
    assert_eq!(spawned(&actions).len(), 1, "{actions:?}");
}

/// What was killed at the end of its drain hangs in the kernel: that is no hanging of its own.
#[test]
fn s09_a_ghost_that_was_told_to_go_is_recorded_as_that() {
    let mut state = serving(rules());
    step(&mut state, Event::Order(Order::Term), T0 + SECOND);
    let (mut now, mut sent) = (T0 + SECOND, Vec::new());
    while !sent.contains(&(3, Sig::Kill)) {
        now = state.due();
        // The other one beats, and neither ends.
        sent.extend(signals(&beat(&mut state, &[3], now)));
    }
    assert!(!sent.contains(&(3, Sig::Abort)), "{sent:?}");
    assert_eq!(initiator(&die(&mut state, 3, KILLED, now)), Some(Initiator::Operator));
}

/// Nobody ends, not even by KILL: the stop is over when its stages are, and two seconds after each KILL.
#[test]
fn s21_a_stop_ends_beside_processes_that_hang_in_the_kernel() {
    let mut state = serving(rules());
    let begun = T0 + SECOND;
    step(&mut state, Event::Order(Order::Term), begun);
    let (mut now, mut buried, mut code) = (begun, Vec::new(), None);
    while code.is_none() {
        now = state.due();
        let actions = beat(&mut state, &[1, 2, 3], now);
        buried.extend(initiator(&actions));
        code = actions.iter().find_map(|action| match action {
            Action::Exit(code) => Some(*code),
            _ => None,
        });
    }
    let stages = rules().graceful() + rules().last();
    assert!(now - begun <= stages + 2 * GHOST_TIME + SECOND, "{} ms", (now - begun) / MS);
    assert_eq!((buried.len(), code), (2, Some(75)), "{buried:?}");
}

/// Between two ticks there is more than a short limit leaves between ABRT and KILL.
#[test]
fn s04_there_is_time_for_a_core_whatever_the_limit() {
    for limit in [2, 3, 4, 10, 60] {
        let limit = limit * SECOND;
        let mut state = serving(Rules { hang_timeout: limit, ..rules() });
        let last = T0 + 300 * MS;
        let mut sent = Vec::new();
        while sent.len() < 2 {
            let now = state.due();
            let seen = |epoch, beat| Seen { epoch, is_ready: true, beat, ..Seen::default() };
            let children = vec![seen(1, now), seen(2, last.min(now)), seen(3, now)];
            let actions = step(&mut state, Event::Seen { children, queue: 0 }, now);
            sent.extend(signals(&actions).into_iter().map(|(_, signal)| (signal, now - last)));
        }
        let core_time = (limit / 10).min(SECOND);
        assert_eq!(sent, [(Sig::Abort, limit - core_time), (Sig::Kill, limit)]);
    }
}

#[test]
fn s04_a_child_without_beats_is_warned_about_diagnosed_and_welcomed_back() {
    let mut state = serving(rules());
    let last = T0 + MS;
    let mut seen = Vec::new();
    let mut look = |state: &mut State, beat: Ns, now: Ns| {
        let child = |epoch, beat| Seen { epoch, is_ready: true, beat, ..Seen::default() };
        let children = vec![child(1, now), child(2, beat), child(3, now)];
        for action in step(state, Event::Seen { children, queue: 0 }, now) {
            match action {
                Action::Say(text) => seen.push(((now - T0) / (500 * MS), text)),
                Action::Diagnose { epoch } => seen.push(((now - T0) / (500 * MS), format!("diagnose {epoch}"))),
                _ => {}
            }
        }
    };
    for half in 0..=16 {
        look(&mut state, last, last + half * 500 * MS);
    }
    look(&mut state, last + 8500 * MS, last + 8500 * MS);
    let expected =
        [(2, "the worker 0 has not beaten for a second"), (4, "diagnose 2"), (17, "the worker 0 beats again")];
    assert_eq!(seen, expected.map(|(at, text)| (at, text.to_owned())));
}

#[test]
fn h7_a_machine_that_stood_still_blames_nobody() {
    let mut state = serving(rules());
    let stale = |state: &mut State, now: Ns| {
        let seen = |epoch| Seen { epoch, is_ready: true, beat: T0 + MS, ..Seen::default() };
        step(state, Event::Seen { children: [1, 2, 3].map(seen).to_vec(), queue: 0 }, now)
    };
    assert!(signals(&stale(&mut state, T0 + 3600 * SECOND)).is_empty());
    // Who still does not beat after that is hung.
    let mut now = T0 + 3600 * SECOND;
    while now < T0 + 3611 * SECOND {
        now = state.due();
        if !signals(&stale(&mut state, now)).is_empty() {
            assert!(now >= T0 + 3609 * SECOND);
            return;
        }
    }
    panic!("never");
}

#[test]
fn h7_who_is_forgiven_for_the_machines_sake_is_not_said_to_beat_again() {
    let mut state = serving(rules());
    let look = |state: &mut State, beat: Ns, now: Ns| {
        let seen = |(epoch, beat)| Seen { epoch, is_ready: true, beat, ..Seen::default() };
        let children = [(1, now), (2, beat), (3, now)].map(seen).to_vec();
        let said = step(state, Event::Seen { children, queue: 0 }, now).into_iter();
        said.filter_map(|action| if let Action::Say(text) = action { Some(text) } else { None }).collect::<Vec<_>>()
    };
    let silent = T0 + MS;
    for half in 1..4 {
        look(&mut state, silent, silent + half * 500 * MS);
    }
    let late = silent + 5000 * MS;
    let said = look(&mut state, silent, late);
    assert!(said.len() == 1 && said[0].contains("stood still"), "{said:?}");
    let warned: Vec<String> = (1..4).flat_map(|half| look(&mut state, silent, late + half * 500 * MS)).collect();
    assert_eq!(warned, ["the worker 0 has not beaten for a second"]);
    assert_eq!(look(&mut state, late + 1600 * MS, late + 1600 * MS), ["the worker 0 beats again"]);
}

#[test]
fn a_second_term_hastens_and_a_third_kills() {
    let mut state = serving(rules());
    let term = |state: &mut State, now| step(state, Event::Order(Order::Term), now);
    assert_eq!(signals(&term(&mut state, T0 + SECOND)), [(2, Sig::Term), (3, Sig::Term)]);
    // `evergate stop` said again is no impatience.
    assert!(signals(&step(&mut state, Event::Order(Order::Stop), T0 + SECOND)).is_empty());
    assert_eq!(signals(&term(&mut state, T0 + SECOND)), [(2, Sig::Quit), (3, Sig::Quit)]);
    let third = signals(&term(&mut state, T0 + SECOND));
    assert!(third.contains(&(2, Sig::Kill)) && third.contains(&(3, Sig::Kill)), "{third:?}");
    for epoch in [2, 3] {
        die(&mut state, epoch, KILLED, T0 + SECOND);
    }
    assert_eq!(exit(&die(&mut state, 1, Status::Code(0), T0 + SECOND)), Some(75), "force was needed");
}

#[test]
fn connects_are_refused_once_the_queue_is_taken() {
    let mut state = serving(rules());
    let take = |state: &mut State, took: [bool; 2], queue, now| {
        let seen = |epoch, took_queue| Seen { epoch, is_ready: true, beat: now, took_queue, ..Seen::default() };
        let children = vec![seen(1, false), seen(2, took[0]), seen(3, took[1])];
        step(state, Event::Seen { children, queue }, now).contains(&Action::CloseListeners)
    };
    let now = T0 + SECOND;
    assert!(!step(&mut state, Event::Order(Order::Term), now).contains(&Action::CloseListeners));
    assert!(!take(&mut state, [true, false], 0, now + 10 * MS));
    assert!(!take(&mut state, [true, true], 1, now + 20 * MS));
    assert!(take(&mut state, [true, true], 0, now + 30 * MS));
    assert!(!take(&mut state, [true, true], 0, now + 40 * MS), "once");
    // A worker that does not answer delays it by half a second and no more.
    let mut state = serving(rules());
    step(&mut state, Event::Order(Order::Term), now);
    assert!(!take(&mut state, [true, false], 0, now + 499 * MS));
    assert!(take(&mut state, [true, false], 0, now + 500 * MS));
}

#[test]
fn settling_goes_on_serving() {
    let mut state = serving(Rules { settle: 5 * SECOND, ..rules() });
    let now = T0 + SECOND;
    assert!(signals(&step(&mut state, Event::Order(Order::Term), now)).is_empty());
    assert_eq!(spawned(&die(&mut state, 2, KILLED, now + SECOND)).len(), 1, "replaced while settling");
    assert!(signals(&beat(&mut state, &[1, 3, 4], now + 2 * SECOND)).is_empty());
    assert_eq!(signals(&beat(&mut state, &[1, 3, 4], now + 5 * SECOND)).len(), 2);
}

#[test]
fn workers_are_added_and_taken_within_bounds() {
    let mut state = serving(rules());
    let order = |state: &mut State, order| step(state, Event::Order(order), T0 + SECOND);
    assert_eq!(spawned(&order(&mut state, Order::More)), [(4, 3)]);
    assert!(spawned(&order(&mut state, Order::More)).is_empty(), "three is the most");
    // The one that is not ready yet goes first.
    assert_eq!(signals(&order(&mut state, Order::Fewer)), [(4, Sig::Term)]);
    assert!(signals(&order(&mut state, Order::Fewer)).is_empty(), "two is the fewest");
    // Its row is its own until it is buried.
    assert_eq!(spawned(&order(&mut state, Order::More)), [(5, 4)]);
    let actions = die(&mut state, 4, Status::Code(0), T0 + 2 * SECOND);
    assert_eq!(initiator(&actions), Some(Initiator::ScaleDown));
    assert!(spawned(&actions).is_empty());
    beat(&mut state, &[1, 2, 3, 5], T0 + 2 * SECOND);
    assert_eq!(signals(&order(&mut state, Order::Fewer)), [(2, Sig::Term)], "the oldest");
}

#[test]
fn a_failed_spawn_is_tried_again_and_never_at_once() {
    let mut state = serving(rules());
    die(&mut state, 2, KILLED, T0 + SECOND);
    let failed = Event::SpawnFailed { epoch: 4, why: "no memory".into() };
    let actions = step(&mut state, failed, T0 + SECOND);
    assert!(spawned(&actions).is_empty());
    let mut now = T0 + SECOND;
    let mut births = Vec::new();
    while births.is_empty() {
        now = state.due();
        births = spawned(&beat(&mut state, &[1, 3], now));
    }
    assert!(now - T0 - SECOND >= 80 * MS);
    assert_eq!(births, [(5, 1)]);
}

#[test]
fn orphans_are_killed_when_their_time_is_over() {
    let mut state = State::new(rules(), Circumstances { has_orphans: true, ..GIVEN }, T0);
    step(&mut state, Event::Start, T0);
    let mut now = T0;
    loop {
        now = state.due().max(now);
        if beat(&mut state, &[1, 2, 3], now).contains(&Action::KillOrphans) {
            assert_eq!(now - T0, 24 * SECOND);
            return;
        }
        assert!(now < T0 + 60 * SECOND);
    }
}

#[test]
fn rules_come_from_the_plan() {
    let plan = Plan::parse("evergate-plan=1\nlisten=127.0.0.1:0\nworkers_min=1\nworkers_max=4\nslots=1\ndrain_ms=7\n");
    let rules = Rules::of_plan(&plan.unwrap());
    assert_eq!((rules.workers_min, rules.workers_max, rules.drain), (1, 4, 7 * MS));
}

/// One that was told to go hangs: it is ended for that long before its drain is over, and force was needed in a stop.
#[test]
fn s04_one_that_hangs_while_it_drains_is_ended_for_that() {
    let mut state = serving(Rules { drain: 3600 * SECOND, ..rules() });
    let begun = T0 + SECOND;
    beat(&mut state, &[1, 2, 3], begun);
    assert_eq!(signals(&step(&mut state, Event::Order(Order::Term), begun)), [(2, Sig::Term), (3, Sig::Term)]);
    let (mut sent, mut now) = (Vec::new(), begun);
    while !sent.contains(&(2, Sig::Kill)) {
        now = state.due();
        sent.extend(signals(&beat(&mut state, &[1, 3], now)));
    }
    assert_eq!(sent, [(2, Sig::Abort), (2, Sig::Kill)], "and nothing for the one that beats");
    assert!((10 * SECOND..=11 * SECOND).contains(&(now - begun)), "{}", now - begun);
    assert_eq!(initiator(&die(&mut state, 2, KILLED, now)), Some(Initiator::Hang));
    die(&mut state, 3, Status::Code(0), now);
    beat(&mut state, &[1], now);
    assert_eq!(exit(&die(&mut state, 1, Status::Code(0), now)), Some(75));
}
