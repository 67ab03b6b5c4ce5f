//! What is said of programs that fail: to clients, in access records and in the records of their ends.

use std::time::Duration;

use evergate_testkit::raw::{Response, chat_body, post_request};
use evergate_testkit::wait::try_wait_for;
use evergate_testkit::{Evergate, Raw, adaptersim, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::hosts::{ask, asking, code, gateway, hosts, programs_ends, said, waiter};
use crate::hosts_kept::{MODES, model, program, section};
use crate::support::{CHAT, LIMIT, send};

/// A program that does these steps for each request.
fn command(steps: &[&str], more: &str) -> String {
    let program = adaptersim().display().to_string();
    let argv: Vec<&str> = std::iter::once(program.as_str()).chain(steps.iter().copied()).collect();
    format!("process = {{ mode = \"command\", argv = {argv:?}, grace = \"1s\"{more} }}")
}

/// The access record of a request that was answered so.
fn record(gateway: &Evergate, cause: &str) -> Value {
    let is_it = |record: &Value| record["cause"] == cause;
    wait_for("its access record", LIMIT, || gateway.access().into_iter().find(is_it))
}

/// The end of a program that its host has brought about.
fn ended_by_host(gateway: &Evergate) -> Value {
    let is_it = |end: &Value| end["initiator"] == "host";
    wait_for("the record of its end", LIMIT, || programs_ends(gateway).into_iter().find(is_it))
}

#[track_caller]
fn assert_detail(record: &Value, words: &str) {
    assert!(record["detail"].as_str().unwrap_or_default().contains(words), "{record}");
}

/// The client hears the words, without the detail that a worker was told beside them.
fn assert_told(response: &Response, (status, name): (u16, &str), words: &str) {
    assert_eq!(code(response), (status, name.into()), "{}", response.text());
    assert!(response.text().contains(words), "{}", response.text());
    assert_eq!(response.json()["error"].as_object().unwrap().len(), 4, "{}", response.text());
}

#[test]
fn g7_a_limit_that_ends_a_program_is_named_in_both_records() {
    let gateway = gateway(&[("tiny", &command(&["hang"], ", first_output = \"300ms\""))]);
    assert_told(&ask(&gateway, "tiny/x", "x", false), (504, "adapter_timeout"), "process.first_output");
    assert_detail(&record(&gateway, "adapter_timeout"), "process.first_output");
    let end = ended_by_host(&gateway);
    let why = end["why"].as_str().unwrap_or_default();
    assert!(why.starts_with("adapter_timeout: ") && why.contains("process.first_output"), "{end}");
    let shown = gateway.cli(&["exits"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.lines().any(|line| line.contains("program tiny") && line.ends_with(why)), "{shown}");
}

#[test]
fn g7_a_limit_of_a_kept_program_is_named_in_the_record() {
    let gateway = gateway(&[("tiny", &section("stdio", &[], ", first_output = \"300ms\""))]);
    assert_told(&ask(&gateway, "tiny/x", "hang", false), (504, "adapter_timeout"), "process.first_output");
    assert_detail(&record(&gateway, "adapter_timeout"), "process.first_output");
}

#[test]
fn g3_what_a_kept_program_has_broken_is_in_both_records() {
    let gateway = gateway(&[("tiny", &section("stdio", &[], ""))]);
    assert_told(
        &ask(&gateway, "tiny/x", "raw={;hang", false),
        (502, "adapter_protocol_error"),
        "the program of this model",
    );
    let record = record(&gateway, "adapter_protocol_error");
    let detail = record["detail"].as_str().unwrap_or_default();
    assert!(detail.len() > 20, "{record}");
    let end = ended_by_host(&gateway);
    assert!(end["why"].as_str().unwrap_or_default().starts_with("adapter_protocol_error: the program of"), "{end}");
}

#[test]
fn g7_a_limit_that_ends_a_stream_is_named_in_both_records() {
    let gateway = gateway(&[("tiny", &command(&["out:hello\n", "hang"], ", output = \"lines\", idle = \"300ms\""))]);
    let events = ask(&gateway, "tiny/x", "x", true).text();
    let last = events.lines().rev().find(|line| !line.is_empty()).unwrap();
    let error: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!((&error["error"]["code"], error["error"].as_object().unwrap().len()), (&"adapter_timeout".into(), 4));
    assert_detail(&record(&gateway, "adapter_timeout"), "process.idle");
    assert!(ended_by_host(&gateway)["why"].as_str().unwrap_or_default().contains("process.idle"));
}

#[test]
fn g1_why_a_program_cannot_be_started_is_on_record_and_not_for_clients() {
    let gateway = gateway(&[("tiny", r#"process = { mode = "command", argv = ["/nowhere/model"] }"#)]);
    let response = ask(&gateway, "tiny/x", "x", false);
    assert_told(&response, (502, "adapter_spawn_failed"), "cannot be started");
    assert!(!response.text().contains("nowhere"), "{}", response.text());
    assert_detail(&record(&gateway, "adapter_spawn_failed"), "cannot execute /nowhere/model: No such file");
}

#[test]
fn g4_a_program_that_ends_badly_is_on_record_with_its_code() {
    for (mode, own, text) in
        [("command", command(&["exit:3"], ""), "x"), ("stdio", section("stdio", &[], ""), "exit=3")]
    {
        let gateway = gateway(&[("tiny", &own)]);
        assert_told(&ask(&gateway, "tiny/x", text, false), (502, "adapter_exited"), "exit code 3");
        assert_detail(&record(&gateway, "adapter_exited"), "exit code 3");
        // It was nobody's doing but its own.
        let end = wait_for("the record of its end", LIMIT, || programs_ends(&gateway).into_iter().next());
        assert_eq!((&end["initiator"], &end["why"]), (&"crash".into(), &Value::Null), "{mode}");
    }
}

#[test]
fn g23_a_program_that_does_not_answer_any_more_is_on_record_with_that() {
    let own = section("server", &[], ", health_interval = \"200ms\", health_timeout = \"200ms\"");
    let gateway = gateway(&[("tiny", &own)]);
    assert_eq!(ask(&gateway, "tiny/ok", "hi", false).status, 200);
    send(program(&gateway, "tiny"), Signal::STOP);
    let why = ended_by_host(&gateway)["why"].as_str().unwrap_or_default().to_owned();
    assert_eq!(why, "adapter_timeout: the program of this model lives but does not answer");
}

#[test]
fn a2_a_program_whose_client_has_left_is_on_record_with_that() {
    let gateway = gateway(&[("tiny", &command(&["hang"], ""))]);
    let mut raw = Raw::connect(&gateway.addr());
    let body = chat_body("tiny/x", false, &json!({ "messages": [{ "role": "user", "content": "x" }] }));
    raw.send(&post_request(CHAT, "", &body));
    wait_until("its program", LIMIT, || model(&gateway, "tiny")["in_flight"] == 1);
    drop(raw);
    assert_eq!(ended_by_host(&gateway)["why"], "nobody waited for its answer any more");
}

#[test]
fn g21_a_program_that_dies_within_an_answer_without_a_length_is_told_as_that() {
    let own = format!(
        "process = {{ mode = \"server\", argv = [{:?}, \"serve-die:127.0.0.1:{{port}}\"], health = \"/v1/models\" }}",
        adaptersim().display().to_string()
    );
    let gateway = gateway(&[("tiny", &own)]);
    assert_told(&ask(&gateway, "tiny/x", "hi", false), (502, "adapter_exited"), "signal 6");
    assert_detail(&record(&gateway, "adapter_exited"), "signal 6");
    let events = ask(&gateway, "tiny/x", "hi", true).text();
    assert!(events.contains("\"content\":\"a\""), "what came before: {events}");
    assert!(events.contains("adapter_exited") && events.contains("signal 6"), "{events}");
}

#[test]
fn g21_one_request_is_one_start_of_a_program_that_is_broken() {
    for mode in MODES {
        let own = section(mode, &["exit:3"], "");
        let gateway = gateway(&[("tiny", &own)]);
        for starts in 1..=2 {
            assert_told(&ask(&gateway, "tiny/x", "x", false), (502, "adapter_exited"), "exit code 3");
            // The next try would come when the pause is over, and it ends at once.
            wait_until("the end of the pause", LIMIT, || gateway.model("tiny")["retry_ms"] == 0);
            let ends = || programs_ends(&gateway).len();
            let more = try_wait_for(Duration::from_millis(500), || (ends() > starts).then_some(()));
            assert!(more.is_none() && ends() == starts, "{mode}: {:?}", gateway.model("tiny"));
        }
    }
}

#[test]
fn a_program_that_uses_up_a_limit_is_on_record_with_that() {
    let writes = ["-c", "exec head -c 2000000 /dev/zero > big"];
    let gateway = gateway(&[
        ("spins", &command(&["spin"], ", limits = { cpu = \"1s\" }")),
        (
            "writes",
            &format!(
                "process = {{ mode = \"command\", argv = [\"sh\", {:?}, {:?}], limits = {{ file_size = \"1MiB\" }} }}",
                writes[0], writes[1]
            ),
        ),
    ]);
    for (name, signal, shown) in [("spins", 24, "signal 24 (SIGXCPU)"), ("writes", 25, "signal 25 (SIGXFSZ)")] {
        let response = ask(&gateway, &format!("{name}/x"), "x", false);
        assert_told(&response, (502, "adapter_exited"), &format!("signal {signal}"));
        let is_its = |end: &Value| end["upstream"] == name;
        let end = wait_for("the record of its end", LIMIT, || programs_ends(&gateway).into_iter().find(is_its));
        assert_eq!((&end["initiator"], &end["signal"]), (&"crash".into(), &signal.into()));
        let table = gateway.cli(&["exits"]);
        let table = String::from_utf8_lossy(&table.stdout).into_owned();
        assert!(table.contains(shown), "{table}");
    }
}

/// Sends a request that has so much time.
fn within(gateway: &Evergate, name: &str, time: &str) -> Raw {
    let mut raw = Raw::connect(&gateway.addr());
    let body = chat_body(name, false, &json!({ "messages": [{ "role": "user", "content": "x" }] }));
    raw.send(&post_request(CHAT, &format!("x-request-timeout: {time}\r\n"), &body));
    raw
}

/// Its host stands still at that time, so that it is the worker that has to know.
fn answer_without_its_host(gateway: &Evergate, mut raw: Raw) -> Response {
    let host = hosts(gateway)[0];
    send(host, Signal::STOP);
    let response = raw.read_response(LIMIT);
    send(host, Signal::CONT);
    response
}

#[test]
fn g20_a_request_that_waits_for_the_next_program_is_told_so_whoever_notices_its_time() {
    let folder = tempfile::tempdir().unwrap();
    let (up, go) = (folder.path().join("up"), folder.path().join("go"));
    let (up, go_text) = (up.display(), go.display());
    let script =
        format!("[ -e {up} ] && while [ ! -e {go_text} ]; do sleep 0.02; done; touch {up}; exec \"$0\" \"$@\"");
    let own = section("server", &[], "").replacen("argv = [", &format!("argv = [\"sh\", \"-c\", {script:?}, "), 1);
    let gateway = gateway(&[("tiny", &own)]);
    assert_eq!(ask(&gateway, "tiny/ok", "x", false).status, 200);
    send(program(&gateway, "tiny"), Signal::KILL);
    wait_until("the record of its end", LIMIT, || programs_ends(&gateway).len() == 1);
    let raw = within(&gateway, "tiny/ok", "1500ms");
    wait_until("the request in its host", LIMIT, || model(&gateway, "tiny")["in_flight"] == 1);
    assert_told(&answer_without_its_host(&gateway, raw), (503, "model_loading"), "was not ready in time");
    std::fs::write(&go, "").unwrap();
    wait_until("an answer", LIMIT, || ask(&gateway, "tiny/ok", "x", false).status == 200);
}

#[test]
fn l1_a_request_that_waits_for_its_turn_at_a_program_is_told_so_whoever_notices_its_time() {
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    let own = waiter(go.to_str().unwrap()).replace("in_flight_max = 8", "in_flight_max = 1");
    let gateway = gateway(&[("tiny", &own)]);
    let first = asking(&gateway, "tiny/x", "x");
    wait_until("the first at its program", LIMIT, || model(&gateway, "tiny")["in_flight"] == 1);
    let raw = within(&gateway, "tiny/x", "1500ms");
    wait_until("the second in its host", LIMIT, || model(&gateway, "tiny")["waiting"] == 1);
    assert_told(&answer_without_its_host(&gateway, raw), (503, "overloaded"), "was not free in time");
    std::fs::write(&go, "").unwrap();
    assert_eq!(said(&first.join().unwrap()), "done");
}
