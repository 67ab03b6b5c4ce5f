//! The built-in model, and the endpoints around it: every field that OpenAI's published schemas require.

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use evergate_testkit::raw::{self, get_request, post, post_request};
use evergate_testkit::sse::{Event, text_of};
use evergate_testkit::{Evergate, Raw, Response, post_chat};
use serde_json::{Value, json};

use crate::support::{CHAT, EXE, LIMIT, assert_error, assert_good_stream, assert_request_id, echo};

fn assert_recent(created: &Value) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let created = created.as_u64().expect("Unix seconds");
    assert!(created.abs_diff(now) < 120, "{created} is not now");
}

fn stream_events(response: &Response) -> Vec<Event> {
    assert_eq!((response.status, response.header("content-type")), (200, Some("text/event-stream")));
    assert_request_id(response);
    assert!(response.chunks_hold_whole_events());
    let events = response.events();
    assert_good_stream(&events, response.is_complete);
    events
}

#[test]
fn a_start_without_a_file_prints_a_line_to_try_and_the_line_works() {
    let gateway = Evergate::builder(EXE).without_config().start();
    let said = gateway.wait_stderr("try: curl ", LIMIT);
    assert!(said.contains(&format!("listening on http://{}", gateway.addr())), "{said}");
    assert!(said.contains(&gateway.admin()), "{said}");
    let line = said.lines().find_map(|line| line.split_once("try: curl ").map(|(_, rest)| rest)).unwrap();
    assert!(line.starts_with(&format!("http://{}{CHAT} ", gateway.addr())), "{line}");
    // As a person would: the very text, by a shell.
    let tried = Command::new("sh").args(["-c", &format!("curl {line}")]).output().unwrap();
    let said = String::from_utf8_lossy(&tried.stderr);
    let answer: Value = serde_json::from_slice(&tried.stdout).unwrap_or_else(|_| panic!("curl: {said}"));
    assert_eq!(answer["choices"][0]["message"]["content"], "Say hello", "{answer}");
    let body = line.split_once("-d '").unwrap().1.strip_suffix('\'').unwrap();
    assert_eq!(post(&gateway.addr(), CHAT, body).content(), "Say hello");
    let stream = body.replacen('{', "{\"stream\":true,", 1);
    assert_eq!(text_of(&stream_events(&post(&gateway.addr(), CHAT, &stream))), "Say hello");
}

#[test]
fn a_providers_key_in_the_environment_opens_its_models() {
    let config = "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n";
    let start = || Evergate::builder(EXE).config(config);
    let gateway = start().env("DEEPSEEK_API_KEY", "sk-no-such-key").start();
    let said = gateway.wait_stderr("models: ", LIMIT);
    let models = said.lines().find(|line| line.starts_with("models: ")).unwrap();
    assert!(models.contains("deepseek/<model>") && !models.contains("openai/"), "{models}");
    assert_error(&post_chat(&gateway.addr(), "openai/x", false, &Value::Null), 404, "model_not_found");
}

#[test]
fn a_chat_completion_has_every_required_field() {
    let gateway = echo();
    let response = post_chat(&gateway.addr(), "echo", false, &Value::Null);
    assert_eq!((response.status, response.header("content-type")), (200, Some("application/json")));
    assert_request_id(&response);
    let value = response.json();
    assert!(value["id"].as_str().unwrap().starts_with("chatcmpl-"), "{value}");
    assert_eq!((&value["object"], &value["model"]), (&json!("chat.completion"), &json!("echo")));
    assert_recent(&value["created"]);
    let message = json!({"role": "assistant", "content": "Say hello", "refusal": null});
    let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "stop"});
    assert_eq!(value["choices"], json!([choice]));
    // "Say" is one token and "hello" two, by the documented count of four bytes each.
    assert_eq!(value["usage"], json!({"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}));
    let other = post_chat(&gateway.addr(), "echo", false, &Value::Null);
    assert_ne!(other.json()["id"], value["id"]);
    assert_ne!(other.header("x-request-id"), response.header("x-request-id"));
}

#[test]
fn a_chat_stream_has_every_required_field_and_ends_with_done() {
    let gateway = echo();
    let mut events = stream_events(&post_chat(&gateway.addr(), "echo", true, &Value::Null));
    assert_eq!(text_of(&events), "Say hello");
    events.pop();
    let chunks: Vec<Value> = events.iter().map(Event::json).collect();
    let (last, others) = chunks.split_last().unwrap();
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!((&chunk["id"], &chunk["created"]), (&chunks[0]["id"], &chunks[0]["created"]));
        assert_eq!((&chunk["model"], chunk["choices"].as_array().unwrap().len()), (&json!("echo"), 1));
        assert!(chunk["choices"][0].as_object().unwrap().contains_key("logprobs"));
        assert_eq!(chunk["choices"][0]["index"], 0);
        assert!(chunk.get("usage").is_none(), "not asked for: {chunk}");
    }
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(others.len() >= 3, "a role and two words: {chunks:?}");
    for chunk in others {
        assert_eq!(chunk["choices"][0].get("finish_reason"), Some(&Value::Null));
    }
    assert_eq!((&last["choices"][0]["finish_reason"], &last["choices"][0]["delta"]), (&json!("stop"), &json!({})));
}

#[test]
fn a_stream_reports_usage_when_asked() {
    let gateway = echo();
    let extra = json!({"stream_options": {"include_usage": true}});
    let mut events = stream_events(&post_chat(&gateway.addr(), "echo", true, &extra));
    events.pop();
    let last = events.pop().unwrap().json();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"], json!({"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}));
    assert!(events.iter().all(|event| event.json().get("usage") == Some(&Value::Null)));
}

#[test]
fn completions_answer_whole_and_streaming() {
    let gateway = echo();
    let body = r#"{"model":"echo","prompt":"one two"}"#;
    let value = post(&gateway.addr(), "/v1/completions", body).json();
    assert!(value["id"].as_str().unwrap().starts_with("cmpl-"), "{value}");
    assert_eq!((&value["object"], &value["model"]), (&json!("text_completion"), &json!("echo")));
    assert_recent(&value["created"]);
    let choice = json!({"index": 0, "text": "one two", "logprobs": null, "finish_reason": "stop"});
    assert_eq!(value["choices"], json!([choice]));
    assert_eq!(value["usage"]["total_tokens"], 4);

    let body = r#"{"model":"echo","prompt":"one two","stream":true}"#;
    let mut events = stream_events(&post(&gateway.addr(), "/v1/completions", body));
    assert_eq!(text_of(&events), "one two");
    events.pop();
    let reasons: Vec<Value> = events.iter().map(|event| event.json()["choices"][0]["finish_reason"].clone()).collect();
    let (last, others) = reasons.split_last().unwrap();
    assert!(*last == "stop" && others.iter().all(Value::is_null), "{reasons:?}");
}

#[test]
fn five_inputs_have_five_vectors_as_numbers_and_as_base64() {
    let gateway = echo();
    let ask = |format: &str| {
        let body =
            format!(r#"{{"model":"echo","input":["a","b","c","d","e"],"dimensions":8,"encoding_format":"{format}"}}"#);
        post(&gateway.addr(), "/v1/embeddings", &body).json()
    };
    let (plain, packed) = (ask("float"), ask("base64"));
    assert_eq!((&plain["object"], &plain["model"]), (&json!("list"), &json!("echo")));
    assert_eq!(plain["usage"], json!({"prompt_tokens": 5, "total_tokens": 5}));
    let data = plain["data"].as_array().unwrap();
    assert_eq!(data.len(), 5);
    for (index, item) in data.iter().enumerate() {
        assert_eq!((&item["object"], &item["index"]), (&json!("embedding"), &json!(index)));
        assert!(data[..index].iter().all(|other| other["embedding"] != item["embedding"]));
        let bytes: Vec<u8> = item["embedding"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|number| (number.as_f64().unwrap() as f32).to_le_bytes())
            .collect();
        assert_eq!(bytes.len(), 32);
        assert_eq!(decode_base64(packed["data"][index]["embedding"].as_str().unwrap()), bytes);
    }
}

fn decode_base64(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        other => panic!("not base64: {other}"),
    };
    assert_eq!(text.len() % 4, 0);
    let digits: Vec<u8> = text.trim_end_matches('=').bytes().map(digit).collect();
    let group = |four: &[u8]| {
        let number = (0..4).fold(0_u32, |number, at| number << 6 | u32::from(*four.get(at).unwrap_or(&0)));
        number.to_be_bytes()[1..four.len()].to_vec()
    };
    digits.chunks(4).flat_map(group).collect()
}

#[test]
fn models_are_listed_and_found() {
    let gateway = echo();
    let list = raw::get(&gateway.addr(), "/v1/models").json();
    assert_eq!(list["object"], "list");
    let data = list["data"].as_array().unwrap();
    assert_eq!(data.len(), 1);
    assert_eq!((&data[0]["id"], &data[0]["object"]), (&json!("echo"), &json!("model")));
    assert!(data[0]["created"].is_u64() && data[0]["owned_by"].is_string(), "{list}");
    let one = raw::get(&gateway.addr(), "/v1/models/echo");
    assert_eq!((one.status, one.json()), (200, data[0].clone()));
    let none = raw::get(&gateway.addr(), "/v1/models/nothing");
    assert_error(&none, 404, "model_not_found");
    assert_eq!(none.json()["error"]["param"], "model");
}

#[test]
fn health_and_readiness_say_200() {
    let gateway = echo();
    for path in ["/healthz", "/readyz"] {
        let response = raw::get(&gateway.addr(), path);
        assert_eq!(response.status, 200, "{path}");
        assert_request_id(&response);
    }
}

/// B16.
#[test]
fn other_methods_are_refused_with_those_that_exist() {
    let gateway = echo();
    let mut raw = Raw::connect(&gateway.addr());
    for (path, allowed) in [
        (CHAT, "POST"),
        ("/v1/completions", "POST"),
        ("/v1/embeddings", "POST"),
        ("/v1/models", "GET"),
        ("/v1/models/echo", "GET"),
        ("/healthz", "GET"),
        ("/readyz", "GET"),
    ] {
        for method in ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "BREW"] {
            raw.send(format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes());
            let response = raw.read_response(LIMIT);
            assert_error(&response, 405, "method_not_allowed");
            let allow = response.header("allow").unwrap_or_default();
            assert!(allow.split(',').any(|one| one.trim() == allowed), "{method} {path}: allow: {allow:?}");
        }
        let other = if allowed == "POST" { get_request(path, "") } else { post_request(path, "", "{}") };
        raw.send(&other);
        assert_error(&raw.read_response(LIMIT), 405, "method_not_allowed");
    }
}

/// Whatever it is: any characters of a method, and any length.
#[test]
fn b16_a_405_names_the_method_as_it_was_sent() {
    let gateway = echo();
    let long = "X".repeat(400);
    let cut = format!("{}...", "X".repeat(32));
    let odd = "!#$%&'*+-.^_`|~09az";
    for (method, named) in [("BREW", "BREW"), ("post", "post"), (odd, odd), ("PROPFIND", "PROPFIND"), (&*long, &*cut)] {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(format!("{method} {CHAT} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes());
        let response = raw.read_response(LIMIT);
        assert_error(&response, 405, "method_not_allowed");
        let message = format!("POST is answered at this path, {named} is not");
        assert_eq!(response.json()["error"]["message"], message.as_str());
        // A label has few values, whatever clients send.
        assert_eq!(gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT)["method"], "other");
    }
}

#[test]
fn head_is_refused_without_a_body() {
    let gateway = echo();
    let mut raw = Raw::connect(&gateway.addr());
    for path in [CHAT, "/v1/models", "/healthz"] {
        raw.send(format!("HEAD {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes());
        let head = raw.read_head(LIMIT);
        assert_eq!(head.status, 405, "{path}");
        assert!(head.header("allow").is_some(), "{path}");
        assert_request_id(&head);
    }
    // The next answer begins where the head ended: no body came with it.
    raw.send(&get_request("/healthz", ""));
    assert_eq!(raw.read_response(LIMIT).status, 200);
}
