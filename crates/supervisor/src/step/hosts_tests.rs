//! Single rules of hosts, each in a small life of its own.

use evergate_board::HostState;
use evergate_core::exit::{Initiator, Kind, Status};

use super::hosts::TURN;
use super::tests::{GIVEN, T0, beat, die, initiator, rules, signals};
use super::{
    Action, Event, HostRules, HostSeen, HostStart, MS, Next, Ns, Order, SECOND, Shown, Sig, State, TICK, Tally,
    name_hash, step,
};

fn host(name: &str, group: Option<&str>) -> HostRules {
    HostRules {
        name: name.into(),
        fingerprint: name_hash(name),
        group: group.map(str::to_owned),
        start: 60 * SECOND,
        grace: SECOND,
        ..HostRules::default()
    }
}

/// A master whose clerk (1) and workers (2, 3) are ready, with these hosts in the rows from 0 on.
fn serving(hosts: Vec<HostRules>) -> State {
    let mut state = State::new(rules(), GIVEN, T0).with_hosts(hosts);
    step(&mut state, Event::Start, T0);
    beat(&mut state, &[1, 2, 3], T0 + MS);
    state
}

fn want(state: &mut State, host: u32, now: Ns) -> Vec<Action> {
    step(state, Event::Hosts(vec![HostSeen { host, is_wanted: true, ..HostSeen::default() }]), now)
}

/// It takes requests, and has some or none.
fn serve(state: &mut State, host: u32, epoch: u32, is_busy: bool, now: Ns) -> Vec<Action> {
    let mut actions = beat(state, &[1, 2, 3, epoch], now);
    let seen = HostSeen { host, ready_epoch: epoch, is_busy, ..HostSeen::default() };
    actions.extend(step(state, Event::Hosts(vec![seen]), now));
    actions
}

fn born(actions: &[Action]) -> Vec<(u32, u32)> {
    let births = actions.iter().filter_map(|action| match action {
        Action::Spawn(birth) if birth.kind == Kind::Host => Some((birth.slot, birth.epoch)),
        _ => None,
    });
    births.collect()
}

fn shown(actions: &[Action], host: u32) -> Option<Shown> {
    actions.iter().rev().find_map(|action| match action {
        Action::ShowHost { host: row, shown } if *row == host => Some(shown.clone()),
        _ => None,
    })
}

fn reload(state: &mut State, hosts: Vec<HostRules>, workers: [u32; 2], now: Ns) -> Vec<Action> {
    step(state, Event::Order(Order::Reload(None)), now);
    step(state, Event::Compiled(Ok(Next { rules: rules(), hosts })), now);
    beat(state, &workers, now)
}

#[test]
fn a_host_is_started_once_by_many_wants_and_preload_needs_none() {
    let mut state = serving(vec![host("a", None), HostRules { is_preloaded: true, ..host("b", None) }]);
    assert_eq!(state.children().filter(|child| child.kind == Kind::Host).count(), 1, "the preloaded one");
    let actions = want(&mut state, 0, T0 + SECOND);
    assert_eq!(born(&actions), [(0, 5)]);
    assert_eq!(shown(&actions, 0).unwrap().state, HostState::Starting);
    assert_eq!(born(&want(&mut state, 0, T0 + SECOND)), []);
    let actions = serve(&mut state, 0, 5, true, T0 + SECOND);
    assert_eq!(shown(&actions, 0).unwrap().state, HostState::Ready);
}

#[test]
fn each_start_of_a_host_is_counted_once_by_how_it_came_out() {
    let starts = |actions: &[Action]| {
        let counts = actions.iter().filter_map(|action| match action {
            Action::Count(Tally::HostStart { host: 0, outcome, took }) => Some((*outcome, *took)),
            _ => None,
        });
        counts.collect::<Vec<_>>()
    };
    let mut state = serving(vec![host("a", None)]);
    let mut now = T0 + SECOND;
    let wait_for_birth = |state: &mut State, now: &mut Ns| loop {
        let mut actions = want(state, 0, *now);
        actions.extend(beat(state, &[1, 2, 3], *now));
        if let [(_, epoch)] = born(&actions)[..] {
            return epoch;
        }
        *now += 100 * MS;
        assert!(*now < T0 + 60 * SECOND, "it is not started");
    };
    let epoch = wait_for_birth(&mut state, &mut now);
    assert_eq!(starts(&die(&mut state, epoch, Status::Code(1), now + MS)), [(HostStart::Failed, MS)]);
    let epoch = wait_for_birth(&mut state, &mut now);
    assert_eq!(starts(&serve(&mut state, 0, epoch, true, now + 3 * MS)), [(HostStart::Ready, 3 * MS)]);
    assert_eq!(starts(&serve(&mut state, 0, epoch, true, now + 4 * MS)), []);
    assert_eq!(starts(&die(&mut state, epoch, Status::Code(1), now + 5 * MS)), [], "its start was over");
    let epoch = wait_for_birth(&mut state, &mut now);
    step(&mut state, Event::Order(Order::Unload { name: name_hash("a"), caller: 1 }), now);
    assert_eq!(starts(&die(&mut state, epoch, Status::Code(0), now + MS)), [(HostStart::Stopped, MS)]);
}

#[test]
fn g21_a_host_that_cannot_start_says_why_and_is_tried_again_ever_more_slowly() {
    let mut state = serving(vec![host("a", None)]);
    let mut now = T0 + SECOND;
    let mut epoch = born(&want(&mut state, 0, now))[0].1;
    for expected in [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000_u64] {
        let status = Status::Code(1);
        step(&mut state, Event::Exited { epoch, status, note: "no such file".into() }, now);
        let actions = step(&mut state, Event::Swept { epoch }, now);
        assert_eq!(born(&actions), []);
        let died = now;
        let mut all = want(&mut state, 0, now);
        while born(&all).is_empty() {
            beat(&mut state, &[1, 2, 3], now);
            now = state.due();
            assert!(now < died + 60 * SECOND, "it is not started");
            all = want(&mut state, 0, now);
        }
        let pause = (now - died) / MS;
        assert!(pause >= expected / 100 * 80 && pause <= expected / 100 * 120 + 1, "{pause} for {expected}");
        epoch = born(&all)[0].1;
    }
    // One that was well for long enough has failed for the first time.
    for _ in 0..62 {
        serve(&mut state, 0, epoch, true, now);
        now += TICK;
    }
    let actions = die(&mut state, epoch, Status::Signal { number: 9, core: false }, now);
    let failed = shown(&actions, 0).unwrap();
    assert_eq!((failed.state, &*failed.cause), (HostState::Failed, "its host was ended by signal 9"));
    assert!(failed.retry_at <= now + 600 * MS, "{}", (failed.retry_at - now) / MS);
}

#[test]
fn a_host_that_died_while_it_served_is_replaced_without_being_asked_for() {
    let mut state = serving(vec![host("a", None)]);
    let epoch = born(&want(&mut state, 0, T0 + SECOND))[0].1;
    serve(&mut state, 0, epoch, true, T0 + SECOND);
    let mut now = T0 + 2 * SECOND;
    let mut all = die(&mut state, epoch, Status::Code(1), now);
    assert_eq!(initiator(&all), Some(Initiator::Crash));
    assert!(all.contains(&Action::Sweep { epoch }));
    all = step(&mut state, Event::Swept { epoch }, now);
    while born(&all).is_empty() {
        now = state.due();
        assert!(now < T0 + 4 * SECOND, "it is not started");
        all = beat(&mut state, &[1, 2, 3], now);
    }
    assert!(now <= T0 + 2 * SECOND + 600 * MS);
}

#[test]
fn g24_an_idle_host_is_shown_as_stopping_before_it_is_told_and_a_want_starts_the_next() {
    let mut state = serving(vec![host("a", None)]);
    let epoch = born(&want(&mut state, 0, T0 + SECOND))[0].1;
    serve(&mut state, 0, epoch, false, T0 + SECOND);
    let idle = HostSeen { host: 0, ready_epoch: epoch, idle_epoch: epoch, ..HostSeen::default() };
    let busy = Event::Hosts(vec![HostSeen { is_busy: true, ..idle }]);
    assert_eq!(signals(&step(&mut state, busy, T0 + SECOND)), [], "it has something to do");
    let actions = step(&mut state, Event::Hosts(vec![idle]), T0 + SECOND);
    let told = actions.iter().position(|action| *action == Action::Send { epoch, signal: Sig::Term }).unwrap();
    let is_stopping =
        |action: &Action| matches!(action, Action::ShowHost { shown, .. } if shown.state == HostState::Stopping);
    assert!(actions[..told].iter().any(is_stopping));
    // Asked for while it goes: the next one starts when it has gone, with everything that it left.
    assert_eq!(born(&want(&mut state, 0, T0 + SECOND)), []);
    let actions = die(&mut state, epoch, Status::Code(0), T0 + SECOND);
    assert_eq!((initiator(&actions), born(&actions)), (Some(Initiator::Idle), vec![]));
    let actions = step(&mut state, Event::Swept { epoch }, T0 + SECOND);
    assert_eq!(born(&actions), [(0, epoch + 1)], "without a pause: it was no failure");
}

#[test]
fn of_a_group_the_idle_one_goes_and_a_busy_one_has_its_turn() {
    let mut state = serving(vec![host("a", Some("gpu")), host("b", Some("gpu"))]);
    let epoch = born(&want(&mut state, 0, T0 + SECOND))[0].1;
    serve(&mut state, 0, epoch, true, T0 + SECOND);
    let mut now = T0 + 2 * SECOND;
    assert_eq!((born(&want(&mut state, 1, now)), signals(&want(&mut state, 1, now))), (vec![], vec![]));
    while signals(&serve(&mut state, 0, epoch, true, now)).is_empty() {
        now += TICK;
        assert!(now < T0 + 60 * SECOND, "it never goes");
    }
    assert!((T0 + SECOND + TURN..T0 + SECOND + TURN + 2 * TICK).contains(&now));
    let actions = die(&mut state, epoch, Status::Code(0), now);
    assert_eq!((initiator(&actions), born(&actions)), (Some(Initiator::Group), vec![]));
    // A program of the first one may still have what the second needs.
    let actions = step(&mut state, Event::Swept { epoch }, now);
    let second = born(&actions)[0];
    assert_eq!(second.0, 1);
    // Idle, and no longer new: it goes at once.
    serve(&mut state, 1, second.1, false, now);
    now += SECOND;
    serve(&mut state, 1, second.1, false, now);
    assert_eq!(signals(&want(&mut state, 0, now)), [(second.1, Sig::Term)]);
}

#[test]
fn a_reload_leaves_an_unchanged_host_alone_and_replaces_a_changed_one() {
    let changed = HostRules { fingerprint: 99, ..host("b", None) };
    let mut state = serving(vec![host("a", None), host("b", None)]);
    let a = born(&want(&mut state, 0, T0 + SECOND))[0].1;
    let b = born(&want(&mut state, 1, T0 + SECOND))[0].1;
    for (row, epoch) in [(0, a), (1, b)] {
        serve(&mut state, row, epoch, true, T0 + SECOND);
    }
    let actions = reload(&mut state, vec![host("a", None), changed], [6, 7], T0 + 2 * SECOND);
    assert!(signals(&actions).iter().all(|(epoch, _)| ![a, b].contains(epoch)), "{actions:?}");
    assert!(actions.contains(&Action::AddHost { host: 2, name: "b".into(), fingerprint: 99 }));
    assert!(shown(&actions, 1).unwrap().is_retired && shown(&actions, 0).is_none());
    // The old one goes before the new one starts.
    let actions = want(&mut state, 2, T0 + 2 * SECOND);
    assert_eq!((signals(&actions), born(&actions)), (vec![(b, Sig::Term)], vec![]));
    die(&mut state, b, Status::Code(0), T0 + 2 * SECOND);
    let actions = step(&mut state, Event::Swept { epoch: b }, T0 + 2 * SECOND);
    assert_eq!(born(&actions)[0].0, 2);
}

#[test]
fn a_removed_host_serves_the_workers_of_before() {
    let mut state = serving(vec![host("a", None)]);
    let epoch = born(&want(&mut state, 0, T0 + SECOND))[0].1;
    serve(&mut state, 0, epoch, false, T0 + SECOND);
    reload(&mut state, Vec::new(), [5, 6], T0 + 2 * SECOND);
    die(&mut state, 2, Status::Code(0), T0 + 2 * SECOND);
    let kill = Status::Signal { number: 9, core: false };
    die(&mut state, epoch, kill, T0 + 2 * SECOND);
    let mut actions = step(&mut state, Event::Swept { epoch }, T0 + 2 * SECOND);
    let mut now = T0 + 2 * SECOND;
    while born(&actions).is_empty() {
        now += TICK;
        assert!(now < T0 + 4 * SECOND, "it is not started");
        actions = beat(&mut state, &[1, 3, 5, 6], now);
    }
    let Some(Action::Spawn(birth)) = actions.iter().find(|action| matches!(action, Action::Spawn(_))) else { panic!() };
    assert_eq!(birth.generation, 1, "only that one has its section");
    let actions = die(&mut state, 3, Status::Code(0), now);
    assert_eq!(signals(&actions), [(birth.epoch, Sig::Term)]);
    die(&mut state, birth.epoch, Status::Code(0), now);
    let actions = step(&mut state, Event::Swept { epoch: birth.epoch }, now);
    assert!(actions.contains(&Action::DropHost { host: 0 }));
}

#[test]
fn a_stop_ends_workers_then_hosts_then_the_clerk() {
    let mut state = serving(vec![host("a", None)]);
    let epoch = born(&want(&mut state, 0, T0 + SECOND))[0].1;
    serve(&mut state, 0, epoch, true, T0 + SECOND);
    let actions = step(&mut state, Event::Order(Order::Term), T0 + SECOND);
    assert_eq!(signals(&actions), [(2, Sig::Term), (3, Sig::Term)]);
    die(&mut state, 2, Status::Code(0), T0 + SECOND);
    let actions = die(&mut state, 3, Status::Code(0), T0 + SECOND);
    assert_eq!(signals(&actions), [(epoch, Sig::Term)]);
    assert_eq!(signals(&die(&mut state, epoch, Status::Code(0), T0 + SECOND)), [], "its programs may be there");
    let actions = step(&mut state, Event::Swept { epoch }, T0 + SECOND);
    assert_eq!(signals(&actions), [(1, Sig::Term)]);
}

#[test]
fn operators_load_and_unload() {
    let mut state = serving(vec![host("a", None)]);
    let order = |state: &mut State, order| step(state, Event::Order(order), T0 + SECOND);
    let unknown = order(&mut state, Order::Load { name: name_hash("x"), caller: 1 });
    assert!(matches!(&unknown[..], [Action::Say(_), Action::Answer { caller: 1, outcome: Err(_) }]), "{unknown:?}");
    let name = name_hash("a");
    let actions = order(&mut state, Order::Load { name, caller: 2 });
    let epoch = born(&actions)[0].1;
    let actions = serve(&mut state, 0, epoch, false, T0 + SECOND);
    let at = |of: &dyn Fn(&Action) -> bool| actions.iter().position(of).unwrap();
    let shows = at(&|action| matches!(action, Action::ShowHost { shown, .. } if shown.state == HostState::Ready));
    let answers = at(&|action| *action == Action::Answer { caller: 2, outcome: Ok(epoch) });
    assert!(shows < answers, "who hears of it may ask before the row says so: {actions:?}");
    let actions = order(&mut state, Order::Unload { name, caller: 3 });
    assert_eq!(signals(&actions), [(epoch, Sig::Term)]);
    let actions = die(&mut state, epoch, Status::Code(0), T0 + SECOND);
    assert!(actions.contains(&Action::Answer { caller: 3, outcome: Ok(epoch) }));
    assert_eq!((initiator(&actions), shown(&actions, 0).unwrap().state), (Some(Initiator::Operator), HostState::Cold));
    step(&mut state, Event::Swept { epoch }, T0 + SECOND);
    let epoch = born(&order(&mut state, Order::Load { name, caller: 4 }))[0].1;
    let failed = step(&mut state, Event::Exited { epoch, status: Status::Code(1), note: "no".into() }, T0 + SECOND);
    let answer = failed.iter().find(|action| matches!(action, Action::Answer { caller: 4, .. }));
    assert!(matches!(answer, Some(Action::Answer { outcome: Err(refusal), .. }) if refusal.why == "no"), "{failed:?}");
}

#[test]
fn an_order_to_load_waits_for_the_next_program_of_one_that_was_ready() {
    let mut state = serving(vec![host("a", None)]);
    let name = name_hash("a");
    let at = T0 + SECOND;
    let epoch = born(&want(&mut state, 0, at))[0].1;
    serve(&mut state, 0, epoch, false, at);
    let look = |state: &mut State, is_down| {
        let seen = HostSeen { host: 0, ready_epoch: epoch, is_down, ..HostSeen::default() };
        step(state, Event::Hosts(vec![seen]), at)
    };
    let load = |caller| Event::Order(Order::Load { name, caller });
    look(&mut state, true);
    assert_eq!(step(&mut state, load(1), at), [], "it takes no requests");
    assert_eq!(look(&mut state, true), []);
    assert_eq!(look(&mut state, false), [Action::Answer { caller: 1, outcome: Ok(epoch) }]);
    assert_eq!(step(&mut state, load(2), at), [Action::Answer { caller: 2, outcome: Ok(epoch) }]);
    // It goes before its program has come back: idle, say.
    look(&mut state, true);
    step(&mut state, load(3), at);
    step(
        &mut state,
        Event::Hosts(vec![HostSeen {
            host: 0,
            ready_epoch: epoch,
            idle_epoch: epoch,
            is_down: true,
            ..HostSeen::default()
        }]),
        at,
    );
    let gone = die(&mut state, epoch, Status::Code(0), at);
    let answer = gone.iter().find(|action| matches!(action, Action::Answer { caller: 3, .. }));
    assert!(matches!(answer, Some(Action::Answer { outcome: Err(_), .. })), "{gone:?}");
}
