//! Many requests to processes that die at random: everybody gets one answer, and nothing is left.

use std::collections::BTreeMap;

use super::host::{model, serve, stop, streamed};
use super::support::{open_files, run};
use super::wire::{chat, read};

#[test]
fn two_hundred_requests_with_deaths_are_accounted_for_exactly() {
    run(|house| async move {
        let mut setup = model("places=2");
        (setup.config.max, setup.bounds.queue) = (3, 64);
        setup.config.requests_max = 20;
        let (host, stdio) = serve(&house, setup);
        assert_eq!(host.say("text=warm").await.content(), "warm");
        let before = open_files();
        let (mut dice, mut ends, mut left) = (7_u64, BTreeMap::<&str, usize>::new(), 0);
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
                let response = read(stream).await;
                let body = String::from_utf8_lossy(&response.body).into_owned();
                let end = ["adapter_exited", "adapter_protocol_error"].into_iter().find(|code| body.contains(code));
                if end.is_none() && is_stream {
                    assert_eq!(response.streamed(), ("ab".into(), "[DONE]".into()));
                } else if end.is_none() {
                    assert_eq!(response.content(), "ab");
                }
                assert!(response.is_whole, "{body}");
                *ends.entry(end.unwrap_or("answered")).or_default() += 1;
            }
        }
        println!("{ends:?}, {left} left");
        assert_eq!(ends.values().sum::<usize>() + left, 200);
        assert!(ends["answered"] > 100 && ends["adapter_exited"] > 0 && ends["adapter_protocol_error"] > 0, "{ends:?}");
        super::support::until("nobody works", || *house.ear.load.lock().unwrap() == (0, 0)).await;
        stop(&house, &stdio).await;
        super::support::until("descriptors", || open_files() <= before).await;
        let own = std::process::id().to_string();
        let children = std::fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
        assert!(children.trim().is_empty(), "children are left: {children}");
    });
}
