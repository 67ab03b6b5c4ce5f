//! What goes in and what comes out when all is well.

use std::time::Duration;

use evergate_core::config::process::{Input, Output};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use super::support::{plan, run, sim, written_at_rest};
use super::wire::{chat, serve, setup};

#[test]
fn a_text_goes_in_and_comes_out() {
    run(|house| async move {
        let host = serve(&house, setup(plan(&["tr", "a-z", "A-Z"])));
        let response = host.say("hello, \"wörld\"").await;
        assert_eq!(response.content(), "HELLO, \"WöRLD\"");
        let value = response.json();
        assert_eq!((&value["object"], &value["model"]), (&json!("chat.completion"), &json!("m")));
        assert_eq!(value["usage"]["total_tokens"], 8);
        let body = json!({ "model": "m", "prompt": "abc" });
        let response = host.ask_at("/v1/completions", "", &body).await;
        assert_eq!(response.json()["choices"][0]["text"], "ABC");
        assert_eq!(response.json()["object"], "text_completion");
    });
}

#[test]
fn a_text_is_streamed_in_openais_shape() {
    run(|house| async move {
        let host = serve(&house, setup(plan(&["tr", "a-z", "A-Z"])));
        let mut body = chat("hello world");
        body["stream"] = true.into();
        body["stream_options"] = json!({ "include_usage": true });
        let response = host.ask(&body).await;
        assert_eq!(response.streamed(), ("HELLO WORLD".into(), "[DONE]".into()));
        let events: Vec<Value> =
            response.events().iter().filter_map(|event| serde_json::from_str(event).ok()).collect();
        assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "stop");
        assert_eq!(events[events.len() - 1]["usage"]["completion_tokens"], 4);
        assert!(events.iter().all(|event| event["id"] == events[0]["id"]));
        let body = json!({ "model": "m", "prompt": "abc", "stream": true });
        let response = host.ask_at("/v1/completions", "", &body).await;
        assert_eq!(response.streamed(), ("ABC".into(), "[DONE]".into()));
    });
}

#[test]
fn a_template_is_what_the_program_reads() {
    run(|house| async move {
        let mut setup = setup(plan(&["cat"]));
        setup.config.input = Input::Text(Some("{system}|{messages}|{last}".into()));
        let host = serve(&house, setup);
        let body = json!({ "model": "m", "messages": [
            { "role": "system", "content": "be brief" }, { "role": "user", "content": "hi {last}" }] });
        let response = host.ask(&body).await;
        assert_eq!(response.content(), "be brief|system: be brief\nuser: hi {last}|hi {last}");
    });
}

#[test]
fn a_whole_request_goes_in_as_it_came() {
    run(|house| async move {
        let mut setup = setup(plan(&["cat"]));
        setup.config.input = Input::Json;
        let host = serve(&house, setup);
        let mut body = chat("é");
        body["x"] = json!([1.5, null]);
        assert_eq!(serde_json::from_str::<Value>(&host.ask(&body).await.content()).unwrap(), body);
    });
}

#[test]
fn json_is_an_answer_or_the_content_of_one() {
    run(|house| async move {
        let answer = r#"{"id":"own","choices":[{"message":{"role":"assistant","content":"hi","extra":1}}],"n":1.0}"#;
        for (written, content) in [(answer, "hi"), ("\"plain\"", "plain"), (r#"{"content":"object"}"#, "object")] {
            let mut setup = setup(sim(&[&format!("out:{written}")]));
            setup.config.output = Output::Json;
            let host = serve(&house, setup);
            let response = host.say("x").await;
            assert_eq!(response.content(), content);
            if written == answer {
                assert_eq!(response.body, answer.as_bytes(), "passed on as it is");
            }
            assert_eq!(host.stream("x").await.streamed(), (content.into(), "[DONE]".into()));
        }
    });
}

#[test]
fn embeddings_are_json_only() {
    run(|house| async move {
        let vectors = r#"{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.5,-1.25]}]}"#;
        let body = json!({ "model": "m", "input": "x" });
        let mut with_json = setup(sim(&[&format!("out:{vectors}")]));
        with_json.config.output = Output::Json;
        let host = serve(&house, with_json);
        let response = host.ask_at("/v1/embeddings", "", &body).await;
        assert_eq!((response.status, response.body.as_slice()), (200, vectors.as_bytes()));
        let host = serve(&house, setup(plan(&["cat"])));
        host.ask_at("/v1/embeddings", "", &body).await.assert_error(400, "invalid_value", "0");
    });
}

#[test]
fn lines_are_sent_on_as_they_come_and_joined_for_who_wants_one_answer() {
    run(|house| async move {
        let folder = super::support::folder();
        let go = folder.path().join("go");
        let mut setup = setup(sim(&["out:one\n", &format!("await:{}", go.display()), "out:two\nthree"]));
        setup.config.output = Output::Lines;
        let host = serve(&house, setup);
        let mut body = chat("x");
        body["stream"] = true.into();
        let mut stream = host.send("/v1/chat/completions", "", body.to_string().as_bytes()).await;
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains("one\\n") {
            assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
        }
        // The program has not ended: it waits for this.
        std::fs::write(&go, "").unwrap();
        stream.read_to_end(&mut seen).await.unwrap();
        let text = String::from_utf8(seen).unwrap();
        assert!(text.contains("\"two\\n\"") && text.contains("\"three\"") && text.contains("data: [DONE]"), "{text}");
        assert_eq!(host.say("x").await.content(), "one\ntwo\nthree");
    });
}

#[test]
fn g15_a_program_that_reads_nothing_may_answer() {
    run(|house| async move {
        let host = serve(&house, setup(sim(&["close-in", "out:enough"])));
        assert_eq!(host.say(&"x".repeat(10 << 20)).await.content(), "enough");
    });
}

#[test]
fn g14_a_long_text_goes_in_while_the_answer_comes_out() {
    run(|house| async move {
        let host = serve(&house, setup(plan(&["cat"])));
        let text = "x".repeat(10 << 20);
        assert!(host.say(&text).await.content() == text);
    });
}

#[test]
fn g16_what_is_no_utf_8_is_still_an_answer_in_json() {
    run(|house| async move {
        let host = serve(&house, setup(sim(&["hex:61ff00c3", "sleep:30", "hex:a9f09f980a"])));
        assert_eq!(host.say("x").await.content(), "a\u{fffd}\0é\u{fffd}");
        assert_eq!(host.stream("x").await.streamed().0, "a\u{fffd}\0é\u{fffd}");
    });
}

#[test]
fn g25_text_is_an_argument_only_behind_two_dashes() {
    run(|house| async move {
        let mut setup = setup(sim(&["dump"]));
        (setup.config.prompt_arg, setup.config.output) = (true, Output::Text);
        let host = serve(&house, setup);
        for text in ["--help", "$(reboot) `x` ; 'a' \"b\" \\ * ~", "", "-", "é\n😀"] {
            let seen: Value = serde_json::from_str(&host.say(text).await.content()).unwrap();
            let args: Vec<_> = seen["args"].as_array().unwrap().iter().skip(1).collect();
            assert_eq!(args, ["dump", "--", text]);
            assert_eq!(seen["fds"]["0"], "/dev/null");
        }
        let longest = "x".repeat((128 << 10) - 1);
        assert_eq!(host.say(&longest).await.status, 200);
        host.say(&(longest + "x")).await.assert_error(400, "invalid_value", "0");
        host.say("a\0b").await.assert_error(400, "invalid_value", "0");
    });
}

#[test]
fn g13_a_program_waits_for_a_client_that_reads_slowly() {
    run(|house| async move {
        let bytes: usize = 8 << 20;
        let mut setup = setup(sim(&["pid", &format!("flood:{bytes}")]));
        setup.config.output = Output::Lines;
        let host = serve(&house, setup);
        let mut body = chat("x");
        body["stream"] = true.into();
        let stream = host.send("/v1/chat/completions", "", body.to_string().as_bytes()).await;
        let pid = house.heard("pid ", 1).await[0];
        let before = written_at_rest(pid, Duration::from_millis(300)).await;
        assert!(before > 0 && before < bytes / 4, "{before}");
        let (text, last) = super::wire::read(stream).await.streamed();
        assert_eq!((text.len(), last.as_str()), (bytes, "[DONE]"), "and nothing is lost");
    });
}
