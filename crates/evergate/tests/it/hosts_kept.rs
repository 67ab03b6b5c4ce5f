//! Programs that are kept, through the whole gateway: `mode = "stdio"` and `mode = "server"`.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use evergate_testkit::raw::Response;
use evergate_testkit::{Evergate, FakeUpstream, adaptersim, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::hosts::{ask, asking, code, config, gateway, hosts, marked, programs_ends, said};
use crate::support::{EXE, LIMIT, assert_counted, is_full, send, wait_ready};

/// Both modes, by their names.
pub const MODES: [&str; 2] = ["stdio", "server"];

/// A program that serves in a mode, with more keys of its section, and more steps before it does.
pub fn section(mode: &str, steps: &[&str], more: &str) -> String {
    let own = match mode {
        "stdio" => vec!["model:places=8".to_owned()],
        _ => ["pid", "serve:127.0.0.1:{port}", "hang"].map(str::to_owned).to_vec(),
    };
    let argv: Vec<String> = std::iter::once(adaptersim().display().to_string())
        .chain(steps.iter().map(|step| (*step).to_owned()))
        .chain(own)
        .collect();
    let mode_keys = match mode {
        "stdio" => "in_flight_max = 8",
        _ => "health = \"/v1/models\"",
    };
    format!("process = {{ mode = \"{mode}\", argv = {argv:?}, grace = \"1s\", {mode_keys}{more} }}")
}

/// What the scripted upstream says, and what the stdio model is asked to say.
pub const ANSWER: &str = "Hello from the fake upstream";

/// A question whose answer is that.
pub fn question(mode: &str) -> (&'static str, &'static str) {
    match mode {
        "stdio" => ("tiny/x", "say=Hello ;text=from the fake upstream"),
        _ => ("tiny/ok", "hi"),
    }
}

pub fn is_answered(response: &Response) -> bool {
    response.status == 200 && response.json()["choices"][0]["message"]["content"].is_string()
}

pub fn model(gateway: &Evergate, name: &str) -> Value {
    gateway.model(name)
}

pub fn state(gateway: &Evergate, name: &str) -> String {
    model(gateway, name)["state"].as_str().unwrap().to_owned()
}

pub fn program(gateway: &Evergate, name: &str) -> i32 {
    wait_for("its program", LIMIT, || i32::try_from(model(gateway, name)["program_pid"].as_i64()?).ok())
}

#[test]
fn kept_programs_answer_whole_and_streamed() {
    for mode in MODES {
        let gateway = gateway(&[("tiny", &section(mode, &[], ""))]);
        assert_eq!(hosts(&gateway), Vec::<i32>::new(), "nobody starts it before it is asked for");
        let (model, text) = question(mode);
        let first = ask(&gateway, model, text, false);
        assert_eq!(said(&first), ANSWER, "{mode}");
        let streamed = ask(&gateway, model, text, true).text();
        assert!(streamed.contains("Hello") && streamed.contains("[DONE]"), "{mode}: {streamed}");
        let pid = program(&gateway, "tiny");
        assert!(marked(&gateway).contains(&pid), "{mode}: {pid} is its program");
        assert_eq!((hosts(&gateway).len(), state(&gateway, "tiny")), (1, "ready".into()));
        let address = crate::hosts_kept::model(&gateway, "tiny")["address"].as_str().map(str::to_owned);
        assert_eq!(address.is_some_and(|address| address.starts_with("127.0.0.1:")), mode == "server");
    }
}

#[test]
fn embeddings_come_from_a_kept_program_as_it_wrote_them() {
    let gateway = gateway(&[("tiny", &section("stdio", &[], ""))]);
    let body = json!({ "object": "list", "data": [{ "object": "embedding", "index": 0, "embedding": [0.5, -1.25] }] });
    let request = json!({ "model": "tiny/x", "input": format!("body={body}") });
    let mut raw = evergate_testkit::Raw::connect(&gateway.addr());
    raw.send(&evergate_testkit::raw::post_request("/v1/embeddings", "", &request.to_string()));
    let response = raw.read_response(LIMIT);
    assert_eq!((response.status, response.json()), (200, body));
}

#[test]
fn l8_many_requests_to_a_cold_kept_program_are_one_start() {
    let count = if is_full() { 500 } else { 100 };
    for mode in MODES {
        // Its start takes a moment, in which all of them come.
        let gateway = gateway(&[("tiny", &section(mode, &["sleep:300"], ", queue = 600"))]);
        let (model, text) = question(mode);
        let askers: Vec<_> = (0..count).map(|_| asking(&gateway, model, text)).collect();
        for asker in askers {
            assert_eq!(said(&asker.join().unwrap()), ANSWER);
        }
        assert_eq!((hosts(&gateway).len(), marked(&gateway).len()), (1, 1), "{mode}");
        assert_eq!(programs_ends(&gateway), Vec::<Value>::new());
    }
}

#[test]
fn g20_a_program_that_is_never_ready_is_a_loading_model_for_all_who_wait() {
    for mode in MODES {
        let more = ", start_timeout = \"500ms\"";
        let gateway = gateway(&[("tiny", &section(mode, &["err:still loading\n", "hang"], more))]);
        let began = Instant::now();
        let askers: Vec<_> = (0..10).map(|_| asking(&gateway, "tiny/x", "text=hello")).collect();
        for asker in askers {
            let response = asker.join().unwrap();
            assert_eq!(code(&response), (503, "model_loading".into()), "{mode}");
            assert!(response.text().contains("start_timeout"), "{}", response.text());
        }
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
        let failed = model(&gateway, "tiny");
        assert!(failed["cause"].as_str().unwrap().ends_with(": still loading"), "{failed}");
        wait_until("the end of its program", LIMIT, || marked(&gateway).is_empty());
    }
}

#[test]
fn g21_a_program_that_cannot_start_tells_all_why_and_is_tried_again() {
    for mode in MODES {
        let folder = tempfile::tempdir().unwrap();
        let go = folder.path().join("go");
        let script = format!("[ -e {} ] || {{ echo no weights >&2; exit 3; }}; exec \"$0\" \"$@\"", go.display());
        let own = section(mode, &[], "").replacen("argv = [", "argv = [\"sh\", \"-c\", SCRIPT, ", 1);
        let gateway = gateway(&[("tiny", &own.replacen("SCRIPT", &format!("{script:?}"), 1))]);
        let (name, text) = question(mode);
        let askers: Vec<_> = (0..10).map(|_| asking(&gateway, name, text)).collect();
        for asker in askers {
            let response = asker.join().unwrap();
            assert_eq!(code(&response), (502, "adapter_exited".into()), "{mode}");
            assert!(response.text().contains("exit code 3"), "{}", response.text());
            assert!(!response.text().contains("weights"), "its words are for the operator");
        }
        let failed = model(&gateway, "tiny");
        assert!(failed["cause"].as_str().unwrap().ends_with(": no weights"), "{failed}");
        let ends = programs_ends(&gateway);
        assert!(!ends.is_empty() && ends.len() <= 5, "{ends:?}");
        assert!(ends.iter().all(|end| end["code"] == 3 && end["stderr"] == "no weights\n"), "{ends:?}");
        // What was wrong is not wrong any more.
        std::fs::write(&go, "").unwrap();
        wait_until("an answer", LIMIT, || is_answered(&ask(&gateway, name, text, false)));
        assert_eq!(model(&gateway, "tiny")["cause"], Value::Null);
    }
}

#[test]
fn an_idle_program_is_stopped_and_started_again_when_it_is_asked_for() {
    for mode in MODES {
        let gateway = gateway(&[("tiny", &section(mode, &[], ", idle_stop = \"1s\""))]);
        let (name, text) = question(mode);
        assert_eq!(said(&ask(&gateway, name, text, false)), ANSWER);
        let first = program(&gateway, "tiny");
        wait_until("its end", LIMIT, || hosts(&gateway).is_empty() && marked(&gateway).is_empty());
        assert_eq!(state(&gateway, "tiny"), "cold");
        assert_eq!(said(&ask(&gateway, name, text, false)), ANSWER);
        assert_ne!(program(&gateway, "tiny"), first);
        let host_ends: Vec<Value> = gateway.exits().into_iter().filter(|record| record["kind"] == "host").collect();
        assert_eq!((host_ends.len(), &host_ends[0]["initiator"]), (1, &json!("idle")), "{host_ends:?}");
    }
}

#[test]
fn who_asks_again_and_again_keeps_a_program_from_being_idle() {
    for mode in MODES {
        let gateway = gateway(&[("tiny", &section(mode, &[], ", idle_stop = \"1s\""))]);
        let (name, text) = question(mode);
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(4) {
            assert_eq!(said(&ask(&gateway, name, text, false)), ANSWER);
        }
        assert!(gateway.exits().iter().all(|record| record["kind"] != "host"), "{mode}");
    }
}

#[test]
fn g24_requests_at_the_moment_of_the_idle_stop_are_answered() {
    let rounds = if is_full() { 40 } else { 4 };
    for mode in MODES {
        let gateway = gateway(&[("tiny", &section(mode, &[], ", idle_stop = \"1s\""))]);
        let (name, text) = question(mode);
        for round in 0..rounds {
            assert_eq!(said(&ask(&gateway, name, text, false)), ANSWER);
            // As near to its end as can be aimed: the beat after a second of idleness is the moment.
            let began = Instant::now();
            wait_until("the time", LIMIT, || began.elapsed() >= Duration::from_millis(950 + 20 * round % 400));
            let askers: Vec<_> = (0..8).map(|_| asking(&gateway, name, text)).collect();
            for asker in askers {
                assert_eq!(said(&asker.join().unwrap()), ANSWER, "{mode}");
            }
        }
    }
}

#[test]
fn a_preloaded_program_is_there_before_anybody_asks_and_stays() {
    for mode in MODES {
        let gateway = gateway(&[("tiny", &section(mode, &[], ", preload = true, idle_stop = \"1s\""))]);
        wait_until("its start", LIMIT, || state(&gateway, "tiny") == "ready");
        let pid = program(&gateway, "tiny");
        let (name, text) = question(mode);
        assert_eq!(said(&ask(&gateway, name, text, false)), ANSWER);
        let began = Instant::now();
        wait_until("more than its idle time", LIMIT, || began.elapsed() > Duration::from_secs(3));
        assert_eq!((program(&gateway, "tiny"), hosts(&gateway).len()), (pid, 1));
        send(pid, Signal::KILL);
        wait_until("its successor", LIMIT, || {
            let model = model(&gateway, "tiny");
            model["state"] == "ready" && model["program_pid"].as_i64().is_some_and(|other| other != i64::from(pid))
        });
    }
}

#[test]
fn a_program_that_dies_is_replaced_and_who_waited_is_served() {
    for mode in MODES {
        let gateway = gateway(&[("tiny", &section(mode, &[], ", queue = 64"))]);
        let (name, text) = question(mode);
        assert_eq!(said(&ask(&gateway, name, text, false)), ANSWER);
        let (host, pid) = (hosts(&gateway), program(&gateway, "tiny"));
        let held = match mode {
            "stdio" => asking(&gateway, "tiny/x", "hang"),
            _ => asking(&gateway, "tiny/never-headers", "x"),
        };
        wait_until("a request at it", LIMIT, || model(&gateway, "tiny")["in_flight"] == 1);
        send(pid, Signal::KILL);
        assert_eq!(code(&held.join().unwrap()), (502, "adapter_exited".into()), "{mode}");
        assert_eq!(said(&ask(&gateway, name, text, false)), ANSWER);
        assert_eq!(hosts(&gateway), host, "{mode}: its host is the same");
        assert_ne!(program(&gateway, "tiny"), pid);
        assert_eq!(model(&gateway, "tiny")["restarts"], 1);
        let ends = wait_for("its record", LIMIT, || Some(programs_ends(&gateway)).filter(|ends| !ends.is_empty()));
        assert_eq!((&ends[0]["pid"], &ends[0]["signal"]), (&json!(pid), &json!(9)));
    }
}

#[test]
fn one_of_a_group_starts_when_the_other_is_gone() {
    for mode in MODES {
        // It takes a moment to go, which the next one has to wait for.
        let more = ", group = \"gpu\"";
        let gateway = gateway(&[("tiny", &section(mode, &[], more)), ("other", &section(mode, &[], more))]);
        let (_, text) = question(mode);
        let names = if mode == "stdio" { ["tiny/x", "other/x"] } else { ["tiny/ok", "other/ok"] };
        let stop = std::sync::atomic::AtomicBool::new(false);
        let most = std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut most = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    most = most.max(marked(&gateway).len());
                }
                most
            });
            let answers: Vec<_> = (0..4).map(|round| ask(&gateway, names[round % 2], text, false)).collect();
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            answers.iter().for_each(|answer| assert_eq!(said(answer), ANSWER));
            watcher.join().unwrap()
        });
        assert_eq!(most, 1, "{mode}: one at a time");
        let ends: BTreeSet<String> = gateway
            .exits()
            .iter()
            .filter(|record| record["kind"] == "host")
            .map(|record| record["initiator"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(ends, BTreeSet::from(["group".to_owned()]));
    }
}

#[test]
fn a_stop_ends_kept_programs_in_their_own_way_and_leaves_nothing() {
    for mode in MODES {
        let gateway = gateway(&[("tiny", &section(mode, &["fork:setsid:hang", "fork:daemon:hang"], ""))]);
        let (name, text) = question(mode);
        assert_eq!(said(&ask(&gateway, name, text, false)), ANSWER);
        wait_until("its descendants", LIMIT, || marked(&gateway).len() == 3);
        let log = gateway.state_dir().join("models/tiny.log");
        let run = crate::hosts::run_id(&gateway);
        let sockets = gateway.state_dir().join("hosts");
        send(gateway.pid(), Signal::TERM);
        let mut gateway = gateway;
        assert_eq!(gateway.wait_exit(2 * LIMIT).code(), Some(0));
        assert_eq!(crate::hosts::marked_of(&run), BTreeSet::new(), "{mode}");
        assert_eq!(std::fs::read_dir(&sockets).unwrap().count(), 0);
        if mode == "stdio" {
            assert!(std::fs::read_to_string(log).unwrap().contains("err: drain"));
        }
    }
}

#[test]
fn a_server_may_listen_at_a_socket_of_its_own() {
    let argv = [&*adaptersim().display().to_string(), "serve:{socket}", "hang"].map(str::to_owned);
    let own = format!("process = {{ mode = \"server\", argv = {argv:?}, health = \"/v1/models\" }}");
    let gateway = gateway(&[("tiny", &own)]);
    assert_eq!(said(&ask(&gateway, "tiny/ok", ANSWER, false)), ANSWER);
    let host = hosts(&gateway)[0];
    send(host, Signal::KILL);
    wait_until("an answer of the next one", LIMIT, || is_answered(&ask(&gateway, "tiny/ok", ANSWER, false)));
    let sockets = gateway.state_dir().join("hosts");
    send(hosts(&gateway)[0], Signal::KILL);
    send(gateway.pid(), Signal::TERM);
    let mut gateway = gateway;
    gateway.wait_exit(2 * LIMIT);
    assert_eq!(std::fs::read_dir(&sockets).unwrap().count(), 0);
}

#[test]
fn requests_are_filtered_on_their_way_to_a_server() {
    let more = ", strip = [\"user\"], set = { temperature = 0.25 }";
    let gateway = gateway(&[("tiny", &section("server", &[], more))]);
    let more = json!({ "messages": [{ "role": "user", "content": "x" }], "user": "me", "temperature": 2, "seed": 7 });
    let response = evergate_testkit::post_chat(&gateway.addr(), "tiny/echo-request", false, &more);
    let body: Value = serde_json::from_str(response.json()["received"]["body"].as_str().unwrap()).unwrap();
    assert_eq!(
        (&body["model"], &body["temperature"], &body["seed"]),
        (&json!("echo-request"), &json!(0.25), &json!(7))
    );
    assert!(body.get("user").is_none(), "{body}");
}

#[test]
fn g23_a_server_that_lives_and_does_not_answer_is_replaced() {
    let more = ", health_interval = \"200ms\", health_timeout = \"300ms\"";
    let gateway = gateway(&[("tiny", &section("server", &[], more))]);
    assert_eq!(said(&ask(&gateway, "tiny/ok", ANSWER, false)), ANSWER);
    let pid = program(&gateway, "tiny");
    send(pid, Signal::STOP);
    let response = ask(&gateway, "tiny/ok", ANSWER, false);
    assert_eq!(code(&response), (504, "adapter_timeout".into()));
    assert_eq!(said(&ask(&gateway, "tiny/ok", ANSWER, false)), ANSWER);
    assert_ne!(program(&gateway, "tiny"), pid);
}

#[test]
fn what_a_kept_program_says_to_the_client_reaches_it() {
    let gateway = gateway(&[("tiny", &section("stdio", &[], ""))]);
    let response = ask(&gateway, "tiny/x", "fail=422", false);
    assert_eq!(code(&response), (422, "unwilling".into()), "{}", response.text());
    assert_eq!(response.json()["error"]["message"], "no wish to");
    assert_eq!(code(&ask(&gateway, "tiny/x", "fail=500", false)), (502, "upstream_failed".into()));
}

#[test]
fn a_start_that_takes_longer_than_a_request_has_is_told_at_its_time_and_goes_on() {
    for mode in MODES {
        let folder = tempfile::tempdir().unwrap();
        let go = folder.path().join("go");
        let wait = format!("await:{}", go.display());
        let text = format!("{}[timeouts]\ntotal = \"1s\"\n", config(&[("tiny", &section(mode, &[&wait], ""))]));
        let gateway = Evergate::builder(EXE).config(text).start();
        wait_ready(&gateway, 2);
        let (name, text) = question(mode);
        let response = ask(&gateway, name, text, false);
        assert_eq!(code(&response), (503, "model_loading".into()), "{}", response.text());
        let host = hosts(&gateway);
        assert_eq!(state(&gateway, "tiny"), "starting");
        std::fs::write(&go, "").unwrap();
        wait_until("an answer", LIMIT, || is_answered(&ask(&gateway, name, text, false)));
        assert_eq!(hosts(&gateway), host, "{mode}: the start went on");
    }
}

#[test]
fn a_process_is_given_as_many_requests_as_it_says_that_it_takes() {
    let own = section("stdio", &[], "").replace("in_flight_max = 8", "queue = 0");
    let gateway = gateway(&[("tiny", &own)]);
    assert!(gateway.cli(&["models", "load", "tiny"]).status.success());
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    let (address, text) = (gateway.addr(), format!("await={};text=done", go.display()));
    let ask = || {
        let (address, more) = (address.clone(), json!({ "messages": [{ "role": "user", "content": text }] }));
        std::thread::spawn(move || evergate_testkit::post_chat(&address, "tiny/x", false, &more))
    };
    let held: Vec<_> = (0..8).map(|_| ask()).collect();
    wait_until("all of them at it", LIMIT, || model(&gateway, "tiny")["in_flight"] == 8);
    assert_eq!(marked(&gateway).len(), 1);
    std::fs::write(&go, "").unwrap();
    for held in held {
        assert_eq!(said(&held.join().unwrap()), "done");
    }
}

#[test]
fn a_late_request_of_an_old_worker_goes_to_the_program_that_has_replaced_its_own() {
    for mode in MODES {
        let gateway = gateway(&[("tiny", &section(mode, &[], ""))]);
        let (name, text) = question(mode);
        assert_eq!(said(&ask(&gateway, name, text, false)), ANSWER);
        let first = program(&gateway, "tiny");
        // Its worker cannot know before its last byte whose request it is.
        let body = json!({ "model": name, "messages": [{ "role": "user", "content": text }] }).to_string();
        let request = evergate_testkit::raw::post_request("/v1/chat/completions", "", &body);
        let (begin, end) = request.split_at(request.len() - 1);
        let mut late = evergate_testkit::Raw::connect(&gateway.addr());
        late.send(begin);
        wait_until("it has been accepted", LIMIT, || gateway.metrics().contains("evergate_client_connections 1\n"));
        gateway.write("evergate.toml", &config(&[("tiny", &section(mode, &[], ", queue = 7"))]));
        assert!(gateway.cli(&["reload"]).status.success());
        assert_eq!(said(&ask(&gateway, name, text, false)), ANSWER);
        let is_gone = || !marked(&gateway).contains(&first);
        wait_until("the end of the old program", LIMIT, is_gone);
        late.send(end);
        assert_eq!(said(&late.read_response(LIMIT)), ANSWER, "{mode}");
        assert_eq!(marked(&gateway).len(), 1);
    }
}

#[test]
fn what_a_killed_host_had_not_given_to_its_program_is_the_next_ones() {
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    let waiter = crate::hosts::waiter(go.to_str().unwrap()).replace("in_flight_max = 8", "in_flight_max = 1");
    let own = |mode| {
        section(mode, &[], "").replace("in_flight_max = 8", "in_flight_max = 1").replace(" }", ", in_flight_max = 1 }")
    };
    let stdio = section("stdio", &[], "").replace("in_flight_max = 8", "in_flight_max = 1");
    let wait = format!("await={};text=done", go.display());
    let cases = [
        (waiter, "tiny/x", "hello".to_owned(), "hello".to_owned()),
        (stdio, "tiny/x", wait.clone(), wait),
        (own("server"), "tiny/ok", "hi".to_owned(), "hi".to_owned()),
    ];
    for (section, name, held, waiting) in cases {
        let _ = std::fs::remove_file(&go);
        let gateway = gateway(&[("tiny", &section)]);
        let address = gateway.addr();
        let ask = |name: &'static str, text: &str| {
            let (address, more) = (address.clone(), json!({ "messages": [{ "role": "user", "content": text }] }));
            std::thread::spawn(move || evergate_testkit::post_chat(&address, name, false, &more))
        };
        let held = ask(if name == "tiny/ok" { "tiny/never-headers" } else { name }, &held);
        wait_until("one at the program", LIMIT, || model(&gateway, "tiny")["in_flight"] == 1);
        let waiting: Vec<_> = (0..6).map(|_| ask(name, &waiting)).collect();
        wait_until("the others in line", LIMIT, || model(&gateway, "tiny")["waiting"] == 6);
        send(hosts(&gateway)[0], Signal::KILL);
        std::fs::write(&go, "").unwrap();
        assert_eq!(code(&held.join().unwrap()), (502, "upstream_disconnected".into()), "{name}");
        for waiting in waiting {
            let response = waiting.join().unwrap();
            assert!(is_answered(&response), "{name}: {}", response.text());
        }
    }
}

/// G20: what a single target is told, be there others or not: all the time went into the start, and a later try may go well.
#[test]
fn g20_a_loading_model_that_takes_all_the_time_is_no_mere_deadline_with_several_targets() {
    for mode in MODES {
        let fake = FakeUpstream::start();
        let folder = tempfile::tempdir().unwrap();
        let wait = format!("await:{}", folder.path().join("go").display());
        let own = config(&[("tiny", &section(mode, &[&wait], ""))]);
        let others = format!(
            "[timeouts]\ntotal = \"1s\"\n[upstreams.fake]\nbase_url = \"{}\"\n[models.m]\n\
             targets = [ {{ upstream = \"tiny\", model = \"x\" }}, {{ upstream = \"fake\", model = \"ok\" }} ]\n",
            fake.base_url()
        );
        let gateway = Evergate::builder(EXE).config(format!("{own}{others}")).start();
        wait_ready(&gateway, 2);
        for stream in [false, true] {
            let response = ask(&gateway, "m", "hello", stream);
            assert_eq!(code(&response), (503, "model_loading".into()), "{mode}: {}", response.text());
            assert!(response.text().contains("was not ready in time"), "{}", response.text());
            assert_eq!(response.header("x-should-retry"), Some("true"));
            assert!(response.header("retry-after").is_some());
            let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
            let said = ["cause", "backend"].map(|key| record[key].clone());
            assert_eq!(said, [json!("model_loading"), json!("tiny")], "{record}");
            // Starting, unless the machine gave the master no processor for all of that second (seen).
            assert!(record["detail"].as_str().unwrap().starts_with("its host is "), "{record}");
        }
        assert_counted(&gateway, 503, "model_loading", 2);
        assert_eq!(fake.request_count(), 0, "there was no time left for it");
    }
}
