//! Reload, on a virtual clock. Numbers are lines of the specification.

use evergate_core::exit::{Initiator, Status};

use super::tests::{T0, beat, die, initiator, rules, serving, signals, spawned};
use super::{Action, Event, MS, Ns, Order, Refusal, Rules, SECOND, Seen, Sig, State, step};

fn answers(actions: &[Action]) -> Vec<(u64, Result<u32, u8>)> {
    let all = actions.iter().filter_map(|action| match action {
        Action::Answer { caller, outcome } => Some((*caller, outcome.as_ref().copied().map_err(|why| why.code))),
        _ => None,
    });
    all.collect()
}

fn order(state: &mut State, caller: Option<u64>, now: Ns) -> Vec<Action> {
    step(state, Event::Order(Order::Reload(caller)), now)
}

fn compiled(state: &mut State, rules: Rules, now: Ns) -> Vec<Action> {
    step(state, Event::Compiled(Ok(rules.into())), now)
}

/// Everybody is ready; those in `taken` have been told to go and have taken the queue.
fn show(state: &mut State, ready: &[u32], taken: &[u32], now: Ns) -> Vec<Action> {
    let seen = |epoch: &u32| Seen {
        epoch: *epoch,
        is_ready: true,
        beat: now,
        took_queue: taken.contains(epoch),
        ..Seen::default()
    };
    step(state, Event::Seen { children: ready.iter().map(seen).collect(), queue: 0 }, now)
}

#[test]
fn s18_the_new_generation_is_ready_before_the_old_one_goes() {
    let mut state = serving(rules());
    let now = T0 + SECOND;
    assert!(order(&mut state, Some(1), now).contains(&Action::Compile));
    let new = Rules { workers_min: 1, workers_max: 2, drain: 7 * SECOND, ..rules() };
    let actions = compiled(&mut state, new, now);
    assert!(actions.contains(&Action::Keep { generation: 2 }));
    assert_eq!(spawned(&actions), [(4, 3), (5, 4)], "as many as there were, in rows of their own");
    assert!(signals(&actions).is_empty());
    assert!(signals(&show(&mut state, &[1, 2, 3, 4], &[], now)).is_empty(), "not yet");
    let actions = show(&mut state, &[1, 2, 3, 4, 5], &[], now);
    assert_eq!(signals(&actions), [(2, Sig::Term), (3, Sig::Term), (1, Sig::Term)], "the clerk after the workers");
    assert!(actions.contains(&Action::Adopt { generation: 2, rules: new }));
    // Whoever asked is told when the old ones accept no more.
    assert_eq!(answers(&actions), []);
    assert_eq!(answers(&show(&mut state, &[1, 2, 3, 4, 5], &[2], now + MS)), []);
    assert_eq!(answers(&show(&mut state, &[1, 2, 3, 4, 5], &[2, 3], now + 2 * MS)), [(1, Ok(2))]);
    // The clerk is followed at once by one of the new generation.
    let actions = die(&mut state, 1, Status::Code(0), now + 3 * MS);
    assert_eq!((initiator(&actions), spawned(&actions)), (Some(Initiator::Reload), vec![(6, 0)]));
    assert!(actions.iter().any(|action| matches!(action, Action::Spawn(birth) if birth.generation == 2)));
    // An old worker has the time that its own configuration promised, and nobody takes its place.
    let mut sent = Vec::new();
    let mut at = now;
    while sent.is_empty() {
        at = state.due();
        sent = signals(&show(&mut state, &[2, 3, 4, 5, 6], &[2, 3], at));
    }
    assert_eq!((at - now) / SECOND, 25, "20 s of drain, 1 s, 3 s, and a second to be seen ending");
    let actions = die(&mut state, 2, Status::Signal { number: 9, core: false }, at);
    assert_eq!((initiator(&actions), spawned(&actions)), (Some(Initiator::Reload), vec![]));
}

#[test]
fn s18_one_that_is_frozen_does_not_hold_up_the_answer() {
    let mut state = serving(rules());
    order(&mut state, Some(1), T0 + SECOND);
    compiled(&mut state, rules(), T0 + SECOND);
    assert_eq!(answers(&show(&mut state, &[1, 2, 3, 4, 5], &[2], T0 + SECOND)), []);
    assert_eq!(answers(&show(&mut state, &[1, 2, 3, 4, 5], &[2], T0 + 2 * SECOND)), [(1, Ok(2))]);
}

#[test]
fn s19_whatever_fails_leaves_the_old_generation() {
    // The configuration.
    let mut state = serving(rules());
    order(&mut state, Some(1), T0 + SECOND);
    let refusal = Refusal { code: 78, why: "a mistake".into() };
    let actions = step(&mut state, Event::Compiled(Err(refusal)), T0 + SECOND);
    assert_eq!((answers(&actions), signals(&actions)), (vec![(1, Err(78))], vec![]));
    // A boot: the others of the new generation are called off.
    order(&mut state, Some(2), T0 + 2 * SECOND);
    compiled(&mut state, rules(), T0 + 2 * SECOND);
    beat(&mut state, &[1, 2, 3, 4], T0 + 2 * SECOND);
    let actions = die(&mut state, 5, Status::Code(1), T0 + 2 * SECOND);
    assert_eq!((answers(&actions), signals(&actions)), (vec![(2, Err(1))], vec![(4, Sig::Quit)]));
    assert!(spawned(&actions).is_empty() && actions.contains(&Action::Forget { generation: 2 }));
    assert_eq!(state.generation(), 1);
    die(&mut state, 4, Status::Code(0), T0 + 2 * SECOND);
    // A validation without an end.
    let mut now = T0 + 3 * SECOND;
    order(&mut state, Some(3), now);
    let mut actions = Vec::new();
    while answers(&actions).is_empty() {
        now = state.due();
        actions = beat(&mut state, &[1, 2, 3], now);
    }
    assert!(actions.contains(&Action::StopCompile));
    assert_eq!((answers(&actions), (now - T0) / SECOND), (vec![(3, Err(70))], 33));
    // A respawn is of the old generation still.
    let actions = die(&mut state, 2, Status::Code(1), now);
    assert!(actions.iter().any(|action| matches!(action, Action::Spawn(birth) if birth.generation == 1)));
}

/// It was ready and accepts no more: nobody waits until it has drained.
#[test]
fn s19_a_worker_that_goes_before_its_generation_is_in_force_fails_the_reload() {
    let mut state = serving(rules());
    let now = T0 + SECOND;
    order(&mut state, Some(1), now);
    compiled(&mut state, rules(), now);
    assert_eq!(answers(&show(&mut state, &[1, 2, 3, 4], &[], now)), []);
    let seen = |epoch: u32| Seen { epoch, is_ready: true, is_going: epoch == 4, beat: now, ..Seen::default() };
    let children = [1, 2, 3, 4].map(seen).to_vec();
    let actions = step(&mut state, Event::Seen { children, queue: 0 }, now);
    assert_eq!((answers(&actions), signals(&actions)), (vec![(1, Err(1))], vec![(5, Sig::Term)]));
    assert!(spawned(&actions).is_empty() && actions.contains(&Action::Forget { generation: 2 }));
    assert_eq!(state.generation(), 1);
    // It finishes what it has.
    assert!(
        die(&mut state, 4, Status::Code(0), now + SECOND).iter().any(|action| matches!(action, Action::Bury { .. }))
    );
}

#[test]
fn s20_one_reload_waits_for_all_who_come_meanwhile() {
    let mut state = serving(rules());
    let now = T0 + SECOND;
    order(&mut state, Some(1), now);
    for caller in [Some(2), None, Some(3)] {
        assert_eq!(order(&mut state, caller, now), []);
    }
    let actions = step(&mut state, Event::Compiled(Err(Refusal::failed("no"))), now);
    assert_eq!(answers(&actions), [(1, Err(1))]);
    assert!(actions.contains(&Action::Compile), "at once");
    let actions = step(&mut state, Event::Compiled(Err(Refusal::failed("no"))), now);
    assert_eq!(answers(&actions), [(2, Err(1)), (3, Err(1))]);
    assert!(!actions.contains(&Action::Compile));
    // Before the first worker is ready it waits as well.
    let mut state = State::new(rules(), super::tests::GIVEN, T0);
    step(&mut state, Event::Start, T0);
    assert_eq!(order(&mut state, Some(1), T0), []);
    assert!(beat(&mut state, &[1, 2, 3], T0 + MS).contains(&Action::Compile));
}

/// A gateway of which three generations drain (workers 2 and 3, 4 and 5, 7 and 8) and a fourth serves (10, 11), and when
/// that was. Clerks are 1, 6, 9 and 12.
fn with_three_that_drain(rules: Rules) -> (State, Ns) {
    let mut state = serving(rules);
    let mut now = T0 + SECOND;
    for (workers, clerk) in [([4, 5], 1), ([7, 8], 6), ([10, 11], 9)] {
        order(&mut state, None, now);
        assert_eq!(spawned(&compiled(&mut state, rules, now)).len(), 2, "at once");
        show(&mut state, &[&[2, 3, 4, 5, 7, 8, clerk][..], &workers].concat(), &[], now);
        die(&mut state, clerk, Status::Code(0), now);
        now += 100 * MS;
    }
    assert_eq!(state.generation(), 4);
    (state, now)
}

#[test]
fn s20_a_fourth_generation_waits_for_the_oldest() {
    let (mut state, now) = with_three_that_drain(rules());
    order(&mut state, Some(1), now);
    let actions = compiled(&mut state, rules(), now);
    assert!(actions.contains(&Action::Keep { generation: 5 }), "validated at once");
    assert_eq!((spawned(&actions), signals(&actions)), (vec![], vec![]));
    // Its workers go one by one; the generation is gone with the last.
    assert_eq!(spawned(&die(&mut state, 2, Status::Code(0), now + SECOND)), []);
    let actions = die(&mut state, 3, Status::Code(0), now + 2 * SECOND);
    assert_eq!((spawned(&actions).len(), signals(&actions)), (2, vec![]));
    let actions = show(&mut state, &[13, 14], &[], now + 2 * SECOND);
    assert!(actions.contains(&Action::Adopt { generation: 5, rules: rules() }));
}

#[test]
fn s20_it_does_not_wait_for_ever_and_a_stop_ends_the_wait() {
    let slow = Rules { drain: 3600 * SECOND, ..rules() };
    let (mut state, begun) = with_three_that_drain(slow);
    order(&mut state, Some(1), begun);
    compiled(&mut state, slow, begun);
    let (mut now, mut actions) = (begun, Vec::new());
    while spawned(&actions).is_empty() {
        now = state.due();
        actions = beat(&mut state, &[2, 3, 4, 5, 7, 8, 10, 11, 12], now);
    }
    assert_eq!((now - begun) / SECOND, 30);
    assert_eq!(signals(&actions), [(2, Sig::Quit), (3, Sig::Quit)], "the oldest and nobody else");
    let (mut state, now) = with_three_that_drain(slow);
    order(&mut state, Some(1), now);
    compiled(&mut state, slow, now);
    let actions = step(&mut state, Event::Order(Order::Term), now + SECOND);
    assert_eq!(answers(&actions), [(1, Err(1))]);
    assert!(actions.contains(&Action::Forget { generation: 5 }) && !actions.contains(&Action::StopCompile));
}

/// The board has rows for two generations only.
#[test]
fn s20_a_generation_without_rows_waits_as_well() {
    let given = super::Circumstances { rows: 5, ..super::tests::GIVEN };
    let mut state = State::new(rules(), given, T0);
    step(&mut state, Event::Start, T0);
    beat(&mut state, &[1, 2, 3], T0 + MS);
    order(&mut state, None, T0 + SECOND);
    compiled(&mut state, rules(), T0 + SECOND);
    show(&mut state, &[1, 2, 3, 4, 5], &[], T0 + SECOND);
    die(&mut state, 1, Status::Code(0), T0 + SECOND);
    order(&mut state, None, T0 + SECOND);
    assert_eq!(spawned(&compiled(&mut state, rules(), T0 + SECOND)), []);
    assert_eq!(spawned(&die(&mut state, 2, Status::Code(0), T0 + 2 * SECOND)), [], "half a generation is none");
    assert_eq!(spawned(&die(&mut state, 3, Status::Code(0), T0 + 3 * SECOND)), [(7, 1), (8, 2)]);
}

#[test]
fn s20_a_stop_answers_everybody() {
    let mut state = serving(rules());
    let now = T0 + SECOND;
    order(&mut state, Some(1), now);
    order(&mut state, Some(2), now);
    let actions = step(&mut state, Event::Order(Order::Term), now);
    assert_eq!(answers(&actions), [(1, Err(1)), (2, Err(1))]);
    assert!(actions.contains(&Action::StopCompile));
    assert_eq!(answers(&order(&mut state, Some(3), now)), [(3, Err(1))]);
}
