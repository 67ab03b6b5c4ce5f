//! The gateway reloads again and again under load, as fast as it can, and no client sees anything of it: nobody is refused
//! or reset, no answer is cut, no request on a kept connection goes unanswered.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::raw::get_request;
use evergate_testkit::wait::try_wait_for;
use evergate_testkit::{Evergate, FakeUpstream, Raw, chat_request};
use serde_json::{Value, json};

use crate::drain::{LINGER, is_closing};
use crate::h2_wire::{DATA, END, GOAWAY, HEADERS, PING, Wire};
use crate::support::{LIMIT, before, is_full, via};

const WORKERS: usize = 2;
/// Clients that keep their connection, think for up to a second and never look for an end of file.
const KEEPING: usize = 64;
/// Clients with a connection for each request.
const ONE_SHOT: usize = 64;
/// Clients that read streams of half a second.
const STREAMING: usize = 20;
/// Clients that speak HTTP/2, and think.
const HTTP2: usize = 8;
/// The longest thought.
const THOUGHT_MS: u64 = 1000;

#[derive(Default)]
struct Seen {
    is_over: AtomicBool,
    done: AtomicUsize,
    last_answers: AtomicUsize,
    failed: Mutex<Vec<String>>,
}

impl Seen {
    fn goes_on(&self) -> bool {
        !self.is_over.load(Ordering::Relaxed)
    }

    fn done(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    fn fail(&self, who: &str, why: &str) {
        self.failed.lock().unwrap().push(format!("{who}: {why}"));
    }
}

/// Numbers without a pattern that matters (Knuth's multiplicative hash), the same in every run.
struct Thoughts(u64);

impl Thoughts {
    fn next(&mut self) -> Duration {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Duration::from_millis((self.0 >> 33) % (THOUGHT_MS + 1))
    }

    /// Thinks, without a look at any connection.
    fn think(&mut self) {
        try_wait_for(self.next(), || None::<()>);
    }
}

fn connect(who: &str, address: &str, seen: &Seen) -> Option<Kept> {
    let raw = Raw::try_connect(address).map(|raw| (raw, None));
    raw.map_err(|error| seen.fail(who, &format!("connect: {error}"))).ok()
}

/// Since when a connection may have been idle: since its last request was sent, because a busy machine can keep its client
/// from reading an answer that was there at once. None before the first request, which is owed whenever it comes.
type Idle = Option<Instant>;

/// Whether a request has come later than any client may: then its loss shows nothing. To be asked when it has been sent.
fn is_late(idle: Idle) -> bool {
    idle.is_some_and(|since| since.elapsed() > LINGER - Duration::from_millis(100))
}

/// A connection, and since when it may be idle.
type Kept = (Raw, Idle);

/// Sends a request and reads its answer; `None` when the connection is over, in order or not.
fn ask(who: &str, (mut raw, idle): Kept, request: &[u8], seen: &Seen) -> Option<Kept> {
    let began = Instant::now();
    let sent = raw.try_send(request);
    let is_late = is_late(idle);
    let response = match raw.try_read_response(3 * LIMIT) {
        Ok(response) => response,
        Err(_) if is_late => return None,
        Err(reason) => {
            seen.fail(who, &format!("{reason} ({sent:?})"));
            return None;
        }
    };
    let text = response.text();
    if response.status != 200 || !response.is_complete || text.contains("\"error\"") {
        seen.fail(who, &format!("{} complete: {} {text}", response.status, response.is_complete));
        return None;
    }
    if text.starts_with("data:") && !text.ends_with("data: [DONE]\n\n") {
        seen.fail(who, &format!("a stream without its end: {text}"));
    }
    seen.done();
    let is_last = is_closing(&response);
    seen.last_answers.fetch_add(usize::from(is_last), Ordering::Relaxed);
    (!is_last).then_some((raw, Some(began)))
}

fn keeping(address: &str, number: usize, seen: &Seen) {
    let who = format!("keeping {number}");
    let (mut thoughts, mut kept) = (Thoughts(number as u64), None);
    while seen.goes_on() {
        let Some(raw) = kept.take().or_else(|| connect(&who, address, seen)) else { continue };
        kept = ask(&who, raw, &chat_request(&via("ok"), false, &Value::Null), seen);
        thoughts.think();
    }
}

fn one_shot(address: &str, number: usize, seen: &Seen) {
    let who = format!("one-shot {number}");
    while seen.goes_on() {
        let Some(raw) = connect(&who, address, seen) else { continue };
        let request =
            if number.is_multiple_of(2) { get_request("/v1/models", "") } else { get_request("/healthz", "") };
        let _ = ask(&who, raw, &request, seen);
        try_wait_for(Duration::from_millis(20), || None::<()>);
    }
}

fn streaming(address: &str, number: usize, seen: &Seen) {
    let who = format!("streaming {number}");
    let mut kept = None;
    while seen.goes_on() {
        let Some(raw) = kept.take().or_else(|| connect(&who, address, seen)) else { continue };
        kept = ask(&who, raw, &chat_request(&via("stream-10-50"), true, &Value::Null), seen);
    }
}

/// One HTTP/2 exchange: whether the connection goes on; an error when the request was lost without a word.
fn ask_h2(wire: &mut Wire, stream: u32, idle: Idle) -> Result<bool, String> {
    wire.post(stream, &via("stream-3-20"));
    let is_late = is_late(idle);
    read_h2(wire, stream).or_else(|why| if is_late { Ok(false) } else { Err(why) })
}

fn read_h2(wire: &mut Wire, stream: u32) -> Result<bool, String> {
    let (mut goes_on, mut body) = (true, String::new());
    loop {
        let frame = match wire.next_within(3 * LIMIT) {
            Ok(Some(frame)) => frame,
            Ok(None) => return Err(format!("the end before that of stream {stream}")),
            Err(why) => return Err(why),
        };
        match frame.kind {
            PING if frame.flags & END == 0 => wire.send(PING, END, 0, &frame.payload),
            GOAWAY => {
                goes_on = false;
                if u32::from_be_bytes(frame.payload[..4].try_into().unwrap()) < stream {
                    return Err(format!("stream {stream} crossed the second GOAWAY: {:?}", frame.payload));
                }
            }
            HEADERS => assert_eq!((frame.stream, frame.payload[0]), (stream, 0x88)),
            DATA => body += std::str::from_utf8(&frame.payload).unwrap(),
            _ => {}
        }
        if frame.stream == stream && frame.flags & END != 0 {
            let is_whole = body.ends_with("data: [DONE]\n\n") && !body.contains("\"error\"");
            return if is_whole { Ok(goes_on) } else { Err(body) };
        }
    }
}

fn http2(gateway: &Evergate, number: usize, seen: &Seen) {
    let who = format!("http/2 {number}");
    let mut thoughts = Thoughts(1000 + number as u64);
    while seen.goes_on() {
        let (mut wire, mut stream, mut idle) = (Wire::connect(gateway), 1, None);
        while seen.goes_on() {
            let began = Instant::now();
            match ask_h2(&mut wire, stream, idle) {
                Ok(goes_on) => {
                    seen.done();
                    stream += 2;
                    if !goes_on {
                        seen.last_answers.fetch_add(1, Ordering::Relaxed);
                        break;
                    }
                }
                Err(why) => {
                    seen.fail(&who, &why);
                    break;
                }
            }
            idle = Some(began);
            thoughts.think();
        }
    }
}

/// Reloads, and gives how long that took.
fn reload(gateway: &Evergate) -> Duration {
    let begun = Instant::now();
    let output = gateway.cli(&["reload"]);
    assert!(output.status.success(), "{output:?}\n{}", gateway.stderr());
    begun.elapsed()
}

#[test]
fn s18_no_client_notices_reloads() {
    let rounds = if is_full() { 100 } else { 10 };
    let fake = FakeUpstream::start();
    let gateway = before(&fake, &format!("[workers]\nmin = {WORKERS}\nmax = {WORKERS}\n"));
    let (address, seen) = (gateway.addr(), Seen::default());
    let mut times = std::thread::scope(|scope| {
        let (address, seen, gateway) = (&address, &seen, &gateway);
        (0..KEEPING).for_each(|n| drop(scope.spawn(move || keeping(address, n, seen))));
        (0..ONE_SHOT).for_each(|n| drop(scope.spawn(move || one_shot(address, n, seen))));
        (0..STREAMING).for_each(|n| drop(scope.spawn(move || streaming(address, n, seen))));
        (0..HTTP2).for_each(|n| drop(scope.spawn(move || http2(gateway, n, seen))));
        // Also when a reload fails: the clients must not go on for ever.
        let times = std::panic::catch_unwind(|| (0..rounds).map(|_| reload(gateway)).collect::<Vec<_>>());
        seen.is_over.store(true, Ordering::Relaxed);
        times.unwrap()
    });
    times.sort_unstable();
    let failed = seen.failed.into_inner().unwrap();
    let (done, last) = (seen.done.into_inner(), seen.last_answers.into_inner());
    let (median, longest) = (times[rounds / 2], times[rounds - 1]);
    println!("{rounds} reloads ({median:?}, {longest:?} at most), {done} requests, {last} last answers");
    assert!(failed.is_empty(), "{} of {done}: {:#?}", failed.len(), &failed[..failed.len().min(20)]);
    assert!(done > 10 * rounds && last > rounds, "too little load to show anything: {done}, {last}");
    let is_old = |record: &Value| record["kind"] == "worker" && record["initiator"] == "reload";
    // A drain may take twenty seconds, and ends when its last client has gone.
    let ended = gateway.wait_exits(rounds * WORKERS, 3 * LIMIT, is_old);
    let is_well =
        |record: &Value| record["code"] == 0 && record["lost"] == json!([]) && record["sent"] == json!(["TERM"]);
    assert!(ended.iter().all(is_well), "{ended:?}");
    assert_eq!(ended.len(), rounds * WORKERS);
}
