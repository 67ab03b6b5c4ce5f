//! Many requests to processes that die at random: everybody gets one answer, and nothing is left.

use std::collections::BTreeMap;

use super::host::{model, serve, stop, streamed};
use super::support::{alone, open_files, run, until};
use super::wire::{Response, chat, read};

#[test]
fn two_hundred_requests_with_deaths_are_accounted_for_exactly() {
    // Children and descriptors are counted: those of other tests are none of it.
    alone("storm::two_hundred_requests_with_deaths_are_accounted_for_exactly", storm);
}

/// What came of a request.
fn outcome(response: &Response, is_stream: bool) -> String {
    let body = String::from_utf8_lossy(&response.body).into_owned();
    assert!(response.is_whole, "{body}");
    if let Some(code) = response.error_code() {
        // On a busy machine a process may be late with what a client has left behind, and ends with the others that it has.
        let is_late = code == "adapter_timeout" && body.contains("did not end a cancelled request");
        assert!(is_late || ["adapter_exited", "adapter_protocol_error"].contains(&&*code), "{body}");
        return code;
    }
    if is_stream {
        assert_eq!(response.streamed(), ("ab".into(), "[DONE]".into()));
    } else {
        assert_eq!(response.content(), "ab");
    }
    "answered".into()
}

fn storm() {
    run(|house| async move {
        let mut setup = model("places=2");
        (setup.config.max, setup.bounds.queue) = (3, 64);
        setup.config.requests_max = 20;
        let (host, stdio) = serve(&house, setup);
        assert_eq!(host.say("text=warm").await.content(), "warm");
        let before = open_files();
        let (mut dice, mut ends, mut left) = (7_u64, BTreeMap::<String, usize>::new(), 0);
        for _ in 0..25 {
            let mut streams = Vec::new();
            for _ in 0..8 {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let script = match (dice >> 33) % 16 {
                    0 => "say=a;exit=9",
                    1 => "signal=9",
                    2 => "for=0;hang",
                    3 => "daemon;say=a;text=b",
                    _ => "say=a;text=b",
                };
                let is_stream = (dice >> 50).is_multiple_of(2);
                let body = if is_stream { streamed(script) } else { chat(script) };
                let stream = host.send("/v1/chat/completions", "", body.to_string().as_bytes()).await;
                if (dice >> 40).is_multiple_of(10) {
                    left += 1;
                    drop(stream);
                } else {
                    streams.push((stream, is_stream));
                }
            }
            for (stream, is_stream) in streams {
                *ends.entry(outcome(&read(stream).await, is_stream)).or_default() += 1;
            }
        }
        println!("{ends:?}, {left} left");
        assert_eq!(ends.values().sum::<usize>() + left, 200);
        let has = |code: &str, count: usize| ends.get(code).is_some_and(|ended| *ended > count);
        assert!(has("answered", 100) && has("adapter_exited", 0) && has("adapter_protocol_error", 0), "{ends:?}");
        until("nobody works", || *house.ear.load.lock().unwrap() == (0, 0)).await;
        stop(&house, &stdio).await;
        until("descriptors", || open_files() <= before).await;
        let own = std::process::id();
        let children = std::fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
        assert!(children.trim().is_empty(), "children are left: {children}");
    });
}
