//! The programs in examples/ behind the real binary, as the README's tour runs them. A case that needs what is not here
//! (python3, node, what examples/setup installs) says so and is reported as ignored, which `./test` holds against
//! tests/skips.txt.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod engine;
mod gateway;
mod stdio;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use evergate_testkit::cases::{self, Case};
use evergate_testkit::raw::Response;
use evergate_testkit::{Evergate, post_chat, wait_until};
use serde_json::{Value, json};

const CASES: [Case; 6] = [
    ("a_command_shouts", stdio::a_command_shouts),
    ("the_python_reference_of_the_stdio_protocol_answers", stdio::python_answers),
    ("the_typescript_reference_of_the_stdio_protocol_answers", stdio::typescript_answers),
    ("a_python_gateway_that_dies_in_every_way_is_restarted_and_told_of", gateway::dies_in_every_way),
    ("embeddings_of_a_kept_engine_equal_its_own", engine::embeddings_equal),
    ("a_managed_llama_server_answers_and_comes_back", engine::server_answers),
];

fn main() {
    cases::run(&CASES);
}

/// The binary under test.
const EXE: &str = env!("CARGO_BIN_EXE_evergate");
/// Nothing here takes so long unless it is broken.
const LIMIT: Duration = Duration::from_secs(60);

fn examples() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples")).canonicalize().unwrap()
}

/// A gateway with the tour's configuration, at addresses of its own.
fn tour() -> Evergate {
    let text = std::fs::read_to_string(examples().join("evergate.toml")).unwrap();
    gateway(&text.replace("dir = \".\"", &format!("dir = \"{}\"", examples().display())))
}

fn gateway(sections: &str) -> Evergate {
    let head = "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n";
    let gateway = Evergate::builder(EXE).config(format!("{head}{sections}")).start();
    gateway.wait_workers(2);
    gateway
}

fn ask(gateway: &Evergate, model: &str, text: &str, stream: bool) -> Response {
    ask_with(gateway, model, text, stream, &json!({}))
}

/// Asks with `more` in the request's body.
fn ask_with(gateway: &Evergate, model: &str, text: &str, stream: bool, more: &Value) -> Response {
    let mut body = json!({ "max_tokens": 8, "messages": [{ "role": "user", "content": text }] });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    post_chat(&gateway.addr(), model, stream, &body)
}

/// What a whole answer says.
fn said(response: &Response) -> String {
    assert_eq!(response.status, 200, "{}", response.text());
    response.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// What a stream says, which must come to its end.
fn streamed(response: &Response) -> String {
    let text = response.text();
    assert!(response.status == 200 && text.trim_end().ends_with("data: [DONE]"), "{text}");
    let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
    events.filter_map(|event| Some(event["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect()
}

/// Ends the gateway, after which nothing of its programs may be there.
fn end(mut gateway: Evergate) {
    let pids: Vec<i64> = ["host_pid", "program_pid"].iter().flat_map(|key| pids(&gateway, key)).collect();
    gateway.signal(rustix::process::Signal::TERM);
    gateway.wait_exit(LIMIT);
    let is_there = |pid: &i64| evergate_testkit::driver::is_alive(i32::try_from(*pid).unwrap());
    wait_until("the end of its programs", LIMIT, || !pids.iter().any(is_there));
}

fn pids(gateway: &Evergate, key: &str) -> Vec<i64> {
    let all: Value = serde_json::from_str(&gateway.printed(&["models", "--json"])).unwrap();
    all.as_array().unwrap().iter().filter_map(|model| model[key].as_i64()).collect()
}

/// Whether this command succeeds.
fn can(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).stdin(Stdio::null()).output().is_ok_and(|output| output.status.success())
}

fn needs_python() -> Result<(), String> {
    if can("python3", &["--version"]) { Ok(()) } else { Err("there is no python3".into()) }
}

/// What examples/setup has made.
fn needs_engine() -> Result<(), String> {
    let stamp = examples().join("../.tools/examples/stamp");
    if stamp.is_file() {
        Ok(())
    } else {
        Err("examples/setup has not been run, or could not install its packages".into())
    }
}
