//! Pipes, damaged files and other things under the names of files: nobody waits for them, and whoever reads is told what is
//! there (I7, J5, K1).

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use evergate_testkit::driver::is_alive;
use evergate_testkit::{Evergate, FakeUpstream, gateway_config, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::cli::{run, stderr, stdout};
use crate::hosts::{ask, config, said};
use crate::support::{EXE, LIMIT, assert_alive, echo, open_stream};

fn pipe_at(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// The state folder's own files: the start is refused, and `stop` does not wait either.
#[test]
fn i7_a_pipe_in_the_place_of_a_state_file_is_refused_with_its_path() {
    for name in ["exits.jsonl", "lock", "run.json"] {
        let state = tempfile::tempdir().unwrap();
        let (path, folder) = (state.path().join(name), state.path().to_str().unwrap());
        pipe_at(&path);
        let began = Instant::now();
        let output = run(state.path(), &["serve", "--listen", "127.0.0.1:0", "--state-dir", folder]);
        let words = stderr(&output);
        assert_eq!(output.status.code(), Some(71), "{name}: {words}");
        assert!(words.contains(path.to_str().unwrap()) && words.contains("it is a pipe"), "{words}");
        for command in ["stop", "status", "exits"] {
            let output = run(state.path(), &[command, "--state-dir", folder]);
            assert_eq!(output.status.code(), Some(i32::from(command != "exits")), "{command}");
        }
        assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    }
}

/// A configuration, and a secret in it, for which nobody writes: the check ends and names the file.
#[test]
fn k1_a_pipe_that_nobody_writes_is_named_and_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    pipe_at(&folder.path().join("pipe"));
    let text = "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { file = \"pipe\" }\n";
    std::fs::write(folder.path().join("secret.toml"), text).unwrap();
    let checks = ["pipe", "secret.toml"].map(|config| {
        let mut command = Command::new(EXE);
        command.args(["check", "--config", config]).current_dir(folder.path()).env_remove("EVERGATE_API_KEY");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    });
    let serve = run(folder.path(), &["serve", "--config", "secret.toml", "--state-dir", "state"]);
    let outputs = checks.into_iter().map(|check| check.wait_with_output().unwrap()).chain([serve]);
    for output in outputs {
        let words = stderr(&output);
        assert_eq!(output.status.code(), Some(78), "{words}");
        assert!(words.contains("pipe") && words.contains("nobody has written it to its end within 10 s"), "{words}");
    }
}

/// A shell's `<(...)`, also a slow one.
#[test]
fn a_configuration_to_be_checked_may_come_out_of_a_pipe() {
    let folder = tempfile::tempdir().unwrap();
    let text = "[server]\\nlisten = [\\\"127.0.0.1:0\\\"]\\n[admin]\\nlisten = \\\"\\\"\\n[models.m]\\ntargets = [{ upstream = \\\"echo\\\" }]\\n";
    let script = format!(
        "check() {{ \"$0\" check --json --config \"$1\"; }}; check <(printf \"{text}\") && check <(sleep 0.5; printf \"{text}\")"
    );
    let output = Command::new("bash").args(["-c", &script, EXE]).current_dir(folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let lines = stdout(&output);
    let oks =
        lines.lines().filter(|line| serde_json::from_str::<Value>(line).unwrap()["config"]["models"]["m"].is_object());
    assert_eq!(oks.count(), 2, "{lines}");
}

/// What is known of a run whose file is damaged, or older than the run: its processes are followed all the same.
#[test]
fn i1_processes_that_the_run_file_does_not_name_are_found_and_recorded() {
    let short = "[shutdown]\ndrain = \"2s\"\ncancel = \"500ms\"\ncleanup = \"500ms\"\n";
    for damage in ["{}", "a full disk"] {
        let (fake, state) = (FakeUpstream::start(), tempfile::tempdir().unwrap());
        let text = gateway_config(fake.base_url(), &[], short);
        let mut first = Evergate::builder(EXE).config(text.clone()).state_dir(state.path()).start();
        let _ = first.wait_workers(2);
        let _held = open_stream(&first, "hold-mid");
        let (master, children, run) = (first.pid(), first.children(), first.run());
        first.signal(Signal::KILL);
        let _ = first.wait_exit(LIMIT);
        let stale = format!(
            "{}],\"children\":[\n]}}\n",
            std::fs::read_to_string(state.path().join("run.json")).unwrap().split("],").next().unwrap()
        );
        let is_stale = damage == "a full disk";
        std::fs::write(state.path().join("run.json"), if is_stale { &stale } else { damage }).unwrap();
        let second = Evergate::builder(EXE).config(text).state_dir(state.path()).start();
        let words = second.stderr();
        let left = children.iter().filter(|child| child.kind != "clerk").count();
        assert_eq!((left, run["pid"].as_i64()), (2, Some(i64::from(master))));
        assert!(words.contains("was not ended cleanly") && !words.contains("0 of its processes"), "{words}");
        assert_eq!(words.contains("run.json: it is damaged"), !is_stale, "{words}");
        let of_master = second.wait_exits(1, LIMIT, |record| record["kind"] == "master").remove(0);
        assert_eq!(of_master["pid"], json!(if is_stale { master } else { 0 }), "{of_master}");
        // The one that held a stream, at least, was there.
        let records = second.wait_exits(1, LIMIT, |record| record["initiator"] == "orphan");
        for record in &records {
            let child = children.iter().find(|child| record["pid"] == child.pid).unwrap();
            assert_eq!((&record["kind"], &record["slot"]), (&json!(child.kind), &json!(child.slot)), "{record}");
        }
        first.wait_no_children(LIMIT);
        assert!(children.iter().all(|child| !is_alive(child.pid)));
    }
}

/// B3, B4: a host is recorded by its upstream's name, and whatever a predecessor left is in the counts.
#[test]
fn i1_a_hosts_end_after_its_master_is_recorded_by_its_name_and_counted() {
    let state = tempfile::tempdir().unwrap();
    let tr = r#"process = { mode = "command", argv = ["tr", "a-z", "A-Z"] }"#;
    let start = || Evergate::builder(EXE).config(config(&[("shout", tr)])).state_dir(state.path()).start();
    let mut first = start();
    assert_eq!(said(&ask(&first, "shout/x", "hello", false)), "HELLO");
    wait_until("the host in the run file", LIMIT, || first.children().iter().any(|child| child.kind == "host"));
    let host = first.children().into_iter().find(|child| child.kind == "host").unwrap();
    first.signal(Signal::KILL);
    let _ = first.wait_exit(LIMIT);
    let second = start();
    let record = second.wait_exits(1, LIMIT, |record| record["pid"] == host.pid).remove(0);
    assert_eq!((&record["kind"], &record["upstream"]), (&json!("host"), &json!("shout")), "{record}");
    let table = second.printed(&["exits"]);
    assert!(table.contains(" host shout "), "{table}");
    let counted = |kind: &str| {
        let line = format!("evergate_exits_total{{kind=\"{kind}\",initiator=\"");
        second.metrics().lines().any(|found| found.starts_with(&line) && !found.ends_with(" 0"))
    };
    wait_until("what the predecessor left in the counts", LIMIT, || counted("master") && counted("host"));
}

/// The log of a gateway that runs: records are counted as dropped while nobody reads, and written when somebody does.
#[test]
fn j5_a_log_that_is_a_pipe_costs_records_and_neither_requests_nor_the_stop() {
    let mut gateway = echo();
    let path = gateway.state_dir().join("access.jsonl");
    assert_alive(&gateway);
    wait_until("the first record", LIMIT, || gateway.access().len() == 1);
    std::fs::rename(&path, gateway.state_dir().join("kept")).unwrap();
    pipe_at(&path);
    gateway.signal(Signal::USR1);
    let dropped = || {
        let text = gateway.metrics();
        let line =
            text.lines().find(|line| line.starts_with("evergate_access_records_dropped_total ")).unwrap().to_owned();
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    wait_until("a record that is dropped", LIMIT, || {
        assert_alive(&gateway);
        dropped() > 0
    });
    let _ = gateway.wait_stderr("it is a pipe and nobody reads it", LIMIT);
    // A reader, such as a log shipper.
    let reader = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    assert_alive(&gateway);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(&reader), &mut line).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["cause"], "ok", "{line}");
    drop(reader);
    gateway.signal(Signal::TERM);
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0), "{}", gateway.stderr());
}
