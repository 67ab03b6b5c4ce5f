//! Starts: one for all who wait, those that come to nothing, and ports that are somebody else's.

use std::io::Read;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evergate_host::server::Condition;
use evergate_sys::Status;

use super::model::{SERVES, body, given, serve};
use super::support::{LONG, run, until};
use super::wire::read;

const SHORT: Duration = Duration::from_millis(300);

#[test]
fn g20_two_hundred_requests_at_once_are_one_start() {
    run(|house| async move {
        let mut given = given(&["pid", "sleep:300", "serve:127.0.0.1:{port}", "hang"]);
        given.queue = 200;
        let host = serve(&house, given);
        assert_eq!(host.server.condition(), Condition::Down, "nothing is started before it is asked for");
        let mut streams = Vec::new();
        for _ in 0..200 {
            let body = body("ok", false).to_string();
            streams.push(host.send("/v1/chat/completions", "", body.as_bytes()).await);
        }
        for stream in streams {
            assert_eq!(read(stream).await.status, 200);
        }
        assert_eq!(house.heard("pid ", 1).await.len(), 1);
        assert!(house.ear.ended.lock().unwrap().is_empty() && house.programs.live() == 1);
    });
}

#[test]
fn g20_who_waits_in_line_for_a_program_that_is_not_there_yet_hears_that() {
    run(|house| async move {
        let mut given = given(&["hang"]);
        (given.places, given.queue) = (1, 1);
        let host = serve(&house, given);
        let first = host.send("/v1/chat/completions", "", body("ok", false).to_string().as_bytes()).await;
        until("it has the place", || *house.ear.load.lock().unwrap() == (1, 0)).await;
        let second =
            async { host.ask_at("/v1/chat/completions", "x-request-timeout: 300ms\r\n", &body("ok", false)).await };
        let third = async {
            until("the line is full", || *house.ear.load.lock().unwrap() == (1, 1)).await;
            host.play("ok").await
        };
        let (second, third) = tokio::join!(second, third);
        second.assert_error(503, "model_loading", "0");
        third.assert_error(503, "overloaded", "0");
        assert!(host.server.stop(Instant::now() + LONG).await);
        read(first).await.assert_error(503, "server_shutting_down", "0");
    });
}

#[test]
fn g20_a_program_that_is_never_ready_is_ended_and_its_requests_are_told_at_their_own_time() {
    run(|house| async move {
        // It answers, but its path of health does not.
        let mut given = given(&SERVES);
        (given.start_timeout, given.config.health) = (SHORT * 4, "/nothing".into());
        let host = serve(&house, given);
        let begin = Instant::now();
        let early = host.ask_at("/v1/chat/completions", "x-request-timeout: 300ms\r\n", &body("ok", false)).await;
        early.assert_error(503, "model_loading", "0");
        assert_eq!(early.header("retry-after"), Some("2"));
        assert!(begin.elapsed() >= SHORT && begin.elapsed() < SHORT * 4, "{:?}", begin.elapsed());
        // With time enough to hear of the end of the start, and of the program, on a busy machine.
        let late = host.ask_at("/v1/chat/completions", "x-request-timeout: 20s\r\n", &body("ok", false)).await;
        let message = late.assert_error(503, "model_loading", "0");
        assert!(message.contains("process.start_timeout"), "{message}");
        // It is ended before anybody hears that it will not come.
        assert_eq!((house.programs.live(), house.ear.ended.lock().unwrap().len()), (0, 1));
    });
}

#[test]
fn g21_a_crash_at_the_start_has_a_cause_and_a_pause() {
    run(|house| async move {
        let host = serve(&house, given(&["err:no such weights\n", "exit:7"]));
        let message = host.play("ok").await.assert_error(502, "adapter_exited", "0");
        assert!(message.contains("exit code 7") && !message.contains("weights"), "{message}");
        let Condition::Failed(cause) = host.server.condition() else { panic!("{:?}", host.server.condition()) };
        assert!(cause.detail.contains("no such weights"), "{cause:?}");
        // Whoever comes within the pause hears the same at once, and starts nothing.
        for _ in 0..20 {
            host.play("ok").await.assert_error(502, "adapter_exited", "0");
        }
        assert_eq!(house.ear.ended.lock().unwrap().len(), 1);
        assert_eq!(house.ear.ended.lock().unwrap()[0].exit.status, Status::Code(7));
        // After it, nobody starts it but a request.
        assert_eq!(host.server.changed(&Condition::Failed(cause)).await, Condition::Down);
        assert_eq!(house.ear.ended.lock().unwrap().len(), 1);
        host.play("ok").await.assert_error(502, "adapter_exited", "0");
        assert_eq!(house.ear.ended.lock().unwrap().len(), 2);
    });
}

#[test]
fn g21_a_crash_loop_is_started_ever_less_often() {
    run(|house| async move {
        let mut given = given(&["pid", "exit:1"]);
        given.preload = true;
        let host = serve(&house, given);
        let begin = Instant::now();
        until("four starts", || house.ear.ended.lock().unwrap().len() == 4).await;
        // 0.5 + 1 + 2 seconds.
        assert!(begin.elapsed() >= Duration::from_millis(3500), "{:?}", begin.elapsed());
        host.play("ok").await.assert_error(502, "adapter_exited", "0");
    });
}

#[test]
fn g21_a_program_that_cannot_be_executed_says_so() {
    run(|house| async move {
        let mut given = given(&SERVES);
        given.plan.argv[0] = "/no/such/program".into();
        let host = serve(&house, given);
        let message = host.play("ok").await.assert_error(502, "adapter_spawn_failed", "0");
        assert!(!message.contains("/no/such"), "{message}");
    });
}

/// Takes the port that a program was given, before it does, and counts who says anything there.
fn stranger(port: u16) -> Arc<AtomicUsize> {
    let said = Arc::new(AtomicUsize::new(0));
    let (listener, counted) = (TcpListener::bind(("127.0.0.1", port)).unwrap(), Arc::clone(&said));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            stream.set_read_timeout(Some(LONG)).unwrap();
            let length = stream.read(&mut [0; 1000]).unwrap_or(0);
            counted.fetch_add(length, Ordering::Relaxed);
            let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
        }
    });
    said
}

#[test]
fn g22_a_stranger_at_the_port_is_not_taken_for_the_program() {
    run(|house| async move {
        // One cannot take its port and ends; the other does not even try.
        for meets in ["exec \"$0\" serve:127.0.0.1:\"$1\" hang", "exec \"$0\" hang"] {
            house.ear.lines.lock().unwrap().clear();
            let folder = super::support::folder();
            let go = folder.path().join("go");
            let sim = evergate_testkit::adaptersim().display().to_string();
            let script = format!(
                "if [ -e {go} ]; then exec \"$0\" serve:127.0.0.1:\"$1\" hang; fi; echo port $1 >&2; \
                 \"$0\" await:{go}; {meets}",
                go = go.display()
            );
            let mut given = given(&[]);
            given.plan = super::support::plan(&["sh", "-c", &script, &sim, "{port}"]);
            let host = serve(&house, given);
            let request = host.send("/v1/chat/completions", "", body("ok", false).to_string().as_bytes()).await;
            let port = u16::try_from(house.heard("port ", 1).await[0]).unwrap();
            let said = stranger(port);
            std::fs::write(&go, "").unwrap();
            let response = read(request).await;
            assert_eq!(response.status, 200, "{response:?}");
            assert!(!response.body.is_empty());
            assert_eq!(said.load(Ordering::Relaxed), 0, "the stranger has heard something");
            until("the first one is gone", || house.programs.live() == 1).await;
        }
    });
}

#[test]
fn g22_a_program_may_serve_from_a_child_or_on_a_socket() {
    run(|house| async move {
        let sim = evergate_testkit::adaptersim().display().to_string();
        let mut wrapped = given(&[]);
        wrapped.plan = super::support::plan(&["sh", "-c", "\"$0\" serve:127.0.0.1:$1 hang; true", &sim, "{port}"]);
        for given in [
            given(&["fork:plain:serve:127.0.0.1:{port},hang", "hang"]),
            given(&["fork:setsid:serve:127.0.0.1:{port},hang", "hang"]),
            given(&["fork:daemon:serve:127.0.0.1:{port},hang", "hang"]),
            wrapped,
            given(&["serve:{socket}", "hang"]),
        ] {
            let host = serve(&house, given);
            assert_eq!(host.play("ok").await.status, 200);
            let _ = host.server.stop(Instant::now() + LONG).await;
        }
        assert_eq!(house.programs.live(), 0);
    });
}
