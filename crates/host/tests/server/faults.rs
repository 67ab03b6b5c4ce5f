//! Programs that die, or live and do not answer, while they serve.

use std::time::{Duration, Instant};

use evergate_host::program::Ladder;
use evergate_sys::{Signal, Status};
use serde_json::Value;

use super::model::{SERVES, body, given, serve, signal};
use super::support::{run, until};
use super::wire::{Response, read, unread};

const SHORT: Duration = Duration::from_millis(200);

/// A stream's end that is an error with this code.
#[track_caller]
fn assert_ends_with(response: &Response, code: &str) -> String {
    let events = response.events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], code, "{last}");
    assert!(response.is_whole && events.len() > 1 && !events.iter().any(|event| event == "[DONE]"));
    last["error"]["message"].as_str().unwrap().to_owned()
}

#[test]
fn g23_a_program_that_lives_and_does_not_answer_is_replaced() {
    run(|house| async move {
        let mut given = given(&SERVES);
        (given.config.health_interval, given.config.health_timeout) = (SHORT, SHORT);
        let host = serve(&house, given);
        assert_eq!(host.play("ok").await.status, 200);
        let pid = host.is_ready().await;
        let unary = host.send("/v1/chat/completions", "", body("never-headers", false).to_string().as_bytes()).await;
        let stream = host.send("/v1/chat/completions", "", body("idle-mid", true).to_string().as_bytes()).await;
        until("both are there", || *house.ear.load.lock().unwrap() == (2, 0)).await;
        house.heard("request ", 3).await;
        until("the stream has begun", || unread(&stream) > 0).await;
        signal(pid, Signal::STOP);
        let begin = Instant::now();
        let message = read(unary).await.assert_error(504, "adapter_timeout", "1");
        assert!(message.contains("does not answer"), "{message}");
        assert_ends_with(&read(stream).await, "adapter_timeout");
        println!("told after {:?}", begin.elapsed());
        // Whoever comes now waits for the next one.
        assert_eq!(host.play("ok").await.status, 200);
        assert_ne!(host.is_ready().await, pid);
        let ended = house.ear.ended.lock().unwrap().pop().unwrap();
        assert_eq!((ended.ladder, ended.exit.status), (Ladder::Kill, Status::Signal { number: 9, core: false }));
    });
}

#[test]
fn g23_a_request_without_an_answer_is_a_reason_to_look() {
    run(|house| async move {
        let mut given = given(&SERVES);
        (given.config.health_interval, given.config.health_timeout) = (Duration::from_secs(3600), SHORT);
        let host = serve(&house, given);
        assert_eq!(host.play("ok").await.status, 200);
        signal(host.is_ready().await, Signal::STOP);
        let begin = Instant::now();
        host.play("ok").await.assert_error(504, "adapter_timeout", "1");
        assert!(begin.elapsed() < Duration::from_secs(10));
    });
}

#[test]
fn g23_a_slow_program_that_is_well_is_left_alone() {
    run(|house| async move {
        let mut given = given(&SERVES);
        (given.config.health_interval, given.config.health_timeout) = (SHORT / 4, SHORT * 5);
        let host = serve(&house, given);
        assert_eq!(host.play("delay-2500").await.status, 200);
        assert!(house.ear.ended.lock().unwrap().is_empty());
    });
}

#[test]
fn g23_one_failed_look_is_no_reason() {
    run(|house| async move {
        let mut given = given(&SERVES);
        (given.config.health_interval, given.config.health_timeout) = (SHORT * 2, SHORT * 10);
        let host = serve(&house, given);
        assert_eq!(host.play("ok").await.status, 200);
        let pid = host.is_ready().await;
        signal(pid, Signal::STOP);
        // Nobody accepts the looks: with the second in the queue the first has failed.
        until("it is looked at again", || host.queued_connections() >= 2).await;
        signal(pid, Signal::CONT);
        assert_eq!(host.play("delay-2000").await.status, 200);
        assert_eq!(host.is_ready().await, pid);
    });
}

#[test]
fn g23_one_that_is_busy_with_an_answer_is_not_wedged() {
    run(|house| async move {
        // It has no time for a look while it answers, which takes three seconds.
        let mut given = given(&["serve-one:127.0.0.1:{port}"]);
        (given.config.health_interval, given.config.health_timeout) = (SHORT, SHORT * 2);
        let host = serve(&house, given);
        let response = host.play_stream("any").await;
        assert_eq!((response.status, response.events().len()), (200, 31), "{response:?}");
        assert!(house.ear.ended.lock().unwrap().is_empty());
    });
}

#[test]
fn g21_a_program_that_is_killed_under_load_answers_or_is_truthful_and_comes_back() {
    run(|house| async move {
        let mut given = given(&SERVES);
        (given.places, given.queue) = (4, 20);
        let host = serve(&house, given);
        let ask = async |script: &str, is_stream| {
            host.send("/v1/chat/completions", "", body(script, is_stream).to_string().as_bytes()).await
        };
        let mut at_work = Vec::new();
        for script in ["never-headers", "delay-60000"] {
            at_work.push(ask(script, false).await);
        }
        let mid = [ask("stream-1000-20", true).await, ask("idle-mid", true).await];
        let pid = host.is_ready().await;
        until("four are at work", || *house.ear.load.lock().unwrap() == (4, 0)).await;
        let mut waiting = Vec::new();
        for _ in 0..10 {
            waiting.push(ask("ok", false).await);
        }
        until("ten wait", || *house.ear.load.lock().unwrap() == (4, 10)).await;
        house.heard("request ", 4).await;
        until("the streams have begun", || mid.iter().all(|stream| unread(stream) > 0)).await;
        signal(pid, Signal::KILL);
        for stream in at_work {
            let message = read(stream).await.assert_error(502, "adapter_exited", "1");
            assert!(message.ends_with("was ended by signal 9"), "{message}");
        }
        for stream in mid {
            let message = assert_ends_with(&read(stream).await, "adapter_exited");
            assert!(message.ends_with("was ended by signal 9"), "{message}");
        }
        for stream in waiting {
            assert_eq!(read(stream).await.status, 200, "one that had not been sent waits for the next start");
        }
        assert_eq!(house.heard("pid ", 2).await.len(), 2);
    });
}

#[test]
fn g21_kill_after_kill_every_request_has_an_answer_or_a_truthful_error() {
    run(|house| async move {
        let host = serve(&house, given(&SERVES));
        let is_over = std::cell::Cell::new(false);
        let outcomes = std::cell::RefCell::new(std::collections::BTreeMap::<String, u32>::new());
        let client = async |script: &str, is_stream: bool| {
            while !is_over.get() {
                let response = host.ask(&body(script, is_stream)).await;
                assert!(response.is_whole, "{response:?}");
                let text = String::from_utf8_lossy(&response.body).into_owned();
                let outcome = match response.status {
                    200 if !is_stream || text.ends_with("data: [DONE]\n\n") => "answered".to_owned(),
                    200 => assert_ends_with(&response, "adapter_exited"),
                    _ => response.assert_error(502, "adapter_exited", "1"),
                };
                *outcomes.borrow_mut().entry(outcome).or_default() += 1;
            }
        };
        let killer = async {
            // A third one in a row ends the host's patience.
            for more in [20, 50] {
                let pid = host.is_ready().await;
                let total = || outcomes.borrow().values().sum::<u32>();
                let enough = total() + more;
                until("it serves", || total() >= enough).await;
                signal(pid, Signal::KILL);
                until("it is gone", || !super::support::exists(pid)).await;
            }
            host.is_ready().await;
            is_over.set(true);
        };
        tokio::join!(
            client("delay-20", false),
            client("ok", false),
            client("stream-20-5", true),
            client("ok", true),
            killer
        );
        println!("{:?}", outcomes.borrow());
        let killed = "the program of this model was ended by signal 9";
        assert!(outcomes.borrow().keys().all(|outcome| outcome == "answered" || outcome == killed));
        assert!(outcomes.borrow()["answered"] > 10 && outcomes.borrow().contains_key(killed));
        until("nobody is left", || *house.ear.load.lock().unwrap() == (0, 0)).await;
        assert_eq!((house.programs.live(), house.ear.ended.lock().unwrap().len()), (1, 2));
    });
}

#[test]
fn g21_one_that_dies_again_and_again_is_given_up_with_its_cause() {
    run(|house| async move {
        for (failures, ends) in [(0, 3), (2, 1)] {
            house.ear.ended.lock().unwrap().clear();
            let mut given = given(&["serve:127.0.0.1:{port}", "sleep:1000", "err:out of luck\n", "exit:3"]);
            (given.preload, given.failures) = (true, failures);
            let host = serve(&house, given);
            let cause = host.server.failed().await;
            assert_eq!(cause.fault.row().code, "adapter_exited");
            assert!(cause.message.ends_with("exit code 3, as others shortly before it"), "{}", cause.message);
            assert_eq!(cause.detail, "out of luck");
            let began = Instant::now();
            host.play("ok").await.assert_error(502, "adapter_exited", "0");
            assert!(began.elapsed() < Duration::from_millis(1500), "it waited for the next start");
            assert_eq!(house.ear.ended.lock().unwrap().len(), ends);
        }
    });
}

#[test]
fn g21_an_exit_by_itself_tells_its_code() {
    run(|house| async move {
        let host = serve(&house, given(&["serve:127.0.0.1:{port}", "sleep:1000", "exit:3"]));
        let message = host.play("never-headers").await.assert_error(502, "adapter_exited", "1");
        assert!(message.ends_with("ended with exit code 3"), "{message}");
    });
}
