//! Reload: another configuration without a lost request, or everything as it was. Numbers are lines of the specification
//! of supervision.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::link::Gone;
use evergate_testkit::raw::get_request;
use evergate_testkit::wait::try_wait_for;
use evergate_testkit::{Evergate, FakeUpstream, Identity, Raw, gateway_config, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    EXE, LIMIT, ONE_WORKER, assert_alive, assert_failed_stream, assert_good_stream, before, chat, echo, is_full,
    last_message, open_stream, rest_of,
};

/// The generation that serves, as everybody can see it.
fn generation(gateway: &Evergate) -> u64 {
    status(gateway)["master"]["generation"].as_u64().unwrap()
}

pub fn status(gateway: &Evergate) -> Value {
    let output = gateway.cli(&["status", "--json"]);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Reloads, which must come off.
pub fn reload(gateway: &Evergate) -> String {
    let output = gateway.cli(&["reload"]);
    assert!(output.status.success(), "{output:?}\n{}", gateway.stderr());
    text(&output.stdout)
}

/// The exit code and the reason of a reload that failed.
pub fn failed(output: &Output) -> (i32, String) {
    assert!(output.stdout.is_empty(), "{output:?}");
    (output.status.code().unwrap(), text(&output.stderr))
}

/// Names of the models, asked on a connection of its own.
fn models(gateway: &Evergate) -> Vec<String> {
    let all = gateway.get("/v1/models").json();
    all["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
}

/// Generations of the living workers.
fn generations(gateway: &Evergate) -> Vec<u64> {
    gateway.children().iter().filter(|child| child.kind == "worker").map(|child| child.generation).collect()
}

fn with_model(fake: &FakeUpstream, model: &str) -> String {
    gateway_config(fake.base_url(), &[model], "")
}

#[test]
fn s18_a_reload_brings_the_new_configuration_and_old_streams_finish() {
    let fake = FakeUpstream::start();
    let gateway = Evergate::builder(EXE).config(with_model(&fake, "old")).start();
    let before = gateway.children();
    let mut stream = open_stream(&gateway, "hold-mid");
    assert_eq!(models(&gateway), ["old"]);

    gateway.write("evergate.toml", &with_model(&fake, "new"));
    assert_eq!(reload(&gateway), "generation 2 serves\n");
    // From this moment on nobody meets the old one.
    for _ in 0..20 {
        assert_eq!(models(&gateway), ["new"]);
    }
    assert_eq!(generation(&gateway), 2);
    // The idle worker and the clerk go at once, the one with the stream when that is over.
    gateway.wait_exits(2, LIMIT, |record| record["initiator"] == "reload" && record["code"] == 0);
    assert!(generations(&gateway).contains(&1), "the stream is still there");
    fake.release();
    let events = rest_of(&mut stream);
    assert_good_stream(&events, stream.body_is_complete());
    // Its client keeps the connection and sends nothing more: the worker waits for its linger and goes.
    let ended = gateway.wait_exits(3, LIMIT, |record| record["initiator"] == "reload");
    let mut pids: Vec<i64> = ended.iter().map(|record| record["pid"].as_i64().unwrap()).collect();
    let mut old: Vec<i64> = before.iter().map(|child| child.pid.into()).collect();
    pids.sort_unstable();
    old.sort_unstable();
    assert_eq!(pids, old, "every child of the old generation, and nobody else");
    assert!(ended.iter().all(|record| record["generation"] == 1 && record["lost"] == json!([])), "{ended:?}");
    assert_eq!(stream.read_to_close(LIMIT), (Vec::new(), Gone::Eof));
    assert!(gateway.metrics().contains("evergate_reloads_total{outcome=\"ok\"} 1"));
}

#[test]
fn s18_reloads_under_load_fail_no_request() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let (is_over, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (gateway, is_over, done) = (&gateway, &is_over, &done);
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    // A connection of its own for each, and every second one a stream.
                    let response = chat(gateway, "stream-4-5", number % 2 == 0);
                    assert!(response.status == 200 && response.is_complete, "{}", response.text());
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 0..8 {
            let so_far = done.load(Ordering::Relaxed);
            assert_eq!(reload(&gateway), format!("generation {} serves\n", round + 2));
            wait_until("requests go on", LIMIT, || done.load(Ordering::Relaxed) > so_far + 4);
        }
        is_over.store(true, Ordering::Relaxed);
    });
    gateway.wait_exits(16, LIMIT, |record| record["kind"] == "worker" && record["initiator"] == "reload");
    assert!(gateway.exits().iter().all(|record| record["lost"] == json!([])), "{:?}", gateway.exits());
    wait_until("only the last generation is left", LIMIT, || generations(&gateway) == [9, 9]);
}

#[test]
fn s19_a_broken_file_changes_nothing_and_the_command_says_why() {
    let fake = FakeUpstream::start();
    let gateway = Evergate::builder(EXE).config(with_model(&fake, "old")).start();
    let before = gateway.children();
    let mut stream = open_stream(&gateway, "hold-mid");
    for (config, said) in [
        (with_model(&fake, "new") + "[workers]\nmni = 1\n", "unknown key \"mni\"; did you mean \"min\"?"),
        ("not toml".into(), "1 mistake in the configuration"),
        (with_model(&fake, "new").replace("base_url", "api_key = { file = \"gone\" }\nbase_url"), "gone"),
    ] {
        gateway.write("evergate.toml", &config);
        let (code, why) = failed(&gateway.cli(&["reload"]));
        assert_eq!(code, 78, "{why}");
        assert!(why.contains(said) && why.contains("evergate.toml"), "{why}");
        assert_eq!((generation(&gateway), gateway.children()), (1, before.clone()));
        assert_eq!(models(&gateway), ["old"]);
    }
    // The same by a signal, where only the log can say it; and as JSON.
    gateway.signal(Signal::HUP);
    gateway.wait_stderr("the reload has failed, generation 1 serves on", LIMIT);
    let output = gateway.cli(&["reload", "--json"]);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &answer["reloaded"]), (Some(78), &json!(false)));
    assert!(answer["error"].as_str().unwrap().contains("gone"), "{answer}");
    fake.release();
    let events = rest_of(&mut stream);
    assert_good_stream(&events, stream.body_is_complete());
    wait_until("all five are counted", LIMIT, || {
        gateway.metrics().contains("evergate_reloads_total{outcome=\"failed\"} 5")
    });
    assert!(gateway.exits().is_empty(), "{:?}", gateway.exits());
}

/// Workers of the first generation.
fn workers_of_first(gateway: &Evergate) -> Vec<i32> {
    let mut workers = gateway.children();
    workers.retain(|child| child.kind == "worker" && child.generation == 1);
    workers.sort_by_key(|child| child.slot);
    workers.iter().map(|child| child.pid).collect()
}

/// A gateway whose workers' boot fails in a way that the test writes into a file.
fn faulty(fake: &FakeUpstream, more: &str) -> (Evergate, tempfile::NamedTempFile) {
    let fault = tempfile::NamedTempFile::new().unwrap();
    let path = fault.path().to_str().unwrap().to_owned();
    let config = gateway_config(fake.base_url(), &[], more);
    let gateway = Evergate::builder(EXE).config(config).env("EVERGATE_FAULT_BOOT", &path).start();
    // One that still boots would meet what the test plants for the next generation.
    wait_until("two ready workers", LIMIT, || gateway.metrics().contains("evergate_workers{phase=\"ready\"} 2"));
    (gateway, fault)
}

#[test]
fn s19_workers_that_cannot_boot_leave_the_old_generation_serving() {
    let fake = FakeUpstream::start();
    let (gateway, fault) = faulty(&fake, "[workers]\nboot_timeout = \"1s\"\n");
    let before = gateway.workers();
    for (kind, said) in [("fail", "a planted fault"), ("hang", "was not ready in time")] {
        std::fs::write(fault.path(), kind).unwrap();
        let (code, why) = failed(&gateway.cli(&["reload"]));
        assert_eq!(code, 1, "{why}");
        assert!(why.contains("of generation") && why.contains(said), "{why}");
        assert_eq!((generation(&gateway), workers_of_first(&gateway)), (1, before.clone()));
        assert_eq!(chat(&gateway, "ok", false).status, 200);
        wait_until("nobody of the failed generation is left", LIMIT, || generations(&gateway) == [1, 1]);
    }
    std::fs::write(fault.path(), "").unwrap();
    // Numbers of generations that failed are not used again: exit records stay clear.
    assert_eq!(reload(&gateway), "generation 4 serves\n");
    assert!(gateway.exits().iter().all(|record| record["lost"] == json!([])));
}

#[test]
fn s19_what_only_a_restart_can_change_is_refused_by_name() {
    let fake = FakeUpstream::start();
    let config = gateway_config(fake.base_url(), &[], "");
    let gateway = Evergate::builder(EXE).config(config.clone()).start();
    let other = config.replacen("127.0.0.1:0", "127.0.0.2:0", 1);
    let admin = config.replace("[admin]\nlisten = \"127.0.0.1:0\"", "[admin]\nlisten = \"\"");
    for (config, key) in [
        (other, "[server] listen"),
        (admin, "[admin] listen"),
        (config.clone() + "[workers]\nslots = 257\n", "[workers] slots"),
        (config.clone() + "[workers]\nmax = 60\n", "[workers] max"),
    ] {
        gateway.write("evergate.toml", &config);
        let (code, why) = failed(&gateway.cli(&["reload"]));
        assert_eq!(code, 78, "{why}");
        assert!(why.contains(key) && why.contains("needs a restart"), "{why}");
    }
    assert_eq!(generation(&gateway), 1);
    // Everything else can be: fewer slots, other numbers of workers.
    gateway.write("evergate.toml", &(config + "[workers]\nslots = 8\nmin = 3\nmax = 5\n"));
    reload(&gateway);
    wait_until("three workers", LIMIT, || generations(&gateway) == [2, 2, 2]);
    let master = &status(&gateway)["master"];
    assert_eq!((&master["workers_min"], &master["workers_max"]), (&json!(3), &json!(5)));
}

/// A respawn gets its generation's configuration, whatever became of the file.
#[test]
fn s19_a_respawn_after_the_file_was_broken_serves_as_before() {
    let fake = FakeUpstream::start();
    let gateway = Evergate::builder(EXE).config(with_model(&fake, "first")).start();
    gateway.write("evergate.toml", &with_model(&fake, "second"));
    reload(&gateway);
    wait_until("only the second generation is left", LIMIT, || generations(&gateway) == [2, 2]);
    gateway.write("evergate.toml", "broken");
    for index in [0, 1] {
        let pid = gateway.kill_worker(index);
        wait_until("another worker", LIMIT, || {
            let workers = gateway.workers();
            workers.len() == 2 && !workers.contains(&pid)
        });
    }
    for _ in 0..10 {
        assert_eq!(models(&gateway), ["second"]);
    }
    assert_eq!(generations(&gateway), [2, 2]);
}

#[test]
fn s20_the_master_answers_during_a_reload_and_a_second_one_waits() {
    let fake = FakeUpstream::start();
    let (gateway, fault) = faulty(&fake, "[workers]\nboot_timeout = \"2s\"\n");
    std::fs::write(fault.path(), "hang").unwrap();
    let mut pings = Vec::new();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| gateway.cli(&["reload"]));
        wait_until("the first is under way", LIMIT, || generations(&gateway).contains(&2));
        // Two that come meanwhile, and a signal: all of them are one.
        let second = scope.spawn(|| gateway.cli(&["reload"]));
        let third = scope.spawn(|| gateway.cli(&["reload"]));
        gateway.signal(Signal::HUP);
        let end = Instant::now() + Duration::from_millis(700);
        while Instant::now() < end {
            pings.push(ping(&gateway));
        }
        std::fs::write(fault.path(), "").unwrap();
        let (code, why) = failed(&first.join().unwrap());
        assert!(code == 1 && why.contains("was not ready in time"), "{code} {why}");
        for waiting in [second, third] {
            assert_eq!(text(&waiting.join().unwrap().stdout), "generation 3 serves\n");
        }
    });
    assert_prompt(&pings);
    assert_eq!(generation(&gateway), 3);
    assert!(gateway.metrics().contains("evergate_reloads_total{outcome=\"ok\"} 1"));
}

/// Below 50 ms; a machine that runs the other tests too may be away for longer now and then.
fn assert_prompt(pings: &[Duration]) {
    let slow = pings.iter().filter(|ping| **ping >= Duration::from_millis(50)).count();
    assert!(slow * 20 <= pings.len(), "{slow} of {} took 50 ms: {pings:?}", pings.len());
}

/// How long the master takes to answer at its control socket.
fn ping(gateway: &Evergate) -> Duration {
    let begun = Instant::now();
    let mut socket = UnixStream::connect(gateway.state_dir().join("control.sock")).unwrap();
    socket.write_all(b"ping\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "ok\n");
    begun.elapsed()
}

/// Three generations that drain, each with a stream, the oldest first, and a fourth that serves. `shutdown` has a drain
/// that outlasts the test.
fn three_that_drain(fake: &FakeUpstream, shutdown: &str) -> (Evergate, Vec<Raw>) {
    let gateway = before(fake, &format!("{ONE_WORKER}[shutdown]\n{shutdown}\n"));
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(open_stream(&gateway, "hold-mid"));
        reload(&gateway);
    }
    assert_eq!(generations(&gateway).len(), 4);
    (gateway, streams)
}

/// A reload that would make a fourth one waits, and cuts nothing.
#[test]
fn s20_a_reload_waits_for_room_beside_three_generations_that_drain() {
    let fake = FakeUpstream::start();
    let (gateway, mut streams) = three_that_drain(&fake, "drain = \"100s\"");
    streams.push(open_stream(&gateway, "hold-mid"));
    // A mistake is said at once all the same.
    gateway.write("evergate.toml", "broken");
    assert_eq!(failed(&gateway.cli(&["reload"])).0, 78);
    gateway.write("evergate.toml", &(with_model(&fake, "new") + ONE_WORKER));
    let begun = Instant::now();
    let (still, output) = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| gateway.cli(&["reload"]));
        gateway.wait_stderr("waits for an older one", LIMIT);
        let mut pings = Vec::new();
        let is_over = try_wait_for(Duration::from_secs(2), || {
            pings.push(ping(&gateway));
            waiting.is_finished().then_some(())
        });
        assert_prompt(&pings);
        let still = (is_over.is_none(), generation(&gateway));
        fake.release();
        (still, waiting.join().unwrap())
    });
    if begun.elapsed() > Duration::from_secs(25) {
        println!("held up by a busy machine for {:?}, nearly as long as it waits", begun.elapsed());
        return;
    }
    assert_eq!((still, output.status.success()), ((true, 4), true), "{output:?}\n{}", gateway.stderr());
    for stream in &mut streams {
        let events = rest_of(stream);
        assert_good_stream(&events, stream.body_is_complete());
    }
    assert_eq!(models(&gateway), ["new"]);
    wait_until("only the last is left", LIMIT, || generations(&gateway) == [5]);
    assert!(gateway.exits().iter().all(|record| record["note"] == "" && record["lost"] == json!([])));
}

/// ... but not for ever: then the oldest is told to be quick. In `./test --full` only, since it takes half a minute; the
/// rule is shown by the simulation, too.
#[test]
fn s20_a_reload_that_waited_long_enough_hastens_the_oldest() {
    if !is_full() {
        return;
    }
    let fake = FakeUpstream::start();
    let (gateway, mut streams) = three_that_drain(&fake, "drain = \"100s\"");
    let begun = Instant::now();
    reload(&gateway);
    assert!(begun.elapsed() > Duration::from_secs(29), "{:?}", begun.elapsed());
    let mut oldest = streams.remove(0);
    let events = rest_of(&mut oldest);
    assert_failed_stream(&events[..], oldest.body_is_complete(), "server_shutting_down");
    assert!(last_message(&events).contains("reloaded again and again"), "{events:?}");
    fake.release();
    for mut stream in streams {
        let events = rest_of(&mut stream);
        assert_good_stream(&events, stream.body_is_complete());
    }
    wait_until("only the last is left", LIMIT, || generations(&gateway) == [5]);
}

#[test]
fn s17_a_number_asked_for_by_hand_outlives_a_reload() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 1\nmax = 4\nidle_after = \"1s\"\n");
    let output = gateway.cli(&["scale", "3"]);
    assert_eq!(text(&output.stdout), "3 workers wanted\n", "{output:?}");
    gateway.wait_workers(3);
    reload(&gateway);
    wait_until("three of the new generation", LIMIT, || generations(&gateway) == [2, 2, 2]);
    assert_eq!(status(&gateway)["master"]["workers_target"], 3);
}

#[test]
fn s20_a_stop_during_a_reload_ends_both() {
    let fake = FakeUpstream::start();
    let (mut gateway, fault) = faulty(&fake, "");
    std::fs::write(fault.path(), "hang").unwrap();
    let reload = std::thread::scope(|scope| {
        let reload = scope.spawn(|| gateway.cli(&["reload"]));
        wait_until("it is under way", LIMIT, || generations(&gateway).contains(&2));
        gateway.signal(Signal::TERM);
        reload.join().unwrap()
    });
    let (code, why) = failed(&reload);
    assert!(code == 1 && why.contains("stopping"), "{code} {why}");
    // One that hangs in its boot has to be killed if it takes signals already: then force was needed.
    let code = gateway.wait_exit(LIMIT).code();
    assert!(matches!(code, Some(0 | 75)), "{code:?}");
    gateway.wait_no_children(LIMIT);
}

#[test]
fn s18_a_certificate_is_renewed_by_a_reload() {
    let config = "[server]\nlisten = [\"127.0.0.1:0\"]\ntls = { cert = \"cert.pem\", key = \"key.pem\" }\n\
                  [admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\ntargets = [{ upstream = \"echo\" }]\n";
    let (old, new) = (Identity::generate(), Identity::generate());
    let gateway = Evergate::builder(EXE)
        .config(config)
        .file("cert.pem", &old.cert_pem)
        .file("key.pem", &old.key_pem)
        .tls(&old.client_config(&["http/1.1"]))
        .start();
    let get = |identity: &Identity| {
        let mut raw = Raw::connect_tls(&gateway.addr(), &identity.client_config(&["http/1.1"]));
        raw.try_send(&get_request("/readyz", "")).map_err(|gone| format!("{gone:?}"))?;
        raw.try_read_response(LIMIT).map(|response| response.status)
    };
    // Half of a renewal: a certificate that does not belong to the key.
    gateway.write("cert.pem", &new.cert_pem);
    let (code, why) = failed(&gateway.cli(&["reload"]));
    assert!(code == 78 && why.contains("cannot be used"), "{code} {why}");
    assert_eq!(get(&old), Ok(200));
    gateway.write("key.pem", &new.key_pem);
    reload(&gateway);
    assert_eq!(get(&new), Ok(200));
    assert!(get(&old).is_err(), "nobody shows the old certificate any more");
}

#[test]
fn s31_clients_that_say_nothing_or_never_read_hold_nobody_up() {
    let gateway = echo();
    let path = gateway.state_dir().join("control.sock");
    let silent: Vec<UnixStream> = (0..40).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let mut long = UnixStream::connect(&path).unwrap();
    let deaf: Vec<UnixStream> = (0..20)
        .map(|_| {
            let mut socket = UnixStream::connect(&path).unwrap();
            socket.write_all(b"reload\n").unwrap();
            socket
        })
        .collect();
    // Those before it are let go after their second, sixteen at a time.
    let answered = wait_for("an answer", Duration::from_secs(10), || Some(ping(&gateway)));
    assert!(answered < Duration::from_secs(6), "{answered:?}");
    assert!(ping(&gateway) < Duration::from_millis(500));
    let _ = long.write_all(&[b'x'; 4096]);
    long.set_read_timeout(Some(LIMIT)).unwrap();
    let mut rest = Vec::new();
    // Closed, with or without a word.
    let ended = long.read_to_end(&mut rest);
    let is_closed = ended.as_ref().map_or_else(|error| error.kind() == std::io::ErrorKind::ConnectionReset, |_| true);
    assert!(is_closed, "{ended:?}");
    assert_alive(&gateway);
    drop((silent, deaf));
}
