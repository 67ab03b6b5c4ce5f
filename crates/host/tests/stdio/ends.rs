//! Starts that fail, and the ends of a pool.

use std::time::{Duration, Instant};

use evergate_host::program::Ladder;

use super::host::{model, said, serve, setup, stop, streamed};
use super::support::{LONG, exists, plan, run, sim, until};
use super::wire::{chat, read};

#[test]
fn a_start_that_fails_is_told_and_not_tried_in_a_loop() {
    run(|house| async move {
        let (host, _stdio) = serve(&house, setup(plan(&["/no/such/program"])));
        host.say("x").await.assert_error(502, "adapter_spawn_failed", "0");
        let (host, _stdio) = serve(&house, setup(sim(&["err:no memory\n", "exit:7"])));
        let begin = Instant::now();
        let message = host.say("x").await.assert_error(502, "adapter_exited", "0");
        assert!(message.ends_with("exit code 7"), "{message}");
        let (asked, mut turns) = (Instant::now(), tokio::time::interval(Duration::from_millis(10)));
        while begin.elapsed() < Duration::from_secs(2) {
            host.say("x").await.assert_error(502, "adapter_exited", "0");
            turns.tick().await;
        }
        let starts = house.ear.ended.lock().unwrap().len();
        // At 0, 0.5 and 1.5 s.
        assert!((2..=3).contains(&starts), "{starts} starts in {:?}", asked.elapsed());
    });
}

#[test]
fn a_program_that_is_never_ready_is_ended_and_those_who_wait_are_told() {
    run(|house| async move {
        for (steps, code, status) in [
            (&["pid", "hang"][..], "model_loading", 503),
            (&["pid", "out:hello\n", "hang"], "adapter_protocol_error", 502),
            (&["pid", "out:{\"type\":\"drained\"}\n", "hang"], "adapter_protocol_error", 502),
            (&["pid", "close-out", "hang"], "adapter_protocol_error", 502),
        ] {
            house.ear.lines.lock().unwrap().clear();
            let mut setup = setup(sim(steps));
            setup.bounds.start_timeout = Duration::from_millis(400);
            let (host, stdio) = serve(&house, setup);
            host.say("x").await.assert_error(status, code, "0");
            let pid = house.heard("pid ", 1).await[0];
            until("it is gone", || !exists(pid)).await;
            stop(&house, &stdio).await;
        }
    });
}

#[test]
fn a_request_waits_for_a_start_as_long_as_its_own_deadline() {
    run(|house| async move {
        let (host, stdio) = serve(&house, setup(sim(&["sleep:400", "model:"])));
        let early = host.ask_at("/v1/chat/completions", "x-request-timeout: 100ms\r\n", &chat("text=x")).await;
        early.assert_error(503, "model_loading", "0");
        assert_eq!(host.say("text=x").await.content(), "x");
        stop(&house, &stdio).await;
    });
}

#[test]
fn the_line_is_bounded_and_who_leaves_it_leaves_no_gap() {
    run(|house| async move {
        let folder = super::support::folder();
        let go = folder.path().join("go");
        let mut setup = model("");
        setup.bounds.queue = 1;
        let (host, stdio) = serve(&house, setup);
        assert_eq!(host.say("text=warm").await.content(), "warm");
        let body = chat(&format!("await={};text=x", go.display())).to_string();
        let busy = host.send("/v1/chat/completions", "", body.as_bytes()).await;
        until("one works", || *house.ear.load.lock().unwrap() == (1, 0)).await;
        let waiting = host.send("/v1/chat/completions", "", body.as_bytes()).await;
        until("one waits", || *house.ear.load.lock().unwrap() == (1, 1)).await;
        host.say("text=x").await.assert_error(503, "overloaded", "0");
        drop(waiting);
        until("it has left", || *house.ear.load.lock().unwrap() == (1, 0)).await;
        let late = host.ask_at("/v1/chat/completions", "x-request-timeout: 100ms\r\n", &chat("text=x")).await;
        late.assert_error(503, "overloaded", "0");
        std::fs::write(&go, "").unwrap();
        assert_eq!(read(busy).await.content(), "x");
        stop(&house, &stdio).await;
    });
}

#[test]
fn a_stop_lets_requests_finish_refuses_others_and_drains() {
    run(|house| async move {
        let folder = super::support::folder();
        let go = folder.path().join("go");
        let (host, stdio) = serve(&house, model(""));
        let body = streamed(&format!("say=a;await={};text=b", go.display())).to_string();
        let busy = host.send("/v1/chat/completions", "", body.as_bytes()).await;
        said(&house, "request ", 1).await;
        assert!(!stdio.stop(Instant::now() + Duration::from_millis(50)).await, "it has a request");
        host.say("text=x").await.assert_error(503, "server_shutting_down", "0");
        std::fs::write(&go, "").unwrap();
        assert_eq!(read(busy).await.streamed(), ("ab".into(), "[DONE]".into()));
        stop(&house, &stdio).await;
        said(&house, "drain", 1).await;
        assert_eq!(house.ear.ended.lock().unwrap()[0].ladder, Ladder::Untouched);
    });
}

#[test]
fn a_drain_that_is_not_heeded_ends_by_term_after_its_grace() {
    run(|house| async move {
        let mut setup = model("stubborn");
        // Time enough for a busy machine to end it by TERM.
        setup.plan.grace = Duration::from_secs(2);
        let (host, stdio) = serve(&house, setup);
        assert_eq!(host.say("text=x").await.content(), "x");
        let begin = Instant::now();
        stop(&house, &stdio).await;
        assert!(begin.elapsed() >= Duration::from_millis(1990) && begin.elapsed() < LONG / 2);
        assert_eq!(house.ear.ended.lock().unwrap()[0].ladder, Ladder::Term);
    });
}

#[test]
fn a_stop_while_it_starts_is_a_stop() {
    run(|house| async move {
        let (_host, stdio) = serve(&house, setup(sim(&["pid", "hang"])));
        let pid = house.heard("pid ", 1).await[0];
        stop(&house, &stdio).await;
        assert!(!exists(pid));
    });
}
