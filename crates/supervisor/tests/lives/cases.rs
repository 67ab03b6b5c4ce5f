//! What a user of the master can rely on.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use evergate_board::MasterPhase;
use evergate_supervisor::{Run, client};
use evergate_sys::{Pid, Signal};
use rustix::process::kill_process;

use crate::causes;
use crate::drive::{Gateway, Setup, all_gone, ask, closed, hold, until};
use crate::life::{EXITS, LOST};

type Case = (&'static str, fn(&Path));

const CASES: &[Case] = &[
    ("serves_and_stops_by_command", serves_and_stops_by_command),
    ("killed_worker_is_replaced_and_its_requests_are_named", killed_worker_is_replaced_and_its_requests_are_named),
    ("what_was_answered_is_not_lost", what_was_answered_is_not_lost),
    ("exit_causes_are_exact", exit_causes_are_exact),
    ("s09_every_code_and_signal_is_recorded_exactly", causes::s09_every_code_and_signal_is_recorded_exactly),
    ("s09_a_core_is_a_fact", causes::s09_a_core_is_a_fact),
    ("s11_strangers_of_any_code_have_no_effect", causes::s11_strangers_of_any_code_have_no_effect),
    ("failed_start_says_why", failed_start_says_why),
    ("bad_configuration_ends_the_start", bad_configuration_ends_the_start),
    ("i6_second_start_names_the_first", i6_second_start_names_the_first),
    ("i1_master_killed_leaves_nothing_and_the_next_starts", i1_master_killed_leaves_nothing_and_the_next_starts),
    ("h6_hung_worker_is_replaced", h6_hung_worker_is_replaced),
    ("h4_crash_loop_leaves_the_others_serving", h4_crash_loop_leaves_the_others_serving),
    ("term_lets_requests_finish", term_lets_requests_finish),
    ("h13_second_term_hastens", h13_second_term_hastens),
    ("i11_stubborn_worker_needs_force", i11_stubborn_worker_needs_force),
    ("workers_are_added_and_taken_by_signal", workers_are_added_and_taken_by_signal),
    ("strangers_are_reaped_without_effect", strangers_are_reaped_without_effect),
    ("i3_many_deaths_at_once_lose_none", i3_many_deaths_at_once_lose_none),
    ("deaths_leave_the_master_as_it_was", deaths_leave_the_master_as_it_was),
];

pub fn run(filter: Option<&str>) {
    let chosen: Vec<_> = CASES.iter().filter(|(name, _)| filter.is_none_or(|text| name.contains(text))).collect();
    println!("running {} tests", chosen.len());
    let mut failed = 0;
    for (name, case) in &chosen {
        let folder = tempfile::tempdir().unwrap();
        let outcome = std::panic::catch_unwind(|| case(folder.path()));
        println!("test {name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        failed += usize::from(outcome.is_err());
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {word}. {} passed; {failed} failed; 0 ignored", chosen.len() - failed);
    if failed > 0 {
        std::process::exit(101);
    }
}

fn refused(address: std::net::SocketAddr) {
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

fn kill(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn serves_and_stops_by_command(folder: &Path) {
    let mut gateway = Gateway::launch(folder, &Setup::default());
    let banner = gateway.line("serving at");
    let run = gateway.run();
    let address = gateway.address();
    assert_eq!(banner, format!("serving at http://{address} with http://{}", run.admin));
    assert_eq!((run.pid, run.phase.as_str(), run.children.len()), (gateway.pid().as_raw_nonzero().get(), "serving", 3));
    gateway.wait_workers(2);
    assert_eq!(ask(address, "ping").0.split(' ').count(), 2);
    assert_eq!(client::request(&gateway.state(), "ping").unwrap().text, "ok");
    assert!(matches!(client::request(&gateway.state(), "dance"), Err(client::ClientError::Refused(_))));
    let board = gateway.board();
    assert_eq!(board.master().phase(), MasterPhase::Serving);
    // Process lists tell who is who.
    for child in &run.children {
        let line = std::fs::read_to_string(format!("/proc/{}/cmdline", child.pid)).unwrap();
        assert!(line.starts_with(&format!("evergate: {}", child.kind)), "{line}");
    }
    gateway.signal(Signal::HUP);
    gateway.line("generation 2 of the configuration is in force");

    let begun = Instant::now();
    assert_eq!(client::request(&gateway.state(), "stop").unwrap().text, "ok");
    assert!(client::wait_gone(run.pid, run.start_ticks, Duration::from_secs(20)).unwrap());
    assert_eq!(gateway.wait(), 0);
    assert!(begun.elapsed() < Duration::from_secs(2), "an idle stop is quick: {:?}", begun.elapsed());
    refused(address);
    all_gone(&run);
    assert!(matches!(client::request(&gateway.state(), "ping"), Err(client::ClientError::NotRunning)));
    assert_eq!(Run::read(&gateway.state()).unwrap(), None);
    assert_eq!(gateway.exits("\"initiator\":\"operator\"").len(), 3);
}

fn killed_worker_is_replaced_and_its_requests_are_named(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup::default());
    let address = gateway.address();
    gateway.wait_workers(2);
    let all: Vec<_> = (0..8).map(|n| hold(address, &format!("client-{n}."))).collect();
    let (pid, row, _) = all[0];
    let victims: Vec<usize> = (0..8).filter(|n| all[*n].0 == pid).collect();
    kill(pid, Signal::KILL);
    // The worker's clients see their connections end, and nobody else's.
    victims.iter().for_each(|n| closed(&all[*n].2));
    until("a replacement in the same row", || {
        gateway.ready_workers().into_iter().find(|(number, other)| *number == row && *other != pid)
    });
    let records = gateway.exits(&format!("\"pid\":{pid},"));
    assert_eq!(records.len(), 1);
    let record = &records[0];
    assert!(record.contains("\"code\":null,\"signal\":9,\"core\":false,\"initiator\":\"unknown\""), "{record}");
    assert!(record.contains("\"phase\":\"ready\"") && record.contains("\"route\":\"/hold\""), "{record}");
    for n in 0..8 {
        assert_eq!(record.contains(&format!("client-{n}.")), victims.contains(&n), "{n}: {record}");
    }
    let board = gateway.board();
    assert_eq!(board.series(row).unwrap().get(LOST), u64::try_from(victims.len()).unwrap());
    assert_eq!(board.master_series().unwrap().get(EXITS), 1);
    assert_eq!(board.inflight(row).count(), 0);
    // The clerk gets an access record for each.
    let lines = until("access records", || {
        let text = std::fs::read_to_string(folder.join("access.log")).ok()?;
        (text.lines().count() >= victims.len()).then_some(text)
    });
    let is_lost = |line: &&str| line.contains("\"cause\":\"worker_lost\"") && line.contains("\"status\":0,");
    assert_eq!(lines.lines().filter(is_lost).count(), victims.len(), "{lines}");
    no_zombies(&gateway);
}

fn what_was_answered_is_not_lost(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup { workers: (1, 1), ..Setup::default() });
    let address = gateway.address();
    let (pid, row, held) = hold(address, "unanswered.");
    let open = [ask(address, "answered done."), ask(address, "idle"), ask(address, "idle")];
    kill(pid, Signal::KILL);
    closed(&held);
    open.iter().for_each(|(_, socket)| closed(socket));
    let record = until("its record", || gateway.exits(&format!("\"pid\":{pid},")).pop());
    let (lost, ending) = record.split_once("\"ending\":").unwrap();
    assert!(lost.contains("unanswered.") && !lost.contains("done."), "{record}");
    assert!(ending.contains("done.") && !ending.contains("unanswered."), "{record}");
    // Two without a request, and the one whose request was over.
    assert!(record.contains("\"connections_idle\":3,"), "{record}");
    let lines = until("access records", || {
        let text = std::fs::read_to_string(folder.join("access.log")).ok()?;
        (text.lines().count() >= 2).then_some(text)
    });
    let line = |id: &str| lines.lines().find(|line| line.contains(id)).unwrap();
    assert!(line("unanswered.").contains("\"cause\":\"worker_lost\""), "{lines}");
    let answered = line("done.");
    assert!(answered.contains("\"cause\":\"ok\"") && answered.contains("\"status\":204"), "{answered}");
    assert!(answered.contains("its last bytes were the client's, or on their way, when the worker died"), "{answered}");
    assert_eq!(gateway.board().series(row).unwrap().get(LOST), 1);
}

/// Children of the master that have ended and were not reaped.
pub fn no_zombies(gateway: &Gateway) {
    let master = gateway.pid().as_raw_nonzero().to_string();
    until("no zombies", || {
        let is_zombie = |stat: &str| {
            let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
            fields.next() == Some("Z") && fields.next() == Some(&master)
        };
        let stats = std::fs::read_dir("/proc").unwrap().flatten();
        let any = stats.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
        (!any.into_iter().any(|stat| is_zombie(&stat))).then_some(())
    });
}

fn exit_causes_are_exact(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup { workers: (1, 1), ..Setup::default() });
    let address = gateway.address();
    let (mut expected, mut last) = (0, 0);
    for (request, facts) in [
        ("exit 5", "\"code\":5,\"signal\":null,\"core\":false,\"initiator\":\"crash\""),
        ("exit 0", "\"code\":0,\"signal\":null,\"core\":false,\"initiator\":\"unknown\""),
        ("abort", "\"code\":null,\"signal\":6,"),
    ] {
        let pid = fresh(&gateway, last);
        last = pid;
        ask(address, request);
        expected += 1;
        until("its record", || (gateway.exits("worker").len() == expected).then_some(()));
        let record = &gateway.exits(&format!("\"pid\":{pid},"))[0];
        assert!(record.contains(facts), "{record}");
    }
    assert!(gateway.exits("\"signal\":6,")[0].contains("\"initiator\":\"crash\""));
    // Signals from outside, and connects kept in the queue while there is no worker. (A SEGV that somebody sends is
    // swallowed once by Rust's own handler, which looks for stack overflows.)
    for signal in [Signal::TERM, Signal::ILL, Signal::ALARM] {
        let pid = fresh(&gateway, last);
        last = pid;
        kill(pid, signal);
        expected += 1;
        assert_eq!(ask(address, "ping").0.split(' ').count(), 2);
        until("its record", || (gateway.exits("worker").len() == expected).then_some(()));
    }
}

/// The only worker, once it is another than the last: a record is written a moment before the row is emptied.
fn fresh(gateway: &Gateway, last: i32) -> i32 {
    until("the next worker", || gateway.ready_workers().first().map(|(_, pid)| *pid).filter(|pid| *pid != last))
}

fn failed_start_says_why(folder: &Path) {
    for (config, code) in [
        ("worker_exit_at_boot=78", 78),
        ("worker_exit_at_boot=71", 71),
        ("worker_exit_at_boot=9", 70),
        ("clerk_exit_at_boot=71 worker_never_ready=1", 71),
    ] {
        let mut gateway = Gateway::launch(folder, &Setup::with(config));
        assert_eq!(gateway.wait(), code, "{config}");
        let words = gateway.last_words();
        assert!(words.contains("no luck today") && words.contains("the start has failed"), "{words}");
        assert!(!words.contains("serving at"), "{words}");
        assert_eq!(Run::read(&gateway.state()).unwrap(), None);
    }
    let setup = Setup { boot_ms: 300, ..Setup::with("worker_never_ready=1") };
    let mut gateway = Gateway::launch(folder, &setup);
    assert_eq!(gateway.wait(), 70);
    assert!(gateway.last_words().contains("was not ready in time"));
    assert!(!gateway.exits("\"signal\":9,\"core\":false,\"initiator\":\"boot\"").is_empty());
}

fn bad_configuration_ends_the_start(folder: &Path) {
    let mut gateway = Gateway::launch(folder, &Setup::with("compile_exit=78"));
    assert_eq!(gateway.wait(), 78);
    assert_eq!(gateway.last_words(), "the configuration is bad");
    // A stop while the configuration is being read is obeyed; the lock of a new folder shows that it has come so far.
    let folder = folder.join("new");
    std::fs::create_dir(&folder).unwrap();
    let mut gateway = Gateway::launch(&folder, &Setup::with("compile_hang=1"));
    until("its lock", || gateway.state().join("lock").exists().then_some(()));
    gateway.signal(Signal::TERM);
    assert_eq!(gateway.wait(), 0);
}

fn i6_second_start_names_the_first(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup::default());
    let mut second = Gateway::launch(folder, &Setup::default());
    assert_eq!(second.wait(), 71);
    let words = second.last_words();
    assert!(words.contains(&format!("(pid {})", gateway.pid().as_raw_nonzero())), "{words}");
    // The same port from another state folder.
    let other = tempfile::tempdir().unwrap();
    let address = gateway.address().to_string();
    let mut third = Gateway::launch(other.path(), &Setup { listen: address.clone(), ..Setup::default() });
    assert_eq!(third.wait(), 71);
    let words = third.last_words();
    assert!(words.contains(&format!("{address} is taken")), "{words}");
    // `second` must not take the first one's children with it.
    std::mem::forget(second);
    assert_eq!(ask(gateway.address(), "ping").0.split(' ').count(), 2);
}

fn i1_master_killed_leaves_nothing_and_the_next_starts(folder: &Path) {
    let mut gateway = Gateway::start(folder, &Setup::default());
    gateway.wait_workers(2);
    let (run, address) = (gateway.run(), gateway.address());
    let (_, _, busy) = hold(address, "busy");
    gateway.signal(Signal::KILL);
    assert_eq!(gateway.wait(), -9);
    // The one with a request is draining; the port is free for the next all the same.
    let mut next = Gateway::launch(folder, &Setup { listen: address.to_string(), ..Setup::default() });
    next.line("was not ended cleanly");
    next.line("serving at");
    assert_eq!(next.address(), address);
    drop(busy);
    all_gone(&run);
    let record = next.exits("\"kind\":\"master\"");
    assert_eq!(record.len(), 1);
    assert!(record[0].contains(&format!("\"pid\":{},", run.pid)), "{}", record[0]);
    assert!(record[0].contains("\"code\":null,\"signal\":null"), "{}", record[0]);
    next.signal(Signal::TERM);
    assert_eq!(next.wait(), 0);
}

fn h6_hung_worker_is_replaced(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup { workers: (1, 1), hang_ms: 1000, ..Setup::default() });
    let (row, pid) = gateway.wait_workers(1)[0];
    assert_eq!(ask(gateway.address(), "spin").0, "spinning");
    until("a replacement", || gateway.ready_workers().into_iter().find(|worker| worker.0 == row && worker.1 != pid));
    let record = &gateway.exits(&format!("\"pid\":{pid},"))[0];
    assert!(record.contains("\"signal\":6,") && record.contains("\"initiator\":\"hang\""), "{record}");
    // A frozen one does not obey ABRT.
    let pid = fresh(&gateway, pid);
    kill(pid, Signal::STOP);
    until("a replacement", || gateway.ready_workers().into_iter().find(|worker| worker.0 == row && worker.1 != pid));
    let record = &gateway.exits(&format!("\"pid\":{pid},"))[0];
    assert!(record.contains("\"signal\":9,") && record.contains("\"initiator\":\"hang\""), "{record}");
}

fn h4_crash_loop_leaves_the_others_serving(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup::with("worker_loop_slot=1"));
    let board = gateway.board();
    until("the slot is shown as degraded", || (board.master().degraded() == 1).then_some(()));
    assert!(gateway.exits("\"slot\":1,").len() >= 5);
    assert_eq!(ask(gateway.address(), "ping").0.split(' ').count(), 2);
}

fn term_lets_requests_finish(folder: &Path) {
    let mut gateway = Gateway::start(folder, &Setup::default());
    let (run, address) = (gateway.run(), gateway.address());
    let (_, _, busy) = hold(address, "busy");
    gateway.signal(Signal::TERM);
    until("connects are refused", || TcpStream::connect(address).is_err().then_some(()));
    assert_eq!(gateway.process.try_wait().unwrap(), None, "it waits for the request");
    drop(busy);
    assert_eq!(gateway.wait(), 0);
    all_gone(&run);
}

fn h13_second_term_hastens(folder: &Path) {
    let mut gateway = Gateway::start(folder, &Setup { drain_ms: 600_000, ..Setup::default() });
    let (_, _, busy) = hold(gateway.address(), "busy");
    let board = gateway.board();
    gateway.signal(Signal::TERM);
    until("draining", || (board.master().phase() == MasterPhase::Draining).then_some(()));
    gateway.signal(Signal::TERM);
    assert_eq!(gateway.wait(), 0);
    closed(&busy);
}

fn i11_stubborn_worker_needs_force(folder: &Path) {
    let mut gateway = Gateway::start(folder, &Setup { drain_ms: 0, ..Setup::with("worker_stubborn=1") });
    gateway.wait_workers(2);
    let run = gateway.run();
    gateway.signal(Signal::INT);
    assert_eq!(gateway.wait(), 75);
    assert!(gateway.last_words().contains("did not end in time and is killed"));
    all_gone(&run);
    assert_eq!(gateway.exits("\"signal\":9,\"core\":false,\"initiator\":\"operator\"").len(), 2);
}

fn workers_are_added_and_taken_by_signal(folder: &Path) {
    let mut gateway = Gateway::start(folder, &Setup::default());
    gateway.wait_workers(2);
    gateway.signal(Signal::TTIN);
    gateway.wait_workers(3);
    gateway.signal(Signal::TTIN);
    gateway.line("the most that is configured");
    gateway.signal(Signal::TTOU);
    gateway.wait_workers(2);
    until("its record", || (gateway.exits("\"initiator\":\"scale_down\"").len() == 1).then_some(()));
    gateway.signal(Signal::TTOU);
    gateway.line("the fewest that is configured");
    assert_eq!(gateway.run().children.len(), 3);
}

fn strangers_are_reaped_without_effect(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup::default());
    let board = gateway.board();
    let before = gateway.wait_workers(2);
    assert_eq!(ask(gateway.address(), "stranger").0, "left");
    until("a stranger was reaped", || (board.master().strangers() == 1).then_some(()));
    assert_eq!(gateway.wait_workers(2), before);
    assert!(gateway.exits("").is_empty());
    no_zombies(&gateway);
}

fn i3_many_deaths_at_once_lose_none(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup { workers: (12, 12), ..Setup::default() });
    let workers = gateway.wait_workers(12);
    for (_, pid) in &workers {
        kill(*pid, Signal::KILL);
    }
    until("twelve records", || (gateway.exits("\"signal\":9,").len() == 12).then_some(()));
    let after = gateway.wait_workers(12);
    assert!(workers.iter().all(|(_, pid)| after.iter().all(|(_, other)| other != pid)));
    no_zombies(&gateway);
    assert_eq!(gateway.run().children.len(), 13);
}

fn deaths_leave_the_master_as_it_was(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup { workers: (12, 12), ..Setup::default() });
    let master = gateway.pid().as_raw_nonzero();
    let descriptors = || std::fs::read_dir(format!("/proc/{master}/fd")).unwrap().count();
    let mut workers = gateway.wait_workers(12);
    let before = descriptors();
    let mut total = 0;
    // Three rounds: a fourth death of the same slots would only wait longer.
    for _ in 0..3 {
        for (_, pid) in &workers {
            kill(*pid, Signal::KILL);
        }
        total += 12;
        until("all records", || (gateway.exits("\"signal\":9,").len() == total).then_some(()));
        workers = gateway.wait_workers(12);
        assert_eq!(ask(gateway.address(), "ping").0.split(' ').count(), 2);
    }
    until("as many descriptors as before", || (descriptors() == before).then_some(()));
    no_zombies(&gateway);
    // One of each: no child has what another child or the master has.
    let (_, pid) = workers[0];
    let mut links: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| std::fs::read_link(entry.unwrap().path()).unwrap().to_string_lossy().into_owned())
        .collect();
    links.sort();
    assert!(!links.iter().any(|link| link.contains("/state/")), "the lock and the records are the master's: {links:?}");
    assert_eq!(links.iter().filter(|link| link.starts_with("socket:")).count(), 1, "the listener alone: {links:?}");
}
