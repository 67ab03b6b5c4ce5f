//! What operators and clients see of models that are programs: states, who waits, what was counted, how they ended.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command};

use evergate_testkit::{Evergate, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::hosts::{TR, ask, asking, config, gateway, said, waiter};
use crate::support::{EXE, LIMIT, send, wait_ready};

/// The state that clients see of a model.
fn listed(gateway: &Evergate, name: &str) -> Value {
    let list = gateway.get("/v1/models").json();
    let entry = list["data"].as_array().unwrap().iter().find(|entry| entry["id"] == name).unwrap().clone();
    assert_eq!(gateway.get(&format!("/v1/models/{name}")).json()["state"], entry["state"]);
    entry["state"].clone()
}

fn has(gateway: &Evergate, line: &str) -> bool {
    gateway.metrics().lines().any(|found| found == line)
}

fn metric(gateway: &Evergate, line: &str) {
    let text = gateway.metrics();
    let about: Vec<&str> = text.lines().filter(|line| line.contains("_host_") || line.contains("_program_")).collect();
    assert!(text.lines().any(|found| found == line), "no line {line} among {about:#?}");
}

#[test]
fn a_cold_start_shows_its_state_and_who_waits_everywhere() {
    // The host reads this in its boot, and waits there for somebody who writes.
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("boot");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let models = "[models.shout]\ntargets = [{ upstream = \"shout\", model = \"x\" }]\n\
                  [models.echo]\ntargets = [{ upstream = \"echo\" }]\n";
    let text = format!("{}{models}", config(&[("shout", TR)]));
    let gateway = Evergate::builder(EXE).config(text).env("EVERGATE_FAULT_HOST", fifo.to_str().unwrap()).start();
    wait_ready(&gateway, 2);
    assert_eq!((listed(&gateway, "shout"), listed(&gateway, "echo")), (json!("cold"), Value::Null));
    metric(&gateway, r#"evergate_host_state{upstream="shout",state="cold"} 1"#);

    let askers: Vec<_> = (0..3).map(|_| asking(&gateway, "shout", "hello")).collect();
    wait_until("three that wait", LIMIT, || gateway.model("shout")["waiting"] == 3);
    assert_eq!(listed(&gateway, "shout"), "starting");
    metric(&gateway, r#"evergate_host_state{upstream="shout",state="starting"} 1"#);
    metric(&gateway, r#"evergate_host_waiting{upstream="shout"} 3"#);
    let status: Value = serde_json::from_str(&gateway.printed(&["status", "--json"])).unwrap();
    assert_eq!((&status["models"][0]["model"], &status["models"][0]["waiting"]), (&json!("shout"), &json!(3)));
    assert_eq!(status["inflight"][0]["phase"], "start");
    let host = status["children"].as_array().unwrap().iter().find(|child| child["kind"] == "host").unwrap();
    assert_eq!(host["upstream"], "shout");
    assert_eq!(evergate_testkit::get(&gateway.admin(), "/status").json()["models"][0]["state"], "starting");
    let table = gateway.printed(&["status"]);
    assert!(table.contains("\nhost shout ") && table.contains("\nprogram shout: starting for "), "{table}");
    assert!(table.contains(", 3 waiting\n"), "{table}");

    std::fs::write(&fifo, "").unwrap();
    for asker in askers {
        assert_eq!(said(&asker.join().unwrap()), "HELLO");
    }
    assert_eq!((listed(&gateway, "shout"), gateway.model("shout")["waiting"].clone()), (json!("ready"), json!(0)));
    wait_until("their ends", LIMIT, || {
        has(&gateway, r#"evergate_program_exits_total{upstream="shout",cause="done"} 3"#)
    });
    for line in [
        r#"evergate_host_state{upstream="shout",state="ready"} 1"#,
        r#"evergate_host_state{upstream="shout",state="starting"} 0"#,
        r#"evergate_host_starts_total{upstream="shout",result="ready"} 1"#,
        r#"evergate_host_start_seconds_count{upstream="shout"} 1"#,
        r#"evergate_host_wait_seconds_count{upstream="shout"} 3"#,
        r#"evergate_program_starts_total{upstream="shout"} 3"#,
    ] {
        metric(&gateway, line);
    }
    // Who comes now waits for no start.
    assert_eq!(said(&ask(&gateway, "shout", "hello", false)), "HELLO");
    metric(&gateway, r#"evergate_host_wait_seconds_count{upstream="shout"} 3"#);
}

#[test]
fn ends_of_programs_are_counted_by_cause_and_the_last_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    let crash =
        r#"process = { mode = "command", argv = ["sh", "-c", "cat >/dev/null; echo out of paper >&2; exit 3"] }"#;
    let hang = r#"process = { mode = "command", argv = ["sleep", "600"], timeout = "300ms" }"#;
    let missing = r#"process = { mode = "command", argv = ["no-such-program-anywhere"] }"#;
    let wait = waiter(go.to_str().unwrap());
    let gateway = gateway(&[("crash", crash), ("hang", hang), ("missing", missing), ("wait", &wait)]);
    for name in ["crash/x", "hang/x", "missing/x"] {
        assert!(matches!(ask(&gateway, name, "hello", false).status, 502 | 504));
    }
    let asker = asking(&gateway, "wait/x", "hello");
    wait_until("its program", LIMIT, || gateway.model("wait")["program_pid"].is_number());
    wait_until("its load", LIMIT, || gateway.model("wait")["in_flight"] == 1);
    metric(&gateway, r#"evergate_host_in_flight{upstream="wait"} 1"#);
    let pid = gateway.model("wait")["program_pid"].as_i64().unwrap();
    send(i32::try_from(pid).unwrap(), Signal::KILL);
    assert_eq!(asker.join().unwrap().status, 502);

    for (upstream, cause) in [("crash", "crash"), ("hang", "host"), ("missing", "boot"), ("wait", "unknown")] {
        let line = format!(r#"evergate_program_exits_total{{upstream="{upstream}",cause="{cause}"}} 1"#);
        wait_until(&line, LIMIT, || has(&gateway, &line));
        wait_until("its record", LIMIT, || gateway.model(upstream)["last_exit"]["initiator"] == cause);
    }
    assert_eq!(gateway.model("crash")["program_pid"], Value::Null, "what has ended is not shown");
    let last = gateway.model("crash")["last_exit"].clone();
    assert_eq!((&last["kind"], &last["code"], &last["note"]), (&json!("program"), &json!(3), &json!("out of paper")));
    assert_eq!(
        (&gateway.model("wait")["last_exit"]["signal"], gateway.model("wait")["state"].clone()),
        (&json!(9), json!("ready"))
    );
    let table = gateway.printed(&["models"]);
    let row = |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(row("crash").contains("program code 3, crash, ") && row("crash").ends_with("  out of paper"), "{table}");
    assert!(row("missing").contains("program not started, boot, "), "{table}");
    assert!(row("wait").contains("program signal 9 (SIGKILL), unknown, "), "{table}");
}

/// Ends it whatever becomes of the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_log_is_bounded_and_followed_over_its_rotations() {
    // 400 lines of 7 kB each, most of it spaces, which are soon looked through for secrets: 2.8 MB of standard error, within
    // what a program may say in a second.
    let talk = r#"process = { mode = "command", argv = ["awk", 'BEGIN { for (i = 0; i < 400; i++) printf "%7000d\n", i > "/dev/stderr"; print "ok" }'] }"#;
    let gateway = gateway(&[("talk", talk)]);
    let folder = tempfile::tempdir().unwrap();
    let (heard, said_aside) = (folder.path().join("heard"), folder.path().join("aside"));
    let lines = |path: &Path| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let number = |line: &str| line.rsplit(' ').next().and_then(|digits| digits.parse::<u32>().ok());
        text.lines().filter_map(number).collect::<Vec<_>>()
    };
    let mut follower = None;
    for round in 1..=3 {
        assert_eq!(said(&ask(&gateway, "talk/x", "go", false)), "ok");
        follower.get_or_insert_with(|| {
            let files = [&heard, &said_aside].map(|path| std::fs::File::create(path).unwrap());
            let [out, aside] = files;
            let mut command = Command::new(EXE);
            command.args(["logs", "talk", "-f", "--state-dir"]).arg(gateway.state_dir());
            Ended(command.stdout(out).stderr(aside).spawn().unwrap())
        });
        wait_until("all its lines", LIMIT, || lines(&heard).len() >= round * 400);
    }
    let expected: Vec<u32> = (0..3).flat_map(|_| 0..400).collect();
    assert_eq!((lines(&heard), std::fs::read_to_string(&said_aside).unwrap()), (expected, String::new()));
    let models = gateway.state_dir().join("models");
    let names = || std::fs::read_dir(&models).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
    let logs: BTreeSet<String> = names().filter(|name| name.contains(".log")).collect();
    assert_eq!(logs, BTreeSet::from(["talk.log".to_owned(), "talk.log.1".to_owned()]));
    for log in logs {
        let bytes = std::fs::metadata(models.join(log)).unwrap().len();
        assert!(bytes <= 4 << 20, "{bytes}");
    }
    // Without -f: what is kept, the older file first.
    let all = gateway.printed(&["logs", "talk"]);
    assert!(all.len() > 4 << 20, "{}", all.len());
    assert!(all.trim_end().ends_with("399") && all.lines().all(|line| line.contains(" err: ")));
}

#[test]
fn a_programs_traceback_is_on_record_and_shown() {
    let script = r#"cat >/dev/null; echo 'Traceback (most recent call last):' >&2; echo '  File \"gateway.py\", line 7' >&2; echo 'RuntimeError: no paper, key sk-test-1234567890abcdef' >&2; exit 1"#;
    let section = format!("process = {{ mode = \"command\", argv = [\"sh\", \"-c\", \"{script}\"] }}");
    let gateway = gateway(&[("tired", &section)]);
    let answer = ask(&gateway, "tired/x", "hello", false);
    assert_eq!((answer.status, answer.error_code().as_str()), (502, "adapter_exited"));
    assert!(!answer.text().contains("paper"), "its words are for operators: {}", answer.text());
    wait_until("its record", LIMIT, || gateway.printed(&["exits"]).contains("program tired"));
    let text = gateway.printed(&["exits"]);
    let row = text.lines().find(|line| line.contains("program tired")).unwrap();
    assert!(row.contains("code 1") && row.contains(" crash ") && row.contains("RuntimeError: no paper"), "{text}");
    let words = text.split(" has said last:\n").nth(1).unwrap();
    assert!(
        words.starts_with("  Traceback (most recent call last):\n    File \"gateway.py\", line 7\n  RuntimeError"),
        "{text}"
    );
    let records: Value = serde_json::from_str(&gateway.printed(&["exits", "--json"])).unwrap();
    let record = records.as_array().unwrap().iter().find(|record| record["upstream"] == "tired").unwrap().clone();
    assert!(record["stderr"].as_str().unwrap().starts_with("Traceback (most recent call last):\n"), "{record}");
    assert_eq!((&record["kind"], &record["code"], &record["signal"]), (&json!("program"), &json!(1), &Value::Null));
    assert!(!text.contains("sk-test-1234567890abcdef") && !records.to_string().contains("sk-test-1234567890abcdef"));
    assert!(!gateway.printed(&["logs", "tired"]).contains("sk-test-1234567890abcdef"));
}
