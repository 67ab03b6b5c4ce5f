//! What a worker gives up when memory is short (J3), rung by rung, each with its own answer. The limit is planted: files as a
//! memory cgroup has them, in a folder of the test's.

use std::path::PathBuf;

use evergate_testkit::raw::{chat_body, get_request, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, Response, gateway_config, wait_until};
use serde_json::{Value, json};

use crate::support::{CHAT, EXE, LIMIT, ONE_WORKER, assert_failed_stream, chat, open, open_stream, rest_of, via};

/// A megabyte, of which the planted limit has a thousand.
const MB: u64 = 1_000_000;

/// A gateway whose worker believes to be in such a cgroup.
struct Tight {
    gateway: Evergate,
    folder: PathBuf,
    _folder: tempfile::TempDir,
}

/// One worker, before `fake`, with a tenth of the limit used.
fn tight(fake: &FakeUpstream, more: &str) -> Tight {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_path_buf();
    for (name, text) in [
        ("memory.max", "1000000000"),
        ("memory.high", "max"),
        ("memory.stat", ""),
        ("meminfo", ""),
        ("memory.pressure", ""),
    ] {
        std::fs::write(path.join(name), text).unwrap();
    }
    std::fs::write(path.join("memory.current"), (100 * MB).to_string()).unwrap();
    let config = gateway_config(fake.base_url(), &[], &format!("{ONE_WORKER}{more}"));
    let gateway = Evergate::builder(EXE).config(config).env("EVERGATE_FAULT_MEMORY", path.to_str().unwrap()).start();
    Tight { gateway, folder: path, _folder: folder }
}

impl Tight {
    /// So much is used, in thousandths of the limit, and so much of it could be taken back.
    fn say(&self, used: u64, inactive: u64) {
        std::fs::write(self.folder.join("memory.stat"), format!("anon 1\ninactive_file {}\n", inactive * MB)).unwrap();
        // The file is never seen empty: as many bytes in one write.
        let mut text = (used * MB).to_string();
        text.insert_str(0, &"0".repeat(12 - text.len()));
        std::fs::write(self.folder.join("new"), &text).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(self.folder.join("memory.current")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, text.as_bytes(), 0).unwrap();
    }

    /// A file that the worker has open, never seen empty or by halves: as many bytes in one write.
    fn replace(&self, name: &str, text: &str) {
        let file = std::fs::OpenOptions::new().write(true).open(self.folder.join(name)).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, format!("{text:<256}").as_bytes(), 0).unwrap();
    }

    /// The same, and waits until the worker has seen it.
    fn be(&self, used: u64, rung: u8) {
        self.say(used, 0);
        let line = format!("evergate_memory_rung {rung}\n");
        wait_until(&line, LIMIT, || self.gateway.metrics().contains(&line));
    }

    /// Waits until so many requests are on the board: they have been let in, and their bodies are being read.
    fn wait_in_flight(&self, count: usize) {
        wait_until("requests in flight", LIMIT, || {
            let status: Value = serde_json::from_slice(&self.gateway.cli(&["status", "--json"]).stdout).unwrap();
            status["inflight"].as_array().map_or(0, Vec::len) == count
        });
    }

    fn spared(&self, what: &str) -> u64 {
        let (metrics, name) = (self.gateway.metrics(), format!("evergate_memory_spared_total{{what=\"{what}\"}} "));
        metrics.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap()
    }

    /// A request that stands on record under this id, and its answer.
    fn ask(&self, id: &str, body: &str) -> Response {
        let mut raw = Raw::connect(&self.gateway.addr());
        raw.send(&post_request(CHAT, &format!("x-request-id: {id}\r\n"), body));
        raw.read_response(LIMIT)
    }

    #[track_caller]
    fn assert_recorded(&self, id: &str, percent: u64) {
        let record = self.gateway.wait_access(id, LIMIT);
        let detail = format!("memory: {percent} % of 953 MiB used");
        assert_eq!((&record["cause"], &record["detail"]), (&json!("overloaded"), &json!(detail)), "{record}");
    }
}

fn large(bytes: usize) -> String {
    json!({ "model": via("ok"), "messages": [{ "role": "user", "content": "x".repeat(bytes) }] }).to_string()
}

fn small() -> String {
    chat_body(&via("ok"), false, &Value::Null)
}

#[test]
fn j3_at_85_percent_connections_are_not_kept() {
    let fake = FakeUpstream::start();
    let tight = tight(&fake, "");
    let mut raw = Raw::connect(&tight.gateway.addr());
    let mut ask = || {
        raw.send(&post_request(CHAT, "", &small()));
        let response = raw.read_response(LIMIT);
        (response.status, response.header("connection").map(str::to_owned))
    };
    assert_eq!(ask(), (200, None));
    tight.be(849, 0);
    assert_eq!(ask(), (200, None));
    tight.be(850, 1);
    wait_until("the idle upstream connection is gone", LIMIT, || fake.open_connections() == 0);
    assert_eq!(ask(), (200, Some("close".into())));
    tight.gateway.wait_stderr("memory: 85 % of 953 MiB used: connections are not kept", LIMIT);
    // Large bodies are still taken, and everything is as before when it is over.
    assert_eq!(tight.ask("large", &large(200_000)).status, 200);
    tight.be(100, 0);
    assert_eq!(chat(&tight.gateway, "ok", false).header("connection"), None);
}

/// By its length, before its body is read; by what has come, where it says none; and by what the others will be.
#[test]
fn j3_at_92_percent_large_bodies_are_refused_and_small_ones_are_not() {
    let fake = FakeUpstream::start();
    let tight = tight(&fake, "");
    tight.be(920, 2);
    let mut raw = Raw::connect(&tight.gateway.addr());
    // Of 200,000 bytes not one is sent.
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nx-request-id: by-length\r\ncontent-length: 200000\r\n\r\n");
    raw.send(head.as_bytes());
    let response = raw.read_response(LIMIT);
    assert_eq!((response.status, response.error_code().as_str()), (503, "overloaded"), "{}", response.text());
    assert!(response.error_message().contains("short of memory"), "{}", response.text());
    assert!(response.header("retry-after-ms").is_some());
    tight.assert_recorded("by-length", 92);
    let mut raw = Raw::connect(&tight.gateway.addr());
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nx-request-id: by-chunks\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    let (text, mut request) = (large(100_000), head.into_bytes());
    request.extend_from_slice(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes());
    let _ = raw.try_send(&request);
    assert_eq!(raw.read_response(LIMIT).status, 503);
    tight.assert_recorded("by-chunks", 92);
    assert_eq!((tight.spared("large_body"), fake.request_count()), (2, 0));
    assert_eq!(tight.ask("small", &small()).status, 200);
    // What is about to come counts, four times: 50 % are used, and a body of 8 MB has begun that makes it 82.
    let mut raws = Vec::new();
    std::fs::write(tight.folder.join("memory.max"), "100000000").unwrap();
    tight.be(50, 0);
    raws.push(begin(&tight, ("first", 8_000_000), "{"));
    tight.wait_in_flight(1);
    let mut second = begin(&tight, ("second", 8_000_000), "{");
    assert_eq!(second.read_response(LIMIT).status, 503);
    drop(raws);
}

#[test]
fn j3_at_95_percent_new_requests_are_refused_and_those_under_way_go_on() {
    let fake = FakeUpstream::start();
    let tight = tight(&fake, "");
    let mut under_way = open_stream(&tight.gateway, "hold-mid");
    tight.be(950, 3);
    let response = tight.ask("refused", &small());
    assert_eq!((response.status, response.error_code().as_str()), (503, "overloaded"), "{}", response.text());
    assert_eq!(response.header("x-should-retry"), Some("true"));
    let ms: u32 = response.header("retry-after-ms").unwrap().parse().unwrap();
    assert!((500..1500).contains(&ms), "{ms}");
    tight.assert_recorded("refused", 95);
    assert_eq!((tight.spared("request"), fake.request_count()), (1, 1));
    // Who asks how it is, and what there is, is answered.
    for path in ["/healthz", "/readyz", "/v1/models"] {
        let mut raw = Raw::connect(&tight.gateway.addr());
        raw.send(&get_request(path, ""));
        assert_eq!(raw.read_response(LIMIT).status, 200, "{path}");
    }
    fake.release();
    assert!(rest_of(&mut under_way).last().unwrap().is_done());
    // What the kernel can take back is not used up.
    tight.say(950, 200);
    wait_until("it is taken off", LIMIT, || tight.gateway.metrics().contains("evergate_memory_rung 0\n"));
    assert_eq!(tight.ask("again", &small()).status, 200);
}

/// The one that holds the most first, one at a time, and nobody who holds next to nothing.
#[test]
fn j3_at_98_percent_the_requests_that_hold_the_most_are_ended() {
    let fake = FakeUpstream::start();
    let tight = tight(&fake, "");
    let body = |bytes: usize, stream: bool| {
        let text = "x".repeat(bytes);
        json!({ "model": via(if stream { "hold-mid" } else { "hold" }), "stream": stream,
                "messages": [{ "role": "user", "content": text }] })
    };
    let ask = |id: &str, bytes: usize, stream: bool| {
        let index = fake.request_count();
        let mut raw = Raw::connect(&tight.gateway.addr());
        raw.send(&post_request(CHAT, &format!("x-request-id: {id}\r\n"), &body(bytes, stream).to_string()));
        let _ = fake.wait_request(index, LIMIT);
        raw
    };
    let mut none = open(&tight.gateway, "hold", false);
    let _ = fake.wait_request(0, LIMIT);
    let (mut little, mut most) = (ask("little", 100_000, false), ask("most", 900_000, true));
    assert_eq!(most.read_head(LIMIT).status, 200);
    assert!(most.next_event(LIMIT).is_some());
    tight.say(985, 0);
    let events = rest_of(&mut most);
    assert_failed_stream(&events, most.body_is_complete(), "overloaded");
    let response = little.read_response(LIMIT);
    assert_eq!((response.status, response.error_code().as_str()), (503, "overloaded"));
    for (id, index) in [("most", 2), ("little", 1)] {
        let _ = fake.wait_closed(index, LIMIT);
        let record = tight.gateway.wait_access(id, LIMIT);
        assert_eq!((&record["cause"], &record["detail"]), (&json!("overloaded"), &json!("memory")), "{record}");
    }
    let ended: Vec<String> =
        tight.gateway.access().iter().map(|one| one["client_id"].as_str().unwrap_or("").into()).collect();
    assert_eq!(ended, ["most", "little"], "in that order");
    wait_until("both are counted", LIMIT, || tight.spared("under_way") == 2);
    tight.be(100, 0);
    fake.release();
    assert_eq!(none.read_response(LIMIT).status, 200);
}

/// The head of a chat request whose body is that long, under this id, and a part of it.
fn begin(tight: &Tight, (id, bytes): (&str, usize), part: &str) -> Raw {
    let mut raw = Raw::connect(&tight.gateway.addr());
    let fields = format!("x-request-id: {id}\r\ncontent-length: {bytes}\r\n");
    raw.send(format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{fields}\r\n{part}").as_bytes());
    raw
}

#[test]
fn j3_at_98_percent_a_large_body_that_is_still_being_read_is_ended() {
    let fake = FakeUpstream::start();
    let tight = tight(&fake, "");
    let text = large(900_000);
    let mut much = begin(&tight, ("much", text.len()), &text[..400_000]);
    let (mut little, rest) = (small(), small());
    let rest = little.split_off(rest.len() / 2);
    let mut little = begin(&tight, ("little", little.len() + rest.len()), &little);
    tight.wait_in_flight(2);
    tight.say(985, 0);
    let response = much.read_response(LIMIT);
    assert_eq!((response.status, response.error_code().as_str()), (503, "overloaded"), "{}", response.text());
    assert!(response.error_message().contains("held the most"), "{}", response.text());
    assert_eq!(response.header("connection"), Some("close"), "its rest is no request");
    let record = tight.gateway.wait_access("much", LIMIT);
    assert_eq!((&record["cause"], &record["detail"]), (&json!("overloaded"), &json!("memory")), "{record}");
    wait_until("it is counted", LIMIT, || tight.spared("under_way") == 1);
    tight.be(100, 0);
    little.send(rest.as_bytes());
    assert_eq!(little.read_response(LIMIT).status, 200);
    assert_eq!(fake.request_count(), 1, "nobody is called for a part of a body");
}

/// Without a cgroup's limit it is the machine's memory that runs out, whatever its size.
#[test]
fn j3_without_a_limit_the_machines_memory_counts() {
    let fake = FakeUpstream::start();
    let tight = tight(&fake, "");
    tight.be(860, 1);
    let left = |mib: u64| {
        let text = format!("MemTotal:       67108864 kB\nMemAvailable: {:>14} kB\nSwapFree: 0 kB\n", mib * 1024);
        tight.replace("meminfo", &text);
    };
    let rung = |rung: u8| {
        let line = format!("evergate_memory_rung {rung}\n");
        wait_until(&line, LIMIT, || tight.gateway.metrics().contains(&line));
    };
    // As long as the cgroup has a limit, that one counts, whatever others have taken of the machine.
    left(50);
    for _ in 0..3 {
        // Each is looked at afresh.
        let response = tight.ask("bound", &large(200_000));
        assert_eq!(response.status, 200, "{}", response.text());
    }
    std::fs::write(tight.folder.join("memory.max"), "max\n").unwrap();
    rung(3);
    let response = tight.ask("refused", &small());
    assert_eq!((response.status, response.error_code().as_str()), (503, "overloaded"), "{}", response.text());
    let record = tight.gateway.wait_access("refused", LIMIT);
    assert_eq!(record["detail"], "memory: 50 MiB of the machine's are left", "{record}");
    left(4_000);
    rung(0);
    assert_eq!(tight.ask("large", &large(200_000)).status, 200);
    // What is about to come counts against all that is left: of 230 MiB there is enough for this body, but not for one of 19 MB.
    left(230);
    rung(1);
    assert_eq!(tight.ask("large", &large(200_000)).status, 200);
    let mut refused = begin(&tight, ("too-large", 19_000_000), "{");
    assert_eq!(refused.read_response(LIMIT).status, 503);
}

/// While all stand still for want of memory, what costs little is given up, and no more.
#[test]
fn j3_stalls_for_memory_close_connections_and_refuse_large_bodies() {
    let fake = FakeUpstream::start();
    let tight = tight(&fake, "");
    let stall = |percent: u64| {
        let text =
            format!("some avg10=99.00 avg60=0.00 avg300=0.00 total=1\nfull avg10={percent:02}.50 avg60=0.00 total=1\n");
        tight.replace("memory.pressure", &text);
    };
    let ask = |id: &str, body: &str| {
        let response = tight.ask(id, body);
        (response.status, response.header("connection").map(str::to_owned))
    };
    stall(19);
    assert_eq!(ask("calm", &small()), (200, None));
    stall(25);
    wait_until("it is seen", LIMIT, || tight.gateway.metrics().contains("evergate_memory_rung 1\n"));
    assert_eq!(ask("closing", &large(200_000)), (200, Some("close".into())));
    stall(90);
    wait_until("it is seen", LIMIT, || tight.gateway.metrics().contains("evergate_memory_rung 2\n"));
    assert_eq!(ask("large", &large(200_000)).0, 503);
    let record = tight.gateway.wait_access("large", LIMIT);
    assert_eq!(record["detail"], "memory: all stand still for it 90 % of the time", "{record}");
    assert_eq!(ask("small", &small()).0, 200, "how far the end is, a stall does not say");
    stall(0);
    wait_until("it is over", LIMIT, || tight.gateway.metrics().contains("evergate_memory_rung 0\n"));
    assert_eq!(ask("again", &large(200_000)), (200, None));
}

#[test]
fn j3_turned_off_nothing_is_given_up() {
    let fake = FakeUpstream::start();
    let tight = tight(&fake, "[limits]\nmemory_guard = false\n");
    tight.say(999, 0);
    let held = tight.ask("asked", &large(200_000));
    assert_eq!((held.status, held.header("connection")), (200, None));
    assert!(tight.gateway.metrics().contains("evergate_memory_rung 0\n"));
}

/// Its own limit: a worker that grows beyond `rss_max` is replaced, and until then takes nothing that makes it grow more.
#[test]
fn j3_a_worker_that_outgrows_its_own_limit_refuses_large_bodies() {
    let fake = FakeUpstream::start();
    let config = gateway_config(
        fake.base_url(),
        &[],
        &format!("{ONE_WORKER}rss_max = \"64MiB\"\n[timeouts]\ntotal = \"60s\"\n"),
    );
    let gateway = Evergate::builder(EXE).config(config).start();
    let body = json!({ "model": via("hold"), "messages": [{ "role": "user", "content": "x".repeat(1 << 20) }] });
    let request = post_request(CHAT, "", &body.to_string());
    // A hundred of them are more than half as much again.
    let mut held = Vec::new();
    let refused = loop {
        let mut raw = Raw::connect(&gateway.addr());
        let index = fake.request_count();
        let _ = raw.try_send(&request);
        let came = wait_until_either(&fake, index, &mut raw);
        match came {
            Some(response) => break response,
            None => held.push(raw),
        }
        assert!(held.len() < 100, "a hundred large bodies are held");
    };
    assert_eq!((refused.status, refused.error_code().as_str()), (503, "overloaded"), "{}", refused.text());
    assert!(!held.is_empty(), "the first one was refused");
    assert_eq!(chat(&gateway, "ok", false).status, 200, "small ones go on");
    fake.release();
    for raw in &mut held {
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
}

/// None when the request has reached the upstream, else its answer.
fn wait_until_either(fake: &FakeUpstream, index: usize, raw: &mut Raw) -> Option<Response> {
    let mut answer = None;
    wait_until("the request is sent on, or refused", LIMIT, || {
        answer = raw.try_read_response(std::time::Duration::from_millis(20)).ok();
        answer.is_some() || fake.request_count() > index
    });
    answer
}
