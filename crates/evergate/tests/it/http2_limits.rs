//! The limits that run against an HTTP/2 client: of its heads, and of a connection on which nothing is asked for.

use std::time::{Duration, Instant};

use evergate_testkit::{Evergate, FakeUpstream, wait_until};
use serde_json::json;

use crate::h2_wire::{ALL, DATA, END, GOAWAY, HEADERS, PING, RESET, Wire};
use crate::support::{LIMIT, ONE_WORKER, assert_alive, assert_counted, before, echo_with, via};

const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
const SECOND: Duration = Duration::from_secs(1);

/// "POST http://localhost/v1/chat/completions".
const POST: &[u8] = b"\x83\x86\x04\x14/v1/chat/completions\x01\x09localhost";

/// Reads to the connection's end, says a piece every 200 ms, acknowledges each PING; the last streams of the GOAWAY frames, none
/// with an error.
#[track_caller]
fn read_to_end(wire: &mut Wire, piece: &[u8]) -> Vec<u32> {
    let (mut last, end) = (Vec::new(), Instant::now() + LIMIT);
    while Instant::now() < end {
        match wire.next_within(Duration::from_millis(200)) {
            Ok(Some(frame)) if frame.kind == GOAWAY => {
                assert_eq!(frame.payload[4..8], [0; 4], "{frame:?}");
                last.push(u32::from_be_bytes(frame.payload[..4].try_into().unwrap()));
            }
            Ok(Some(frame)) if frame.kind == PING && frame.flags & END == 0 => wire.send(PING, END, 0, &frame.payload),
            Ok(Some(_)) => {}
            Ok(None) => return last,
            Err(why) if why.starts_with("nothing") => drop(wire.link.write_all(piece)),
            // A piece that crossed the end.
            Err(_) if !piece.is_empty() => return last,
            Err(why) => panic!("{why}; {last:?}"),
        }
    }
    panic!("not ended; {last:?}");
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn answered(gateway: &Evergate) -> Wire {
    let mut wire = Wire::connect(gateway);
    wire.get(1);
    assert!(wire.answer(1).0);
    wire
}

/// A8: a head that is not complete in time, or any other frame, ends the connection, whatever else comes meanwhile.
#[test]
fn a8_half_a_frame_ends_its_connection() {
    let gateway = echo_with(&format!("{ONE_WORKER}[timeouts]\nheader = \"1s\"\n"));
    let (head, body) = (frame(HEADERS, 0, 3, POST), frame(DATA, 0, 1, b"abcdef"));
    for (name, bytes, piece) in [
        ("a head without its end", &head[..], &b""[..]),
        ("a head that never ends", &head, &frame(CONTINUATION, 0, 3, b"\x00\x01x\x01y")),
        ("half a head", &head[..20], b""),
        ("a head that trickles", &head[..10], b"/"),
        ("half of a frame's head", &head[..5], b""),
        ("half a PING", &frame(PING, 0, 0, &[0; 8])[..12], b""),
        ("half a body of a stream that is over", &body[..12], b""),
    ] {
        let mut wire = answered(&gateway);
        let began = Instant::now();
        wire.link.write_all(bytes).unwrap();
        assert!(read_to_end(&mut wire, piece).is_empty(), "{name}");
        let took = began.elapsed();
        assert!(took >= SECOND && took < LIMIT / 2, "{name}: {took:?}");
    }
    assert_alive(&gateway);
}

/// A8: where the head of a request had begun it is on record, though nothing of it could be read; nothing else is. The stream
/// beside it ends with its connection, and its upstream is left.
#[test]
fn a8_a_head_that_does_not_end_is_on_record_as_that() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, &format!("{ONE_WORKER}[timeouts]\nheader = \"1s\"\n"));
    let (head, ping) = (frame(HEADERS, 0, 3, POST), frame(PING, 0, 0, &[0; 8]));
    let more = frame(CONTINUATION, 0, 3, b"\x00\x01x\x01y");
    let mut wires: Vec<Wire> = [
        // On record: without its end, with half of one, of which only the frame's own head has come.
        head.clone(),
        [&head[..], &more[..5]].concat(),
        head[..9].to_vec(),
        // Not: a frame that may be anything, one that is none of a request, the trailers of a request that is over.
        head[..5].to_vec(),
        ping[..12].to_vec(),
        frame(HEADERS, END, 1, POST),
    ]
    .into_iter()
    .map(|bytes| {
        let mut wire = answered(&gateway);
        wire.link.write_all(&bytes).unwrap();
        wire
    })
    .collect();
    let mut busy = Wire::connect(&gateway);
    busy.post(1, &via("hold-mid"));
    let _ = busy.skip_to(HEADERS);
    busy.link.write_all(&head).unwrap();
    wires.push(busy);
    for wire in &mut wires {
        assert!(read_to_end(wire, b"").is_empty());
    }
    let _ = fake.wait_closed(0, LIMIT);

    assert_counted(&gateway, 408, "request_timeout", 4);
    wait_until("all records", LIMIT, || gateway.access().len() >= 5);
    let (cut, others): (Vec<_>, Vec<_>) =
        gateway.access().into_iter().partition(|record| record["cause"] == "request_timeout");
    assert_eq!((cut.len(), others.len()), (4, 1), "{others:?}");
    for record in cut {
        let known = [&record["status"], &record["method"], &record["route"], &record["attempts"]];
        assert_eq!(known, [&json!(408), &json!("other"), &json!("other"), &json!(0)], "{record}");
        assert!(record["duration_ms"].as_f64().unwrap() >= 1000.0, "{record}");
    }
    assert_eq!(others[0]["cause"], "client_gone", "{others:?}");
    assert_eq!((fake.request_count(), gateway.exits().len()), (1, 0));
}

/// A9: the rest of a body has limits of its own, and heads that come in time cost nothing.
#[test]
fn a9_a_body_in_half_frames_is_waited_for() {
    let gateway = echo_with(&format!("{ONE_WORKER}[timeouts]\nheader = \"1s\"\n"));
    let body = frame(DATA, END, 1, br#"{"model":"echo","messages":[{"role":"user","content":"slowly"}]}"#);
    let mut wire = Wire::connect(&gateway);
    for piece in [&frame(HEADERS, 0, 1, POST)[..], &frame(CONTINUATION, END_HEADERS, 1, &[])[..], &body[..30]] {
        assert!(wire.next_within(Duration::from_millis(300)).is_err());
        wire.link.write_all(piece).unwrap();
    }
    assert!(wire.next_within(2 * SECOND).is_err());
    wire.link.write_all(&body[30..]).unwrap();
    let (is_ok, answer) = wire.answer(1);
    assert!(is_ok && answer.contains("slowly"), "{answer}");
}

/// A10: without a request a connection ends in order when `client_idle` is over; PINGs, whoever sends them, do not keep it.
#[test]
fn a10_an_idle_http2_connection_ends_in_order() {
    let gateway = echo_with(&format!("{ONE_WORKER}[timeouts]\nclient_idle = \"1s\"\n"));
    let ping = frame(PING, 0, 0, &[7; 8]);
    for (name, is_used, piece) in [
        ("silent", true, &b""[..]),
        ("talking", true, &ping),
        ("never used", false, b""),
        ("only talking", false, &ping),
    ] {
        let began = Instant::now();
        let mut wire = if is_used { answered(&gateway) } else { Wire::connect(&gateway) };
        assert_eq!(read_to_end(&mut wire, piece), [ALL, u32::from(is_used)], "{name}");
        let took = began.elapsed();
        assert!(took >= SECOND.mul_f64(0.9) && took < LIMIT / 2, "{name}: {took:?}");
    }
    // A request that crosses the first word is served.
    let mut wire = answered(&gateway);
    assert_eq!(wire.skip_to_goaway(), ALL);
    wire.get(3);
    assert!(wire.answer(3).0);
    assert_eq!(read_to_end(&mut wire, b""), [3]);
    assert_alive(&gateway);
}

/// A10: a stream under way keeps its connection, however silent; the limit begins with its end.
#[test]
fn a10_a_connection_with_a_stream_is_not_idle() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, &format!("{ONE_WORKER}[timeouts]\nclient_idle = \"1s\"\n"));
    for is_left in [false, true] {
        let mut wire = Wire::connect(&gateway);
        wire.post(1, &via("hold-mid"));
        assert_eq!(wire.skip_to(HEADERS).stream, 1);
        let began = Instant::now();
        while began.elapsed() < 3 * SECOND {
            if let Ok(frame) = wire.next_within(Duration::from_millis(200)) {
                let frame = frame.expect("not the end");
                assert!(matches!(frame.kind, PING | DATA), "{frame:?}");
                if frame.kind == PING {
                    wire.send(PING, END, 0, &frame.payload);
                }
            }
        }
        let over = Instant::now();
        if is_left {
            wire.send(RESET, 0, 1, &[0, 0, 0, 8]);
        } else {
            fake.release();
        }
        assert_eq!(read_to_end(&mut wire, b""), [ALL, 1]);
        let took = over.elapsed();
        assert!(took >= SECOND.mul_f64(0.9) && took < LIMIT / 2, "{is_left}: {took:?}");
        fake.hold();
    }
    let causes = || gateway.access().iter().map(|record| record["cause"].clone()).collect::<Vec<_>>();
    wait_until("both records", LIMIT, || causes() == [json!("ok"), json!("client_gone")]);
}
