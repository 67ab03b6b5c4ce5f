//! Programs of this machine as models: started once when they are asked for, replaced when they die, left alone by a reload,
//! and gone without a trace at the end.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use evergate_testkit::driver::is_alive;
use evergate_testkit::raw::Response;
use evergate_testkit::{Evergate, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{CHAT, EXE, LIMIT, is_full, send, wait_ready};

/// What every configuration here begins with.
pub const HEAD: &str =
    "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n[workers]\nmin = 2\nmax = 2\n";
/// A program that shouts.
pub const TR: &str = r#"process = { mode = "command", argv = ["tr", "a-z", "A-Z"], in_flight_max = 32, queue = 600 }"#;

/// A program that says its process's number and waits until a file is there.
pub fn waiter(go: &str) -> String {
    let script = format!("cat >/dev/null; echo $$ >&2; while [ ! -e {go} ]; do sleep 0.02; done; echo done");
    format!("process = {{ mode = \"command\", argv = [\"sh\", \"-c\", \"{script}\"], in_flight_max = 8 }}")
}

/// A configuration with these upstreams.
pub fn config(upstreams: &[(&str, &str)]) -> String {
    let sections = upstreams.iter().map(|(name, section)| format!("[upstreams.{name}]\n{section}\n"));
    format!("{HEAD}{}", sections.collect::<String>())
}

/// A gateway with these upstreams.
pub fn gateway(upstreams: &[(&str, &str)]) -> Evergate {
    let gateway = Evergate::builder(EXE).config(config(upstreams)).start();
    wait_ready(&gateway, 2);
    gateway
}

/// Asks, and waits for the answer.
pub fn ask(gateway: &Evergate, model: &str, text: &str, stream: bool) -> Response {
    let more = json!({ "messages": [{ "role": "user", "content": text }] });
    evergate_testkit::post_chat(&gateway.addr(), model, stream, &more)
}

/// What the model has said.
pub fn said(response: &Response) -> String {
    assert_eq!(response.status, 200, "{}", response.text());
    response.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// Status and code of an answer that is an error.
pub fn code(response: &Response) -> (u16, String) {
    (response.status, response.json()["error"]["code"].as_str().unwrap_or_default().to_owned())
}

pub fn hosts(gateway: &Evergate) -> Vec<i32> {
    gateway.children().into_iter().filter(|child| child.kind == "host").map(|child| child.pid).collect()
}

/// Processes that carry a mark of this run's hosts.
pub fn marked(gateway: &Evergate) -> BTreeSet<i32> {
    marked_of(&run_id(gateway))
}

/// The run's number, which its programs' marks begin with.
pub fn run_id(gateway: &Evergate) -> String {
    let run = std::fs::read_to_string(gateway.state_dir().join("run.json")).unwrap();
    run.split("\"run_id\":\"").nth(1).unwrap()[..16].to_owned()
}

pub fn marked_of(run: &str) -> BTreeSet<i32> {
    let mark = format!("EVERGATE_HOST={run}.");
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_marked = |pid: &i32| {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|byte| *byte == 0).any(|pair| pair.starts_with(mark.as_bytes()))
    };
    pids.filter(is_marked).collect()
}

pub fn programs_ends(gateway: &Evergate) -> Vec<Value> {
    let folder = gateway.state_dir().join("models");
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let files = files.filter(|path: &PathBuf| path.to_string_lossy().ends_with(".exits.jsonl"));
    let lines: String = files.map(|path| std::fs::read_to_string(path).unwrap()).collect();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Asks on another thread.
pub fn asking(gateway: &Evergate, model: &'static str, text: &'static str) -> std::thread::JoinHandle<Response> {
    let address = gateway.addr();
    std::thread::spawn(move || {
        let more = json!({ "messages": [{ "role": "user", "content": text }] });
        evergate_testkit::post_chat(&address, model, false, &more)
    })
}

#[test]
fn a_command_answers_whole_and_streamed_and_nobody_starts_it_before() {
    let gateway = gateway(&[("shout", TR)]);
    assert_eq!(hosts(&gateway), Vec::<i32>::new());
    assert_eq!(said(&ask(&gateway, "shout/x", "hello", false)), "HELLO");
    let response = ask(&gateway, "shout/x", "hello world", true);
    assert!(response.text().contains("HELLO") && response.text().contains("[DONE]"), "{}", response.text());
    assert_eq!(hosts(&gateway).len(), 1);
}

#[test]
fn l8_many_requests_to_a_cold_model_start_its_host_once() {
    let gateway = gateway(&[("shout", TR)]);
    let count = if is_full() { 500 } else { 120 };
    let askers: Vec<_> = (0..count).map(|_| asking(&gateway, "shout/x", "hello")).collect();
    for asker in askers {
        assert_eq!(said(&asker.join().unwrap()), "HELLO");
    }
    assert_eq!(hosts(&gateway).len(), 1);
    assert!(gateway.exits().iter().all(|record| record["kind"] != "host"));
}

#[test]
fn g20_a_host_that_cannot_start_tells_all_why_within_their_time() {
    let fault = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(fault.path(), "the graphics card is away").unwrap();
    let config = format!("{}[timeouts]\ntotal = \"5s\"\n", config(&[("shout", TR)]));
    let builder = Evergate::builder(EXE).config(config).env("EVERGATE_FAULT_HOST", fault.path().to_str().unwrap());
    let gateway = builder.start();
    wait_ready(&gateway, 2);
    let began = Instant::now();
    let askers: Vec<_> = (0..20).map(|_| asking(&gateway, "shout/x", "hello")).collect();
    for asker in askers {
        assert_eq!(code(&asker.join().unwrap()), (502, "adapter_spawn_failed".into()));
    }
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    let why = |record: &Value| record["kind"] == "host" && record["note"] == "the graphics card is away";
    let records = gateway.exits();
    let failed = records.iter().filter(|record| why(record)).count();
    assert!((1..=5).contains(&failed), "tried {failed} times: {records:?}");
    assert_eq!(records.iter().find(|record| why(record)).unwrap()["upstream"], "shout");
    // What was wrong is not wrong any more: the next try serves.
    std::fs::write(fault.path(), "").unwrap();
    wait_until("an answer", LIMIT, || ask(&gateway, "shout/x", "hello", false).status == 200);
}

#[test]
fn a_killed_host_takes_its_programs_with_it_and_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    let gateway = gateway(&[("wait", &waiter(go.to_str().unwrap()))]);
    let asker = asking(&gateway, "wait/x", "hello");
    wait_until("its program", LIMIT, || !marked(&gateway).is_empty());
    let (host, programs) = (hosts(&gateway)[0], marked(&gateway));
    send(host, Signal::KILL);
    let (status, code) = code(&asker.join().unwrap());
    assert_eq!((status, &*code), (502, "upstream_disconnected"));
    wait_until("the end of its programs", LIMIT, || marked(&gateway).is_disjoint(&programs));
    std::fs::write(&go, "").unwrap();
    assert_eq!(said(&ask(&gateway, "wait/x", "hello", false)), "done");
    let exits = gateway.exits();
    let record = exits.iter().find(|record| record["kind"] == "host").unwrap();
    assert_eq!((&record["pid"], &record["signal"]), (&json!(host), &json!(9)));
}

/// G24: nobody knows yet that the host is gone: the request lies in its socket, and the next one takes it.
#[test]
fn g24_a_request_that_is_sent_to_a_dead_host_is_the_next_ones() {
    let gateway = gateway(&[("shout", TR)]);
    for round in 0..3 {
        assert_eq!(said(&ask(&gateway, "shout/x", "hello", false)), "HELLO");
        let host = hosts(&gateway)[0];
        // Without its master nobody says on the board that it is gone.
        send(gateway.pid(), Signal::STOP);
        send(host, Signal::KILL);
        let tasks = || std::fs::read_dir(format!("/proc/{host}/task")).map_or(0, Iterator::count);
        wait_until("its end, of all its threads", LIMIT, || !is_alive(host) && tasks() <= 1);
        let asker = asking(&gateway, "shout/x", "again");
        let inflight = "evergate_inflight_requests{kind=\"unary\"} 1\n";
        wait_until("the request at work", LIMIT, || gateway.metrics().contains(inflight));
        send(gateway.pid(), Signal::CONT);
        assert_eq!(said(&asker.join().unwrap()), "AGAIN", "round {round}");
        let exits = gateway.wait_exits(round + 1, LIMIT, |record| record["kind"] == "host");
        assert_eq!((&exits[round]["pid"], &exits[round]["signal"]), (&json!(host), &json!(9)));
    }
}

#[test]
fn g5_a_killed_program_is_a_truthful_error_and_on_record_with_its_last_words() {
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    let gateway = gateway(&[("wait", &waiter(go.to_str().unwrap()))]);
    let asker = asking(&gateway, "wait/x", "hello");
    let log = gateway.state_dir().join("models/wait.log");
    let pid = wait_for("its process's number", LIMIT, || {
        let text = std::fs::read_to_string(&log).ok()?;
        text.lines().next()?.rsplit(' ').next()?.parse::<i32>().ok()
    });
    send(pid, Signal::KILL);
    assert_eq!(code(&asker.join().unwrap()), (502, "adapter_exited".into()));
    let record = wait_for("its record", LIMIT, || programs_ends(&gateway).into_iter().next());
    assert_eq!((&record["kind"], &record["signal"], &record["pid"]), (&json!("program"), &json!(9), &json!(pid)));
    assert_eq!((&record["upstream"], &record["note"]), (&json!("wait"), &json!(pid.to_string())));
    std::fs::write(&go, "").unwrap();
    assert_eq!(said(&ask(&gateway, "wait/x", "hello", false)), "done");
    assert_eq!(hosts(&gateway).len(), 1);
}

#[test]
fn a_killed_worker_does_not_disturb_a_host_and_its_program_ends() {
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    let gateway = gateway(&[("wait", &waiter(go.to_str().unwrap()))]);
    let address = gateway.addr();
    let body = evergate_testkit::raw::chat_body("wait/x", false, &Value::Null);
    let mut raw = evergate_testkit::Raw::connect(&address);
    raw.send(&evergate_testkit::raw::post_request(CHAT, "", &body));
    wait_until("its program", LIMIT, || !marked(&gateway).is_empty());
    let host = hosts(&gateway);
    for worker in gateway.workers() {
        send(worker, Signal::KILL);
    }
    wait_until("the end of its program", LIMIT, || marked(&gateway).is_empty());
    std::fs::write(&go, "").unwrap();
    wait_ready(&gateway, 2);
    assert_eq!(said(&ask(&gateway, "wait/x", "hello", false)), "done");
    assert_eq!(hosts(&gateway), host);
}

#[test]
fn a_reload_leaves_an_unchanged_host_alone_and_replaces_a_changed_one() {
    let gateway = gateway(&[("shout", TR), ("other", TR)]);
    for model in ["shout/x", "other/x"] {
        assert_eq!(said(&ask(&gateway, model, "hello", false)), "HELLO");
    }
    let of = |gateway: &Evergate| hosts(gateway).into_iter().collect::<BTreeSet<_>>();
    let before = of(&gateway);
    let changed = TR.replace("a-z", "h");
    let next = config(&[("shout", TR), ("other", &changed.replace("A-Z", "H"))]);
    std::fs::write(gateway.config_file(), next).unwrap();
    let reloaded = gateway.cli(&["reload"]);
    assert!(reloaded.status.success(), "{reloaded:?}");
    assert_eq!(said(&ask(&gateway, "shout/x", "hello", false)), "HELLO");
    assert_eq!(said(&ask(&gateway, "other/x", "hello", false)), "Hello");
    wait_until("the end of the old one", 2 * LIMIT, || of(&gateway).len() == 2);
    assert_eq!(of(&gateway).intersection(&before).count(), 1);
}

#[test]
fn a_stop_leaves_nothing_behind_and_ends_hosts_after_workers() {
    let folder = tempfile::tempdir().unwrap();
    // A grandchild in a session of its own holds the program's output.
    let script = "cat >/dev/null; setsid sleep 600 & echo started";
    let section =
        format!("process = {{ mode = \"command\", argv = [\"sh\", \"-c\", \"{script}\"], timeout = \"30s\" }}");
    let go = folder.path().join("go");
    let gateway = gateway(&[("stray", &section), ("wait", &waiter(go.to_str().unwrap()))]);
    let _ = ask(&gateway, "stray/x", "hello", false);
    let asker = asking(&gateway, "wait/x", "hello");
    wait_until("a program", LIMIT, || !marked(&gateway).is_empty());
    let run = run_id(&gateway);
    let sockets = gateway.state_dir().join("hosts");
    assert_eq!(std::fs::read_dir(&sockets).unwrap().count(), 2);
    send(gateway.pid(), Signal::TERM);
    std::fs::write(&go, "").unwrap();
    assert_eq!(said(&asker.join().unwrap()), "done", "a drain lets it finish");
    let mut gateway = gateway;
    gateway.wait_exit(2 * LIMIT);
    assert_eq!(marked_of(&run), BTreeSet::new());
    assert_eq!(std::fs::read_dir(&sockets).unwrap().count(), 0);
    let exits = gateway.exits();
    let last = |kind: &str| exits.iter().rposition(|record| record["kind"] == kind).unwrap();
    let first = |kind: &str| exits.iter().position(|record| record["kind"] == kind).unwrap();
    assert!(last("worker") < first("host") && last("host") < first("clerk"), "{exits:?}");
}

#[test]
fn operators_see_load_unload_and_read_models() {
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    std::fs::write(&go, "").unwrap();
    let gateway = gateway(&[("shout", TR), ("wait", &waiter(go.to_str().unwrap()))]);
    let cli = |args: &[&str]| {
        let out = gateway.cli(args);
        (out.status.code().unwrap(), String::from_utf8(out.stdout).unwrap())
    };
    let states = || -> Vec<(String, String)> {
        let models: Value = serde_json::from_str(&cli(&["models", "--json"]).1).unwrap();
        let text = |model: &Value, key: &str| model[key].as_str().unwrap().to_owned();
        models.as_array().unwrap().iter().map(|model| (text(model, "model"), text(model, "state"))).collect()
    };
    let expected = |shout: &str| vec![("shout".to_owned(), shout.to_owned()), ("wait".to_owned(), "cold".to_owned())];
    assert_eq!(states(), expected("cold"));
    assert_eq!(cli(&["models", "load", "shout"]), (0, "shout loaded\n".into()));
    assert_eq!((states(), hosts(&gateway).len()), (expected("ready"), 1));
    assert!(cli(&["models"]).1.contains("ready"));
    assert_eq!(cli(&["models", "unload", "shout"]).0, 0);
    assert_eq!((states(), hosts(&gateway).len()), (expected("cold"), 0));
    assert_eq!(cli(&["models", "load", "nobody"]).0, 1);
    assert_eq!(said(&ask(&gateway, "wait/x", "hello", false)), "done");
    wait_until("its output", LIMIT, || cli(&["logs", "wait"]).1.contains(" err: "));
    assert_eq!((cli(&["logs", "never"]).0, cli(&["logs", "../x"]).0), (1, 64));
}
