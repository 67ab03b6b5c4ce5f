//! Thousands of requests to a command, a good third of which are killed, cancelled or misbehave: each has its truthful
//! answer and one exact record, and nothing is left of any. In a process of its own, so that everything in it is counted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
// They serve other test programs too, each with a part of them.
#![allow(dead_code)]

#[path = "../life/support.rs"]
mod support;
#[path = "../command/wire.rs"]
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use evergate_core::config::process::Output;
use evergate_host::program::{Ended, Ladder};
use evergate_sys::{Pid, Signal, Status};
use tokio::io::AsyncReadExt;

use support::{Ear, House, is_full, open_files, run, sim, until};
use wire::{Host, chat, serve, setup};

/// Clients at once; fewer than there are places, so that nobody is refused.
const CLIENTS: usize = 16;

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Unary,
    Stream,
    Long,
    ExitCode,
    OwnSignal,
    KilledFromOutside,
    ClientLeaves,
    TooSlow,
    LeavesDaemon,
    Empty,
}

const MIX: [Kind; 16] = [
    Kind::Unary,
    Kind::ExitCode,
    Kind::Stream,
    Kind::Unary,
    Kind::OwnSignal,
    Kind::Long,
    Kind::KilledFromOutside,
    Kind::Stream,
    Kind::ClientLeaves,
    Kind::Unary,
    Kind::TooSlow,
    Kind::Unary,
    Kind::LeavesDaemon,
    Kind::Stream,
    Kind::Empty,
    Kind::Unary,
];

fn code(at: usize) -> u8 {
    u8::try_from(at % 255 + 1).unwrap()
}

/// The steps of the program.
fn steps(kind: Kind, at: usize) -> String {
    match kind {
        Kind::Unary | Kind::Stream => format!("out:answer {at}"),
        Kind::Long => "flood:300000".into(),
        Kind::ExitCode => format!("err:oops\nexit:{}", code(at)),
        Kind::OwnSignal => "signal:9".into(),
        Kind::KilledFromOutside => "pid\nhang".into(),
        Kind::ClientLeaves => "out:a\nhang".into(),
        Kind::TooSlow => "hang".into(),
        Kind::LeavesDaemon => format!("fork:daemon:hang\nout:answer {at}"),
        Kind::Empty => "err:nothing".into(),
    }
}

/// Asks, and checks what comes.
async fn ask(host: &Host, kind: Kind, at: usize) {
    let mut body = chat(&steps(kind, at));
    body["stream"] = matches!(kind, Kind::Stream | Kind::ClientLeaves).into();
    let timeout = if kind == Kind::TooSlow { "x-request-timeout: 150ms\r\n" } else { "" };
    let headers = format!("x-request-id: {at}\r\n{timeout}");
    let mut stream = host.send("/v1/chat/completions", &headers, body.to_string().as_bytes()).await;
    if kind == Kind::ClientLeaves {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains("\"content\":\"a\"") {
            assert!(stream.read_buf(&mut seen).await.unwrap() > 0, "{}", String::from_utf8_lossy(&seen));
        }
        return;
    }
    let response = wire::read(stream).await;
    assert_eq!(response.header("x-request-id"), Some(at.to_string().as_str()));
    match kind {
        Kind::Unary | Kind::LeavesDaemon => assert_eq!(response.content(), format!("answer {at}")),
        Kind::Stream => assert_eq!(response.streamed(), (format!("answer {at}"), "[DONE]".into())),
        Kind::Long => assert_eq!(response.content().len(), 300_000 - 1),
        Kind::ExitCode => {
            let message = response.assert_error(502, "adapter_exited", "1");
            assert!(message.ends_with(&format!("exit code {}", code(at))), "{message}");
        }
        Kind::OwnSignal | Kind::KilledFromOutside => {
            let message = response.assert_error(502, "adapter_exited", "1");
            assert!(message.ends_with("ended by signal 9"), "{message}");
        }
        Kind::Empty => drop(response.assert_error(502, "adapter_protocol_error", "1")),
        // A busy machine may take all of its time for the start.
        Kind::TooSlow => assert!(matches!(response.status, 503 | 504), "{response:?}"),
        Kind::ClientLeaves => unreachable!("it has left"),
    }
}

/// Whether a record says what happened.
fn is_exact(kind: Kind, at: usize, ended: &Ended) -> bool {
    let killed = |number| Status::Signal { number, core: false };
    // On a busy machine a TERM may take longer than the grace.
    let by_us = [(killed(15), Ladder::Term), (killed(15), Ladder::Kill), (killed(9), Ladder::Kill)];
    let own = |status| ended.exit.status == status && ended.ladder == Ladder::Untouched;
    match kind {
        Kind::Unary | Kind::Stream | Kind::Long | Kind::Empty => own(Status::Code(0)),
        Kind::LeavesDaemon => own(Status::Code(0)) && ended.strays > 0,
        Kind::ExitCode => own(Status::Code(code(at))) && ended.tail == b"oops",
        Kind::OwnSignal | Kind::KilledFromOutside => own(killed(9)),
        Kind::ClientLeaves | Kind::TooSlow => by_us.contains(&(ended.exit.status, ended.ladder)),
    }
}

/// Kills whoever says that it is there to be killed.
async fn kill(ear: Arc<Ear>) {
    let mut looks = tokio::time::interval(Duration::from_millis(5));
    loop {
        looks.tick().await;
        let lines = std::mem::take(&mut *ear.lines.lock().unwrap());
        for pid in lines.iter().filter_map(|line| line.strip_prefix("pid ")?.parse().ok()) {
            let _ = rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

fn children() -> String {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let text = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
    tasks.map(|task| text(task.unwrap())).collect::<String>()
}

/// Programs of this process's hosts, anywhere on the machine.
fn marked() -> usize {
    let mark = format!("EVERGATE_PROGRAM={}.", std::process::id());
    let all =
        std::fs::read_dir("/proc").unwrap().filter_map(|entry| std::fs::read(entry.ok()?.path().join("environ")).ok());
    all.filter(|environ| environ.split(|byte| *byte == 0).any(|variable| variable.starts_with(mark.as_bytes()))).count()
}

#[test]
fn requests_that_go_wrong_by_the_thousand_are_accounted_for_and_leave_nothing() {
    run(|house| async move {
        let count = if is_full() { 10_000 } else { 300 };
        let mut setup = setup(sim(&["obey"]));
        (setup.config.output, setup.places) = (Output::Text, 2 * CLIENTS as u32 * 16);
        let host = Arc::new(serve(&house, setup));
        // What the runtime and the first program open for good.
        ask(&host, Kind::Unary, 0).await;
        settled(&house).await;
        house.ear.ended.lock().unwrap().clear();
        let (before, begin) = (open_files(), Instant::now());

        let mut tasks = tokio::task::JoinSet::new();
        let killer = tasks.spawn(kill(Arc::clone(&house.ear)));
        for client in 0..CLIENTS {
            let host = Arc::clone(&host);
            tasks.spawn(async move {
                for at in (client..count).step_by(CLIENTS) {
                    // Every client meets every kind.
                    ask(&host, MIX[(at + at / CLIENTS) % MIX.len()], at).await;
                }
            });
        }
        for _ in 0..CLIENTS {
            tasks.join_next().await.unwrap().unwrap();
        }
        killer.abort();
        settled(&house).await;
        println!("{count} requests in {:?}, descriptors {before} then {}", begin.elapsed(), open_files());

        let mut records = BTreeMap::new();
        for ended in house.ear.ended.lock().unwrap().drain(..) {
            let at: usize = ended.request.as_deref().unwrap().parse().unwrap();
            assert!(records.insert(at, ended).is_none(), "request {at} has two records");
        }
        for at in 0..count {
            let kind = MIX[(at + at / CLIENTS) % MIX.len()];
            match records.remove(&at) {
                Some(ended) => assert!(is_exact(kind, at, &ended), "{kind:?} {at}: {ended:?}"),
                None => assert_eq!(kind, Kind::TooSlow, "request {at} has no record"),
            }
        }
        assert!(records.is_empty());
        assert_eq!(children(), "", "no zombie and no descendant");
        assert_eq!(marked(), 0);
        assert_eq!(open_files(), before, "flat descriptors");
    });
}

async fn settled(house: &House) {
    until("nothing is left", || house.programs.live() == 0 && children().is_empty()).await;
    until("no place is taken", || *house.ear.load.lock().unwrap() == (0, 0)).await;
}
