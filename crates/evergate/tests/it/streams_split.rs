//! Streams that are cut anywhere on their way, in every form of lines and fields that the standard allows: what passes is
//! what came, in whole events, and what it says is understood.

use evergate_testkit::fake::Then;
use evergate_testkit::{Evergate, FakeUpstream, Response};
use serde_json::{Value, json};

use crate::support::{LIMIT, ONE_WORKER, assert_counted, before, chat};

/// The one event that says how a stream ended and what it cost: who does not understand it calls the stream cut.
const LAST: &str = r#"{"choices":[{"index":0,"delta":{"content":"é 😀"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#;
/// What the gateway adds where an upstream leaves it out.
const DONE: &str = "data: [DONE]\n\n";

/// An answer whose body comes in these pieces, each a chunk of its own: nothing puts them together on their way.
fn staged(pieces: &[&[u8]]) -> Vec<Vec<u8>> {
    let mut bytes =
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
        bytes.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        bytes.extend_from_slice(piece);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    vec![bytes]
}

/// A stream in these pieces passes as it is, is understood, and its connection is kept.
#[track_caller]
fn assert_understood(gateway: &Evergate, fake: &FakeUpstream, pieces: &[&[u8]], what: &str) -> Response {
    fake.stage("staged", staged(pieces), Then::Keep);
    let passed = chat(gateway, "staged", true);
    let expected = [&pieces.concat()[..], DONE.as_bytes()].concat();
    assert_eq!((passed.status, passed.is_complete), (200, true), "{what}");
    assert_eq!(passed.text(), String::from_utf8(expected).unwrap(), "{what}");
    assert!(passed.chunks_hold_whole_events(), "{what}: an event was split: {:?}", passed.chunks);
    passed
}

#[track_caller]
fn assert_recorded(gateway: &Evergate, response: &Response, what: &str) {
    let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
    let said = ["cause", "tokens_in", "tokens_out"].map(|key| record[key].clone());
    assert_eq!(said, [json!("ok"), json!(3), json!(2)], "{what}: {record}");
}

/// F7, F8: wherever it is cut, also within characters and between CR and LF.
#[test]
fn f7_f8_a_stream_says_the_same_wherever_it_is_cut() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let text = "data: {\"choices\":[{\"delta\":{\"content\":\"ü👩‍💻\"}}]}";
    let mut count = 0;
    for stream in [
        format!("\u{feff}{text}\n\n: ping\n\ndata: {LAST}\n\n"),
        format!("{text}\r\n\r\n: ping\r\n\r\ndata: {LAST}\r\n\r\n"),
        format!("{text}\r\r: ping\r\rdata: {LAST}\r\r"),
        format!("{text}\n\r\n: ping\r\ndata: {LAST}\r\n\n"),
    ] {
        let bytes = stream.as_bytes();
        for at in 1..bytes.len() {
            let (before, after) = bytes.split_at(at);
            let passed = assert_understood(&gateway, &fake, &[before, after], &format!("{stream:?} cut at {at}"));
            if at % 16 == 0 {
                assert_recorded(&gateway, &passed, &stream);
            }
            count += 1;
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        let passed = assert_understood(&gateway, &fake, &single, &format!("{stream:?} byte by byte"));
        assert_recorded(&gateway, &passed, &stream);
        count += 1;
    }
    assert_counted(&gateway, 200, "ok", count);
    assert_eq!(fake.connections().len(), 1, "each was read to its end");
}

/// F9: the forms of the WHATWG HTML standard, 9.2.6.
#[test]
fn f9_every_form_of_a_field_is_understood() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let (one, two) = LAST.split_at(LAST.find("\"finish_reason\"").unwrap());
    let forms = [
        format!("\u{feff}data: {LAST}\n\n"),
        format!("data:{LAST}\n\n"),
        format!("data:   {LAST}\n\n"),
        format!("data: {one}\ndata:{two}\n\n"),
        format!(": a comment\nid: 7\nevent: chunk\nretry: 10\nnonsense\ndata: {LAST}\nmore: fields\n\n"),
        format!("id\nevent:\ndata: {LAST}\n\n\n\n"),
        format!("data: {LAST}\r\nid: \u{feff}\r\n\r\n"),
    ];
    for form in &forms {
        let passed = assert_understood(&gateway, &fake, &[form.as_bytes()], form);
        assert_recorded(&gateway, &passed, form);
    }
    assert_counted(&gateway, 200, "ok", forms.len() as u64);
    assert_eq!(fake.connections().len(), 1);
}

/// F11: what comes together goes on together: as many writes as pieces came, not as events.
#[test]
fn f11_tiny_events_cost_writes_by_their_bytes() {
    const EVENTS: usize = 20_000;
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let mut stream: String =
        (0..EVENTS).map(|n| format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{n} \"}}}}]}}\n\n")).collect();
    stream += &format!("data: {LAST}\n\n");
    let pieces: Vec<&[u8]> = stream.as_bytes().chunks(16 << 10).collect();
    let passed = assert_understood(&gateway, &fake, &pieces, "tiny events");
    assert_recorded(&gateway, &passed, "tiny events");
    assert_counted(&gateway, 200, "ok", 1);
    let writes = passed.chunks.len();
    println!("{EVENTS} events in {} pieces were passed on in {writes} writes", pieces.len());
    // A piece may be read in several parts, of some KiB each.
    assert!(writes < EVENTS / 20, "{writes} writes for {EVENTS} events");
    assert_eq!(fake.connections().len(), 1);
}

/// F16: chunks without a choice, with the role in each, with nulls: they pass, and the usage in one of them counts.
#[test]
fn f16_chunks_that_say_little_pass() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let chunks = [
        json!({"choices": []}),
        json!({"choices": null}),
        json!({"id": "x"}),
        json!({"choices": [{"index": 0, "delta": {"role": "assistant", "content": null, "tool_calls": null}}]}),
        json!({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": null}]}),
        json!({"choices": [{"index": 0, "delta": null, "finish_reason": ""}]}),
        json!({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": "stop"}]}),
        json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
    ];
    let stream: String = chunks.iter().map(|chunk: &Value| format!("data: {chunk}\n\n")).collect();
    let passed = assert_understood(&gateway, &fake, &[stream.as_bytes()], "odd chunks");
    assert_recorded(&gateway, &passed, "odd chunks");
    // An event by itself, too: none of them is withheld.
    let pieces: Vec<Vec<u8>> = chunks.iter().map(|chunk| format!("data: {chunk}\n\n").into_bytes()).collect();
    let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
    let passed = assert_understood(&gateway, &fake, &pieces, "odd chunks one by one");
    assert_recorded(&gateway, &passed, "odd chunks one by one");
    assert_counted(&gateway, 200, "ok", 2);
    assert_eq!(fake.connections().len(), 1);
}
