//! The way to an upstream: its name, its addresses, its certificate. The name's answers are planted (`dns_fault.rs`), so that
//! a test needs neither a resolver of its own nor the machine's; addresses and certificates are real.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use evergate_testkit::fake::{BlackHole, TEXT, refused_address};
use evergate_testkit::raw::{Response, chat_body, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Identity, Raw, gateway_config, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{CHAT, EXE, LIMIT, ONE_WORKER, assert_error, chat, open, via};

/// A gateway before the upstream `http://two.test:PORT`, whose addresses the test says.
struct Named {
    gateway: Evergate,
    answers: PathBuf,
    _folder: tempfile::TempDir,
}

/// How long addresses are used without asking again, and a failure is believed, by the manual.
const FRESH: Duration = Duration::from_secs(10);
const FAILED: Duration = Duration::from_secs(1);

fn named(port: &str, answers: &str, more: &str) -> Named {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("answers");
    std::fs::write(&path, answers).unwrap();
    let config = gateway_config(&format!("http://two.test:{port}/v1"), &[], &format!("{ONE_WORKER}{more}"));
    let gateway = Evergate::builder(EXE).config(config).env("EVERGATE_FAULT_DNS", path.to_str().unwrap()).start();
    Named { gateway, answers: path, _folder: folder }
}

fn port_of(address: &str) -> &str {
    address.rsplit(':').next().unwrap()
}

impl Named {
    fn say(&self, answers: &str) {
        std::fs::write(&self.answers, answers).unwrap();
    }

    /// Look-ups so far that ended like this. The worker tells its counts with its beat.
    fn wait_look_ups(&self, result: &str, count: u64) {
        let line = format!("evergate_dns_lookups_total{{result=\"{result}\"}} {count}\n");
        wait_until(&line, LIMIT, || self.gateway.metrics().contains(&line));
    }
}

/// A request under this id, and its record.
#[track_caller]
fn recorded(gateway: &Evergate, id: &str, stream: bool) -> (Response, Value) {
    let mut raw = Raw::connect(&gateway.addr());
    let fields = format!("x-request-id: {id}\r\n");
    raw.send(&post_request(CHAT, &fields, &chat_body(&via("ok"), stream, &Value::Null)));
    let response = raw.read_response(LIMIT);
    let record = gateway.wait_access(id, LIMIT);
    (response, record)
}

fn detail(record: &Value) -> &str {
    record["detail"].as_str().unwrap_or_default()
}

/// D1: no such name. The failure is believed for a second at most, by everybody; then the name is asked for again.
#[test]
fn d1_a_name_that_does_not_exist_is_a_502_and_asked_for_again() {
    let fake = FakeUpstream::start();
    let named = named(port_of(fake.address()), "two.test\n", "");
    let began = Instant::now();
    for stream in [false, true, false] {
        let (response, record) = recorded(&named.gateway, &format!("d1-{stream}"), stream);
        assert_error(&response, 502, "upstream_connect_failed");
        assert_eq!(record["cause"], "upstream_connect_failed");
        assert!(detail(&record).starts_with("resolve: "), "{record}");
    }
    named.wait_look_ups("failed", 1);
    // Later than that a second look-up would be right.
    assert!(began.elapsed() < FAILED, "the machine is too slow for this test");
    named.say("two.test 127.0.0.1\n");
    wait_until("the name is found", 3 * FAILED, || chat(&named.gateway, "ok", false).status == 200);
    assert_eq!(fake.request_count(), 1);
    // The real resolver says so too.
    let config = gateway_config("http://no-such-host.invalid/v1", &[], "");
    let gateway = Evergate::builder(EXE).config(config).start();
    assert_error(&chat(&gateway, "ok", false), 502, "upstream_connect_failed");
}

/// One right answer, whose connection the upstream closes behind it: the next request opens another. A request that comes while
/// it is closing would rightly not be sent again.
#[track_caller]
fn assert_right_and_over(named: &Named, fake: &FakeUpstream) {
    assert_eq!(chat(&named.gateway, "stale", false).content(), TEXT);
    wait_until("the end of its connection", LIMIT, || fake.open_connections() == 0);
}

/// D1: the addresses that were good last are used while the resolver fails or is silent.
#[test]
fn d1_last_good_addresses_serve_while_the_resolver_is_down() {
    let fake = FakeUpstream::start();
    let named = named(port_of(fake.address()), "two.test 127.0.0.1\n", "");
    assert_right_and_over(&named, &fake);
    let found = Instant::now();
    named.say("two.test\n");
    wait_until("the addresses are old", 2 * FRESH, || found.elapsed() > FRESH);
    for _ in 0..3 {
        assert_right_and_over(&named, &fake);
    }
    named.wait_look_ups("failed", 1);
    // Silent for a minute: nobody waits for it long.
    named.say("two.test after=60000 127.0.0.1\n");
    let failed = Instant::now();
    wait_until("the failure is old", LIMIT, || failed.elapsed() > FAILED);
    for _ in 0..3 {
        let began = Instant::now();
        assert_right_and_over(&named, &fake);
        assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
    }
    named.wait_look_ups("late", 1);
}

/// D2: a slow resolver has its own limit, one look-up serves everybody, and who needs no name is not held up.
#[test]
fn d2_a_slow_look_up_ends_at_its_own_limit_and_runs_once() {
    let fake = FakeUpstream::start();
    let more = format!("[timeouts]\ndns = \"2s\"\n[upstreams.other]\nbase_url = \"{}\"\n", fake.base_url());
    let named = named(port_of(fake.address()), "two.test after=60000 127.0.0.1\n", &more);
    let began = Instant::now();
    let mut waiting: Vec<Raw> = (0..50).map(|n| open(&named.gateway, "ok", n % 2 == 0)).collect();
    let other = evergate_testkit::post_chat(&named.gateway.addr(), "other/ok", false, &Value::Null);
    assert_eq!(other.content(), TEXT);
    assert!(began.elapsed() < Duration::from_millis(1800), "{:?}", began.elapsed());
    for raw in &mut waiting {
        let response = raw.read_response(LIMIT);
        assert_error(&response, 504, "upstream_timeout");
        assert!(response.error_message().contains("timeouts.dns"), "{}", response.text());
    }
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1800) && took < Duration::from_secs(8), "{took:?}");
    named.wait_look_ups("late", 1);
    let metrics = named.gateway.metrics();
    assert!(metrics.contains("evergate_dns_lookups_total{result=\"ok\"} 0\n"), "{metrics}");
    assert_eq!(fake.request_count(), 1);
    let threads = std::fs::read_dir(format!("/proc/{}/task", named.gateway.workers()[0])).unwrap();
    let names = threads.filter_map(|thread| std::fs::read_to_string(thread.unwrap().path().join("comm")).ok());
    assert_eq!(names.filter(|name| name.trim() == "evergate-dns").count(), 1);
    // Nor does it hold up the exit.
    let (mut gateway, began) = (named.gateway, Instant::now());
    gateway.signal(Signal::TERM);
    assert!(gateway.wait_exit(LIMIT).success(), "{}", gateway.stderr());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// D2: one that answers within its limit is waited for, by all with one look-up.
#[test]
fn d2_five_hundred_requests_to_a_slow_name_make_one_look_up() {
    let fake = FakeUpstream::start();
    let named = named(port_of(fake.address()), "two.test after=700 127.0.0.1\n", "slots = 600\n");
    let mut waiting: Vec<Raw> = (0..500).map(|_| open(&named.gateway, "ok", false)).collect();
    for raw in &mut waiting {
        assert_eq!(raw.read_response(LIMIT).content(), TEXT);
    }
    named.wait_look_ups("ok", 1);
    let record = named.gateway.metrics();
    assert!(record.contains("evergate_dns_lookups_total{result=\"late\"} 0\n"), "{record}");
}

/// D3: a name that moves is followed at the latest when its addresses are old; a kept connection stays where it is.
#[test]
fn d3_a_name_that_moves_is_followed() {
    let old = FakeUpstream::start();
    let port = port_of(old.address()).to_owned();
    let new = FakeUpstream::start_at(&format!("127.0.0.2:{port}"));
    let named = named(&port, "two.test 127.0.0.1\n", "");
    assert_eq!(chat(&named.gateway, "ok", false).content(), TEXT);
    let found = Instant::now();
    named.say("two.test 127.0.0.2\n");
    assert_eq!(chat(&named.gateway, "stale", false).content(), TEXT);
    assert_eq!((old.connections().len(), old.request_count()), (1, 2));
    wait_until("the addresses are old", 2 * FRESH, || found.elapsed() > FRESH);
    assert_eq!(chat(&named.gateway, "ok", false).content(), TEXT);
    assert_eq!((old.request_count(), new.request_count()), (2, 1));
}

/// D5: an address that swallows everything is left behind after a quarter of a second, also within one family; one that
/// refuses at once.
#[test]
fn d5_a_black_hole_costs_a_head_start_and_not_the_request() {
    let fake = FakeUpstream::start();
    let port = port_of(fake.address());
    for hole in ["[::1]", "127.0.0.2"] {
        let _hole = BlackHole::at(&format!("{hole}:{port}"));
        let hole = hole.trim_matches(['[', ']']);
        let named = named(port, &format!("two.test {hole} 127.0.0.1\n"), "");
        let began = Instant::now();
        assert_eq!(chat(&named.gateway, "ok", false).content(), TEXT);
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(240) && took < Duration::from_secs(2), "{hole}: {took:?}");
    }
    let named = named(port, "two.test ::1 127.0.0.1\n", "");
    let began = Instant::now();
    assert_eq!(chat(&named.gateway, "ok", false).content(), TEXT);
    assert!(began.elapsed() < Duration::from_millis(240), "{:?}", began.elapsed());
}

/// D5: one address that swallows everything, alone: `connect` ends it.
#[test]
fn d5_a_black_hole_alone_ends_at_connect() {
    let hole = BlackHole::at("127.0.0.1:0");
    let config = gateway_config(&format!("http://{}/v1", hole.address()), &[], "[timeouts]\nconnect = \"400ms\"\n");
    let gateway = Evergate::builder(EXE).config(config).start();
    for stream in [false, true] {
        let began = Instant::now();
        let response = chat(&gateway, "ok", stream);
        assert_error(&response, 504, "upstream_timeout");
        assert!(response.error_message().contains("did not take a connection within timeouts.connect"));
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(360) && took < Duration::from_secs(3), "{took:?}");
    }
}

/// D7: what is wrong with a certificate is on record; people are told once a minute, clients never.
#[test]
fn d7_a_certificate_that_is_not_right_is_named_on_record() {
    let itself = |identity: Identity| (identity.cert_pem.clone(), identity);
    let (of_namesake, namesake) = Identity::of_a_namesake();
    let cases = [
        ("expired", " days ago by this machine's clock; it has to be renewed", itself(Identity::expired())),
        ("not_valid_yet", " days by this machine's clock; look at that clock", itself(Identity::not_valid_yet())),
        (
            "wrong_name",
            "is for elsewhere.example, not for localhost; base_url",
            itself(Identity::for_names(&["elsewhere.example"])),
        ),
        ("unknown_authority", "as \"roots\" of this upstream", (String::new(), Identity::generate())),
        ("ca_certificate", "it needs one with CA:FALSE, and \"roots\"", itself(Identity::authority())),
        ("bad_signature", "compare the file of \"roots\"", (namesake, of_namesake)),
    ];
    for (kind, words, (roots, identity)) in &cases {
        let fake = FakeUpstream::start_tls(identity);
        let trust = if roots.is_empty() { "" } else { "[upstreams.fake.roots]\nfile = \"ca.pem\"\n" };
        let config = gateway_config(fake.base_url(), &[], &format!("{ONE_WORKER}{trust}"));
        let gateway = Evergate::builder(EXE).config(config).file("ca.pem", roots).start();
        for (n, stream) in [false, true, false].into_iter().enumerate() {
            let (response, record) = recorded(&gateway, &format!("{kind}-{n}"), stream);
            assert_error(&response, 502, "upstream_connect_failed");
            assert!(!response.text().contains(kind), "{}", response.text());
            assert_eq!(record["cause"], "upstream_connect_failed");
            let detail = detail(&record);
            assert!(detail.starts_with(&format!("tls: {kind}: ")) && detail.contains(words), "{record}");
            // Of no type of the library's.
            assert!(!detail.contains("Other") && !detail.contains("Name("), "{record}");
        }
        let said = gateway.wait_stderr("could be made: tls: ", LIMIT);
        assert_eq!(said.matches("could be made: tls: ").count(), 1, "{said}");
        assert!(said.contains(kind) && said.contains(words), "{said}");
        assert_eq!(fake.request_count(), 0);
        let count = "cause=\"upstream_connect_failed\"} 3\n";
        wait_until("three are counted", LIMIT, || gateway.metrics().contains(count));
    }
}

/// D7: an upstream that speaks no TLS.
#[test]
fn d7_an_upstream_without_tls_is_a_502() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // What web servers say to a handshake.
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 64]).unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").unwrap();
    });
    let config = gateway_config(&format!("https://{address}/v1"), &[], "");
    let gateway = Evergate::builder(EXE).config(config).start();
    let (response, record) = recorded(&gateway, "plain", false);
    assert_error(&response, 502, "upstream_connect_failed");
    let words = "tls: handshake: what answers there does not speak TLS";
    assert!(detail(&record).starts_with(words), "{record}");
    answering.join().unwrap();
}

/// D4: the record tells a refused connection from the rest.
#[test]
fn a_refused_connection_is_named_on_record() {
    let config = gateway_config(&format!("http://{}/v1", refused_address()), &[], "");
    let gateway = Evergate::builder(EXE).config(config).start();
    let (response, record) = recorded(&gateway, "refused", false);
    assert_error(&response, 502, "upstream_connect_failed");
    assert!(detail(&record).starts_with("connect: "), "{record}");
    assert_eq!(record["status"], json!(502));
}
