//! Which limit ended a request: the client is told its name, the record has it, and the upstream is left.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use evergate_testkit::fake::{BlackHole, mute};
use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, gateway_config, wait_until};
use serde_json::{Value, json};

use crate::support::{CHAT, EXE, LIMIT, ONE_WORKER, assert_error, before, rest_of, via};

/// What is said of a limit.
struct Said {
    /// The configuration's key, with its section.
    key: &'static str,
    status: u16,
    code: &'static str,
    /// Up to the key.
    words: &'static str,
}

const fn said(key: &'static str, status: u16, code: &'static str, words: &'static str) -> Said {
    Said { key, status, code, words }
}

/// Sends a request that a limit of 400 ms is going to end, and checks all that is said of it.
#[track_caller]
fn assert_named(gateway: &Evergate, script: &str, stream: bool, extra: &Value, said: &Said) {
    let id = format!("{}-{script}-{stream}", said.key).replace([' ', '\'', '/'], "-");
    let mut raw = Raw::connect(&gateway.addr());
    let began = Instant::now();
    raw.send(&post_request(CHAT, &format!("x-request-id: {id}\r\n"), &chat_body(script, stream, extra)));
    let response = raw.read_response(LIMIT);
    let took = began.elapsed();
    let (message, status) = if response.status == 200 {
        let events = response.events();
        let last = events.last().unwrap();
        assert_eq!(last.error_code().as_deref(), Some(said.code), "{id}");
        (last.data.clone(), 200)
    } else {
        assert_error(&response, said.status, said.code);
        (response.error_message(), said.status)
    };
    let words = format!("{} {}", said.words, said.key);
    assert!(message.contains(&words), "{id}: {message:?} does not say {words:?}");
    assert!(took >= Duration::from_millis(360) && took < Duration::from_secs(4), "{id}: {took:?}");
    let record = gateway.wait_access(&id, LIMIT);
    assert_eq!((&record["cause"], &record["status"]), (&json!(said.code), &json!(status)), "{record}");
    assert_eq!(record["detail"], said.key, "{record}");
}

fn with(base_url: &str, key: &str) -> Evergate {
    let more = format!("{ONE_WORKER}[timeouts]\n{key} = \"400ms\"\n");
    Evergate::builder(EXE).config(gateway_config(base_url, &[], &more)).start()
}

fn big() -> Value {
    json!({"messages": [{"role": "user", "content": "x".repeat(10_000_000)}]})
}

/// D2, D5, D8: the way to an upstream.
#[test]
fn a_connect_that_takes_too_long_names_what_it_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let answers = folder.path().join("answers");
    std::fs::write(&answers, "slow.test after=60000 127.0.0.1\n").unwrap();
    let hole = BlackHole::at("127.0.0.1:0");
    let (_mute, silent) = mute();
    let cases = [
        (
            "http://slow.test:9/v1".to_owned(),
            said("timeouts.dns", 504, "upstream_timeout", "was not found by its name within"),
        ),
        (
            "http://slow.test:9/v1".to_owned(),
            said("timeouts.connect", 504, "upstream_timeout", "was not found by its name within"),
        ),
        (
            format!("http://{}/v1", hole.address()),
            said("timeouts.connect", 504, "upstream_timeout", "did not take a connection within"),
        ),
        (
            format!("https://{silent}/v1"),
            said("timeouts.connect", 504, "upstream_timeout", "did not finish the TLS handshake within"),
        ),
        (
            format!("https://{silent}/v1"),
            said("timeouts.total", 504, "deadline_exceeded", "did not finish the TLS handshake within"),
        ),
    ];
    for (base_url, said) in &cases {
        let key = said.key.strip_prefix("timeouts.").unwrap();
        let more = format!("{ONE_WORKER}[timeouts]\n{key} = \"400ms\"\n");
        let gateway = Evergate::builder(EXE)
            .config(gateway_config(base_url, &[], &more))
            .env("EVERGATE_FAULT_DNS", answers.to_str().unwrap())
            .start();
        for stream in [false, true] {
            assert_named(&gateway, "fake/ok", stream, &Value::Null, said);
        }
    }
}

/// An upstream that takes a connection and then reads nothing of a large request; one that reads slowly is no fault.
#[test]
fn a_request_that_the_upstream_does_not_read_ends_by_write() {
    let said = said("timeouts.write", 504, "upstream_timeout", "did not take the request within");
    let (_mute, address) = mute();
    let gateway = with(&format!("http://{address}/v1"), "write");
    for stream in [false, true] {
        assert_named(&gateway, "fake/ok", stream, &big(), &said);
    }
    wait_until("nothing is left of them", LIMIT, || gateway.metrics().contains("evergate_upstream_connections 0\n"));

    let slow = SlowReader::start();
    let gateway = with(&format!("http://{}/v1", slow.address), "write");
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(CHAT, "", &chat_body("fake/ok", false, &big())));
    let response = raw.read_response(LIMIT);
    assert_eq!(response.status, 200, "{}", response.text());
    let took = slow.took();
    assert!(took > Duration::from_millis(1200), "the upstream was not slow: {took:?}");
}

/// An upstream that reads a request a little at a time and then answers.
struct SlowReader {
    address: String,
    reading: std::thread::JoinHandle<Duration>,
}

impl SlowReader {
    fn start() -> Self {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 64 * 1024).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let reading = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (began, mut bytes, mut piece) = (Instant::now(), 0, vec![0; 512 * 1024]);
            while bytes < 10_000_000 {
                bytes += stream.read(&mut piece).unwrap();
                evergate_testkit::wait::try_wait_for(Duration::from_millis(20), || None::<()>);
            }
            let took = began.elapsed();
            let body = "{\"choices\":[]}";
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all((head + body).as_bytes()).unwrap();
            took
        });
        Self { address, reading }
    }

    fn took(self) -> Duration {
        self.reading.join().unwrap()
    }
}

/// From the request's last byte to the answer's.
#[test]
fn an_answer_that_takes_too_long_names_the_limit() {
    let late = |key, words| said(key, 504, "upstream_timeout", words);
    let over = |key, words| said(key, 504, "deadline_exceeded", words);
    let cases = [
        ("never-headers", false, over("timeouts.total", "did not answer within")),
        ("idle-mid", false, over("timeouts.total", "did not finish its answer within")),
        ("never-headers", true, over("timeouts.total", "did not answer within")),
        ("silent", true, over("timeouts.total", "did not finish within")),
        ("silent", true, said("timeouts.first_token", 504, "first_token_timeout", "sent no event within")),
        ("idle-mid", false, late("timeouts.idle", "did not finish its answer within")),
        ("idle-mid", true, late("timeouts.idle", "was silent for longer than")),
        ("stream-400-50", true, over("timeouts.stream_total", "did not finish within")),
    ];
    let fake = FakeUpstream::start();
    for (n, (script, stream, said)) in cases.iter().enumerate() {
        let gateway = with(fake.base_url(), said.key.strip_prefix("timeouts.").unwrap());
        assert_named(&gateway, &via(script), *stream, &Value::Null, said);
        let _ = fake.wait_closed(n, LIMIT);
    }
}

/// The limit of one of several targets; the error is that of the attempt that might have done better.
#[test]
fn an_attempt_that_takes_too_long_names_the_limit() {
    let fake = FakeUpstream::start();
    let target = |model: &str| format!("{{ upstream = \"fake\", model = \"{model}\" }}");
    let mut models = String::new();
    for script in ["never-headers", "silent"] {
        let targets = [script, "status-401"].map(target).join(", ");
        write!(models, "[models.\"m-{script}\"]\nattempt = \"400ms\"\ntargets = [{targets}]\n").unwrap();
    }
    let gateway = before(&fake, &models);
    let said = |words| said("the model's attempt", 504, "upstream_timeout", words);
    assert_named(&gateway, "m-never-headers", false, &Value::Null, &said("did not answer within"));
    assert_named(&gateway, "m-silent", true, &Value::Null, &said("sent no event within"));
}

/// A request that does not come, and a line that does not move.
#[test]
fn a_request_that_comes_too_slowly_or_waits_too_long_names_the_limit() {
    let fake = FakeUpstream::start();
    let body = chat_body(&via("ok"), false, &Value::Null);
    let request = post_request(CHAT, "", &body);
    for key in ["body_idle", "body"] {
        let gateway = with(fake.base_url(), key);
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&request[..request.len() - 5]);
        let response = raw.read_response(LIMIT);
        assert_error(&response, 408, "request_timeout");
        assert!(response.error_message().ends_with(&format!("within timeouts.{key}")), "{}", response.text());
    }
    let more = "[workers]\nmin = 1\nmax = 1\nslots = 1\n[timeouts]\ntotal = \"400ms\"\nidle = \"20s\"\n";
    let gateway = before(&fake, more);
    let mut first = crate::support::open_stream(&gateway, "hold-mid");
    let response = crate::support::chat(&gateway, "ok", false);
    assert_error(&response, 503, "overloaded");
    assert!(response.error_message().contains("timeouts.total"), "{}", response.text());
    fake.release();
    assert!(rest_of(&mut first).last().unwrap().is_done());
    assert_eq!(fake.request_count(), 1);
}

/// Who reads nothing is not told anything: the record names the limit.
#[test]
fn a_client_that_reads_nothing_is_recorded_with_the_limit() {
    let fake = FakeUpstream::start();
    let gateway = with(fake.base_url(), "client_stall");
    let mut raw = Raw::connect(&gateway.addr());
    raw.link().shrink_receive_buffer();
    raw.send(&post_request(CHAT, "x-request-id: stalled\r\n", &chat_body(&via("flood"), true, &Value::Null)));
    let record = gateway.wait_access("stalled", LIMIT);
    assert_eq!((&record["cause"], &record["detail"]), (&json!("client_stalled"), &json!("timeouts.client_stall")));
    let _ = fake.wait_closed(0, LIMIT);
}
