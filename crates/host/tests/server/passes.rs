//! What goes to the program and what comes back.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::AsyncReadExt;

use super::model::{SERVES, body, given, serve};
use super::support::{run, until};
use super::wire::read;

#[test]
fn bodies_pass_as_they_are() {
    run(|house| async move {
        let host = serve(&house, given(&SERVES));
        let sent = r#"{ "model" : "echo-request","messages":[],"n":1.0,"seed" : 1e2}"#;
        for (path, status) in [("chat/completions", 200), ("completions", 200), ("embeddings", 200)] {
            let stream = host.send(&format!("/v1/{path}"), "x-request-id: r-1\r\n", sent.as_bytes()).await;
            let response = read(stream).await;
            assert_eq!(response.status, status, "{response:?}");
            let received = &response.json()["received"];
            assert_eq!(received["body"], sent, "{received}");
            let head = received["head"].as_str().unwrap();
            assert!(head.starts_with(&format!("POST /v1/{path} HTTP/1.1\r\n")) && head.contains("x-request-id: r-1"));
        }
        for (script, status) in [("status-429-7", 429), ("status-400", 400), ("status-500", 500)] {
            let response = host.play(script).await;
            assert_eq!((response.status, response.header("x-evergate-fault")), (status, None), "its own error");
            assert_eq!(response.header("retry-after"), (status == 429).then_some("7"));
            assert!(response.json()["error"].is_object());
        }
    });
}

#[test]
fn fields_are_left_out_and_set_and_the_rest_keeps_its_bytes() {
    run(|house| async move {
        let mut given = given(&SERVES);
        given.config.strip = vec!["seed".into(), "user".into()];
        given.config.set.insert("temperature".into(), "0.25".into());
        let host = serve(&house, given);
        let sent = r#"{"seed":1, "model" : "echo-request","temperature":1,"messages":[ ],"user":"u"}"#;
        let response = read(host.send("/v1/chat/completions", "", sent.as_bytes()).await).await;
        let expected = r#"{"model" : "echo-request","messages":[ ],"temperature":0.25}"#;
        assert_eq!(response.json()["received"]["body"], expected);
    });
}

#[test]
fn streams_pass_as_they_come() {
    run(|house| async move {
        let host = serve(&house, given(&SERVES));
        for script in ["ok", "crlf", "one-byte", "odd-chunks", "big-event-300000", "stream-20", "no-done"] {
            let response = host.play_stream(script).await;
            assert_eq!((response.status, response.is_whole), (200, true), "{script}");
            let text = String::from_utf8(response.body.clone()).unwrap();
            assert_eq!(text.contains("[DONE]"), script != "no-done", "{script}");
        }
        // The first word is there long before the last.
        let begin = Instant::now();
        let mut stream =
            host.send("/v1/chat/completions", "", body("stream-20-100", true).to_string().as_bytes()).await;
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains("word0") {
            assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
        }
        assert!(!String::from_utf8_lossy(&seen).contains("word9") && begin.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn an_answer_beyond_its_limit_is_an_error() {
    run(|house| async move {
        let mut given = given(&SERVES);
        given.output_bytes_max = 100_000;
        let host = serve(&house, given);
        assert_eq!(host.play("huge-90000").await.status, 200);
        host.play("huge-200000").await.assert_error(502, "adapter_protocol_error", "1");
        let response = host.play_stream("big-event-200000").await;
        let (_, last) = response.streamed();
        assert!(last.contains("adapter_protocol_error"), "{last}");
    });
}

#[test]
fn what_breaks_off_is_an_error_and_no_end() {
    run(|house| async move {
        let host = serve(&house, given(&SERVES));
        for script in ["close-early", "reset-early", "eof-mid", "reset-mid", "two-lengths"] {
            let response = host.play(script).await;
            response.assert_error(502, "adapter_protocol_error", "1");
        }
        for script in ["eof-mid", "reset-mid", "no-done-cut"] {
            let response = host.play_stream(script).await;
            let events = response.events();
            let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
            assert_eq!(last["error"]["code"], "adapter_protocol_error", "{script}: {last}");
            assert!(!events.iter().any(|event| event == "[DONE]"), "{script}");
        }
        host.play_stream("no-events").await.assert_error(502, "adapter_protocol_error", "1");
        assert_eq!(house.ear.ended.lock().unwrap().len(), 0, "none of it is the program's end");
    });
}

#[test]
fn a_client_that_leaves_is_left_at_the_program_within_100_ms() {
    run(|house| async move {
        let mut given = given(&SERVES);
        given.places = 1;
        let host = serve(&house, given);
        assert_eq!(host.play("ok").await.status, 200);
        let mut sent = 1;
        for (script, is_stream) in [("never-headers", false), ("idle-mid", true), ("flood", true)] {
            let stream = host.send("/v1/chat/completions", "", body(script, is_stream).to_string().as_bytes()).await;
            until("it is at the program", || *house.ear.load.lock().unwrap() == (1, 0)).await;
            sent += 1;
            house.heard("request ", sent).await;
            let connections = || host.open_connections();
            assert_eq!(connections(), 1, "{script}");
            let begin = Instant::now();
            drop(stream);
            until("its place is free", || *house.ear.load.lock().unwrap() == (0, 0)).await;
            until("its connection is closed", || connections() == 0).await;
            println!("{script}: left after {:?}", begin.elapsed());
            assert!(begin.elapsed() < Duration::from_millis(100) + Duration::from_secs(1));
        }
    });
}
