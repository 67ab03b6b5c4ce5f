//! Starts, and those that fail.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use evergate_host::{StartError, Wiring};
use evergate_sys::{Status, Step};

use super::support::{LONG, OUTPUT, alone, folder, open_files, plan, read, run, sim, text, until};

const ENOENT: i32 = 2;
const ENOEXEC: i32 = 8;
const EACCES: i32 = 13;

#[test]
fn g1_a_program_that_cannot_be_executed_has_its_exact_reason() {
    run(|house| async move {
        let folder = folder();
        let file = |name: &str, content: &str, mode: u32| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path.into_os_string()
        };
        let cases = [
            (folder.path().join("missing").into_os_string(), Step::Exec, ENOENT),
            ("no-such-program-anywhere".into(), Step::Exec, ENOENT),
            (file("plain", "#!/bin/sh\n", 0o644), Step::Exec, EACCES),
            (file("script", "#!/no/such/interpreter\n", 0o755), Step::Interpreter, ENOENT),
            (file("words", "not a program\n", 0o755), Step::Exec, ENOEXEC),
            (folder.path().as_os_str().to_owned(), Step::Exec, EACCES),
        ];
        for (program, step, errno) in cases {
            let outcome = house.programs.start(&plan(&[&program]), OUTPUT, Instant::now() + LONG).await;
            let Err(StartError::Failed(failed)) = outcome else { panic!("{program:?}: {outcome:?}") };
            assert_eq!((&failed.program, failed.step, failed.errno), (&program, step, errno), "{failed}");
        }
        let mut lost = plan(&["true"]);
        lost.dir = Some(folder.path().join("missing"));
        let outcome = house.programs.start(&lost, OUTPUT, Instant::now() + LONG).await;
        let Err(StartError::Failed(failed)) = outcome else { panic!("{outcome:?}") };
        assert_eq!((failed.step, failed.errno), (Step::Dir, ENOENT));
        assert_eq!(house.programs.end_all(Instant::now() + LONG).await, 0, "nothing is left of any");
    });
}

#[test]
fn g1_a_name_is_looked_up_as_a_shell_would() {
    run(|house| async move {
        let folder = folder();
        let denied = folder.path().join("tr");
        std::fs::write(&denied, "").unwrap();
        let mut plan = plan(&["tr", "a-z", "A-Z"]);
        // One that may not be executed does not hide the next.
        plan.env = vec![("PATH".into(), format!("/no/such/folder:{}:/usr/bin:/bin", folder.path().display()).into())];
        let mut program = house.start(&plan, super::support::PIPES).await;
        let mut input = program.take_input().unwrap();
        input.feed(b"hello", LONG).await.unwrap();
        drop(input);
        assert_eq!(text(&read(&mut program).await), "HELLO");
        assert_eq!(program.exited().await, Some(Status::Code(0)));
    });
}

/// In a process of its own, since the limit is one of the process.
#[test]
fn g2_a_full_machine_is_asked_again_after_pauses() {
    alone("starts::g2_a_full_machine_is_asked_again_after_pauses", || run(|house| async move { full(&house).await }));
}

async fn full(house: &super::support::House) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let plan = sim(&[]);
    let before = getrlimit(Resource::Nofile);
    let few = Rlimit { current: Some(open_files() as u64 + 2), maximum: before.maximum };
    setrlimit(Resource::Nofile, few).unwrap();
    let (begin, patience) = (Instant::now(), Duration::from_millis(400));
    let (one, other) = tokio::join!(
        house.programs.start(&plan, OUTPUT, begin + patience),
        house.programs.start(&plan, OUTPUT, begin + patience),
    );
    assert!(matches!(one, Err(StartError::NoRoom(_))), "{one:?}");
    assert!(matches!(other, Err(StartError::NoRoom(_) | StartError::TooLate)), "{other:?}");
    // The pauses have grown by now: the next is refused at once instead of asking again.
    let begin = Instant::now();
    let outcome = house.programs.start(&plan, OUTPUT, begin).await;
    assert!(matches!(outcome, Err(StartError::NoRoom(_) | StartError::TooLate)), "{outcome:?}");
    assert!(begin.elapsed() < patience / 2);
    let mut later = std::pin::pin!(house.programs.start(&plan, OUTPUT, Instant::now() + LONG));
    let asked = std::cell::Cell::new(0);
    let later = std::future::poll_fn(|context| {
        asked.set(asked.get() + 1);
        later.as_mut().poll(context)
    });
    let relief = async {
        until("it has asked again", || asked.get() >= 2).await;
        setrlimit(Resource::Nofile, before).unwrap();
    };
    let (later, ()) = tokio::join!(later, relief);
    assert_eq!(later.unwrap().exited().await, Some(Status::Code(0)), "there is room again");
}

#[test]
fn a_nul_in_an_argument_is_refused_before_anything_is_started() {
    run(|house| async move {
        let args = [std::ffi::OsString::from("a\0b")];
        let wiring = Wiring { args: &args, ..OUTPUT };
        let outcome = house.programs.start(&sim(&[]), wiring, Instant::now() + LONG).await;
        assert!(matches!(outcome, Err(StartError::Io(_))), "{outcome:?}");
        assert_eq!(house.programs.live(), 0);
    });
}

/// The host's one thread waits for the fork, and for nothing else.
#[test]
fn a_start_does_not_hold_up_the_host() {
    run(|house| async move {
        let mut longest = Duration::ZERO;
        for _ in 0..20 {
            let plan = sim(&[]);
            let mut start = Box::pin(house.programs.start(&plan, OUTPUT, Instant::now() + LONG));
            let begin = Instant::now();
            let first = futures_now(start.as_mut());
            longest = longest.max(begin.elapsed());
            assert!(!first, "the exec is waited for, not sat out");
            start.await.unwrap().exited().await.unwrap();
        }
        println!("longest start, the host's share: {longest:?}");
        assert!(longest < Duration::from_millis(500));
    });
}

/// Polls once; whether it is ready.
fn futures_now<F: Future>(future: std::pin::Pin<&mut F>) -> bool {
    future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_ready()
}
