//! A program that misbehaves to order, for tests of what runs programs.
//!
//! Its arguments are steps, done one after another, each `name` or `name:value`; sizes and times are in bytes and
//! milliseconds. It ends with 0 after the last, and by itself after two minutes, so that no defect of what it tests can
//! leave it behind for good.
//!
//! - `exit:CODE`, `signal:NUMBER` to itself, `hang`, `spin`, `sleep:MS`, `await:FILE` until there is one
//! - `read` all input, `read-some` of it, `echo` it, `close-in`, `close-out`
//! - `out:TEXT`, `err:TEXT`, `hex:BYTES`, `pid` to standard error, `dump` what it was given, as JSON; `dump:FILE` into one
//! - `try:PATH`, one after the other parted by commas: whether each can be read and written, as JSON, into `tried.json`
//! - `flood:BYTES` lines to standard output, `flood-err:BYTES`, `line:BYTES` without an end, `drip:COUNT:MS` lines
//! - `alloc:BYTES` and touch them
//! - `serve:ADDRESS`, `HOST:PORT` or a socket's path: a `FakeUpstream`, beside what follows; it says `request N` on standard
//!   error when the Nth POST is there
//! - `serve-one:HOST:PORT` one request after another: GET is well, anything else a stream of 30 events in three seconds
//! - `serve-hold:HOST:PORT`: GET is well, anything else is held until its client leaves; says `here` and `gone` to standard error
//! - `serve-die:HOST:PORT`: GET is well; of anything else the answer, whose end is its connection's, is cut by an ABRT
//! - `model:OPTIONS` speaks the stdio protocol (`model.rs`), until it is drained
//! - `obey` the steps on its input, one a line
//! - `fork:KIND:STEPS` with the steps parted by commas: a child of kind `plain`, `setsid` (a session of its own), `daemon` (the
//!   same, and its parent has ended), `naked` (the same, with nothing in its environment)
#![forbid(unsafe_code)]
// A step that is wrong should stop the test that wrote it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::exit, clippy::indexing_slicing)]
// It is a program on its own, whose waiting nobody else waits for.
#![allow(clippy::disallowed_methods)]

use std::io::{Read, Write};
use std::process::{Command, exit};
use std::time::Duration;

use evergate_testkit::FakeUpstream;
use rustix::process::{Signal, getpid, kill_process, setsid};
use serde_json::{Map, Value, json};

/// Longer than any test, shorter than anybody's patience.
const LIFE: Duration = Duration::from_secs(120);

fn main() {
    std::thread::spawn(|| {
        std::thread::sleep(LIFE);
        exit(99);
    });
    // What comes after `--` is somebody's text.
    std::env::args().skip(1).take_while(|step| step != "--").for_each(|step| do_step(&step));
}

fn do_step(step: &str) {
    let (name, value) = step.split_once(':').unwrap_or((step, ""));
    if let Err(error) = act(name, value) {
        // What a plain program does that meets a closed pipe.
        let _ = writeln!(std::io::stderr(), "adaptersim: {step}: {error}");
        exit(98);
    }
}

fn act(name: &str, value: &str) -> std::io::Result<()> {
    let number = || value.parse::<u64>().expect("a number");
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    match name {
        "exit" => exit(value.parse().expect("a code")),
        "signal" => signal(value),
        "hang" => loop {
            std::thread::sleep(LIFE);
        },
        "spin" => loop {
            std::hint::spin_loop();
        },
        "sleep" => std::thread::sleep(Duration::from_millis(number())),
        "await" => {
            while !std::path::Path::new(value).exists() {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        "read" => {
            std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
        }
        "read-some" => {
            let _ = std::io::stdin().read(&mut [0; 100])?;
        }
        "echo" => {
            std::io::copy(&mut std::io::stdin(), &mut out)?;
            out.flush()?;
        }
        "close-in" => close(0),
        "close-out" => close(1),
        "out" => {
            out.write_all(value.as_bytes())?;
            out.flush()?;
        }
        "err" => err.write_all(value.as_bytes())?,
        "hex" => {
            out.write_all(&hex(value))?;
            out.flush()?;
        }
        "pid" => writeln!(err, "pid {}", getpid().as_raw_nonzero())?,
        "dump" if value.is_empty() => writeln!(out, "{}", dump())?,
        "dump" => std::fs::write(value, dump().to_string())?,
        "try" => {
            let tried: Map<String, Value> = value.split(',').map(|path| (path.to_owned(), reach(path))).collect();
            std::fs::write("tried.json", Value::from(tried).to_string())?;
        }
        "flood" => flood(&mut out, number(), b"all work and no play makes a dull model\n")?,
        "flood-err" => flood(&mut err, number(), b"all work and no play makes a dull model\n")?,
        "line" => flood(&mut out, number(), b"x")?,
        "drip" => drip(value)?,
        "alloc" => {
            let bytes = vec![1_u8; usize::try_from(number()).expect("a size")];
            std::hint::black_box(&bytes);
        }
        "obey" => {
            for step in std::io::read_to_string(std::io::stdin())?.lines() {
                do_step(step);
            }
        }
        // For as long as the program lives.
        "serve" if value.starts_with('/') => tell(FakeUpstream::start_unix(std::path::Path::new(value))),
        "serve" => tell(FakeUpstream::start_at(value)),
        "serve-one" => serve_one(value, stream_slowly)?,
        "serve-hold" => serve_one(value, hold)?,
        "serve-die" => serve_one(value, die_within)?,
        "model" => evergate_testkit::model::serve(value),
        "fork" => fork(value)?,
        "setsid" => {
            setsid()?;
        }
        _ => panic!("adaptersim: no such step: {name}"),
    }
    Ok(())
}

fn signal(number: &str) {
    let signal = Signal::from_named_raw(number.parse().expect("a number"));
    match signal {
        Some(signal) => kill_process(getpid(), signal).expect("a signal to itself"),
        // Those for real time have no names.
        None => {
            let own = getpid().as_raw_nonzero().to_string();
            Command::new("kill").args([&format!("-{number}"), &own]).status().expect("kill(1)");
        }
    }
    std::thread::sleep(LIFE);
}

/// What a descriptor's owner would do, without being it: its file becomes another.
fn close(number: i32) {
    let nothing = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").expect("/dev/null");
    match number {
        0 => rustix::stdio::dup2_stdin(&nothing),
        _ => rustix::stdio::dup2_stdout(&nothing),
    }
    .expect("dup2");
}

fn flood(to: &mut impl Write, bytes: u64, of: &[u8]) -> std::io::Result<()> {
    let block = of.repeat((64 << 10) / of.len());
    let mut left = usize::try_from(bytes).expect("a size");
    while left > 0 {
        let part = &block[..left.min(block.len())];
        to.write_all(part)?;
        left -= part.len();
    }
    to.flush()
}

fn drip(value: &str) -> std::io::Result<()> {
    let (count, ms) = value.split_once(':').expect("drip:COUNT:MS");
    for line in 0..count.parse::<u64>().expect("a number") {
        let mut out = std::io::stdout();
        writeln!(out, "line {line}")?;
        out.flush()?;
        std::thread::sleep(Duration::from_millis(ms.parse().expect("a number")));
    }
    Ok(())
}

/// Tells of every request that comes in.
fn tell(fake: FakeUpstream) {
    std::thread::spawn(move || {
        let posts = (0..).filter(|index| fake.wait_request(*index, LIFE).request.method == "POST");
        for (_, number) in posts.zip(1_u64..) {
            let _ = writeln!(std::io::stderr(), "request {number}");
        }
    });
}

/// Answers a request, of which it is given the bytes.
type Answer = fn(std::net::TcpStream, &[u8]) -> std::io::Result<()>;

/// As simple servers do that have one thread.
fn serve_one(address: &str, answer: Answer) -> std::io::Result<()> {
    for stream in std::net::TcpListener::bind(address)?.incoming() {
        // Whoever leaves is no reason to end.
        let _ = answer_one(stream?, answer);
    }
    Ok(())
}

fn answer_one(mut stream: std::net::TcpStream, answer: Answer) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    // A test's GET ends with its head, and anything else with an object.
    while !(bytes.ends_with(b"}") || bytes.starts_with(b"GET ") && bytes.ends_with(b"\r\n\r\n")) {
        let mut piece = [0; 4096];
        let length = stream.read(&mut piece)?;
        if length == 0 {
            return Ok(());
        }
        bytes.extend_from_slice(&piece[..length]);
    }
    if bytes.starts_with(b"GET ") {
        return stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    }
    answer(stream, &bytes)
}

fn hold(mut stream: std::net::TcpStream, _: &[u8]) -> std::io::Result<()> {
    eprintln!("here");
    let _ = stream.read(&mut [0; 100]);
    eprintln!("gone");
    Ok(())
}

/// In a request that asks for a stream after an event, else within the object.
fn die_within(mut stream: std::net::TcpStream, asked: &[u8]) -> std::io::Result<()> {
    let is_stream = asked.windows(13).any(|text| text == b"\"stream\":true");
    let (kind, part) = match is_stream {
        true => (
            "text/event-stream",
            "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\"finish_reason\":null}]}\n\n",
        ),
        false => ("application/json", "{\"choices\":[{\"mess"),
    };
    stream.write_all(format!("HTTP/1.0 200 OK\r\ncontent-type: {kind}\r\n\r\n{part}").as_bytes())?;
    std::thread::sleep(Duration::from_millis(50));
    std::process::abort()
}

fn stream_slowly(mut stream: std::net::TcpStream, _: &[u8]) -> std::io::Result<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")?;
    for _ in 0..30 {
        stream.write_all(b"data: {}\n\n")?;
        std::thread::sleep(Duration::from_millis(100));
    }
    stream.write_all(b"data: [DONE]\n\n")
}

fn fork(value: &str) -> std::io::Result<()> {
    let (kind, steps) = value.split_once(':').expect("fork:KIND:STEPS");
    let mut command = Command::new("/proc/self/exe");
    let steps: Vec<String> = steps.split(',').map(str::to_owned).collect();
    match kind {
        "plain" => command.args(steps).spawn().map(drop),
        "setsid" => command.arg("setsid").args(steps).spawn().map(drop),
        "naked" => command.env_clear().arg("setsid").args(steps).spawn().map(drop),
        "daemon" => {
            // The one between ends, and is waited for.
            let rest = format!("fork:setsid:{}", steps.join(","));
            command.args(["setsid", &rest]).status().map(drop)
        }
        _ => panic!("adaptersim: no such kind: {kind}"),
    }
}

fn hex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).expect("hex"), 16).expect("hex"))
        .collect()
}

/// Whether a place can be read, and written.
fn reach(path: &str) -> Value {
    let is_folder = std::path::Path::new(path).is_dir();
    let can_read = if is_folder { std::fs::read_dir(path).is_ok() } else { std::fs::File::open(path).is_ok() };
    let new = std::path::Path::new(path).join("new");
    json!([can_read, is_folder && std::fs::write(new, "").is_ok()])
}

/// Environment, arguments, descriptors, limits and the kernel's account of it.
fn dump() -> Value {
    let env: Map<String, Value> = std::env::vars().map(|(name, value)| (name, value.into())).collect();
    let mut fds = Map::new();
    for number in 0..1024 {
        if let Ok(target) = std::fs::read_link(format!("/proc/self/fd/{number}")) {
            fds.insert(number.to_string(), target.display().to_string().into());
        }
    }
    let read = |name: &str| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
    json!({
        "env": env,
        "args": std::env::args().collect::<Vec<_>>(),
        "fds": fds,
        "dir": std::env::current_dir().map(|dir| dir.display().to_string()).unwrap_or_default(),
        "limits": read("limits"),
        "status": read("status"),
        "pid": std::process::id(),
        "group": rustix::process::getpgrp().as_raw_nonzero().get(),
    })
}
