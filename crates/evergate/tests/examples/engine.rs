//! llama.cpp behind the gateway, with a model that examples/setup has made.

use std::process::Command;

use evergate_testkit::raw::{Raw, post_request};
use evergate_testkit::{wait_for, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::{LIMIT, ask, ask_with, end, examples, needs_engine, said, streamed, tour};

const TEXTS: [&str; 3] = ["a gateway", "a gateway that cannot be knocked over", "something else: \u{e4}\u{1f600}"];

/// What the engine makes of the same texts without anything around it.
const ALONE: &str = "import json, sys, xllamacpp\nfrom llama_server import params\n\
    server = xllamacpp.Server(params(sys.argv[1], 0, is_embedding=True))\n\
    print('\\n@' + json.dumps(server.handle_embeddings({'input': json.loads(sys.argv[2])})))";

pub(crate) fn embeddings_equal() -> Result<(), String> {
    needs_engine()?;
    let gateway = tour();
    let body = json!({ "model": "embed", "input": TEXTS }).to_string();
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request("/v1/embeddings", "", &body));
    let answer = raw.read_response(LIMIT);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let through = vectors(&answer.json());
    assert!(through.len() == TEXTS.len() && through.iter().all(|vector| vector.len() == 64), "{through:?}");
    assert_ne!(through[0], through[1]);

    let python = examples().join("../.tools/examples/bin/python");
    let mut command = Command::new(python);
    command.args(["-c", ALONE, "../.tools/examples/tiny.gguf", &json!(TEXTS).to_string()]).current_dir(examples());
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix('@')).unwrap_or_else(|| panic!("{out:?}"));
    assert_eq!(through, vectors(&serde_json::from_str(line).unwrap()), "not the engine's own");
    // What is no embedding is the client's mistake, and costs the engine nothing.
    assert_eq!(ask(&gateway, "embed", "hello", false).status, 400);
    assert_eq!(gateway.model("embed")["restarts"], 0);
    end(gateway);
    Ok(())
}

fn vectors(answer: &Value) -> Vec<Vec<f64>> {
    let vector = |item: &Value| item["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    answer["data"].as_array().unwrap().iter().map(vector).collect()
}

pub(crate) fn server_answers() -> Result<(), String> {
    needs_engine()?;
    let gateway = tour();
    // Its weights are random, and what it says is another text on every processor: no end of text may cut it short.
    let on = json!({ "ignore_eos": true });
    let hello = |stream| ask_with(&gateway, "tiny", "hello", stream, &on);
    let answer = hello(false);
    assert!(!said(&answer).is_empty() && answer.json()["usage"]["completion_tokens"] == 8, "{}", answer.text());
    assert!(!streamed(&hello(true)).is_empty());
    let before = gateway.model("tiny");
    assert!(before["address"].as_str().is_some_and(|address| address.contains("127.0.0.1:")), "{before}");
    wait_until("its words in its log", LIMIT, || gateway.printed(&["logs", "tiny"]).contains("listening on"));
    let pid = i32::try_from(before["program_pid"].as_i64().unwrap()).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    let last =
        wait_for("its record", LIMIT, || Some(gateway.model("tiny")["last_exit"].clone()).filter(Value::is_object));
    assert_eq!((&last["pid"], &last["signal"]), (&json!(pid), &json!(9)));
    assert!(!said(&hello(false)).is_empty(), "its successor answers");
    assert_ne!(gateway.model("tiny")["program_pid"], json!(pid));
    end(gateway);
    Ok(())
}
