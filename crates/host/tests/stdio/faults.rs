//! Programs that break the protocol or die: what the client is told, and that the next request is served.

use std::time::{Duration, Instant};

use evergate_host::program::Ladder;
use evergate_sys::Status;

use super::host::{model, said, serve, stop, streamed};
use super::support::{LONG, exists, run, text, until, written_at_rest};
use super::wire::{chat, read};

const SHORT: Duration = Duration::from_millis(150);
/// What a busy machine may add.
const SLACK: Duration = Duration::from_secs(5);

/// Each script ends as it says, whole and streamed, and the next request is served.
fn each(scripts: &'static [&'static str], code: &'static str) {
    run(|house| async move {
        for script in scripts {
            let mut setup = model("");
            setup.bounds.output_bytes_max = 4096;
            let (host, stdio) = serve(&house, setup);
            host.say(script).await.assert_error(502, code, "1");
            host.ask(&streamed(script)).await.assert_error(502, code, "1");
            assert_eq!(host.say("text=well").await.content(), "well", "{script}");
            stop(&house, &stdio).await;
        }
    });
}

#[test]
fn g3_a_result_without_an_answer_is_none() {
    each(&["end", "result={\"body\":{},\"text\":\"x\"}"], "adapter_protocol_error");
}

#[test]
fn g16_what_is_no_frame_ends_the_program() {
    let scripts =
        &["raw=hello", "raw=", "raw=[]", "hex=ff0a", "hex=7b2274797065223a22647261e2820a", "raw={\"type\":\"x\"}"];
    each(scripts, "adapter_protocol_error");
}

#[test]
fn g17_a_line_without_an_end_is_cut_off_at_the_limit() {
    each(&["line=5000", "line=1000000;hang"], "adapter_protocol_error");
}

#[test]
fn g18_an_answer_out_of_turn_ends_the_program() {
    each(&["for=999999;hang", "for=x;hang", "raw={\"type\":\"result\",\"id\":\"0\"};text=a"], "adapter_protocol_error");
    // One that has ended is not answered twice; who gets it next must not hear it.
    run(|house| async move {
        let (host, stdio) = serve(&house, model(""));
        assert_eq!(host.say("text=first").await.content(), "first");
        let id = said(&house, "request ", 1).await[0].strip_prefix("request ").unwrap().to_owned();
        host.say(&format!("for={id};text=second")).await.assert_error(502, "adapter_protocol_error", "1");
        assert_eq!(host.say("text=third").await.content(), "third");
        stop(&house, &stdio).await;
        assert_eq!(house.ear.ended.lock().unwrap().len(), 2);
    });
}

#[test]
fn g4_g5_the_exact_end_of_a_process_is_told_and_recorded() {
    run(|house| async move {
        for (script, words, status) in [
            ("err=boom;exit=3", "ended with exit code 3", Status::Code(3)),
            ("exit=0", "ended with exit code 0", Status::Code(0)),
            ("exit=255", "ended with exit code 255", Status::Code(255)),
            ("signal=9", "was ended by signal 9", Status::Signal { number: 9, core: false }),
        ] {
            let (host, stdio) = serve(&house, model(""));
            let message = host.say(script).await.assert_error(502, "adapter_exited", "1");
            assert!(message.ends_with(words), "{message}");
            until("its record", || !house.ear.ended.lock().unwrap().is_empty()).await;
            let ended = house.ear.ended.lock().unwrap().remove(0);
            assert_eq!((ended.exit.status, ended.ladder), (status, Ladder::Untouched));
            assert!(script != "err=boom;exit=3" || text(&ended.tail).contains("boom"));
            assert_eq!(host.say("text=well").await.content(), "well");
            stop(&house, &stdio).await;
            house.ear.ended.lock().unwrap().clear();
        }
    });
}

#[test]
fn g6_a_death_within_an_answer_ends_it_with_an_error() {
    run(|house| async move {
        let (host, stdio) = serve(&house, model(""));
        host.say("say=part;exit=1").await.assert_error(502, "adapter_exited", "1");
        let (text, last) = host.ask(&streamed("say=part;exit=1")).await.streamed();
        assert_eq!(text, "part");
        assert!(last.contains("adapter_exited") && last.contains("exit code 1"), "{last}");
        stop(&house, &stdio).await;
    });
}

#[test]
fn g7_silence_has_limits_and_the_process_is_replaced() {
    run(|house| async move {
        let mut setup = model("");
        // Long enough for an answer of a busy machine's.
        let limit = SHORT * 6;
        (setup.config.first_output, setup.config.idle) = (limit, limit);
        setup.plan.grace = LONG;
        let (host, stdio) = serve(&house, setup);
        for (script, key) in [("hang", "first_output"), ("say=a;hang", "idle")] {
            house.ear.lines.lock().unwrap().clear();
            let begin = Instant::now();
            let message = host.say(script).await.assert_error(504, "adapter_timeout", "1");
            assert!(message.contains(key) && begin.elapsed() < limit + SLACK, "{message} {:?}", begin.elapsed());
            said(&house, "cancel ", 1).await;
            said(&house, "drain", 1).await;
        }
        assert_eq!(host.say("text=well").await.content(), "well");
        stop(&house, &stdio).await;
        assert_eq!(house.ear.ended.lock().unwrap().len(), 3);
    });
}

#[test]
fn a_deadline_of_the_requests_own_cancels_it_and_keeps_the_process() {
    run(|house| async move {
        let mut setup = model("");
        // A busy machine's process may be late with the end of what is cancelled: here it must not be ended for it.
        setup.plan.grace = LONG;
        let (host, stdio) = serve(&house, setup);
        assert_eq!(host.say("text=warm").await.content(), "warm");
        let late = host.ask_at("/v1/chat/completions", "x-request-timeout: 100ms\r\n", &chat("hang")).await;
        late.assert_error(504, "deadline_exceeded", "1");
        assert_eq!(host.say("text=well").await.content(), "well");
        stop(&house, &stdio).await;
        assert_eq!(house.ear.ended.lock().unwrap().len(), 1);
    });
}

#[test]
fn g8_a_cancel_that_is_not_answered_ends_the_process_by_force() {
    run(|house| async move {
        let deaf = format!("trap '' TERM; exec {} model:deaf", evergate_testkit::adaptersim().display());
        let (host, stdio) = serve(&house, super::host::setup(super::support::plan(&["sh", "-c", &deaf])));
        let stream = host.send("/v1/chat/completions", "", streamed("say=a;hang").to_string().as_bytes()).await;
        said(&house, "request ", 1).await;
        let begin = Instant::now();
        drop(stream);
        until("it is gone", || !house.ear.ended.lock().unwrap().is_empty()).await;
        // Its grace is 300 ms for the cancel, and once more for TERM.
        let took = begin.elapsed();
        assert!((Duration::from_millis(590)..Duration::from_secs(1) + SLACK).contains(&took), "{took:?}");
        assert_eq!(house.ear.ended.lock().unwrap()[0].ladder, Ladder::Kill);
        assert_eq!(host.say("text=well").await.content(), "well");
        // It is deaf to TERM only: a drain it hears.
        stop(&house, &stdio).await;
    });
}

#[test]
fn a_client_that_leaves_is_told_to_the_program_and_its_place_is_free() {
    run(|house| async move {
        let mut setup = model("");
        // A busy machine's process may be late with the end of what is cancelled: here it must not be ended for it.
        setup.plan.grace = LONG;
        let (host, stdio) = serve(&house, setup);
        for body in [chat("hang"), streamed("hang"), streamed("say=a;hang")] {
            house.ear.lines.lock().unwrap().clear();
            let stream = host.send("/v1/chat/completions", "", body.to_string().as_bytes()).await;
            said(&house, "request ", 1).await;
            let begin = Instant::now();
            drop(stream);
            said(&house, "cancel ", 1).await;
            println!("cancelled after {:?}", begin.elapsed());
            assert!(begin.elapsed() < Duration::from_millis(100) + SLACK);
            until("its place is free", || *house.ear.load.lock().unwrap() == (0, 0)).await;
        }
        assert_eq!(host.say("text=well").await.content(), "well");
        stop(&house, &stdio).await;
        assert_eq!(house.ear.ended.lock().unwrap().len(), 1, "it is the same process all along");
    });
}

#[test]
fn g12_a_flood_of_standard_error_holds_nothing_up() {
    run(|house| async move {
        let (host, stdio) = serve(&house, super::host::setup(super::support::sim(&["flood-err:20000000", "model:"])));
        assert_eq!(host.say("text=well").await.content(), "well");
        stop(&house, &stdio).await;
    });
}

#[test]
fn g13_a_client_that_does_not_read_stops_the_program_and_nobody_is_late() {
    run(|house| async move {
        let mut setup = model("");
        setup.bounds.output_bytes_max = 64 << 20;
        setup.config.idle = SHORT;
        let (host, stdio) = serve(&house, setup);
        let body = streamed("flood=5000;err=written;end").to_string();
        let stream = host.send("/v1/chat/completions", "", body.as_bytes()).await;
        said(&house, "request ", 1).await;
        let pid = house.heard("pid ", 1).await[0];
        written_at_rest(pid, SHORT * 5).await;
        let lines = house.ear.lines.lock().unwrap().clone();
        assert!(!lines.iter().any(|line| line == "written"), "five megabytes are held for nobody");
        let (text, last) = read(stream).await.streamed();
        assert_eq!((text.len(), last.as_str()), (5000 * 1001, "[DONE]"));
        stop(&house, &stdio).await;
        assert_eq!(house.ear.ended.lock().unwrap().len(), 1);
    });
}

#[test]
fn g14_a_program_that_does_not_read_is_given_up() {
    run(|house| async move {
        let ready = "out:{\"type\":\"ready\",\"protocol\":1}\n";
        let mut setup = super::host::setup(super::support::sim(&[ready, "hang"]));
        setup.config.idle = SHORT;
        let (host, stdio) = serve(&house, setup);
        let message = host.say(&"x".repeat(1 << 20)).await.assert_error(504, "adapter_timeout", "1");
        assert!(message.contains("read nothing"), "{message}");
        stop(&house, &stdio).await;
    });
}

#[test]
fn g14_g15_large_requests_and_a_closed_input_are_no_fault() {
    run(|house| async move {
        let (host, stdio) = serve(&house, model(""));
        let script = format!("text={}", "x".repeat(900_000));
        assert_eq!(host.say(&script).await.content().len(), 900_000);
        // What it has it may answer; the next one goes to another.
        assert_eq!(host.say("close-in;sleep=50;text=last").await.content(), "last");
        assert_eq!(host.say("text=well").await.content(), "well");
        stop(&house, &stdio).await;
    });
}

#[test]
fn g15_who_has_closed_its_input_has_seen_nothing() {
    run(|house| async move {
        let ready = "out:{\"type\":\"ready\",\"protocol\":1}\n";
        let (host, stdio) = serve(&house, super::host::setup(super::support::sim(&["close-in", ready, "hang"])));
        host.say("x").await.assert_error(502, "adapter_exited", "0");
        until("three were asked", || house.ear.ended.lock().unwrap().len() >= 3).await;
        stop(&house, &stdio).await;
    });
}

#[test]
fn g19_a_process_is_replaced_between_two_requests() {
    run(|house| async move {
        for (at, why) in ["requests", "rss", "lifetime"].into_iter().enumerate() {
            let mut setup = model("");
            match at {
                0 => setup.config.requests_max = 3,
                1 => setup.config.rss_max = 64 << 20,
                _ => setup.config.lifetime_max = Duration::from_millis(300),
            }
            house.ear.ended.lock().unwrap().clear();
            let (host, stdio) = serve(&house, setup);
            let begin = Instant::now();
            let mut sum = 0;
            while sum < 7 || (at == 2 && begin.elapsed() < Duration::from_millis(500)) {
                let script = if at == 1 { "leak=30000000;text=well" } else { "text=well" };
                assert_eq!(host.say(script).await.content(), "well", "{why} {sum}");
                sum += 1;
            }
            stop(&house, &stdio).await;
            let ended = house.ear.ended.lock().unwrap();
            assert!(ended.len() >= 2, "{why}: {}", ended.len());
            assert!(ended.iter().all(|ended| ended.exit.status == Status::Code(0)), "{why}: drained, not killed");
        }
    });
}

#[test]
fn g10_what_a_process_started_goes_with_it() {
    run(|house| async move {
        let (host, stdio) = serve(&house, model(""));
        assert_eq!(host.say("daemon;text=a").await.content(), "a");
        let pids = house.heard("pid ", 2).await;
        stop(&house, &stdio).await;
        assert!(pids.iter().all(|pid| !exists(*pid)));
    });
}
