//! Input and output: at once, within bounds, and never a reason for either side to hang.

use std::time::{Duration, Instant};

use evergate_host::program::{Fed, TAIL_BYTES};
use evergate_sys::Status;

use super::support::{LONG, OUTPUT, PIPES, is_full, plan, read, run, sim, text, until, written_at_rest};

#[test]
fn g12_a_flood_of_errors_blocks_nobody_and_its_end_is_kept() {
    run(|house| async move {
        let bytes: u64 = if is_full() { 1 << 30 } else { 64 << 20 };
        let steps = [format!("flood-err:{bytes}"), "err:the last words".to_owned(), "out:answer".to_owned()];
        let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
        let (output, ended) = house.whole(&sim(&steps)).await;
        assert_eq!((text(&output).as_str(), ended.exit.status), ("answer", Status::Code(0)));
        assert_eq!(ended.tail.len(), TAIL_BYTES);
        assert!(ended.tail.ends_with(b"the last words"));
        let told = house.ear.lines.lock().unwrap().len() as u64;
        let all = bytes / 40 + 1;
        assert!(told < 100_000, "{told}");
        assert!(told + *house.ear.dropped.lock().unwrap() >= all, "what is not told is counted");
    });
}

#[test]
fn g13_a_program_waits_while_nobody_reads() {
    run(|house| async move {
        let bytes: usize = 20 << 20;
        let mut program = house.start(&sim(&[&format!("flood:{bytes}")]), OUTPUT).await;
        let mut output = program.take_output().unwrap();
        let first = output.chunk().await.unwrap().unwrap();
        let pid = program.pid().as_raw_nonzero().get();
        let before = written_at_rest(pid, Duration::from_millis(200)).await;
        assert!(before < first.len() + (256 << 10), "{before}");
        let mut all = first.len();
        while let Some(chunk) = output.chunk().await.unwrap() {
            all += chunk.len();
        }
        assert_eq!(all, bytes, "and nothing is lost");
    });
}

#[test]
fn g13_a_slow_reader_gets_what_was_written_before_the_exit() {
    run(|house| async move {
        let mut program = house.start(&sim(&["flood:60000"]), OUTPUT).await;
        program.exited().await.unwrap();
        let exited = Instant::now();
        until("nobody lingers for its pipes", || exited.elapsed() > Duration::from_millis(700)).await;
        assert_eq!(read(&mut program).await.len(), 60_000);
    });
}

#[test]
fn g14_ten_megabytes_go_in_and_out_at_once() {
    run(|house| async move {
        let mut program = house.start(&plan(&["cat"]), PIPES).await;
        let (mut input, text) = (program.take_input().unwrap(), vec![b'x'; 10 << 20]);
        let feed = async {
            let fed = input.feed(&text, LONG).await.unwrap();
            drop(input);
            fed
        };
        let (fed, output) = tokio::join!(feed, read(&mut program));
        assert_eq!((fed, output.len()), (Fed::All, 10 << 20));
        assert_eq!(program.exited().await, Some(Status::Code(0)));
    });
}

#[test]
fn g14_a_program_that_never_reads_is_given_up() {
    run(|house| async move {
        for steps in [&["hang"][..], &["read-some", "hang"]] {
            let mut program = house.start(&sim(steps), PIPES).await;
            let begin = Instant::now();
            let stall = Duration::from_millis(200);
            let fed = program.take_input().unwrap().feed(&vec![b'x'; 10 << 20], stall).await.unwrap();
            assert_eq!(fed, Fed::Stalled);
            assert!(begin.elapsed() >= stall && begin.elapsed() < LONG);
        }
    });
}

#[test]
fn g15_a_program_may_close_its_input_and_answer_all_the_same() {
    run(|house| async move {
        let mut program = house.start(&sim(&["close-in", "sleep:50", "out:enough", "exit:0"]), PIPES).await;
        let mut input = program.take_input().unwrap();
        let fed = input.feed(&vec![b'x'; 10 << 20], LONG).await.unwrap();
        assert_eq!(fed, Fed::Closed);
        assert_eq!(text(&read(&mut program).await), "enough");
        assert_eq!(program.exited().await, Some(Status::Code(0)));
    });
}

#[test]
fn g15_a_program_finds_every_signal_at_its_default_and_none_blocked() {
    run(|house| async move {
        let (output, _) = house.whole(&plan(&["grep", "^Sig[BI]", "/proc/self/status"])).await;
        let none = "0000000000000000";
        assert_eq!(text(&output), format!("SigBlk:\t{none}\nSigIgn:\t{none}\n"));
        // And so one that writes to nobody ends as it does in a shell.
        let mut program = house.start(&plan(&["yes"]), OUTPUT).await;
        drop(program.take_output());
        assert_eq!(program.exited().await, Some(Status::Signal { number: 13, core: false }));
    });
}

#[test]
fn g16_any_bytes_come_through_as_they_are() {
    run(|house| async move {
        let (output, _) =
            house.whole(&sim(&["hex:00fffe80c3", "sleep:20", "hex:a9f09f", "sleep:20", "hex:988a0a"])).await;
        assert_eq!(output, b"\x00\xff\xfe\x80\xc3\xa9\xf0\x9f\x98\x8a\n");
    });
}

#[test]
fn output_that_is_a_log_is_told_line_by_line() {
    run(|house| async move {
        let wiring = evergate_host::Wiring::default();
        let mut program = house.start(&sim(&["out:one\ntwo", "err:three\n"]), wiring).await;
        assert!(program.take_output().is_none() && program.take_input().is_none());
        assert_eq!(program.ended().await.unwrap().tail, b"three\n", "the record has standard error only");
        let mut lines = house.ear.lines.lock().unwrap().clone();
        lines.sort();
        assert_eq!(lines, ["one", "three", "two"]);
    });
}

#[test]
fn an_input_that_is_none_is_empty() {
    run(|house| async move {
        let (output, ended) = house.whole(&sim(&["echo", "out:done"])).await;
        assert_eq!((text(&output).as_str(), ended.exit.status), ("done", Status::Code(0)));
    });
}
