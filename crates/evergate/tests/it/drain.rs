//! A worker drains while the gateway serves on: what its HTTP/1 clients see. Test names carry the line of the
//! specification's section on draining that they show.

use std::time::{Duration, Instant};

use evergate_testkit::driver::is_alive;
use evergate_testkit::link::Gone;
use evergate_testkit::raw::{Response, get_request};
use evergate_testkit::wait::try_wait_for;
use evergate_testkit::{Evergate, FakeUpstream, Identity, Raw, chat_request, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    EXE, LIMIT, ONE_WORKER, assert_alive, assert_error, assert_failed_stream, assert_good_stream, before, echo_with,
    open, open_stream, rest_of,
};

/// How long an idle connection stays readable in a drain.
pub const LINGER: Duration = Duration::from_secs(2);

/// One worker that speaks TLS.
const TLS: &str = "[server]\nlisten = [\"127.0.0.1:0\"]\ntls = { cert = \"cert.pem\", key = \"key.pem\" }\n\
                   [admin]\nlisten = \"127.0.0.1:0\"\n[workers]\nmin = 1\nmax = 1\n\
                   [models.echo]\ntargets = [{ upstream = \"echo\" }]\n";

/// A gateway with one worker that speaks TLS, with more sections, and what its clients need.
pub fn tls_gateway(more: &str) -> (Evergate, Identity) {
    let identity = Identity::generate();
    let builder = Evergate::builder(EXE).config(format!("{TLS}{more}"));
    let builder = builder.file("cert.pem", &identity.cert_pem).file("key.pem", &identity.key_pem);
    (builder.tls(&identity.client_config(&["http/1.1"])).start(), identity)
}

/// Tells the first worker to drain, as the master does; returns its process id.
pub fn term_worker(gateway: &Evergate) -> i32 {
    let pid = gateway.workers()[0];
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    pid
}

/// As `term_worker`, and waits until the worker has heard of it.
pub fn drain_worker(gateway: &Evergate) -> i32 {
    let pid = term_worker(gateway);
    wait_until("the drain", LIMIT, || {
        let status = status(gateway);
        let children = status["children"].as_array().unwrap();
        !children.iter().any(|child| child["pid"] == pid && child["phase"] == "ready")
    });
    pid
}

/// Whether a test that wanted to send within the linger was held up by a busy machine, and proves nothing.
pub fn is_too_late(began: Instant) -> bool {
    let is_late = began.elapsed() > LINGER - Duration::from_millis(300);
    if is_late {
        println!("held up: {:?} after the signal", began.elapsed());
    }
    is_late
}

fn status(gateway: &Evergate) -> Value {
    serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap()
}

/// The requests in flight.
fn inflight(gateway: &Evergate) -> Vec<Value> {
    status(gateway)["inflight"].as_array().unwrap().clone()
}

/// Waits until the workers count that many client connections.
pub fn wait_connections(gateway: &Evergate, count: u64) {
    wait_until("connections in the worker", LIMIT, || {
        let status = status(gateway);
        let children = status["children"].as_array().unwrap();
        children.iter().filter_map(|child| child["connections"].as_u64()).sum::<u64>() == count
    });
}

pub fn is_closing(response: &Response) -> bool {
    response.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
}

/// A connection that has had an answer and is kept.
fn kept(gateway: &Evergate) -> Raw {
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&get_request("/healthz", ""));
    assert!(!is_closing(&raw.read_response(LIMIT)));
    raw
}

/// The last answer of a drained connection: whole, announced as the last, then FIN and no reset.
#[track_caller]
fn assert_last_answer(raw: &mut Raw) {
    let response = raw.read_response(LIMIT);
    assert_eq!((response.status, is_closing(&response)), (200, true), "{}", response.text());
    assert_eq!(raw.read_to_close(LIMIT), (Vec::new(), Gone::Eof));
    assert!(!raw.link().was_reset());
}

/// A client that thinks for up to a second and never looks for an end of file gets its answer.
#[test]
fn s18_a_kept_connection_gets_a_last_answer_after_a_seconds_thought() {
    let gateway = echo_with(ONE_WORKER);
    let mut all: Vec<Raw> = (0..11).map(|_| kept(&gateway)).collect();
    let began = Instant::now();
    let pid = drain_worker(&gateway);
    for (tenths, raw) in all.iter_mut().enumerate() {
        let at = began + Duration::from_millis(100 * tenths as u64);
        let _ = raw.link().pause(at.saturating_duration_since(Instant::now()));
        if is_too_late(began) {
            return;
        }
        raw.send(&chat_request("echo", tenths.is_multiple_of(2), &Value::Null));
    }
    all.iter_mut().for_each(assert_last_answer);
    drop(all);
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!((&record["code"], &record["lost"]), (&json!(0), &json!([])), "{record}");
    assert_alive(&gateway);
}

/// A pool opens connections before it needs them: they are owed the time that a request's head has.
#[test]
fn s18_a_connection_that_was_never_used_is_owed_a_request() {
    let plain = echo_with(ONE_WORKER);
    let (tls, identity) = tls_gateway("");
    let config = identity.client_config(&["http/1.1"]);
    let connect = |gateway: &Evergate, is_tls: bool| {
        let mut raw = if is_tls { Raw::connect_tls(&gateway.addr(), &config) } else { Raw::connect(&gateway.addr()) };
        assert!(raw.stays_open(Duration::from_millis(50)));
        raw
    };
    let mut all: Vec<Raw> = [(&plain, false), (&tls, true)]
        .into_iter()
        .map(|(gateway, is_tls)| {
            let raw = connect(gateway, is_tls);
            wait_connections(gateway, 1);
            term_worker(gateway);
            raw
        })
        .collect();
    let pause = LINGER + Duration::from_millis(500);
    all[0].link().pause(pause).expect("still open");
    for raw in &mut all {
        raw.send(&get_request("/healthz", ""));
        assert_last_answer(raw);
    }
}

/// ... and no more than that: a drain is not held up by it for ever.
#[test]
fn s18_a_connection_that_stays_unused_is_closed_in_order() {
    let gateway = echo_with(&format!("{ONE_WORKER}[timeouts]\nheader = \"2500ms\"\n"));
    let mut unused = Raw::connect(&gateway.addr());
    wait_connections(&gateway, 1);
    let began = Instant::now();
    term_worker(&gateway);
    assert_eq!(unused.read_to_close(LIMIT), (Vec::new(), Gone::Eof));
    assert!(!unused.link().was_reset());
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(2) && took < LIMIT / 2, "{took:?}");
}

/// A head that has begun is read to its end, also when that comes after the linger.
#[test]
fn s18_half_a_head_is_waited_for() {
    let gateway = echo_with(ONE_WORKER);
    let mut all = [kept(&gateway), Raw::connect(&gateway.addr())];
    for raw in &mut all {
        raw.send(b"GET /healthz HTTP/1.1\r\nhost:");
    }
    wait_connections(&gateway, 2);
    term_worker(&gateway);
    all[0].link().pause(LINGER + Duration::from_millis(500)).expect("still open");
    for raw in &mut all {
        raw.send(b" localhost\r\n\r\n");
        assert_last_answer(raw);
    }
}

/// Behind its own FIN the worker reads on: a request that crosses it is not answered, but not reset either.
#[test]
fn s18_a_request_that_crosses_the_end_is_not_reset() {
    let gateway = echo_with(ONE_WORKER);
    let mut raw = kept(&gateway);
    let began = Instant::now();
    term_worker(&gateway);
    assert_eq!(raw.read_to_close(LIMIT), (Vec::new(), Gone::Eof));
    let took = began.elapsed();
    assert!(took >= LINGER - Duration::from_millis(100) && took < LIMIT / 2, "{took:?}");
    for _ in 0..5 {
        raw.try_send(&get_request("/healthz", "")).unwrap();
        try_wait_for(Duration::from_millis(20), || None::<()>);
        assert!(!raw.link().was_reset());
    }
}

/// Requests sent around the closing instant, a millisecond apart: each is answered whole or sees an ordered end.
#[test]
fn s18_no_request_in_the_closing_instant_is_reset() {
    const CLIENTS: u64 = 300;
    let gateway = echo_with(ONE_WORKER);
    let mut all: Vec<Raw> = (0..CLIENTS).map(|_| kept(&gateway)).collect();
    let began = Instant::now();
    term_worker(&gateway);
    let first = began + LINGER - Duration::from_millis(CLIENTS / 2);
    let mut in_time = 0;
    for (n, raw) in all.iter_mut().enumerate() {
        // Waiting without reading: these clients do not look.
        let at = first + Duration::from_millis(n as u64);
        try_wait_for(at.saturating_duration_since(Instant::now()), || None::<()>);
        let _ = raw.try_send(&get_request("/healthz", ""));
        in_time += usize::from(began.elapsed() < LINGER - Duration::from_millis(20));
    }
    let (mut answered, mut ended) = (0, 0);
    for raw in &mut all {
        match raw.try_read_response(LIMIT) {
            Ok(response) => {
                assert!(response.is_complete && response.status == 200 && is_closing(&response));
                answered += 1;
            }
            Err(reason) => {
                assert!(reason.starts_with("Eof before a response head; got \"\""), "{reason}");
                ended += 1;
            }
        }
        assert!(!raw.link().was_reset());
    }
    println!("{answered} answered, {ended} ended");
    assert!(answered >= in_time, "the linger was shorter than promised: {answered} of {in_time} in time");
}

/// What is in flight finishes; the connection is good for one more request then, though its head promised more.
#[test]
fn s18_a_stream_in_flight_finishes_and_its_connection_lingers() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let mut raw = open_stream(&gateway, "hold-mid");
    let pid = term_worker(&gateway);
    raw.link().pause(LINGER + Duration::from_millis(300)).expect("still open");
    assert!(is_alive(pid));
    fake.release();
    let began = Instant::now();
    assert_good_stream(&rest_of(&mut raw), raw.body_is_complete());
    let _ = raw.link().pause(Duration::from_secs(1));
    if is_too_late(began) {
        return;
    }
    raw.send(&get_request("/healthz", ""));
    assert_last_answer(&mut raw);
}

/// ... and is closed after its linger when its client keeps it and asks for nothing more.
#[test]
fn s18_a_connection_that_is_kept_after_its_stream_is_closed_after_its_linger() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let mut all = [open_stream(&gateway, "hold-mid"), open_stream(&gateway, "hold-mid")];
    // One whose next head has begun meanwhile is waited for as long as a head has.
    all[1].send(b"GET /healthz HTTP/1.1\r\nhost:");
    let pid = drain_worker(&gateway);
    fake.release();
    let began = Instant::now();
    for raw in &mut all {
        assert_good_stream(&rest_of(raw), raw.body_is_complete());
    }
    assert_eq!(all[0].read_to_close(LIMIT), (Vec::new(), Gone::Eof));
    assert!(!all[0].link().was_reset());
    let took = began.elapsed();
    assert!(took >= LINGER - Duration::from_millis(100) && took < LIMIT / 2, "{took:?}");
    all[1].send(b" localhost\r\n\r\n");
    assert_last_answer(&mut all[1]);
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!((&record["code"], &record["note"]), (&json!(0), &json!("")), "{record}");
}

/// A slow reader has its whole answer, though the worker was done with it long before.
#[test]
fn s18_an_answer_that_is_read_slowly_is_not_cut() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let mut raw = open(&gateway, "huge-12000000", false);
    wait_until("a full socket", 3 * LIMIT, || inflight(&gateway).first().is_some_and(|one| one["phase"] == "stream"));
    let pid = term_worker(&gateway);
    try_wait_for(LINGER + Duration::from_millis(500), || None::<()>);
    // The worker is done with it, and the linger begins, some megabytes before we are.
    let began = Instant::now();
    let response = raw.read_response(3 * LIMIT);
    assert!(response.is_complete && response.body.len() > 12_000_000, "{}", response.body.len());
    if !is_too_late(began) {
        // Its head came before the drain, so that it is owed one more.
        raw.send(&get_request("/healthz", ""));
        assert_last_answer(&mut raw);
    }
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!((&record["code"], &record["note"]), (&json!(0), &json!("")), "{record}");
}

#[test]
fn s21_a_worker_without_connections_drains_at_once() {
    let gateway = echo_with(ONE_WORKER);
    let mut times: Vec<Duration> = Vec::new();
    // As below: a full machine delays some, a linger would delay all.
    while times.len() < 20 && times.last().is_none_or(|time| *time >= Duration::from_millis(100)) {
        wait_connections(&gateway, 0);
        let began = Instant::now();
        let pid = term_worker(&gateway);
        wait_until("the worker's end", LIMIT, || !is_alive(pid));
        times.push(began.elapsed());
        let _ = gateway.wait_exits(times.len(), LIMIT, |record| record["kind"] == "worker");
        let _ = gateway.wait_workers(1);
        assert_alive(&gateway);
    }
    println!("{times:?}");
    assert!(times.last().is_some_and(|time| *time < Duration::from_millis(100)), "{times:?}");
}

/// The stage that ran out stands in the record; a stream that was told so is a normal end.
#[test]
fn s21_the_record_names_the_drain_that_ran_out() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, &format!("{ONE_WORKER}[shutdown]\ndrain = \"300ms\"\n"));
    let mut held = open_stream(&gateway, "hold-mid");
    let pid = term_worker(&gateway);
    assert_failed_stream(&rest_of(&mut held), held.body_is_complete(), "server_shutting_down");
    assert_eq!(held.read_to_close(LIMIT), (Vec::new(), Gone::Eof));
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    let note = record["note"].as_str().unwrap_or_default();
    assert_eq!((&record["code"], note), (&json!(0), "drain ran out: 1 request was ended"), "{record}");
}

/// A drain that is cut short ends idle connections in order too, and answers what comes in that moment.
#[test]
fn s21_connections_end_in_order_when_the_drain_runs_out() {
    let gateway = echo_with(&format!("{ONE_WORKER}[shutdown]\ndrain = \"300ms\"\n"));
    let mut all: Vec<Raw> = (0..50).map(|_| kept(&gateway)).collect();
    let began = Instant::now();
    term_worker(&gateway);
    for (n, raw) in all.iter_mut().enumerate() {
        let at = began + Duration::from_millis(275 + n as u64);
        try_wait_for(at.saturating_duration_since(Instant::now()), || None::<()>);
        let _ = raw.try_send(&chat_request("echo", false, &Value::Null));
    }
    for raw in &mut all {
        match raw.try_read_response(LIMIT) {
            Ok(response) if response.status == 200 => assert!(response.is_complete && is_closing(&response)),
            Ok(response) => assert_error(&response, 503, "server_shutting_down"),
            Err(reason) => assert!(reason.starts_with("Eof before a response head; got \"\""), "{reason}"),
        }
        assert!(!raw.link().was_reset());
    }
}

/// A request whose body is still on its way when the drain runs out is told so.
#[test]
fn s21_a_body_on_its_way_is_answered_when_the_drain_runs_out() {
    let gateway = echo_with(&format!("{ONE_WORKER}[shutdown]\ndrain = \"300ms\"\n"));
    let mut raw = Raw::connect(&gateway.addr());
    let request = chat_request("echo", false, &Value::Null);
    raw.send(&request[..request.len() - 5]);
    wait_until("the request in the worker", LIMIT, || inflight(&gateway).len() == 1);
    let pid = term_worker(&gateway);
    assert_error(&raw.read_response(LIMIT), 503, "server_shutting_down");
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!((&record["code"], &record["lost"]), (&json!(0), &json!([])), "{record}");
    assert!(!raw.link().was_reset());
}

/// A client that does not take its answer costs the worker the exit code that says so.
#[test]
fn s21_the_record_names_the_cancel_that_ran_out() {
    let fake = FakeUpstream::start();
    let stages = "[shutdown]\ndrain = \"300ms\"\ncancel = \"200ms\"\n";
    let gateway = before(&fake, &format!("{ONE_WORKER}{stages}"));
    // More than both ends' kernels hold, and no more: a debug build needs its time for each megabyte.
    let mut raw = open(&gateway, "huge-10000000", false);
    raw.link().shrink_receive_buffer();
    // A whole answer is in this phase only when the socket takes no more of it.
    wait_until("a full socket", 3 * LIMIT, || inflight(&gateway).first().is_some_and(|one| one["phase"] == "stream"));
    let pid = term_worker(&gateway);
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    let note = record["note"].as_str().unwrap_or_default();
    let expected = "drain ran out: 1 request was ended; out of time: cancel; 1 request left";
    assert_eq!((&record["code"], note), (&json!(75), expected), "{record}");
}

#[test]
fn s21_an_idle_gateway_stops_within_100_ms() {
    let mut times = Vec::new();
    // On a full machine each of the three processes may wait for a processor that long; what would wait for a turn of the
    // master's loop, or for a linger, takes half a second every time.
    while times.len() < 20 && times.last().is_none_or(|time| *time >= Duration::from_millis(100)) {
        let mut gateway = echo_with("");
        wait_connections(&gateway, 0);
        let began = Instant::now();
        gateway.signal(Signal::TERM);
        assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0));
        times.push(began.elapsed());
    }
    println!("{times:?}");
    assert!(times.last().is_some_and(|time| *time < Duration::from_millis(100)), "{times:?}");
}
