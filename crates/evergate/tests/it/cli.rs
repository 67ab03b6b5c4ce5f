//! The command line: exit codes, data on stdout, talk on stderr.

use std::process::{Command, Output};

use evergate_testkit::Evergate;
use evergate_testkit::link::Link;
use serde_json::{Value, json};

use crate::support::{EXE, LIMIT, echo};

fn run(folder: &std::path::Path, args: &[&str]) -> Output {
    let mut command = Command::new(EXE);
    command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", folder).current_dir(folder).args(args);
    command.output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
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
