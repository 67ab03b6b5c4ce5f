//! The stdio protocol's other side, well and badly spoken: a request's last message says what is done with it.
//!
//! Its steps are parted by `;`, each `name` or `name=value`:
//!
//! - `say=TEXT` and `delta=JSON` are deltas; `end`, `text=TEXT`, `body=JSON` and `fail=STATUS` end the request
//! - `echo` ends it with the frame that came; `result=JSON` with these fields
//! - `hang` until it is cancelled, `sleep=MS`, `await=FILE`
//! - `exit=CODE`, `signal=NUMBER`, `raw=TEXT` and `hex=BYTES` to standard output, `line=BYTES` without an end, `for=ID` a delta
//!   for another request, `flood=COUNT` deltas
//! - `err=TEXT`, `leak=BYTES`, `close-in`, `close-out`, `daemon` a grandchild in a session of its own
//!
//! Standard error hears `pid PID` when it is ready, `request ID`, `cancel ID`, `drain`, and `end` of its input.
#![allow(clippy::disallowed_methods, clippy::exit, reason = "it is a program, whose waiting nobody else waits for")]

use std::collections::BTreeSet;
use std::io::{BufRead, Read, Write};
use std::process::{Command, exit};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

/// How it serves.
#[derive(Clone)]
struct Model {
    is_by_length: bool,
    is_deaf: bool,
    cancelled: Arc<Mutex<BTreeSet<String>>>,
    running: Arc<Mutex<usize>>,
}

/// Serves until it is drained. `options`, parted by commas: `places=COUNT`, `length` for frames by length, `deaf` to cancels,
/// `stubborn` at a drain.
///
/// # Panics
/// On steps that there are not.
pub fn serve(options: &str) {
    let has = |option: &str| options.split(',').any(|own| own == option);
    let places =
        options.split(',').find_map(|option| option.strip_prefix("places=")).map_or(1, |count| count.parse().unwrap());
    let (cancelled, running) = Default::default();
    let model = Model { is_by_length: has("length"), is_deaf: has("deaf"), cancelled, running };
    note(&format!("pid {}", std::process::id()));
    model.write(&json!({ "type": "ready", "protocol": 1, "in_flight": places }));
    let mut input = std::io::stdin().lock();
    while let Some(frame) = model.read(&mut input) {
        let id = frame["id"].as_str().unwrap_or_default().to_owned();
        match frame["type"].as_str().unwrap() {
            "request" => {
                note(&format!("request {id}"));
                *model.running.lock().unwrap() += 1;
                let own = model.clone();
                std::thread::spawn(move || own.answer(&id, &frame));
            }
            "cancel" => {
                note(&format!("cancel {id}"));
                model.cancelled.lock().unwrap().insert(id);
            }
            "drain" => {
                note("drain");
                while has("stubborn") || *model.running.lock().unwrap() > 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
                model.write(&json!({ "type": "drained" }));
                return;
            }
            other => panic!("no such frame: {other}"),
        }
    }
    note("end");
    while *model.running.lock().unwrap() > 0 {
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

impl Model {
    fn read(&self, input: &mut impl BufRead) -> Option<Value> {
        let mut bytes = Vec::new();
        if self.is_by_length {
            let mut length = [0; 4];
            input.read_exact(&mut length).ok()?;
            input.take(u32::from_be_bytes(length).into()).read_to_end(&mut bytes).ok()?;
        } else if input.read_until(b'\n', &mut bytes).ok()? == 0 {
            return None;
        }
        Some(serde_json::from_slice(&bytes).unwrap())
    }

    fn write(&self, frame: &Value) {
        let json = frame.to_string();
        let length = u32::try_from(json.len()).unwrap().to_be_bytes();
        let bytes =
            if self.is_by_length { [&length, json.as_bytes()].concat() } else { [json.as_bytes(), b"\n"].concat() };
        put(&bytes);
    }

    fn answer(&self, id: &str, frame: &Value) {
        let body = &frame["body"];
        let last = body["messages"].as_array().and_then(|all| all.last()).map(|message| &message["content"]);
        let script = last.or(body.get("prompt")).or(body.get("input")).and_then(Value::as_str).unwrap().to_owned();
        for step in script.split(';') {
            let (name, value) = step.split_once('=').unwrap_or((step, ""));
            if self.act(id, frame, name, value) {
                break;
            }
        }
        *self.running.lock().unwrap() -= 1;
    }

    /// Says whether the request is over.
    fn act(&self, id: &str, frame: &Value, name: &str, value: &str) -> bool {
        let number = || value.parse::<u64>().unwrap();
        let delta = |id: &str, text: &str| self.write(&json!({ "type": "delta", "id": id, "text": text }));
        let result = |fields: Value| {
            let mut frame = json!({ "type": "result", "id": id });
            frame.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            self.write(&frame);
            true
        };
        match name {
            "say" => delta(id, value),
            "for" => delta(value, "not mine"),
            "flood" => (0..number()).for_each(|at| delta(id, &format!("{at:0>1000} "))),
            "delta" => {
                let delta: Value = serde_json::from_str(value).unwrap();
                self.write(&json!({ "type": "delta", "id": id, "delta": delta }));
            }
            "end" => return result(json!({})),
            "text" => return result(json!({ "text": value })),
            "body" => return result(json!({ "body": serde_json::from_str::<Value>(value).unwrap() })),
            "result" => return result(serde_json::from_str(value).unwrap()),
            "echo" => return result(json!({ "text": frame.to_string() })),
            "fail" => {
                self.write(&json!({ "type": "error", "id": id, "status": number(), "message": "no wish to", "code": "unwilling" }));
                return true;
            }
            "hang" => {
                while self.is_deaf || !self.cancelled.lock().unwrap().contains(id) {
                    std::thread::sleep(Duration::from_millis(2));
                }
                self.write(&json!({ "type": "error", "id": id, "message": "cancelled" }));
                return true;
            }
            "sleep" => std::thread::sleep(Duration::from_millis(number())),
            "await" => {
                while !std::path::Path::new(value).exists() {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            "exit" => exit(value.parse().unwrap()),
            "signal" => {
                Command::new("kill").args([&format!("-{value}"), &std::process::id().to_string()]).status().unwrap();
                std::thread::sleep(Duration::from_secs(60));
            }
            "raw" => put(format!("{value}\n").as_bytes()),
            "hex" => put(&(0..value.len() / 2)
                .map(|at| u8::from_str_radix(&value[2 * at..][..2], 16).unwrap())
                .collect::<Vec<_>>()),
            "line" => put(&vec![b'x'; usize::try_from(number()).unwrap()]),
            "err" => note(value),
            "leak" => std::mem::forget(std::hint::black_box(vec![1_u8; usize::try_from(number()).unwrap()])),
            "close-in" => rustix::stdio::dup2_stdin(nothing()).unwrap(),
            "close-out" => rustix::stdio::dup2_stdout(nothing()).unwrap(),
            "daemon" => {
                let mut command = Command::new("/proc/self/exe");
                command.args(["setsid", "pid", "hang"]).stdin(std::process::Stdio::null()).spawn().map(drop).unwrap();
            }
            _ => panic!("no such step: {name}"),
        }
        false
    }
}

fn nothing() -> std::fs::File {
    std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap()
}

/// One frame at a time, whoever writes; a pipe that nobody reads ends it.
fn put(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    if out.write_all(bytes).and_then(|()| out.flush()).is_err() {
        exit(98);
    }
}
