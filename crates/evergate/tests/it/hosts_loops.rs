//! A server that comes up and dies again and again, or takes its time to come up again: nobody waits for nothing, and everybody
//! is told how it stands.

use std::time::{Duration, Instant};

use evergate_testkit::{Evergate, adaptersim, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::Value;

use crate::hosts::{ask, code, gateway, programs_ends, said};
use crate::hosts_kept::{ANSWER, is_answered, model, program, state};
use crate::support::{LIMIT, send};

/// A server under a shell's line, which `SIM` in it starts; and a model of its own name.
fn server(script: &str) -> Evergate {
    let script = script.replace("SIM", &adaptersim().display().to_string());
    let own = format!(
        "process = {{ mode = \"server\", argv = [\"sh\", \"-c\", {script:?}], health = \"/v1/models\", grace = \"1s\" }}\n\
         [models.m]\ntargets = [{{ upstream = \"tiny\", model = \"ok\" }}]"
    );
    gateway(&[("tiny", &own)])
}

/// A model of mode `stdio` under a shell's line, likewise.
fn kept(script: &str) -> Evergate {
    let script = script.replace("SIM", &adaptersim().display().to_string());
    let own = format!(
        "process = {{ mode = \"stdio\", argv = [\"sh\", \"-c\", {script:?}], in_flight_max = 8, grace = \"1s\" }}\n\
         [models.m]\ntargets = [{{ upstream = \"tiny\", model = \"x\" }}]"
    );
    gateway(&[("tiny", &own)])
}

/// What clients see in the list of models.
fn listed(gateway: &Evergate) -> String {
    let list = gateway.get("/v1/models").json();
    let all = list["data"].as_array().unwrap();
    all.iter().find(|model| model["id"] == "m").unwrap()["state"].as_str().unwrap().to_owned()
}

#[test]
fn g21_a_server_that_dies_as_soon_as_it_serves_is_no_reason_to_wait() {
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    let gateway = server(&format!(
        "[ -e {} ] && exec SIM serve:127.0.0.1:{{port}} hang; \
         exec SIM serve:127.0.0.1:{{port}} sleep:800 'err:out of luck' exit:3",
        go.display()
    ));
    ask(&gateway, "m", "hello", false);
    // Its pauses grow: 0.5 and 1 s by its host, then from 0.5 s by the master.
    let failed = wait_for("a long pause", 2 * LIMIT, || {
        let model = model(&gateway, "tiny");
        model["retry_ms"].as_u64().is_some_and(|retry| retry > 1500).then_some(model)
    });
    let began = Instant::now();
    for stream in [false, true] {
        let response = ask(&gateway, "m", "hello", stream);
        assert_eq!(code(&response), (502, "adapter_exited".into()));
        assert!(response.text().contains("exit code 3") && !response.text().contains("luck"), "{}", response.text());
        let after: u64 = response.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=4).contains(&after), "{after}");
    }
    let shown = (listed(&gateway), gateway.cli(&["models"]), gateway.cli(&["status"]));
    if began.elapsed() > Duration::from_millis(1400) {
        println!("the machine was too slow for this test");
        return;
    }
    assert_eq!(failed["state"], "failed", "{failed}");
    let cause = failed["cause"].as_str().unwrap();
    // On a busy machine one may die before it was seen to be ready.
    assert!(cause.contains("exit code 3") && cause.ends_with(": out of luck"), "{cause}");
    let text = |output: std::process::Output| String::from_utf8(output.stdout).unwrap();
    assert_eq!(shown.0, "failed");
    let (models, status) = (text(shown.1), text(shown.2));
    assert!(models.contains("failed") && models.contains("out of luck"), "{models}");
    assert!(status.contains("tried again in "), "{status}");
    let ends = programs_ends(&gateway);
    assert!((3..=8).contains(&ends.len()) && ends.iter().all(|end| end["code"] == 3), "{ends:?}");
    // What was wrong is not wrong any more.
    std::fs::write(&go, "").unwrap();
    wait_until("an answer", LIMIT, || is_answered(&ask(&gateway, "m", ANSWER, false)));
    assert_eq!((state(&gateway, "tiny"), &model(&gateway, "tiny")["cause"]), ("ready".into(), &Value::Null));
}

#[test]
fn g21_a_server_that_is_not_there_again_yet_is_shown_as_restarting() {
    let folder = tempfile::tempdir().unwrap();
    let (first, go) = (folder.path().join("first"), folder.path().join("go"));
    let gateway = server(&format!(
        "[ -e {0} ] && while [ ! -e {1} ]; do sleep 0.02; done; : > {0}; exec SIM pid serve:127.0.0.1:{{port}} hang",
        first.display(),
        go.display()
    ));
    assert_eq!(said(&ask(&gateway, "m", ANSWER, false)), ANSWER);
    assert_eq!((state(&gateway, "tiny"), listed(&gateway)), ("ready".into(), "ready".into()));
    send(program(&gateway, "tiny"), Signal::KILL);
    wait_until("it is seen", LIMIT, || state(&gateway, "tiny") == "restarting" && listed(&gateway) == "restarting");
    wait_until("a metric", LIMIT, || {
        gateway.metrics().contains("evergate_host_state{upstream=\"tiny\",state=\"restarting\"} 1")
    });
    // While the next one starts it is no more there than before.
    wait_until("the next start", LIMIT, || model(&gateway, "tiny")["program_pid"].is_u64());
    assert_eq!(state(&gateway, "tiny"), "restarting");
    std::fs::write(&go, "").unwrap();
    assert_eq!(said(&ask(&gateway, "m", ANSWER, false)), ANSWER);
    assert_eq!((state(&gateway, "tiny"), listed(&gateway)), ("ready".into(), "ready".into()));
}

/// A process that runs is not one that says that it is ready.
#[test]
fn g21_a_kept_process_that_is_not_ready_again_yet_is_shown_as_restarting() {
    let folder = tempfile::tempdir().unwrap();
    let (first, go) = (folder.path().join("first"), folder.path().join("go"));
    let gateway = kept(&format!(
        "[ -e {0} ] && while [ ! -e {1} ]; do sleep 0.02; done; : > {0}; exec SIM model:places=8",
        first.display(),
        go.display()
    ));
    let ask_it = || ask(&gateway, "m", "text=hello", false);
    assert!(is_answered(&ask_it()));
    assert_eq!((state(&gateway, "tiny"), listed(&gateway)), ("ready".into(), "ready".into()));
    // One that is there is loaded.
    assert!(gateway.cli(&["models", "load", "tiny"]).status.success());
    let before = program(&gateway, "tiny");
    send(before, Signal::KILL);
    wait_until("the next process runs", LIMIT, || {
        model(&gateway, "tiny")["program_pid"].as_i64() > Some(0) && program(&gateway, "tiny") != before
    });
    assert_eq!((state(&gateway, "tiny"), listed(&gateway)), ("restarting".into(), "restarting".into()));
    std::thread::scope(|scope| {
        let loading = scope.spawn(|| gateway.cli(&["models", "load", "tiny"]));
        // The order waits with the master; a request waits, too.
        let asking = scope.spawn(ask_it);
        wait_until("the request waits", LIMIT, || model(&gateway, "tiny")["waiting"].as_u64() == Some(1));
        assert!(!loading.is_finished(), "it was told of a model that takes no requests");
        std::fs::write(&go, "").unwrap();
        assert!(is_answered(&asking.join().unwrap()));
        let loaded = loading.join().unwrap();
        assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    });
    wait_until("it is ready again", LIMIT, || state(&gateway, "tiny") == "ready" && listed(&gateway) == "ready");
}
