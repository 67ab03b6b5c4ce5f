//! A request's future may be dropped at any of its polls. Here it is, at the first, the second, the third ... until it
//! completes, and after each drop nothing of it must be left: no pass, no place, no row, no task, no connection in use; and one
//! record must be there.
//!
//! The worker's own parts serve a real connection in this process, before a real upstream on loopback; only the service is
//! wrapped, in a future and a body that drop what they hold at a given poll.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod cut;
#[path = "../it/until.rs"]
mod until;
mod worker;

use std::time::Duration;

use evergate_testkit::FakeUpstream;

use worker::Worker;

/// One kind of request.
struct Case {
    /// Which path below `/v1`.
    path: &'static str,
    /// The model, a script of the upstream.
    model: &'static str,
    is_stream: bool,
    /// Sections of the configuration.
    more: &'static str,
    /// How the request comes about.
    how: How,
}

/// What is done beside sending the request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// Nothing.
    Plainly,
    /// The body comes in three pieces, some time apart.
    InPieces,
    /// The only place is taken at first.
    InLine,
    /// Every upstream connection is new.
    Connecting,
}

const CHAT: &str = "chat/completions";

const fn case(model: &'static str, is_stream: bool) -> Case {
    Case { path: CHAT, model, is_stream, more: "", how: How::Plainly }
}

/// More polls than any case has; beyond that it never ends.
const POLLS_MAX: u32 = 300;

#[track_caller]
fn at_every_poll(case: &Case) {
    let fake = FakeUpstream::start();
    let worker = Worker::start(&fake, case.more);
    for polls in 0..POLLS_MAX {
        let outcome = worker.run(case, &fake, polls);
        worker.assert_clean(case, &fake, polls);
        if outcome.is_complete {
            assert!(polls > 1, "{}: nothing was ever dropped", case.model);
            println!("{} (stream: {}): dropped at each of {polls} polls", case.model, case.is_stream);
            return;
        }
    }
    panic!("{}: not complete after {POLLS_MAX} polls", case.model);
}

#[test]
fn a_whole_answer() {
    at_every_poll(&case("ok", false));
    at_every_poll(&case("delay-5", false));
    at_every_poll(&case("one-byte", false));
}

#[test]
fn a_stream_before_and_after_its_head() {
    at_every_poll(&case("ok", true));
    at_every_poll(&case("delay-5", true));
    at_every_poll(&case("stream-6-2", true));
    at_every_poll(&case("error-event-mid", true));
    at_every_poll(&case("json-for-stream", true));
}

/// An upstream that would never end by itself is left: its connection cannot be kept.
#[test]
fn an_answer_that_stops_midway() {
    let more = "[timeouts]\nidle = \"30ms\"\n";
    at_every_poll(&Case { more, ..case("idle-mid", true) });
}

#[test]
fn a_head_that_is_let_go_and_comments() {
    let more = "[timeouts]\nhead_hold = \"5ms\"\nkeepalive = \"3ms\"\n";
    at_every_poll(&Case { more, ..case("delay-30", true) });
    at_every_poll(&Case { more, ..case("stream-3-10", true) });
}

#[test]
fn embeddings() {
    at_every_poll(&Case { path: "embeddings", ..case("delay-5", false) });
}

#[test]
fn a_body_that_comes_in_pieces() {
    at_every_poll(&Case { how: How::InPieces, ..case("ok", false) });
    at_every_poll(&Case { how: How::InPieces, ..case("ok", true) });
}

#[test]
fn a_place_that_is_waited_for() {
    let more = "[workers]\nslots = 1\n";
    at_every_poll(&Case { more, how: How::InLine, ..case("ok", false) });
    at_every_poll(&Case { more, how: How::InLine, ..case("stream-3-2", true) });
}

#[test]
fn a_connection_that_is_made() {
    at_every_poll(&Case { how: How::Connecting, ..case("ok", false) });
    at_every_poll(&Case { how: How::Connecting, ..case("stream-3-2", true) });
}

#[test]
fn a_second_target() {
    let more = "[models.two]\ntargets = [{ upstream = \"fake\", model = \"status-500\" }, { upstream = \"fake\", model = \"delay-5\" }]\n";
    at_every_poll(&Case { more, ..case("two", false) });
    at_every_poll(&Case { more, ..case("two", true) });
}

#[test]
fn what_goes_on_without_its_client() {
    let more =
        "[models.kept]\non_disconnect = \"finish\"\ntargets = [{ upstream = \"fake\", model = \"stream-4-3\" }]\n";
    at_every_poll(&Case { more, ..case("kept", false) });
    at_every_poll(&Case { more, ..case("kept", true) });
    let more = "[models.kept]\non_disconnect = { drain = \"5ms\" }\ntargets = [{ upstream = \"fake\", model = \"stream-4-5\" }]\n";
    at_every_poll(&Case { more, ..case("kept", true) });
}

/// Nothing takes so long unless it is broken.
const LIMIT: Duration = Duration::from_secs(20);
