//! A14: HTTP/2 clients that mean harm, frame by frame (RFC 9113): each loses its connection and costs nobody else anything.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use evergate_testkit::{Evergate, wait_until};

use crate::h2_wire::{DATA, END, GOAWAY, HEADERS, PING, RESET, SETTINGS, WINDOW_UPDATE, Wire};
use crate::support::{LIMIT, ONE_WORKER, assert_alive, echo_with};

const PRIORITY: u8 = 2;
const PUSH_PROMISE: u8 = 5;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

/// RFC 9113, 7.
const PROTOCOL_ERROR: u32 = 1;
const ENHANCE_YOUR_CALM: u32 = 11;

/// More than the buffers of both sockets hold together, bytes: who can send that much is read.
const BEYOND_BUFFERS: usize = 24 << 20;

/// `GET /healthz` without its end.
const GET: [u8; 22] = *b"\x82\x86\x04\x08/healthz\x01\x09localhos";

fn get() -> Vec<u8> {
    [&GET[..], b"t"].concat()
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// How a connection ended.
#[derive(Debug)]
struct Ending {
    /// Whether it took everything.
    is_all_taken: bool,
    /// The error code that the gateway gave as its reason. A reset takes unread words with it.
    reason: Option<u32>,
}

/// Sends until the connection ends or so many bytes are sent; then reads to its end, which must come.
#[track_caller]
fn ending(wire: &mut Wire, next: impl FnMut(u32) -> Vec<u8>, bytes: usize) -> Ending {
    let mut sent = 0;
    let mut pieces = (0..).map(next);
    let is_taken = loop {
        let piece = pieces.next().unwrap();
        if wire.link.write_all(&piece).is_err() {
            break false;
        }
        sent += piece.len();
        if sent >= bytes {
            break true;
        }
    };
    let mut reason = None;
    loop {
        match wire.next_or_gone(LIMIT) {
            Ok(Some(frame)) if frame.kind == GOAWAY => {
                reason = Some(u32::from_be_bytes(frame.payload[4..8].try_into().unwrap()));
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(limit) => panic!("not ended within {limit:?}; {reason:?}"),
        }
    }
    Ending { is_all_taken: is_taken, reason }
}

impl Ending {
    /// It came while there was more to send; its reason, where that was not lost, is the flood, or a header block that is cut
    /// off in the middle of a field.
    #[track_caller]
    fn assert_early(&self, name: &str) {
        let is_why = self.reason.is_none_or(|code| code == ENHANCE_YOUR_CALM || code == PROTOCOL_ERROR);
        assert!(!self.is_all_taken && is_why, "{name}: {self:?}");
    }
}

/// Resident memory of the one worker, KiB.
fn rss(gateway: &Evergate) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.workers()[0])).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[track_caller]
fn assert_calm(gateway: &Evergate, before: &[i32], memory: u64) {
    assert_alive(gateway);
    assert_eq!(gateway.workers(), before);
    assert!(gateway.exits().is_empty());
    let grown = rss(gateway).saturating_sub(memory);
    assert!(grown < 32 * 1024, "{grown} KiB more");
}

/// Streams that are opened and reset at once (CVE-2023-44487), and heads that never end (CVE-2024-27316).
#[test]
fn a14_floods_end_their_connection() {
    let gateway = echo_with(ONE_WORKER);
    let (before, memory) = (gateway.workers(), rss(&gateway));

    let reset = |n: u32| {
        let one = |n: u32| {
            [frame(HEADERS, END_HEADERS, 2 * n + 1, &get()), frame(RESET, 0, 2 * n + 1, &[0, 0, 0, 8])].concat()
        };
        (100 * n..100 * n + 100).flat_map(one).collect()
    };
    let mut wire = Wire::connect(&gateway);
    ending(&mut wire, reset, BEYOND_BUFFERS).assert_early("rapid reset");
    assert_calm(&gateway, &before, memory);

    // A literal field that is not indexed, 4 KiB a frame.
    let field = [&b"\x00\x01x\x7f\x81\x1e"[..], &[b'y'; 4000]].concat();
    let endless = |n: u32| match n {
        0 => frame(HEADERS, 0, 1, &get()),
        _ => frame(CONTINUATION, 0, 1, &field),
    };
    let mut wire = Wire::connect(&gateway);
    ending(&mut wire, endless, BEYOND_BUFFERS).assert_early("CONTINUATION of fields");
    assert_calm(&gateway, &before, memory);

    let empty = |n: u32| match n {
        0 => frame(HEADERS, 0, 1, &get()),
        _ => frame(CONTINUATION, 0, 1, &[]).repeat(100),
    };
    let mut wire = Wire::connect(&gateway);
    ending(&mut wire, empty, BEYOND_BUFFERS).assert_early("CONTINUATION of nothing");
    assert_calm(&gateway, &before, memory);
}

/// Frames that ask for answers nobody reads: the connection stalls, and is cut as any other that does.
#[test]
fn a14_unread_answers_are_cut_and_hold_no_memory() {
    let gateway = echo_with(&format!("{ONE_WORKER}[timeouts]\nclient_stall = \"700ms\"\n"));
    let (before, memory) = (gateway.workers(), rss(&gateway));
    for (name, flood) in [
        ("PING", frame(PING, 0, 0, &[7; 8]).repeat(500)),
        ("SETTINGS", frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]).repeat(500)),
    ] {
        let mut stream = TcpStream::connect(gateway.addr()).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).unwrap();
        let began = Instant::now();
        // It never reads: sooner or later the gateway stops reading too, and then ends it.
        while stream.write_all(&flood).is_ok() {
            assert!(began.elapsed() < LIMIT, "{name}: taken for ever");
        }
        assert_calm(&gateway, &before, memory);
    }
}

/// Floods that only cost their sender, and frames that break the protocol: the reason is given, the worker lives.
#[test]
fn a14_broken_frames_end_their_connection_with_a_reason() {
    let gateway = echo_with(ONE_WORKER);
    let (before, memory) = (gateway.workers(), rss(&gateway));
    let head = |flags: u8, stream: u32, block: &[u8]| frame(HEADERS, flags | END_HEADERS, stream, block);
    for (name, bytes) in [
        ("a frame beyond 16 KiB", frame(DATA, 0, 1, &[0; 20_000])),
        ("DATA for no stream", frame(DATA, 0, 1, b"x")),
        ("DATA for stream 0", frame(DATA, 0, 0, b"x")),
        ("a stream of the server's", head(END, 2, &get())),
        ("an index that is not there", head(END, 1, b"\xff\xff\xff\x7f")),
        ("a text that does not end", head(END, 1, b"\x82\x86\x04\x7f\xff\xff\xff\x7fx")),
        ("a table that grows", head(END, 1, b"\x3f\xff\xff\xff\x7f")),
        ("CONTINUATION alone", frame(CONTINUATION, END_HEADERS, 1, &get())),
        ("another frame within a head", [frame(HEADERS, 0, 1, &get()), frame(PING, 0, 0, &[0; 8])].concat()),
        ("a window beyond its most", frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff])),
        ("a window of nothing", frame(WINDOW_UPDATE, 0, 0, &[0; 4])),
        ("a PING of seven bytes", frame(PING, 0, 0, &[0; 7])),
        ("SETTINGS of five bytes", frame(SETTINGS, 0, 0, &[0; 5])),
        ("SETTINGS of a stream", frame(SETTINGS, 0, 1, &[])),
        ("a frame size of nothing", frame(SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 0])),
        ("an initial window of 2^31", frame(SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0])),
        ("a push by the client", frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2])),
        ("a reset of no stream", frame(RESET, 0, 9, &[0; 4])),
        ("padding beyond the frame", frame(DATA, PADDED, 1, &[200, 0])),
        ("text", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
    ] {
        let mut wire = Wire::connect(&gateway);
        let said = ending(&mut wire, |_| bytes.clone(), 1).reason;
        // A mistake of the client's: neither "no error" nor "internal error".
        assert!(said.is_some_and(|code| code != 0 && code != 2), "{name}: {said:?}");
    }
    assert_calm(&gateway, &before, memory);

    // Frames that mean nothing here: a request behind a million bytes of them is answered.
    for nothing in [frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 15]), frame(0xaf, 0, 0, b"grease")] {
        let mut wire = Wire::connect(&gateway);
        wire.link.write_all(&nothing.repeat(70_000)).unwrap();
        wire.get(1);
        assert!(wire.answer(1).0);
    }
    assert_calm(&gateway, &before, memory);
}

/// No more than `limits.h2_streams` at once, and those beyond are refused, not queued.
#[test]
fn a14_streams_beyond_the_limit_are_refused() {
    let gateway = echo_with(&format!("{ONE_WORKER}[limits]\nh2_streams = 5\n"));
    let mut wire = Wire::connect(&gateway);
    // The gateway's own settings, and the acknowledgement of ours: the limit is in force.
    wire.send(PING, 0, 0, &[1; 8]);
    assert_eq!(wire.skip_to(PING).payload, [1; 8]);
    // Heads whose bodies are awaited.
    let head = b"\x83\x86\x04\x14/v1/chat/completions\x01\x09localhost";
    for n in 0..50 {
        wire.send(HEADERS, END_HEADERS, 2 * n + 1, head);
    }
    let mut refused = 0;
    while refused < 45 {
        let frame = wire.next().expect("the connection goes on");
        match frame.kind {
            // REFUSED_STREAM
            RESET => {
                assert_eq!(frame.payload, [0, 0, 0, 7]);
                refused += 1;
            }
            HEADERS | DATA => {}
            _ => panic!("{frame:?}"),
        }
    }
    wait_until("the others alive", Duration::from_secs(5), || {
        assert_alive(&gateway);
        true
    });
}
