//! Answers as they should be.

use evergate_core::config::process::Frames;
use serde_json::{Value, json};

use super::host::{model, said, serve, stop, streamed};
use super::support::run;
use super::wire::{chat, read};

#[test]
fn texts_deltas_and_bodies_become_answers_whole_and_streamed() {
    run(|house| async move {
        let (host, stdio) = serve(&house, model(""));
        assert_eq!(host.say("say=a ;say=b;end").await.content(), "a b");
        assert_eq!(host.say("say=a ;text=b").await.content(), "a b");
        assert_eq!(host.say("text=").await.content(), "");
        for script in ["say=a ;say=b;end", "say=a ;text=b", "text=a b"] {
            assert_eq!(host.ask(&streamed(script)).await.streamed(), ("a b".into(), "[DONE]".into()), "{script}");
        }
        let usage =
            r#"result={"text":"hi","finish_reason":"length","usage":{"prompt_tokens":3,"completion_tokens":4}}"#;
        let answer = host.say(usage).await.json();
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
        assert_eq!(answer["usage"], json!({ "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7 }));
        let mut body = streamed(usage);
        body["stream_options"] = json!({ "include_usage": true });
        let events = host.ask(&body).await.events();
        let at = |from_end: usize| serde_json::from_str::<Value>(&events[events.len() - from_end]).unwrap();
        assert_eq!(at(3)["choices"][0]["finish_reason"], "length");
        assert_eq!(at(2)["usage"]["total_tokens"], 7);
        let own = r#"body={"id":"z","choices":[{"index":0,"message":{"role":"assistant","content":"own"},"finish_reason":"stop"}]}"#;
        assert_eq!(host.say(own).await.json()["id"], "z");
        assert_eq!(host.ask(&streamed(own)).await.streamed(), ("own".into(), "[DONE]".into()));
        let text = host.ask_at("/v1/completions", "", &json!({ "model": "m", "prompt": "say=a;text=b" })).await;
        assert_eq!(text.json()["choices"][0]["text"], "ab");
        stop(&house, &stdio).await;
    });
}

#[test]
fn a_tool_call_in_pieces_is_one_in_a_whole_answer() {
    run(|house| async move {
        let (host, stdio) = serve(&house, model(""));
        let script = concat!(
            r#"delta={"role":"assistant","tool_calls":[{"index":0,"id":"c1","type":"function","function":{"name":"f","arguments":"{\"a\""}}]};"#,
            r#"delta={"tool_calls":[{"index":0,"function":{"arguments":":1}"}}]};result={"finish_reason":"tool_calls"}"#
        );
        let choice = host.say(script).await.json()["choices"][0].clone();
        assert_eq!(choice["finish_reason"], "tool_calls");
        assert_eq!((&choice["message"]["content"], &choice["message"]["role"]), (&Value::Null, &json!("assistant")));
        let call = &choice["message"]["tool_calls"][0];
        assert_eq!(call["function"], json!({ "name": "f", "arguments": "{\"a\":1}" }));
        let events = host.ask(&streamed(script)).await.events();
        let first: Value = serde_json::from_str(&events[0]).unwrap();
        assert_eq!(first["choices"][0]["delta"]["tool_calls"][0]["id"], "c1", "its own first words are the first");
        assert_eq!(events.last().unwrap(), "[DONE]");
        stop(&house, &stdio).await;
    });
}

#[test]
fn embeddings_are_a_body_that_stays_as_it_is() {
    run(|house| async move {
        let (host, stdio) = serve(&house, model(""));
        let ask = async |input: &str| host.ask_at("/v1/embeddings", "", &json!({ "model": "m", "input": input })).await;
        let body = r#"{"data":[{"embedding":[0.25],"index":0,"object":"embedding"}],"object":"list"}"#;
        assert_eq!(ask(&format!("body={body}")).await.body, body.as_bytes());
        ask("text=no").await.assert_error(502, "adapter_protocol_error", "1");
        stop(&house, &stdio).await;
    });
}

#[test]
fn a_request_reaches_the_program_with_its_id_its_time_and_any_body() {
    run(|house| async move {
        for frames in [Frames::Lines, Frames::Length] {
            let mut setup = model(if frames == Frames::Length { "length" } else { "" });
            setup.config.frames = frames;
            let (host, stdio) = serve(&house, setup);
            let body = "{ \"model\": \"m\",\r\n\"messages\": [\n{ \"role\": \"user\", \"content\": \"echo\" } ] }";
            let headers = "x-request-id: r-1\r\nx-request-timeout: 20s\r\n";
            let stream = host.send("/v1/chat/completions", headers, body.as_bytes()).await;
            let frame: Value = serde_json::from_str(&read(stream).await.content()).unwrap();
            assert_eq!((&frame["endpoint"], &frame["request_id"]), (&json!("chat"), &json!("r-1")));
            assert_eq!(frame["body"], serde_json::from_str::<Value>(body).unwrap());
            let ms = frame["deadline_ms"].as_u64().unwrap();
            assert!((1..=20_000).contains(&ms), "{ms}");
            stop(&house, &stdio).await;
        }
    });
}

#[test]
fn two_at_once_are_told_apart_and_no_more_than_there_are_places() {
    run(|house| async move {
        let folder = super::support::folder();
        let go = folder.path().join("go");
        let (host, stdio) = serve(&house, model("places=2"));
        let script = |name: &str| chat(&format!("say={name};await={};text={name}", go.display())).to_string();
        let mut streams = Vec::new();
        for (name, load) in [("a", (1, 0)), ("b", (2, 0)), ("c", (2, 1))] {
            streams.push(host.send("/v1/chat/completions", "", script(name).as_bytes()).await);
            super::support::until(name, || *house.ear.load.lock().unwrap() == load).await;
        }
        assert_eq!(said(&house, "request ", 2).await.len(), 2);
        std::fs::write(&go, "").unwrap();
        for (stream, text) in streams.into_iter().zip(["aa", "bb", "cc"]) {
            assert_eq!(read(stream).await.content(), text);
        }
        assert_eq!(said(&house, "pid ", 1).await.len(), 1);
        stop(&house, &stdio).await;
    });
}

#[test]
fn a_line_brings_more_processes_up_to_the_most() {
    run(|house| async move {
        let folder = super::support::folder();
        let go = folder.path().join("go");
        let mut setup = model("");
        setup.config.max = 2;
        let (host, stdio) = serve(&house, setup);
        let body = chat(&format!("await={};text=x", go.display())).to_string();
        let mut streams = Vec::new();
        for _ in 0..3 {
            streams.push(host.send("/v1/chat/completions", "", body.as_bytes()).await);
        }
        super::support::until("two work", || *house.ear.load.lock().unwrap() == (2, 1)).await;
        std::fs::write(&go, "").unwrap();
        for stream in streams {
            assert_eq!(read(stream).await.content(), "x");
        }
        assert_eq!(said(&house, "pid ", 2).await.len(), 2);
        stop(&house, &stdio).await;
    });
}
