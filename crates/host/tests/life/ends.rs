//! Ends: exact causes, the ladder, and nothing left behind.

use std::sync::Arc;
use std::time::{Duration, Instant};

use evergate_core::cgroup;
use evergate_host::cgroup::Cgroups;
use evergate_host::program::Ladder;
use evergate_host::{Plan, Wiring};
use evergate_sys::{Limit, Status};
use evergate_testkit::wait_until;

use super::support::{
    House, LONG, OUTPUT, PIPES, alone, exists, is_full, open_files, plan, read, run, sim, text, until,
};

/// On a machine that is not overrun; promises of 100 ms and the like are checked with this on top.
const SLACK: Duration = Duration::from_secs(2);

#[test]
fn g4_every_exit_code_is_exact() {
    run(|house| async move {
        for code in 0..=255_u8 {
            let (_, ended) = house.whole(&plan(&["sh", "-c", &format!("exit {code}")])).await;
            assert_eq!((ended.exit.status, ended.ladder), (Status::Code(code), Ladder::Untouched));
        }
        assert_eq!(house.ear.ended.lock().unwrap().len(), 256);
    });
}

#[test]
fn g5_every_signal_is_exact() {
    // Those that stop, continue or are ignored by default end nobody.
    const HARMLESS: [u8; 8] = [17, 18, 19, 20, 21, 22, 23, 28];
    run(|house| async move {
        for number in (1..=64).filter(|number| !HARMLESS.contains(number)) {
            // Not by itself: a shell keeps some to itself.
            let mut sleep = plan(&["sleep", "60"]);
            sleep.limits = vec![(Limit::Core, 0)];
            let mut program = house.start(&sleep, Wiring::default()).await;
            let (_, kill) = house.whole(&plan(&["sh", "-c", &format!("kill -{number} {}", program.pid())])).await;
            assert_eq!(kill.exit.status, Status::Code(0));
            let ended = program.ended().await.unwrap();
            assert_eq!(ended.exit.status, Status::Signal { number, core: false });
        }
    });
}

#[test]
fn g7_a_program_that_hangs_ends_with_term() {
    run(|house| async move {
        let mut program = house.start(&sim(&["hang"]), OUTPUT).await;
        let begin = Instant::now();
        program.end();
        let ended = program.ended().await.unwrap();
        assert_eq!(ended.exit.status, Status::Signal { number: 15, core: false });
        assert_eq!(ended.ladder, Ladder::Term);
        assert!(begin.elapsed() < SLACK);
    });
}

fn deaf(steps: &str) -> Plan {
    plan(&["sh", "-c", &format!("trap '' TERM; exec {} {steps}", evergate_testkit::adaptersim().display())])
}

#[test]
fn g8_a_program_that_ignores_term_is_killed_after_its_grace() {
    run(|house| async move {
        let plan = deaf("pid hang");
        let mut program = house.start(&plan, OUTPUT).await;
        house.heard("pid ", 1).await;
        let begin = Instant::now();
        program.end();
        let ended = program.ended().await.unwrap();
        assert_eq!(ended.exit.status, Status::Signal { number: 9, core: false });
        assert_eq!(ended.ladder, Ladder::Kill);
        assert!(begin.elapsed() >= plan.grace && begin.elapsed() < plan.grace + SLACK, "{:?}", begin.elapsed());
    });
}

#[test]
fn g8_a_second_word_ends_the_grace() {
    run(|house| async move {
        let mut plan = deaf("pid hang");
        plan.grace = LONG * 2;
        let mut program = house.start(&plan, OUTPUT).await;
        house.heard("pid ", 1).await;
        program.end();
        tokio::task::yield_now().await;
        program.kill();
        assert_eq!(program.ended().await.unwrap().ladder, Ladder::Kill);
    });
}

#[test]
fn g8_the_rest_of_its_group_has_the_grace_too() {
    run(|house| async move {
        // The shell ends at once; what it started puts something away first.
        let mut plan = plan(&[
            "sh",
            "-c",
            "(trap 'sleep 0.7; echo away >&2; exit' TERM; echo pid $$ >&2; while :; do sleep 0.01; done) & wait",
        ]);
        plan.grace = LONG;
        let mut program = house.start(&plan, OUTPUT).await;
        house.heard("pid ", 1).await;
        program.end();
        let ended = program.ended().await.unwrap();
        let lines = house.ear.lines.lock().unwrap().clone();
        assert!(lines.iter().any(|line| line == "away"), "{ended:?} {lines:?}");
    });
}

#[test]
fn g9_output_that_a_grandchild_holds_open_ends_half_a_second_after_the_exit() {
    run(|house| async move {
        let begin = Instant::now();
        let mut program = house.start(&sim(&["fork:plain:pid,hang", "out:answer"]), OUTPUT).await;
        assert_eq!(text(&read(&mut program).await), "answer");
        let waited = begin.elapsed();
        assert!(waited >= Duration::from_millis(500) && waited < Duration::from_millis(500) + SLACK, "{waited:?}");
        let ended = program.ended().await.unwrap();
        assert_eq!(ended.exit.status, Status::Code(0));
        let grandchild = house.heard("pid ", 1).await[0];
        assert!(!exists(grandchild));
    });
}

#[test]
fn g9_a_grandchild_that_goes_on_writing_is_ended_too() {
    run(|house| async move {
        let mut program = house.start(&plan(&["sh", "-c", "yes & exit 3"]), OUTPUT).await;
        let output = read(&mut program).await;
        assert!(output.starts_with(b"y\ny\n"));
        assert_eq!(program.ended().await.unwrap().exit.status, Status::Code(3));
    });
}

async fn g10(house: &House, kind: &str, is_ordered: bool) {
    let fork = format!("fork:{kind}:pid,fork:setsid:pid;hang,hang").replace(';', ",");
    let steps: &[&str] = if is_ordered { &[&fork, "hang"] } else { &[&fork, "await:/proc/self/exe", "exit:7"] };
    let mut program = house.start(&sim(steps), OUTPUT).await;
    let family = house.heard("pid ", 1).await;
    if is_ordered {
        program.end();
    }
    let ended = program.ended().await.unwrap();
    let expected = if is_ordered { Status::Signal { number: 15, core: false } } else { Status::Code(7) };
    assert_eq!(ended.exit.status, expected, "{kind}");
    for pid in family {
        if kind == "naked" {
            // It hides its maker, so it goes when the programs of the other tests that could have made it are gone.
            wait_until("it is gone", LONG, || !exists(pid));
        } else {
            assert!(!exists(pid), "{kind}: {pid} is left, strays {}", ended.strays);
        }
    }
    assert_eq!(ended.left, 0);
}

#[test]
fn g10_descendants_that_left_the_group_are_found_and_ended() {
    run(|house| async move {
        // As far as time goes, all of them could be this one's.
        let _bystander = house.start(&sim(&["hang"]), OUTPUT).await;
        for kind in ["plain", "setsid", "daemon"] {
            for is_ordered in [true, false] {
                house.ear.lines.lock().unwrap().clear();
                g10(&house, kind, is_ordered).await;
            }
        }
    });
}

#[test]
fn g10_one_that_hides_its_maker_is_found_too() {
    run(|house| async move {
        let mut program = house.start(&sim(&["fork:naked:pid,hang", "hang"]), OUTPUT).await;
        let naked = house.heard("pid ", 1).await[0];
        program.end();
        program.ended().await.unwrap();
        until("it is gone too", || !exists(naked)).await;
    });
}

/// Groups of this process's; none, and a word about it, where it may not make any.
fn cgroups() -> Option<Arc<Cgroups>> {
    let cgroups = Cgroups::make();
    let why = cgroups.check().err().map(str::to_owned);
    why.inspect(|why| println!("no cgroup can be made here ({why}): nothing to test"))
        .is_none()
        .then(|| Arc::new(cgroups))
}

/// Puts a process into a group within each of its own, as a container's runtime would.
fn nest(pid: i32) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    for folder in cgroup::folders(&read(&format!("/proc/{pid}/cgroup")), &read("/proc/self/mountinfo")) {
        let inner = folder.join("inner");
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(inner.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

#[test]
fn g10_one_that_hides_its_maker_goes_with_its_cgroup_while_others_live() {
    let Some(cgroups) = cgroups() else { return };
    run(|house| async move {
        // As far as marks, groups and sessions tell, both could have made it.
        let bystander = house.start(&sim(&["hang"]), OUTPUT).await;
        for (last, is_nested) in [("hang", false), ("exit:7", false), ("exit:7", true)] {
            house.ear.lines.lock().unwrap().clear();
            let mut plan = sim(&["fork:naked:pid,hang", "read", last]);
            plan.cgroups = Some(Arc::clone(&cgroups));
            let mut program = house.start(&plan, PIPES).await;
            let naked = house.heard("pid ", 1).await[0];
            if is_nested {
                nest(naked);
            }
            if last == "hang" {
                program.end();
            }
            drop(program.take_input());
            let ended = program.ended().await.unwrap();
            assert_eq!((exists(naked), ended.strays, ended.left), (false, 1, 0), "{ended:?}");
        }
        assert!(exists(bystander.pid().as_raw_nonzero().get()));
    });
}

#[test]
fn g10_an_orphan_of_a_program_that_lives_is_left_alone() {
    run(|house| async move {
        let mut program = house.start(&sim(&["fork:daemon:pid,hang", "hang"]), OUTPUT).await;
        let helper = house.heard("pid ", 1).await[0];
        // Ends of other programs look for orphans.
        for _ in 0..3 {
            house.whole(&sim(&["exit:0"])).await;
        }
        assert!(exists(helper), "it was taken for somebody else's");
        program.kill();
        assert!(program.ended().await.unwrap().strays >= 1);
        assert!(!exists(helper));
    });
}

#[test]
fn g11_many_programs_leave_no_zombie_and_no_descriptor() {
    run(|house| async move {
        let count = if is_full() { 10_000 } else { 200 };
        house.whole(&sim(&["exit:0"])).await;
        let before = open_files();
        let mut pids = Vec::new();
        for at in 0..count {
            let mut program = house.start(&plan(&["true"]), Wiring::default()).await;
            pids.push(program.pid().as_raw_nonzero().get());
            // Some are waited for, some let go.
            if at % 3 > 0 {
                assert_eq!(program.ended().await.unwrap().exit.status, Status::Code(0));
                assert!(!exists(pids[at]) || house.programs.live() > 0);
            }
        }
        until("none is left", || house.programs.live() == 0).await;
        // Other tests have theirs open meanwhile; a leak would be as many as there were programs.
        until("no descriptor is left", || open_files() < before + 40).await;
        let ours =
            |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains("(true) Z"));
        assert!(!pids.iter().any(|pid| ours(*pid)));
    });
}

#[test]
fn a_program_that_nobody_holds_any_more_is_ended_within_100_ms() {
    run(|house| async move {
        let program = house.start(&sim(&["hang"]), OUTPUT).await;
        let pid = program.pid().as_raw_nonzero().get();
        let begin = Instant::now();
        drop(program);
        until("it is gone", || !exists(pid)).await;
        println!("gone after {:?}", begin.elapsed());
        assert!(begin.elapsed() < Duration::from_millis(100) + SLACK);
        assert_eq!(house.ear.ended.lock().unwrap()[0].ladder, Ladder::Term);
    });
}

#[test]
fn a_start_that_nobody_waits_for_leaves_nothing() {
    run(|house| async move {
        for _ in 0..20 {
            let plan = sim(&["hang"]);
            let start = house.programs.start(&plan, OUTPUT, Instant::now() + LONG);
            let _ = tokio::time::timeout(Duration::from_micros(1), start).await;
        }
        until("none is left", || house.programs.live() == 0).await;
        for ended in house.ear.ended.lock().unwrap().iter() {
            let killed = |number| Status::Signal { number, core: false };
            let truths = [(killed(9), Ladder::Kill), (killed(15), Ladder::Term), (killed(15), Ladder::Kill)];
            assert!(truths.contains(&(ended.exit.status, ended.ladder)), "{ended:?}");
        }
    });
}

#[test]
fn all_programs_end_when_the_host_stops_and_none_starts_any_more() {
    run(|house| async move {
        let mut programs = Vec::new();
        for steps in [&["hang"][..], &["fork:setsid:hang", "hang"], &["spin"]] {
            programs.push(house.start(&sim(steps), Wiring::default()).await);
        }
        programs.push(house.start(&deaf("pid hang"), OUTPUT).await);
        assert_eq!(house.programs.live(), 4);
        assert_eq!(house.programs.end_all(Instant::now() + LONG).await, 0);
        let outcome = house.programs.start(&sim(&[]), OUTPUT, Instant::now() + LONG).await;
        assert!(matches!(outcome, Err(evergate_host::StartError::Stopping)), "{outcome:?}");
        drop(programs);
    });
}

/// The kernel ends a program when the thread that started it does, whatever else happens there.
#[test]
fn a_program_does_not_outlive_its_host() {
    // What is forgotten there would stay on the list of programs here.
    alone("ends::a_program_does_not_outlive_its_host", host_ends);
}

fn host_ends() {
    let (send, receive) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let _ = evergate_testkit::adaptersim();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let held = runtime.block_on(async {
            let house = House::new();
            let program = house.start(&deaf("pid hang"), OUTPUT).await;
            house.heard("pid ", 1).await;
            send.send(program.pid().as_raw_nonzero().get()).unwrap();
            (program, house)
        });
        // Nothing of ours is left to end it: no task runs, and no guard is dropped.
        std::mem::forget((runtime, held));
    });
    let pid = receive.recv_timeout(LONG).unwrap();
    wait_until("it is gone", LONG, || {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
    });
}
