//! Time, places, and clients that leave.

use std::time::{Duration, Instant};

use evergate_core::config::process::Output;
use evergate_sys::Status;

use super::support::{exists, run, sim, until};
use super::wire::{Setup, chat, read, serve, setup};

const SHORT: Duration = Duration::from_millis(200);
/// What a busy machine may add to a promise.
const SLACK: Duration = Duration::from_secs(2);

fn timed(steps: &[&str], change: impl FnOnce(&mut Setup)) -> Setup {
    let mut setup = setup(sim(steps));
    setup.config.output = Output::Lines;
    change(&mut setup);
    setup
}

#[test]
fn g7_each_limit_of_time_ends_the_program_and_is_named() {
    run(|house| async move {
        let cases = [
            (timed(&["read", "hang"], |setup| setup.config.first_output = SHORT), "first_output", false),
            (timed(&["read", "out:a\n", "hang"], |setup| setup.config.idle = SHORT), "idle", true),
            (timed(&["read", "drip:10000:5"], |setup| setup.config.timeout = SHORT), "timeout", true),
            (timed(&["read", "out:a\n", "close-out", "hang"], |setup| setup.config.timeout = SHORT), "timeout", true),
        ];
        for (setup, key, has_begun) in cases {
            let host = serve(&house, setup);
            let begin = Instant::now();
            let message = host.say("x").await.assert_error(504, "adapter_timeout", "1");
            assert!(message.ends_with(&format!("200 ms (process.{key})")), "{message}");
            assert!(begin.elapsed() >= SHORT && begin.elapsed() < SHORT + SLACK);
            let response = host.stream("x").await;
            if has_begun {
                let (_, last) = response.streamed();
                assert!(last.contains("adapter_timeout") && last.contains(key), "{last}");
            } else {
                response.assert_error(504, "adapter_timeout", "1");
            }
            until("nothing is left", || house.programs.live() == 0).await;
            for ended in house.ear.ended.lock().unwrap().drain(..) {
                assert_eq!(ended.exit.status, Status::Signal { number: 15, core: false });
            }
        }
    });
}

#[test]
fn g14_a_program_that_never_reads_is_ended() {
    run(|house| async move {
        let host = serve(&house, timed(&["hang"], |setup| setup.config.idle = SHORT));
        let message = host.say(&"x".repeat(10 << 20)).await.assert_error(504, "adapter_timeout", "1");
        assert!(message.contains("read nothing"), "{message}");
        until("nothing is left", || house.programs.live() == 0).await;
    });
}

#[test]
fn the_requests_own_time_counts_too() {
    run(|house| async move {
        let host = serve(&house, setup(sim(&["hang"])));
        let response = host.ask_at("/v1/chat/completions", "x-request-timeout: 200ms\r\n", &chat("x")).await;
        response.assert_error(504, "deadline_exceeded", "1");
        until("nothing is left", || house.programs.live() == 0).await;
    });
}

#[test]
fn a_client_that_leaves_ends_its_program_within_100_ms() {
    run(|house| async move {
        let host = serve(&house, timed(&["pid", "out:a\n", "hang"], |_| {}));
        for is_stream in [false, true] {
            house.ear.lines.lock().unwrap().clear();
            let mut body = chat("x");
            body["stream"] = is_stream.into();
            let stream = host.send("/v1/chat/completions", "", body.to_string().as_bytes()).await;
            let pid = house.heard("pid ", 1).await[0];
            let begin = Instant::now();
            drop(stream);
            until("it is gone", || !exists(pid)).await;
            println!("stream {is_stream}: gone after {:?}", begin.elapsed());
            assert!(begin.elapsed() < Duration::from_millis(100) + SLACK);
        }
    });
}

#[test]
fn places_and_the_line_before_them_are_bounded() {
    run(|house| async move {
        let folder = super::support::folder();
        let go = folder.path().join("go");
        let mut setup = setup(sim(&["pid", &format!("await:{}", go.display()), "out:done"]));
        (setup.places, setup.queue) = (2, 2);
        let host = serve(&house, setup);
        let body = chat("x").to_string();
        let mut streams = Vec::new();
        for at in 1..=4_u32 {
            streams.push(host.send("/v1/chat/completions", "", body.as_bytes()).await);
            let expected = (at.min(2), at.saturating_sub(2));
            until("it is taken", || *house.ear.load.lock().unwrap() == expected).await;
        }
        assert_eq!(house.heard("pid ", 2).await.len(), 2, "no more than there are places");
        host.say("x").await.assert_error(503, "overloaded", "0");
        // One that waits leaves: its turn is the next one's.
        drop(streams.pop());
        until("it has left", || *house.ear.load.lock().unwrap() == (2, 1)).await;
        let late = host.ask_at("/v1/chat/completions", "x-request-timeout: 100ms\r\n", &chat("x")).await;
        late.assert_error(503, "overloaded", "0");
        std::fs::write(&go, "").unwrap();
        for stream in streams {
            assert_eq!(read(stream).await.content(), "done");
        }
        until("all places are free", || *house.ear.load.lock().unwrap() == (0, 0)).await;
        assert_eq!(house.ear.ended.lock().unwrap().len(), 3);
    });
}

#[test]
fn a_place_is_taken_until_nothing_of_the_program_is_left() {
    run(|house| async move {
        let deaf = format!("trap '' TERM; exec {} pid hang", evergate_testkit::adaptersim().display());
        let mut setup = setup(super::support::plan(&["sh", "-c", &deaf]));
        setup.plan.grace = SHORT;
        let host = serve(&house, setup);
        let stream = host.send("/v1/chat/completions", "", chat("x").to_string().as_bytes()).await;
        let pid = house.heard("pid ", 1).await[0];
        drop(stream);
        until("its place is free", || *house.ear.load.lock().unwrap() == (0, 0)).await;
        assert!(!exists(pid));
    });
}
