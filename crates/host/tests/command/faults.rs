//! Programs that do not do what they should: what the client is told, what is on record, and that nothing is left.

use evergate_core::config::process::Output;
use evergate_host::program::Ladder;
use evergate_sys::Status;

use super::support::{House, plan, run, sim, text, until};
use super::wire::{Host, serve, setup};

fn host(house: &House, steps: &[&str]) -> Host {
    serve(house, setup(sim(steps)))
}

#[test]
fn g1_a_program_that_is_not_there_is_no_reason_not_to_ask_another() {
    run(|house| async move {
        let host = serve(&house, setup(plan(&["/no/such/program"])));
        let message = host.say("x").await.assert_error(502, "adapter_spawn_failed", "0");
        assert!(!message.contains("/no/such"), "paths are for the records: {message}");
        host.stream("x").await.assert_error(502, "adapter_spawn_failed", "0");
        let failed = house.ear.failed.lock().unwrap().clone();
        assert_eq!(failed.len(), 2);
        assert!(failed[0].contains("/no/such/program") && failed[0].contains("No such file"), "{failed:?}");
    });
}

#[test]
fn g3_an_end_without_an_answer_is_none() {
    run(|house| async move {
        for output in [Output::Text, Output::Lines, Output::Json] {
            for steps in [&["read"][..], &["read", "out:\n"]] {
                // An empty line is a piece of an answer where lines are.
                if output == Output::Lines && steps.len() == 2 {
                    continue;
                }
                let mut setup = setup(sim(steps));
                setup.config.output = output;
                let host = serve(&house, setup);
                host.say("x").await.assert_error(502, "adapter_protocol_error", "1");
                host.stream("x").await.assert_error(502, "adapter_protocol_error", "1");
            }
        }
    });
}

#[test]
fn g4_the_exact_exit_code_is_told_and_recorded_with_the_last_words() {
    run(|house| async move {
        for code in [1_u8, 2, 126, 127, 128, 137, 255] {
            let host = host(&house, &["read", "err:Traceback: boom\n", &format!("exit:{code}")]);
            let id = format!("request-{code}");
            let body = super::wire::chat("x");
            let response = host.ask_at("/v1/chat/completions", &format!("x-request-id: {id}\r\n"), &body).await;
            let message = response.assert_error(502, "adapter_exited", "1");
            assert!(message.ends_with(&format!("ended with exit code {code}")), "{message}");
            assert!(!message.contains("boom"), "what a program says is for the records");
            assert_eq!(response.header("x-request-id"), Some(id.as_str()));
            until("its record", || {
                house.ear.ended.lock().unwrap().iter().any(|ended| ended.request.as_deref() == Some(&id))
            })
            .await;
            let ended = house.ear.ended.lock().unwrap().pop().unwrap();
            assert_eq!((ended.exit.status, ended.ladder), (Status::Code(code), Ladder::Untouched));
            assert_eq!(text(&ended.tail), "Traceback: boom\n");
        }
    });
}

#[test]
fn g5_the_exact_signal_is_told_and_recorded() {
    run(|house| async move {
        for number in [9_u8, 15, 6, 1, 64] {
            let mut setup = setup(sim(&["read", &format!("signal:{number}")]));
            setup.plan.limits = vec![(evergate_sys::Limit::Core, 0)];
            let host = serve(&house, setup);
            let message = host.say("x").await.assert_error(502, "adapter_exited", "1");
            assert!(message.ends_with(&format!("was ended by signal {number}")), "{message}");
            until("its record", || !house.ear.ended.lock().unwrap().is_empty()).await;
            let ended = house.ear.ended.lock().unwrap().pop().unwrap();
            assert_eq!(ended.exit.status, Status::Signal { number, core: false });
        }
    });
}

#[test]
fn g6_an_answer_that_breaks_off_is_an_error_and_not_an_end() {
    run(|house| async move {
        for end in ["exit:3", "signal:9"] {
            let mut setup = setup(sim(&["read", "out:half an\n", "sleep:50", end]));
            setup.config.output = Output::Lines;
            let host = serve(&house, setup);
            host.say("x").await.assert_error(502, "adapter_exited", "1");
            let response = host.stream("x").await;
            let (text, last) = response.streamed();
            assert_eq!(text, "half an\n");
            let error: serde_json::Value = serde_json::from_str(&last).unwrap();
            assert_eq!(error["error"]["code"], "adapter_exited", "{last}");
            assert!(response.is_whole && !response.events().iter().any(|event| event == "[DONE]"));
            assert!(!String::from_utf8_lossy(&response.body).contains("\"stop\""));
        }
    });
}

#[test]
fn g17_a_line_without_an_end_is_cut_and_its_program_ended() {
    run(|house| async move {
        let mut setup = setup(sim(&["read", "line:100000000", "hang"]));
        (setup.config.output, setup.output_bytes_max) = (Output::Lines, 1 << 30);
        let host = serve(&house, setup);
        host.say("x").await.assert_error(502, "adapter_protocol_error", "1");
        host.stream("x").await.assert_error(502, "adapter_protocol_error", "1");
        until("both are ended", || house.ear.ended.lock().unwrap().len() == 2).await;
        assert!(house.ear.ended.lock().unwrap().iter().all(|ended| ended.exit.status != Status::Code(0)));
    });
}

#[test]
fn g13_an_answer_beyond_its_limit_is_an_error() {
    run(|house| async move {
        let mut setup = setup(sim(&["read", "flood:2000000", "hang"]));
        setup.output_bytes_max = 1_000_000;
        let host = serve(&house, setup);
        host.say("x").await.assert_error(502, "adapter_protocol_error", "1");
        let (_, last) = host.stream("x").await.streamed();
        assert!(last.contains("adapter_protocol_error"), "{last}");
        until("both are ended", || house.programs.live() == 0).await;
    });
}

#[test]
fn json_that_is_no_answer_is_an_error() {
    run(|house| async move {
        for written in ["{", "[]", "7", "{\"content\":7}", "{\"error\":\"x\"}"] {
            let mut setup = setup(sim(&["read", &format!("out:{written}")]));
            setup.config.output = Output::Json;
            let host = serve(&house, setup);
            host.say("x").await.assert_error(502, "adapter_protocol_error", "1");
            host.stream("x").await.assert_error(502, "adapter_protocol_error", "1");
        }
    });
}
