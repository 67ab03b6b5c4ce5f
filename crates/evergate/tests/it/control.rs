//! Asking and ordering: status when nobody else can answer, commands when the master cannot, and the control socket's own
//! limits. Numbers are lines of the specification of supervision.

use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use evergate_testkit::driver::state_of;
use evergate_testkit::raw::{get, get_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_until};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::{Value, json};

use crate::balance::Frozen;
use crate::support::{LIMIT, ONE_WORKER, assert_alive, before, chat, echo, echo_with, open_stream, wait_ready};

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Line 29: the board alone is enough, by the command and over HTTP.
#[test]
fn s29_status_answers_when_every_worker_is_frozen() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 2\nmax = 2\nhang_timeout = \"60s\"\n");
    wait_ready(&gateway, 2);
    let streams = [open_stream(&gateway, "hold-mid"), open_stream(&gateway, "hold-mid")];
    let frozen: Vec<Frozen> = gateway.workers().into_iter().map(Frozen::new).collect();
    wait_until("both stand still", LIMIT, || gateway.workers().iter().all(|pid| state_of(*pid) == Some('T')));
    let admin = gateway.admin();
    let (mut by_http, mut by_command) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let begun = Instant::now();
        let page = get(&admin, "/status").json();
        by_http.push(begun.elapsed());
        let begun = Instant::now();
        let output = gateway.cli(&["status", "--json"]);
        by_command.push(begun.elapsed());
        let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
        for status in [page, printed] {
            let children = status["children"].as_array().unwrap();
            let workers: Vec<&Value> = children.iter().filter(|child| child["kind"] == "worker").collect();
            assert_eq!(workers.len(), 2);
            let open: u64 = workers.iter().map(|worker| worker["inflight"]["stream"].as_u64().unwrap()).sum();
            assert_eq!(open, 2, "{status}");
            for key in ["pid", "generation", "phase", "age_ms", "requests", "errors", "rss_kib", "beat_age_ms"] {
                assert!(
                    workers.iter().all(|worker| worker[key].is_u64() || worker[key].is_string()),
                    "{key}: {status}"
                );
            }
        }
    }
    let oldest_beat = || {
        let status = get(&admin, "/status").json();
        let of = |child: &Value| child["beat_age_ms"].as_u64().filter(|_| child["kind"] == "worker");
        status["children"].as_array().unwrap().iter().filter_map(of).min().unwrap()
    };
    wait_until("their beats are old", LIMIT, || oldest_beat() >= 1_000);
    let (by_http, by_command) = (median(by_http), median(by_command));
    println!("median of 20 with both workers frozen: over HTTP {by_http:?}, the whole command {by_command:?}");
    // 10 ms on a machine that has time; a command is also a process that starts.
    assert!(by_http < Duration::from_millis(50) && by_command < Duration::from_millis(300));
    drop((frozen, streams));
}

/// Line 29: what has gone wrong lately stands beside what is.
#[test]
fn s29_status_tells_errors_and_the_last_ends() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    wait_ready(&gateway, 1);
    let status = || -> Value { serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap() };
    assert_eq!(status()["exits"], json!([]));
    for (model, code) in [("status-500", 502), ("ok", 200), ("status-400", 400)] {
        assert_eq!(chat(&gateway, model, false).status, code);
    }
    let errors = || {
        let status = status();
        let children = status["children"].as_array().unwrap();
        children.iter().find(|child| child["kind"] == "worker").map(|child| child["errors"].clone())
    };
    wait_until("one error, not the client's own", LIMIT, || errors() == Some(json!(1)));
    let dead = gateway.kill_worker(0);
    wait_until("its end is told", LIMIT, || status()["exits"][0]["pid"] == dead);
    let (status, text) = (status(), String::from_utf8(gateway.cli(&["status"]).stdout).unwrap());
    let last = &status["exits"][0];
    assert_eq!((&last["kind"], &last["slot"], &last["signal"]), (&json!("worker"), &json!(0), &json!(9)), "{last}");
    assert_eq!(last["initiator"], "unknown");
    assert!(text.contains(&format!(" ago worker 0 (pid {dead}) ended: signal 9 (SIGKILL), unknown\n")), "{text}");
}

/// A master that stands still: every command ends soon and says what is wrong, and the workers serve on.
#[test]
fn s31_commands_end_when_the_master_is_frozen() {
    let gateway = echo();
    wait_ready(&gateway, 2);
    let frozen = Frozen::new(gateway.pid());
    wait_until("it stands still", LIMIT, || state_of(gateway.pid()) == Some('T'));
    // With as many before it as the queue holds, not even the connect comes through.
    let waiting = fill_queue(&gateway);
    assert!(waiting.len() > 10, "{}", waiting.len());
    std::thread::scope(|scope| {
        for args in [&["status"][..], &["scale", "1"], &["reload"], &["stop"], &["reload", "--json"]] {
            let gateway = &gateway;
            scope.spawn(move || {
                let begun = Instant::now();
                let output = gateway.cli(args);
                // The words are where they are looked for: for a program on standard output.
                let said = if args.contains(&"--json") { output.stdout } else { output.stderr };
                let (took, said) = (begun.elapsed(), String::from_utf8(said).unwrap());
                assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
                assert!(took < Duration::from_secs(15), "{args:?}: {took:?}");
                let pid = format!("(pid {}, stopped", gateway.pid());
                assert!(said.contains(&pid) && said.contains("has not answered"), "{args:?}: {said}");
            });
        }
    });
    assert!(gateway.cli(&["exits"]).status.success(), "needs no master");
    assert_eq!(get(&gateway.admin(), "/status").status, 200);
    assert_alive(&gateway);
    drop((waiting, frozen));
    wait_until("it answers again", LIMIT, || gateway.cli(&["status"]).status.success());
    assert_alive(&gateway);
}

/// Connects to the control socket until it takes no more.
fn fill_queue(gateway: &Evergate) -> Vec<impl Sized + use<>> {
    let address = SocketAddrUnix::new(gateway.state_dir().join("control.sock")).unwrap();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let next = || {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        connect(&socket, &address).is_ok().then_some(socket)
    };
    std::iter::from_fn(next).take(10_000).collect()
}

/// A master that has no descriptor left for those who wait at its control socket: they wait, and it does its work.
#[test]
fn s31_a_master_without_descriptors_waits_and_does_not_spin() {
    let gateway = echo();
    wait_ready(&gateway, 2);
    let master = gateway.pid();
    let open = std::fs::read_dir(format!("/proc/{master}/fd")).unwrap().count() as u64;
    // Room for a client and for nobody after it. The numbers of descriptors may have gaps, so this is the least room.
    let limit = Rlimit { current: Some(open + 1), maximum: Some(4096) };
    prlimit(Pid::from_raw(master), Resource::Nofile, limit).unwrap();
    let waiting = fill_queue(&gateway);
    assert!(waiting.len() > 10, "{}", waiting.len());
    let (before, begun) = (cpu_ticks(master), Instant::now());
    wait_until("a second", LIMIT, || begun.elapsed() > Duration::from_secs(1));
    let ticks = cpu_ticks(master) - before;
    println!("{ticks} hundredths of a second of processor in {:?}, {} waiting", begun.elapsed(), waiting.len());
    assert!(ticks < 30, "it spins: {ticks} ticks in {:?}", begun.elapsed());
    assert_alive(&gateway);
    drop(waiting);
    prlimit(Pid::from_raw(master), Resource::Nofile, Rlimit { current: Some(4096), ..limit }).unwrap();
    wait_until("it answers", LIMIT, || gateway.cli(&["status"]).status.success());
}

/// Processor time that a process has used, in hundredths of a second.
fn cpu_ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// Line 31: for its owner alone, one short line at a time, many at once, and a word for whatever is not understood.
#[test]
fn s31_the_control_socket_takes_one_short_line_from_its_owner() {
    let gateway = echo();
    let path = gateway.state_dir().join("control.sock");
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let folder = std::fs::metadata(gateway.state_dir()).unwrap();
    assert_eq!(folder.permissions().mode() & 0o777, 0o700);
    let tell = |line: &[u8]| {
        let mut socket = UnixStream::connect(&path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        let _ = socket.write_all(line);
        let mut answer = String::new();
        let _ = socket.read_to_string(&mut answer);
        answer
    };
    for (line, answer) in [
        (&b"dance\n"[..], "error: no such command\n"),
        (b"\xff\xfe\n", "error: no such command\n"),
        (b"scale x\n", "error: no such command\n"),
        (b"scale 18446744073709551616\n", "error: no such command\n"),
        (b"\n", "error: no such command\n"),
        (b"ping\nping\n", "ok\n"),
        (&[b'x'; 600], "error: the request is too long\n"),
    ] {
        assert_eq!(tell(line), answer, "{line:?}");
    }
    // In two pieces; and without its end, which nobody waits for longer than a second.
    let mut socket = UnixStream::connect(&path).unwrap();
    socket.write_all(b"pi").unwrap();
    assert_eq!(tell(b"ping\n"), "ok\n", "another is answered meanwhile");
    socket.write_all(b"ng\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "ok\n");
    let begun = Instant::now();
    let mut silent = UnixStream::connect(&path).unwrap();
    silent.write_all(b"pin").unwrap();
    silent.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(silent.read(&mut [0; 8]).unwrap(), 0, "it is let go");
    assert!(begun.elapsed() >= Duration::from_millis(900), "{:?}", begun.elapsed());
    // It answers still after a reload.
    assert!(gateway.cli(&["reload"]).status.success());
    assert_eq!(tell(b"ping\n"), "ok\n");
}

/// Signals that come together are all obeyed.
#[test]
fn s17_a_burst_of_signals_is_obeyed_whole() {
    let mut gateway = echo_with("[workers]\nmin = 1\nmax = 4\n");
    wait_ready(&gateway, 1);
    for _ in 0..200 {
        // Those that mean nothing here are no end either.
        let without_meaning = [Signal::USR2, Signal::WINCH];
        let all = [Signal::TTIN, Signal::HUP, Signal::TTOU, Signal::USR1, Signal::CHILD, Signal::TTIN];
        for signal in all.into_iter().chain(without_meaning) {
            gateway.signal(signal);
        }
    }
    wait_until("it is calm again", 3 * LIMIT, || {
        let output = gateway.cli(&["status", "--json"]);
        let status: Value = serde_json::from_slice(&output.stdout).unwrap();
        let master = &status["master"];
        let (wanted, generation) = (master["workers_target"].as_u64().unwrap(), master["generation"].as_u64().unwrap());
        let children = status["children"].as_array().unwrap();
        let is_settled = |child: &Value| child["phase"] == "ready" && child["generation"] == generation;
        (1..=4).contains(&wanted)
            && generation > 1
            && children.len() as u64 == wanted + 1
            && children.iter().all(is_settled)
    });
    assert_alive(&gateway);
    // A clerk that still boots when it is told (by USR1) to open its files anew does not die of it.
    assert!(gateway.exits().iter().all(|record| record["signal"] != 10), "{:?}", gateway.exits());
    let mut kept = Raw::connect(&gateway.addr());
    kept.send(&get_request("/healthz", ""));
    assert_eq!(kept.read_response(LIMIT).status, 200);
    // All at once, and the one that ends it is not lost among them.
    for signal in [Signal::TTIN, Signal::HUP, Signal::USR1, Signal::TTOU, Signal::TERM, Signal::HUP, Signal::TTIN] {
        gateway.signal(signal);
    }
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0), "{}", gateway.stderr());
    gateway.wait_no_children(Duration::ZERO);
}
