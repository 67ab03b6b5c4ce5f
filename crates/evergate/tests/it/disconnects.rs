//! What becomes of a call whose client leaves: stopped, read on for a while, or read to its end (`on_disconnect`). What it
//! costs is asserted at the upstream.

use std::time::{Duration, Instant};

use evergate_testkit::fake::{How, PROMPT_TOKENS, mute};
use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{CHAT, EXE, LIMIT, ONE_WORKER, before, send};
use crate::targets::config;

/// A model `m` that is this script of the upstream, with that policy.
fn with(fake: &FakeUpstream, script: &str, policy: &str, more: &str) -> Evergate {
    let model = format!(
        "{ONE_WORKER}{more}[models.m]\non_disconnect = {policy}\ntargets = [{{ upstream = \"fake\", model = \"{script}\" }}]\n"
    );
    before(fake, &model)
}

const DRAIN: &str = "{ drain = \"10s\" }";

/// A request under that id, which has reached the upstream.
fn ask(gateway: &Evergate, fake: &FakeUpstream, id: &str, stream: bool) -> Raw {
    let index = fake.request_count();
    let mut raw = Raw::connect(&gateway.addr());
    let extra = json!({"stream_options": {"include_usage": true}});
    let body = chat_body("m", stream, if stream { &extra } else { &Value::Null });
    raw.send(&post_request(CHAT, &format!("x-request-id: {id}\r\n"), &body));
    let _ = fake.wait_request(index, LIMIT);
    raw
}

/// As `ask`, when the first event is there.
fn ask_stream(gateway: &Evergate, fake: &FakeUpstream, id: &str) -> Raw {
    let mut raw = ask(gateway, fake, id, true);
    assert_eq!(raw.read_head(LIMIT).status, 200);
    assert!(raw.next_event(LIMIT).is_some());
    raw
}

fn leave(raw: Raw, n: usize) {
    if n.is_multiple_of(2) { raw.close() } else { raw.reset() }
}

/// Nothing is left of any request: no row, no place, no connection that is in use.
#[track_caller]
fn assert_clean(gateway: &Evergate) {
    wait_until("nothing in flight", LIMIT, || {
        let metrics = gateway.metrics();
        metrics.contains("evergate_inflight_requests{kind=\"unary\"} 0\n")
            && metrics.contains("evergate_inflight_requests{kind=\"stream\"} 0\n")
            && metrics.contains("evergate_worker_load{worker=\"0\"} 0\n")
    });
}

#[track_caller]
fn assert_left(record: &Value, status: u16, detail: &str, has_usage: bool) {
    assert_eq!((&record["cause"], &record["status"]), (&json!("client_gone"), &json!(status)), "{record}");
    assert_eq!(record["detail"].as_str().unwrap_or_default(), detail, "{record}");
    assert_eq!(record["tokens_in"].is_u64(), has_usage, "{record}");
    if has_usage {
        assert_eq!(record["tokens_in"], PROMPT_TOKENS, "{record}");
    }
}

/// A2, A3: the default.
#[test]
fn a2_a_call_is_stopped_by_default() {
    let fake = FakeUpstream::start();
    let gateway = with(&fake, "hold", "\"cancel\"", "");
    for n in 0..4 {
        leave(ask(&gateway, &fake, &format!("gone-{n}"), n > 1), n);
        let _ = fake.wait_closed(n, LIMIT);
        assert_left(&gateway.wait_access(&format!("gone-{n}"), LIMIT), 499, "", false);
    }
    assert_clean(&gateway);
}

/// Read on, a unary answer and a stream, before the head and after it: the upstream is heard to its end, what it cost is
/// counted, and the connection is kept.
#[test]
fn what_a_client_leaves_is_read_on_for_its_usage() {
    for policy in [DRAIN, "\"finish\""] {
        let fake = FakeUpstream::start();
        let gateway = with(&fake, "hold-mid", policy, "");
        for n in 0..6 {
            let id = format!("left-{n}");
            let (is_stream, has_head) = (n > 1, n > 3);
            let raw = if has_head { ask_stream(&gateway, &fake, &id) } else { ask(&gateway, &fake, &id, is_stream) };
            leave(raw, n);
            wait_until("its connection is gone", LIMIT, || {
                gateway.metrics().contains("evergate_client_connections 0\n")
            });
            // Held: the place, the row, the connection.
            let kind = if is_stream { "stream" } else { "unary" };
            let row = format!("evergate_inflight_requests{{kind=\"{kind}\"}} 1\n");
            assert!(gateway.metrics().contains(&row), "{policy} {n}");
            assert!(gateway.access().iter().all(|record| record["client_id"] != id.as_str()), "recorded too early");
            fake.release();
            assert_eq!(fake.wait_end(n, LIMIT).how, How::Answered, "{policy} {n}");
            // A stream whose head was held back had its first event already, and so its head may be out.
            let record = gateway.wait_access(&id, LIMIT);
            let status = if record["status"] == 200 && is_stream { 200 } else { 499 };
            assert_left(&record, status, "on_disconnect: finished", true);
            fake.hold();
        }
        assert_clean(&gateway);
        assert_eq!(fake.connections().len(), 1, "{policy}: the connection was not kept");
        let counted = format!("evergate_tokens_in_total{{model=\"m\",key=\"\"}} {}\n", 6 * PROMPT_TOKENS);
        assert!(gateway.metrics().contains(&counted), "{}", gateway.metrics());
        let ends = gateway.metrics();
        assert!(ends.lines().any(|line| line.contains("cause=\"client_gone\"")), "{ends}");
    }
}

/// What goes on is a call that was sent. Its first target has failed and the second one is still being connected to: that one
/// is not called for a client that has left.
#[test]
fn a_second_target_that_was_not_sent_anything_is_left_with_the_client() {
    let (fake, (silent, address)) = (FakeUpstream::start(), mute());
    let text =
        config(&[fake.base_url(), &format!("https://{address}/v1")], &["status-500>m|on_disconnect = \"finish\""], "");
    let gateway = Evergate::builder(EXE).config(text).start();
    for (n, stream) in [false, true].into_iter().enumerate() {
        let (id, mut raw) = (format!("second-{n}"), Raw::connect(&gateway.addr()));
        let body = chat_body("status-500>m", stream, &Value::Null);
        raw.send(&post_request(CHAT, &format!("x-request-id: {id}\r\n"), &body));
        // It waits in a TLS handshake that nobody answers.
        let (mut second, _) = silent.accept().unwrap();
        let left = Instant::now();
        leave(raw, n);
        second.set_read_timeout(Some(LIMIT)).unwrap();
        let _ = std::io::copy(&mut second, &mut std::io::sink());
        assert!(left.elapsed() < Duration::from_secs(3), "{:?}: it went on connecting", left.elapsed());
        let record = gateway.wait_access(&id, LIMIT);
        assert_left(&record, 499, "", false);
    }
    assert_clean(&gateway);
}

/// No longer than the model allows.
#[test]
fn what_a_client_leaves_is_read_no_longer_than_allowed() {
    let fake = FakeUpstream::start();
    let gateway = with(&fake, "idle-mid", "{ drain = \"500ms\" }", "");
    for (n, stream) in [false, true].into_iter().enumerate() {
        let id = format!("drained-{n}");
        let raw = if stream { ask_stream(&gateway, &fake, &id) } else { ask(&gateway, &fake, &id, false) };
        let left = Instant::now();
        leave(raw, n);
        let took = fake.wait_closed(n, LIMIT).saturating_duration_since(left);
        assert!(took >= Duration::from_millis(450) && took < Duration::from_secs(3), "{took:?}");
        let record = gateway.wait_access(&id, LIMIT);
        assert_left(&record, if stream { 200 } else { 499 }, "on_disconnect: out of time", false);
    }
    assert_clean(&gateway);
}

/// `finish` is not for ever: the limits of every request hold.
#[test]
fn finishing_has_the_limits_of_every_request() {
    let fake = FakeUpstream::start();
    let limits = "[timeouts]\nidle = \"500ms\"\n";
    let gateway = with(&fake, "idle-mid", "\"finish\"", limits);
    for (n, stream) in [false, true].into_iter().enumerate() {
        let id = format!("limit-{n}");
        let raw = if stream { ask_stream(&gateway, &fake, &id) } else { ask(&gateway, &fake, &id, false) };
        leave(raw, n);
        let _ = fake.wait_closed(n, LIMIT);
        let record = gateway.wait_access(&id, LIMIT);
        assert_left(&record, if stream { 200 } else { 499 }, "on_disconnect: upstream_timeout", false);
    }
    let gateway = with(&fake, "stream-400-50", "\"finish\"", "[timeouts]\nstream_total = \"700ms\"\n");
    leave(ask_stream(&gateway, &fake, "total"), 0);
    assert_left(&gateway.wait_access("total", LIMIT), 200, "on_disconnect: deadline_exceeded", false);
}

/// An upstream that breaks off is said, too.
#[test]
fn an_upstream_that_breaks_off_meanwhile_is_on_record() {
    let fake = FakeUpstream::start();
    let gateway = with(&fake, "hold-mid", DRAIN, "");
    for (n, stream) in [false, true].into_iter().enumerate() {
        let id = format!("broken-{n}");
        let raw = if stream { ask_stream(&gateway, &fake, &id) } else { ask(&gateway, &fake, &id, false) };
        leave(raw, n);
        wait_until("its connection is gone", LIMIT, || gateway.metrics().contains("evergate_client_connections 0\n"));
        fake.close_connections();
        let record = gateway.wait_access(&id, LIMIT);
        assert_left(&record, if stream { 200 } else { 499 }, "on_disconnect: upstream_disconnected", false);
    }
    assert_clean(&gateway);
}

/// Nothing is begun for a client that is gone: not the next target, not a call that was not sent.
#[test]
fn nothing_new_is_begun_for_a_client_that_is_gone() {
    let fake = FakeUpstream::start();
    let targets = ["hold", "ok"].map(|model| format!("{{ upstream = \"fake\", model = \"{model}\" }}")).join(", ");
    let model =
        format!("{ONE_WORKER}[models.m]\non_disconnect = \"finish\"\nretry_unknown = true\ntargets = [{targets}]\n");
    let gateway = before(&fake, &model);
    leave(ask(&gateway, &fake, "no-next", false), 0);
    wait_until("its connection is gone", LIMIT, || gateway.metrics().contains("evergate_client_connections 0\n"));
    // A failure that would have the next target tried.
    fake.close_connections();
    assert_left(&gateway.wait_access("no-next", LIMIT), 499, "on_disconnect: upstream_disconnected", false);
    assert_eq!(fake.request_count(), 1);

    let (_mute, address) = mute();
    let config = evergate_testkit::gateway_config(
        &format!("https://{address}/v1"),
        &[],
        &format!("{ONE_WORKER}[models.m]\non_disconnect = \"finish\"\ntargets = [{{ upstream = \"fake\" }}]\n"),
    );
    let gateway = Evergate::builder(EXE).config(config).start();
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(CHAT, "x-request-id: unsent\r\n", &chat_body("m", false, &Value::Null)));
    wait_until("it is connecting", LIMIT, || {
        gateway.metrics().contains("evergate_inflight_requests{kind=\"unary\"} 1\n")
    });
    raw.close();
    assert_left(&gateway.wait_access("unsent", Duration::from_secs(3)), 499, "", false);
}

/// The stop of a worker waits for it within `drain`, and not beyond.
#[test]
fn a_stop_waits_for_what_is_read_on_within_its_drain() {
    let fake = FakeUpstream::start();
    for (n, drain) in ["20s", "500ms"].into_iter().enumerate() {
        let more = format!("[shutdown]\ndrain = \"{drain}\"\n");
        let mut gateway = with(&fake, "hold-mid", "\"finish\"", &more);
        let id = format!("stop-{n}");
        leave(ask_stream(&gateway, &fake, &id), 0);
        wait_until("its connection is gone", LIMIT, || gateway.metrics().contains("evergate_client_connections 0\n"));
        gateway.signal(Signal::TERM);
        if n == 0 {
            wait_until("it drains", LIMIT, || gateway.run()["phase"] == "draining");
            assert!(gateway.access().is_empty());
            fake.release();
        }
        assert!(gateway.wait_exit(LIMIT).success(), "{}", gateway.stderr());
        let records = gateway.access();
        assert_eq!(records.len(), 1, "{records:?}");
        let detail = ["on_disconnect: finished", "on_disconnect: server_shutting_down"][n];
        assert_left(&records[0], 200, detail, n == 0);
        fake.hold();
    }
}

/// A worker that is killed meanwhile leaves one record, as for any request in flight.
#[test]
fn a_killed_worker_leaves_one_record_of_what_it_read_on() {
    let fake = FakeUpstream::start();
    let gateway = with(&fake, "hold-mid", DRAIN, "");
    leave(ask_stream(&gateway, &fake, "killed"), 1);
    wait_until("its connection is gone", LIMIT, || gateway.metrics().contains("evergate_client_connections 0\n"));
    send(gateway.workers()[0], Signal::KILL);
    let record = gateway.wait_access("killed", LIMIT);
    assert_eq!(record["cause"], "worker_lost", "{record}");
    let _ = fake.wait_closed(0, LIMIT);
    assert_clean(&gateway);
    assert_eq!(gateway.access().len(), 1);
}

/// Held places are places: what is read on counts against `slots`.
#[test]
fn what_is_read_on_holds_its_place() {
    let fake = FakeUpstream::start();
    let model = "[workers]\nmin = 1\nmax = 1\nslots = 1\n[limits]\nqueue = 0\n[models.m]\non_disconnect = \"finish\"\n\
                 targets = [{ upstream = \"fake\", model = \"hold\" }]\n";
    let gateway = before(&fake, model);
    leave(ask(&gateway, &fake, "holds", false), 0);
    wait_until("its connection is gone", LIMIT, || gateway.metrics().contains("evergate_client_connections 0\n"));
    crate::support::assert_error(&crate::support::chat(&gateway, "ok", false), 503, "overloaded");
    fake.release();
    assert_left(&gateway.wait_access("holds", LIMIT), 499, "on_disconnect: finished", true);
    wait_until("the place is free", LIMIT, || crate::support::chat(&gateway, "ok", false).status == 200);
}

/// A2: who leaves the line before the places, before anything was admitted, is on record, too.
#[test]
fn a2_a_client_that_leaves_the_line_is_on_record() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 1\nmax = 1\nslots = 1\n");
    let mut holder = crate::support::open_stream(&gateway, "hold-mid");
    for n in 0..2 {
        let id = format!("in-line-{n}");
        let raw = crate::support::open_as(&gateway, "ok", n == 1, &format!("x-request-id: {id}\r\n"));
        wait_until("it waits", LIMIT, || gateway.metrics().contains("evergate_waiting_requests 1\n"));
        leave(raw, n);
        assert_left(&gateway.wait_access(&id, LIMIT), 499, "", false);
        wait_until("nobody waits", LIMIT, || gateway.metrics().contains("evergate_waiting_requests 0\n"));
    }
    fake.release();
    assert!(crate::support::rest_of(&mut holder).last().unwrap().is_done());
    assert_eq!(fake.request_count(), 1);
}
