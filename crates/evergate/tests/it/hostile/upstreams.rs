//! What upstreams send: streams, and answers whose framing is none.

use evergate_testkit::corpus::{self, Case};
use evergate_testkit::fake::Then;
use evergate_testkit::{FakeUpstream, Response};
use serde_json::Value;

use super::run;
use crate::support::{assert_error_shape, assert_failed_stream, assert_good_stream, before, via};

/// Small limits, so that small inputs are beyond them.
const SMALL: &str = "[limits]\nevent = \"64KiB\"\nanswer = \"256KiB\"\n[timeouts]\nfirst_token = \"4s\"\nidle = \"2s\"\n\
                     [models.echo]\ntargets = [{ upstream = \"echo\" }]\n";

const OUR_END: &[u8] = b"data: [DONE]\n\n";

/// E5-E8, E13, E14, F1-F18: `tests/hostile/upstream.txt`.
#[test]
fn no_answer_of_an_upstream_harms_a_client() {
    let fake = FakeUpstream::start();
    let cases = corpus::parse(include_str!("../../hostile/upstream.txt"));
    let (wire, framed): (Vec<_>, Vec<_>) = cases.into_iter().partition(|case| flag(&case.expect, "wire ").1);
    play(&fake, &framed, SMALL);
    // These close behind answers that promise more. A connection that was kept meanwhile ends under another input's request,
    // which may have been worked for and is not sent again: right, but not what that input is to show.
    play(&fake, &wire, &SMALL.replace("[limits]\n", "[limits]\nupstream_idle = 0\n"));
}

fn play(fake: &FakeUpstream, cases: &[Case], limits: &str) {
    let gateway = before(fake, limits);
    run(&gateway, cases, 20, |case| {
        let name = format!("line-{}", case.line);
        let (expect, is_wire) = flag(&case.expect, "wire ");
        let (expect, is_unary) = flag(expect, "unary ");
        let (pieces, then) = if is_wire { (case.pieces.clone(), Then::Close) } else { (chunked(case), Then::Keep) };
        fake.stage(&name, pieces, then);
        let response = evergate_testkit::post_chat(&gateway.addr(), &via(&name), !is_unary, &Value::Null);
        let said = outcome(&response, is_unary);
        if said != expect {
            return Err(format!("{said}: {}", response.text().chars().take(300).collect::<String>()));
        }
        if is_wire { Ok(()) } else { nothing_changed(&case.bytes(), &response) }
    });
}

fn flag<'a>(text: &'a str, word: &str) -> (&'a str, bool) {
    text.strip_prefix(word).map_or((text, false), |rest| (rest, true))
}

/// A right answer around the pieces, each a chunk of its own.
fn chunked(case: &Case) -> Vec<Vec<u8>> {
    let head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    let chunk = |piece: &Vec<u8>| [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
    let chunks = case.pieces.iter().filter(|piece| !piece.is_empty()).map(chunk);
    [head].into_iter().chain(chunks).chain([b"0\r\n\r\n".to_vec()]).collect()
}

/// What the client got, in the file's words; a shape that is none of the contract's fails the test here.
fn outcome(response: &Response, is_unary: bool) -> String {
    if response.status != 200 {
        assert_error_shape(response);
        assert_names_upstream(&response.json()["error"]);
        return format!("{} {}", response.status, response.error_code());
    }
    if is_unary {
        assert!(response.is_complete);
        return "200".into();
    }
    let events = response.events();
    match events.iter().find_map(evergate_testkit::sse::Event::error_code) {
        Some(code) => {
            assert_failed_stream(&events, response.is_complete, &code);
            assert_names_upstream(&events.last().unwrap().json()["error"]);
            format!("error {code}")
        }
        None => {
            assert_good_stream(&events, response.is_complete);
            "done".into()
        }
    }
}

/// Whoever has several upstreams needs to know which one it was.
fn assert_names_upstream(error: &Value) {
    assert!(error["message"].as_str().is_some_and(|message| message.contains("the upstream \"fake\"")), "{error}");
}

/// What came before our own last event is what the upstream sent, from its first byte on; comments in front may be missing,
/// since they do not begin an answer.
fn nothing_changed(sent: &[u8], response: &Response) -> Result<(), String> {
    if response.status != 200 {
        return Ok(());
    }
    let (sent, got) = (without_comments(sent), without_comments(&response.body));
    let own = response.events().last().map_or(0, |last| last.raw.len());
    let theirs = if response.events().iter().any(|event| event.error_code().is_some()) {
        &got[..got.len() - own]
    } else if sent.starts_with(got) {
        got
    } else {
        got.strip_suffix(OUR_END).unwrap_or(got)
    };
    if sent.starts_with(theirs) { Ok(()) } else { Err(format!("changed: \"{}\"", got.escape_ascii())) }
}

/// Without the blank lines and comments that it begins with.
fn without_comments(mut stream: &[u8]) -> &[u8] {
    while let Some(b'\r' | b'\n' | b':') = stream.first() {
        let end = stream.iter().position(|byte| matches!(byte, b'\r' | b'\n')).map_or(stream.len(), |at| at + 1);
        stream = &stream[end..];
    }
    stream
}
