//! The command line: exit codes, data on stdout, talk on stderr.

use std::process::{Command, Output};

use evergate_testkit::link::Link;
use evergate_testkit::{Evergate, FakeUpstream, gateway_config, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{EXE, LIMIT, assert_alive, echo, open_stream, send};

pub fn run(folder: &std::path::Path, args: &[&str]) -> Output {
    let mut command = Command::new(EXE);
    command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", folder).current_dir(folder).args(args);
    command.output().unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_wrong_command_line_exits_64() {
    let folder = tempfile::tempdir().unwrap();
    for args in [
        &["dance"][..],
        &[],
        &["serve", "--wrong"],
        &["serve", "--config"],
        &["status", "extra"],
        &["serve", "--workers", "many"],
    ] {
        let output = run(folder.path(), args);
        assert_eq!(output.status.code(), Some(64), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
    for arg in ["--help", "--version"] {
        let output = run(folder.path(), &[arg]);
        assert!(output.status.success() && stdout(&output).contains("evergate"), "{arg}");
    }
    // What the processes call each other by is not the user's business.
    let help = stdout(&run(folder.path(), &["--help"]));
    for command in ["serve", "check", "status", "exits", "stop"] {
        assert!(help.contains(command), "{help}");
    }
    assert!(!help.contains("compile") && !help.contains("clerk"), "{help}");
}

const BAD: &str = "[server]\nlisten = [\"127.0.0.1:0\"]\ntime_out = 1\n[limits]\nbody = \"20 parsecs\"\n\
                   [models.m]\ntargets = [{ upstream = \"nobody\" }]\n[cache]\nsize = 1\n";

/// K1.
#[test]
fn all_mistakes_are_told_at_once_and_the_exit_code_is_78() {
    let ended = Evergate::builder(EXE).config(BAD).try_start().err().unwrap();
    assert_eq!(ended.code(), 78, "{}", ended.stderr);
    for said in ["evergate.toml:3:1:", "time_out", "evergate.toml:5:", "nobody", "not in this version"] {
        assert!(ended.stderr.contains(said), "{said:?} is not in:\n{}", ended.stderr);
    }

    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("evergate.toml"), BAD).unwrap();
    for args in [&["check"][..], &["check", "--config", "evergate.toml"]] {
        let output = run(folder.path(), args);
        assert_eq!(output.status.code(), Some(78));
        assert!(stderr(&output).matches("evergate.toml:").count() >= 4, "{}", stderr(&output));
        assert!(output.stdout.is_empty(), "{}", stdout(&output));
    }
    let output = run(folder.path(), &["check", "--json"]);
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &value["ok"]), (Some(78), &json!(false)));
    let mistakes = value["mistakes"].as_array().unwrap();
    assert!(mistakes.len() >= 4, "{value}");
    assert_eq!((&mistakes[0]["line"], &mistakes[0]["column"]), (&json!(3), &json!(1)), "{value}");
}

#[test]
fn check_prints_a_configuration_that_checks_again() {
    let folder = tempfile::tempdir().unwrap();
    let text = "[server]\nlisten = [\"127.0.0.1:4999\"]\n[models.echo]\ntargets = [{ upstream = \"echo\" }]\n";
    std::fs::write(folder.path().join("one.toml"), text).unwrap();
    let first = run(folder.path(), &["check", "--config", "one.toml"]);
    assert!(first.status.success(), "{}", stderr(&first));
    assert!(
        stdout(&first).contains("total = \"300s\"") || stdout(&first).contains("total = \"5m\""),
        "{}",
        stdout(&first)
    );
    std::fs::write(folder.path().join("two.toml"), &first.stdout).unwrap();
    let second = run(folder.path(), &["check", "--config", "two.toml"]);
    assert_eq!(stdout(&first), stdout(&second));
    let value: Value =
        serde_json::from_slice(&run(folder.path(), &["check", "--config", "one.toml", "--json"]).stdout).unwrap();
    assert_eq!(value["ok"], true);
    // Without any file the defaults are checked; a file that was named has to be there.
    assert!(run(folder.path(), &["check"]).status.success());
    let output = run(folder.path(), &["check", "--config", "none.toml"]);
    assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
    assert!(stderr(&output).contains("none.toml"), "{}", stderr(&output));
}

#[test]
fn status_shows_the_processes() {
    let gateway = echo();
    let output = gateway.cli(&["status", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["master"]["pid"], json!(gateway.pid()));
    let mut found: Vec<(String, i64)> = value["children"]
        .as_array()
        .unwrap()
        .iter()
        .map(|child| (child["kind"].as_str().unwrap().to_owned(), child["pid"].as_i64().unwrap()))
        .collect();
    let mut expected: Vec<(String, i64)> =
        gateway.children().iter().map(|child| (child.kind.clone(), i64::from(child.pid))).collect();
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected);
    let table = gateway.cli(&["status"]);
    assert!(table.status.success());
    for worker in gateway.workers() {
        assert!(stdout(&table).contains(&worker.to_string()), "{}", stdout(&table));
    }
    assert!(stdout(&table).contains(&gateway.addr()), "where it listens: {}", stdout(&table));
}

#[test]
fn exits_shows_the_records() {
    let gateway = echo();
    let pid = gateway.kill_worker(0);
    let _ = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid);
    let output = gateway.cli(&["exits", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    let record = value.as_array().unwrap().iter().find(|record| record["pid"] == pid).unwrap();
    assert_eq!((&record["signal"], &record["kind"]), (&json!(9), &json!("worker")));
    let table = stdout(&gateway.cli(&["exits"]));
    assert!(table.contains(&pid.to_string()) && table.contains("SIGKILL"), "{table}");
}

#[test]
fn stop_stops_and_says_so() {
    for args in [&["stop"][..], &["stop", "--now"], &["stop", "--json"]] {
        let mut gateway = echo();
        let address = gateway.addr();
        let output = gateway.cli(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        if args.contains(&"--json") {
            let _: Value = serde_json::from_slice(&output.stdout).unwrap();
        } else {
            assert!(stdout(&output).contains("stopped"), "{}", stdout(&output));
        }
        // It has ended when the command has.
        assert!(Link::connect(&address).is_err());
        assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0));
        for command in ["status", "stop"] {
            let output = gateway.cli(&[command]);
            assert_eq!(output.status.code(), Some(1), "{command}");
            assert!(!output.stderr.is_empty() && output.stdout.is_empty(), "{command}");
        }
    }
}

/// Certificates are judged before anything is started with them.
#[test]
fn certificates_that_cannot_be_used_are_a_mistake() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    for place in [&one, &two] {
        std::fs::create_dir(place).unwrap();
    }
    let (cert, _) = evergate_testkit::Identity::generate().write_to(&one);
    let (_, key) = evergate_testkit::Identity::generate().write_to(&two);
    let empty = folder.path().join("empty.pem");
    std::fs::write(&empty, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let tls = format!("[server]\nlisten = [\"127.0.0.1:0\"]\ntls = {{ cert = {cert:?}, key = {key:?} }}\n");
    let roots = format!("[upstreams.x]\nbase_url = \"https://localhost/v1\"\nroots = {{ file = {empty:?} }}\n");
    for (config, said) in [(tls, "cannot be used together"), (roots, "[upstreams.x]")] {
        let file = folder.path().join("evergate.toml");
        std::fs::write(&file, config).unwrap();
        let output = run(folder.path(), &["check"]);
        assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
        assert!(stderr(&output).contains(said), "{}", stderr(&output));
    }
}

/// `--json` is kept when a command fails: what is read by a program is on standard output.
#[test]
fn errors_are_json_too_where_that_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let json = |output: &Output, args: &[&str]| -> Value {
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let value: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}"));
        assert!(value["error"].as_str().is_some_and(|why| !why.is_empty()), "{args:?}: {value}");
        value
    };
    let gateway = echo();
    for (args, key) in [
        (&["reload"][..], "reloaded"),
        (&["stop"], "stopped"),
        (&["scale", "2"], "scaled"),
        (&["status"], ""),
        (&["models"], ""),
        (&["models", "load", "nope"], ""),
    ] {
        let args = [args, &["--json", "--state-dir", "none"]].concat();
        let value = json(&run(folder.path(), &args), &args);
        assert!(value["error"].as_str().unwrap().contains("no gateway runs"), "{value}");
        assert!(key.is_empty() || value[key] == false, "{value}");
    }
    let value = json(&gateway.cli(&["models", "load", "nope", "--json"]), &["models"]);
    assert_eq!((&value["model"], &value["order"]), (&json!("nope"), &json!("load")));
    gateway.signal(Signal::STOP);
    let words = [&["reload", "--json"][..], &["status", "--json"], &["stop", "--json"]];
    let said = words.map(|args| json(&gateway.cli(args), args)["error"].as_str().unwrap().to_owned());
    gateway.signal(Signal::CONT);
    assert!(said.iter().all(|why| why.contains("has not answered for 5 s")), "{said:?}");
}

/// Another end than the one that was ordered is not called a stop.
#[test]
fn stop_tells_of_a_master_that_was_killed_meanwhile_and_of_another_code_than_0() {
    let fake = FakeUpstream::start();
    for (signal, words) in
        [(Signal::KILL, "was killed before its stop was over"), (Signal::CONT, "has ended with code 75")]
    {
        let text = "[shutdown]\ndrain = \"500ms\"\ncancel = \"300ms\"\ncleanup = \"300ms\"\n";
        let text = gateway_config(
            fake.base_url(),
            &[],
            &if signal == Signal::KILL { text.replace("500ms", "30s") } else { text.to_owned() },
        );
        let mut gateway =
            Evergate::builder(EXE).config(text).env("EVERGATE_FAULT", "1").env("EVERGATE_FAULT_STOP", "hang").start();
        let held = open_stream(&gateway, "hold-mid");
        let output = std::thread::scope(|scope| {
            let stop = scope.spawn(|| gateway.cli(&["stop", "--json"]));
            let status =
                || serde_json::from_slice::<Value>(&gateway.cli(&["status", "--json"]).stdout).unwrap_or_default();
            if signal == Signal::KILL {
                wait_until("the drain", LIMIT, || status()["master"]["phase"] == "draining");
                send(gateway.pid(), signal);
            }
            stop.join().unwrap()
        });
        let value: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((output.status.code(), &value["stopped"]), (Some(1), &json!(signal != Signal::KILL)), "{value}");
        assert!(value["error"].as_str().unwrap().contains(words), "{value}");
        assert_eq!(value["pid"], gateway.pid());
        drop(held);
        let code = gateway.wait_exit(LIMIT).code();
        assert_eq!(
            (code, value["code"].as_i64()),
            if signal == Signal::KILL { (None, None) } else { (Some(75), Some(75)) }
        );
        fake.release();
    }
}

#[test]
fn what_is_not_there_is_told_as_what_it_is() {
    let process = "process = { mode = \"command\", argv = [\"tr\", \"a\", \"b\"] }";
    let gateway = crate::hosts::gateway(&[("shout", process)]);
    for (name, words) in [
        ("shout", "the program of \"shout\" has not written anything yet"),
        ("nope", "no upstream of the name \"nope\" has a program"),
    ] {
        let output = gateway.cli(&["logs", name]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(stderr(&run(folder.path(), &["logs", "shout", "--state-dir", "none"])).contains("no program of \"shout\""));

    // None was asked for, and that is what is shown.
    let gateway = echo();
    assert_alive(&gateway);
    wait_until("a record", LIMIT, || !gateway.access().is_empty());
    let output = gateway.cli(&["access", "-n", "0"]);
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{}", stderr(&output));
}

/// Who has an address, or what stands at a socket's path.
#[test]
fn i7_an_address_that_is_taken_is_told_with_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let taken = echo();
    std::fs::write(folder.path().join("file.sock"), "data").unwrap();
    std::fs::create_dir(folder.path().join("folder.sock")).unwrap();
    std::os::unix::fs::symlink("nowhere", folder.path().join("link.sock")).unwrap();
    let master = format!("(pid {})", taken.pid());
    for (address, words) in [
        (taken.addr(), vec!["is taken by another program: ", &master]),
        ("unix:file.sock".to_owned(), vec!["a file is there"]),
        ("unix:folder.sock".to_owned(), vec!["a folder is there"]),
        ("unix:link.sock".to_owned(), vec!["a symbolic link to nothing is there"]),
    ] {
        let output = run(folder.path(), &["serve", "--listen", &address, "--state-dir", "state"]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(71), "{said}");
        assert!(said.contains(&address) && words.iter().all(|word| said.contains(word)), "{said}");
    }
    assert_eq!(std::fs::read_to_string(folder.path().join("file.sock")).unwrap(), "data");
}

/// It would answer until no slot is left.
#[test]
fn an_upstream_that_is_the_gateway_itself_is_warned_about() {
    let folder = tempfile::tempdir().unwrap();
    let text = "[server]\nlisten = [\"127.0.0.1:4999\"]\n[upstreams.me]\nbase_url = \"http://localhost:4999/v1\"\n";
    std::fs::write(folder.path().join("evergate.toml"), text).unwrap();
    let output = run(folder.path(), &["check"]);
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("warning: evergate.toml:4:12: \"me\" is this gateway itself"), "{said}");
}
