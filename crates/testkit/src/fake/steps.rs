//! From a script and a request to what is done on the wire, byte by byte. Pure.

use std::time::Duration;

use serde_json::{Value, json};

use super::answer::{self, Answer, Endpoint};
use super::request::Request;
use super::script::Script;
use crate::traces::base64;

/// One thing to do on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Write these bytes in one piece.
    Send(Vec<u8>),
    /// Let time pass.
    Pause(Duration),
    /// Wait until the test releases it.
    Hold,
    /// Say nothing more until the client leaves.
    Silence,
    /// Write these bytes over and over, with a pause, until the client leaves.
    Repeat(Vec<u8>, Duration),
    /// End the connection in order, here and now.
    Close,
    /// Break the connection.
    Reset,
}

/// What the fake does about the `index`th request, which came on the `connection`th connection. When the steps end
/// without `Close` or `Reset`, the connection is kept.
pub(super) fn plan(request: &Request, index: usize, connection: usize) -> Vec<Step> {
    let path = request.path().trim_end_matches('/');
    let endpoint = match path.rsplit("/v1/").next().unwrap_or_default() {
        "chat/completions" => Endpoint::Chat,
        "completions" => Endpoint::Text,
        "embeddings" => Endpoint::Embeddings,
        "models" => return json_answer(200, &answer::models(None)),
        other => {
            return match other.strip_prefix("models/") {
                Some(name) => json_answer(200, &answer::models(Some(name))),
                None => json_answer(404, &answer::error(404)),
            };
        }
    };
    if !request.json().is_object() {
        return json_answer(400, &answer::error(400));
    }
    let Some(script) = Script::parse(&request.model()) else { return json_answer(404, &answer::error(404)) };
    let mut answer = Answer::new(endpoint, request, index);
    match &script {
        Script::Words { count, .. } => answer.words = (0..*count).map(|n| format!("word{n} ")).collect(),
        Script::Huge(bytes) => answer.words = vec!["x".repeat(*bytes)],
        Script::OneByte => answer.words = answer::words_of(answer::MANY_BYTES_TEXT),
        Script::Tools => answer.tool = Some(r#"{"city":"Oslo"}"#.to_owned()),
        _ => {}
    }
    let is_stream = request.is_stream() && endpoint != Endpoint::Embeddings;
    if let Script::Leak(status) = script {
        return leak(status, request.bearer(), is_stream);
    }
    if let Some(steps) = whatever_was_asked(&script) {
        return steps;
    }
    match script {
        Script::EventsForUnary => events(&Script::Ok, &answer),
        Script::JsonForStream | Script::TooLong | Script::Huge(_) => unary(&script, &answer),
        Script::EchoRequest => {
            let received = json!({"head": String::from_utf8_lossy(&request.head),
                "body": String::from_utf8_lossy(&request.body), "connection": connection});
            echo(&mut answer, &received, is_stream)
        }
        script if is_stream => events(&script, &answer),
        script => unary(&script, &answer),
    }
}

/// Scripts that do the same for a stream and for a unary request.
fn whatever_was_asked(script: &Script) -> Option<Vec<Step>> {
    Some(match script {
        Script::NeverHeaders => vec![Step::Silence],
        Script::CloseEarly => vec![Step::Close],
        Script::ResetEarly => vec![Step::Reset],
        Script::HoldFail => [vec![Step::Hold], json_answer(500, &answer::error(500))].concat(),
        Script::Compressed => whole(200, "application/json", "content-encoding: gzip\r\n", "{\"choices\":[]}"),
        Script::TwoLengths => {
            let head = head(200, "application/json", "content-length: 2\r\ncontent-length: 3\r\n");
            vec![Step::Send((head + "{} ").into_bytes()), Step::Close]
        }
        Script::Stalled500 => {
            vec![Step::Send(head(500, "application/json", "content-length: 9\r\n").into_bytes()), Step::Silence]
        }
        Script::Status(status, retry_after) => {
            let field = retry_after.map(|seconds| format!("retry-after: {seconds}\r\n")).unwrap_or_default();
            whole(*status, "application/json", &field, &answer::error(*status).to_string())
        }
        Script::Code(status, code) => {
            let mut body = answer::error(*status);
            body["error"]["type"] = code.as_str().into();
            body["error"]["code"] = code.as_str().into();
            json_answer(*status, &body)
        }
        Script::Html(status) => {
            let page = "<!DOCTYPE html><html><body><h1>It works, but not as you think</h1></body></html>";
            whole(*status, "text/html", "", page)
        }
        Script::Empty => whole(200, "application/json", "", ""),
        Script::Redirect => whole(307, "text/plain", "location: /redirected\r\n", "over there"),
        Script::Error200 => json_answer(200, &answer::error(500)),
        Script::NoChoices => json_answer(200, &json!({"hello": "world"})),
        _ => return None,
    })
}

/// An upstream that tells what it was told.
fn leak(status: u16, credential: &str, is_stream: bool) -> Vec<Step> {
    let percent = |byte: u8| format!("%{byte:02X}");
    let url: String = credential.bytes().map(percent).collect();
    let part = |range| credential.get(range).unwrap_or_default();
    let (first, last) = (part(0..12), part(credential.len().saturating_sub(12)..credential.len()));
    let basic = base64(format!("user:{credential}").as_bytes());
    let said = format!("{credential} {url} {basic} {first}***{last} url?key={credential}&x");
    let mut error = answer::error(if status == 200 { 500 } else { status });
    for field in ["message", "param", "code", "type"] {
        error["error"][field] = format!("{field} {said}").into();
    }
    let fields = format!("x-ratelimit-note: {credential}\r\nwww-authenticate: {credential}\r\n");
    match status {
        200 if is_stream => whole(200, "text/event-stream", &fields, &format!("data: {error}\n\n")),
        500 => whole(500, "text/html", &fields, &format!("<html>{said}</html>")),
        _ => whole(status, "application/json", &fields, &error.to_string()),
    }
}

fn unary(script: &Script, answer: &Answer) -> Vec<Step> {
    let mut value = answer.unary();
    if *script == Script::OddUsage {
        value["usage"] = odd_usage();
    }
    let body = value.to_string();
    let head = head(200, "application/json", &format!("content-length: {}\r\n", body.len())).into_bytes();
    let (first, rest) = body.as_bytes().split_at(body.len() / 2);
    let (first, rest) = (Step::Send(first.to_vec()), Step::Send(rest.to_vec()));
    let right = || Step::Send([&head[..], body.as_bytes()].concat());
    match script {
        Script::Delay(time) => vec![Step::Pause(*time), right()],
        Script::Words { count, every } => {
            let time = every.saturating_mul(u32::try_from(*count).unwrap_or(u32::MAX));
            vec![Step::Pause(time), right()]
        }
        Script::Hold => vec![Step::Hold, right()],
        Script::HoldMid => vec![Step::Send(head), first, Step::Hold, rest],
        Script::Silent | Script::PingsOnly => vec![Step::Send(head), Step::Silence],
        Script::IdleMid => vec![Step::Send(head), first, Step::Silence],
        Script::ResetMid => vec![Step::Send(head), first, Step::Reset],
        Script::EofMid => vec![Step::Send(head), first, Step::Close],
        Script::TwoFramings => {
            let fields = format!("content-length: {}\r\ntransfer-encoding: chunked\r\n", body.len());
            let end = "0\r\n\r\n".to_owned();
            vec![Step::Send(
                [self::head(200, "application/json", &fields).into_bytes(), framed(&body), end.into()].concat(),
            )]
        }
        Script::EofHead => vec![Step::Send(head), Step::Close],
        Script::NoEvents => whole(200, "application/json", "", ""),
        Script::Stale => vec![right(), Step::Close],
        Script::BadJson | Script::HalfEvent => whole(200, "application/json", "", "{\"choices\": [oops"),
        Script::HalfEmoji => whole(200, "application/json", "", &body.replacen("Hello", "half \\ud83d", 1)),
        Script::ErrorEventFirst | Script::ErrorEventMid => json_answer(200, &answer::error(500)),
        Script::TooLong => vec![right(), Step::Send(b"{\"and\": \"more\"}".to_vec())],
        Script::OneByte => single_bytes(&[&head[..], body.as_bytes()].concat()),
        _ => vec![right()],
    }
}

fn events(script: &Script, answer: &Answer) -> Vec<Step> {
    let all = answer.events();
    let head = Step::Send(head(200, "text/event-stream", "transfer-encoding: chunked\r\n").into_bytes());
    let middle = all.len() / 2;
    let send = |events: &[String]| events.iter().map(|event| chunk(event)).collect::<Vec<_>>();
    let (first, rest) = (send(&all[..middle]), send(&all[middle..]));
    let done = || chunk("data: [DONE]\n\n");
    let end = || Step::Send(b"0\r\n\r\n".to_vec());
    let finish = || vec![done(), end()];
    let extra = |event: &str| vec![chunk(event)];
    let error = || extra(&answer::event(&answer::error(500)));
    let second = || extra(&answer.text_event("more").replacen("\"index\":0", "\"index\":1", 1));
    let odd = |events: Vec<Value>| events.iter().map(|value| chunk(&answer::event(value))).collect::<Vec<_>>();
    let head = vec![head];
    match script {
        Script::Delay(time) => [vec![Step::Pause(*time)], head, first, rest, finish()].concat(),
        Script::Words { every, .. } => [head, paced(&all, *every), finish()].concat(),
        Script::Hold => [vec![Step::Hold], head, first, rest, finish()].concat(),
        Script::HoldMid => [head, first, vec![Step::Hold], rest, finish()].concat(),
        Script::Silent => [head, vec![Step::Silence]].concat(),
        Script::PingsOnly => [head, vec![Step::Repeat(framed(": ping\n\n"), Duration::from_millis(20))]].concat(),
        Script::IdleMid => [head, first, vec![Step::Silence]].concat(),
        Script::ResetMid => [head, first, vec![Step::Reset]].concat(),
        Script::EofMid => [head, first, vec![Step::Close]].concat(),
        Script::EofHead => [head, vec![Step::Close]].concat(),
        Script::NoEvents => [head, vec![end()]].concat(),
        Script::Stale => [head, first, rest, finish(), vec![Step::Close]].concat(),
        Script::BadJson => [head, first, extra("data: {\"choices\": [oops\n\n"), rest, finish()].concat(),
        Script::HalfEmoji => {
            let half = answer.text_event("half ?").replacen("half ?", "half \\ud83d", 1);
            [head, first, extra(&half), rest, finish()].concat()
        }
        Script::OddUsage => {
            let odd = answer::event(&json!({"id": "x", "object": "chat.completion.chunk", "created": answer::CREATED,
                "model": "odd-usage", "choices": [], "usage": odd_usage()}));
            [head, first, rest, extra(&odd), finish()].concat()
        }
        Script::OddTools => [head, odd(odd_tools()), rest, finish()].concat(),
        Script::OddChunks => [head, first, odd(odd_chunks()), rest, finish()].concat(),
        Script::AfterFinish => [head, first, rest, odd(after_finish()), finish()].concat(),
        Script::TwoUsages => [head, first, odd(vec![usage(3)]), rest, odd(vec![usage(5)]), finish()].concat(),
        Script::ErrorEventFirst => [head, error(), vec![end()]].concat(),
        Script::ErrorEventMid => [head, first, error(), vec![end()]].concat(),
        Script::NoDone => [head, first, rest, vec![end()]].concat(),
        Script::NoDoneCut => [head, first, rest, vec![Step::Close]].concat(),
        Script::SecondOpen => [head, first, rest, second(), vec![end()]].concat(),
        Script::SecondOpenCut => [head, first, rest, second(), vec![Step::Close]].concat(),
        Script::NoFinish => [head, first, vec![end()]].concat(),
        Script::HalfEvent => [head, first, extra("data: {\"id\":\"cut he"), vec![end()]].concat(),
        // In one piece, and what follows in another.
        Script::TwoDone => [head, first, rest, extra("data: [DONE]\n\ndata: [DONE]\n\n"), finish()].concat(),
        Script::AfterDone => {
            let late = answer.text_event("late");
            [head, first, rest, extra(&format!("data: [DONE]\n\n{late}")), extra(&late), vec![end()]].concat()
        }
        Script::OneByte => [head, first, rest, finish()].concat().iter().flat_map(bytes_of).collect(),
        Script::Crlf => [head, crlf(&all), finish()].concat(),
        Script::BigEvent(size) => [head, first, extra(&answer.text_event(&"x".repeat(*size))), rest, finish()].concat(),
        Script::Flood => {
            let block = framed(&answer.text_event(&"flood ".repeat(40))).repeat(50);
            [head, first, vec![Step::Repeat(block, Duration::ZERO)]].concat()
        }
        _ => [head, first, rest, finish()].concat(),
    }
}

fn echo(answer: &mut Answer, received: &Value, is_stream: bool) -> Vec<Step> {
    if is_stream {
        answer.words = vec![received.to_string()];
        return events(&Script::Ok, answer);
    }
    let mut value = answer.unary();
    value["received"] = received.clone();
    json_answer(200, &value)
}

/// The events with a pause before each word but the first: the first event is the role's or the first word itself.
fn paced(all: &[String], every: Duration) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut words = 0;
    for event in all {
        let is_word = event.contains("word");
        if is_word && words > 0 && !every.is_zero() {
            steps.push(Step::Pause(every));
        }
        words += usize::from(is_word);
        steps.push(chunk(event));
    }
    steps
}

fn crlf(all: &[String]) -> Vec<Step> {
    all.iter()
        .enumerate()
        .map(|(index, event)| {
            let event = event.replacen("data: ", &format!(": note\nevent: message\nid: {index}\ndata:"), 1);
            chunk(&event.replace('\n', "\r\n"))
        })
        .collect()
}

fn odd_chunk(choices: &Value) -> Value {
    json!({"id": "odd", "object": "chat.completion.chunk", "created": answer::CREATED, "model": "odd", "choices": choices})
}

fn odd_tools() -> Vec<Value> {
    let call = |call: Value| odd_chunk(&json!([{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": null}]));
    vec![
        call(json!({"type": "function", "function": {"name": "a", "arguments": "{\"x"}})),
        call(json!({"index": 7, "id": "late", "function": {"arguments": "\": [1,"}})),
        call(json!({"index": 3, "id": null, "function": {"name": null, "arguments": "oops"}})),
    ]
}

fn odd_chunks() -> Vec<Value> {
    vec![
        odd_chunk(&json!([])),
        odd_chunk(&Value::Null),
        odd_chunk(&json!([{"index": 0, "delta": {"role": "assistant", "content": "again "}, "finish_reason": null}])),
        odd_chunk(&json!([{"index": 0, "delta": null, "finish_reason": null}])),
        odd_chunk(&json!([{"index": 0, "delta": {"content": null}}])),
    ]
}

fn after_finish() -> Vec<Value> {
    vec![
        odd_chunk(&json!([{"index": 0, "delta": {"content": "more "}, "finish_reason": null}])),
        odd_chunk(&json!([{"index": 0, "delta": {}, "finish_reason": "length"}])),
    ]
}

fn usage(completion: u64) -> Value {
    let mut value = odd_chunk(&json!([]));
    value["usage"] = json!({"prompt_tokens": answer::PROMPT_TOKENS, "completion_tokens": completion,
        "total_tokens": answer::PROMPT_TOKENS + completion});
    value
}

fn odd_usage() -> Value {
    json!({"prompt_tokens": -5, "completion_tokens": 1_000_000_000_000_000_000_u64, "total_tokens": "many"})
}

fn bytes_of(step: &Step) -> Vec<Step> {
    match step {
        Step::Send(bytes) => single_bytes(bytes),
        other => vec![other.clone()],
    }
}

fn single_bytes(bytes: &[u8]) -> Vec<Step> {
    bytes.iter().map(|&byte| Step::Send(vec![byte])).collect()
}

fn chunk(event: &str) -> Step {
    Step::Send(framed(event))
}

fn framed(event: &str) -> Vec<u8> {
    format!("{:x}\r\n{event}\r\n", event.len()).into_bytes()
}

fn json_answer(status: u16, value: &Value) -> Vec<Step> {
    whole(status, "application/json", "", &value.to_string())
}

fn whole(status: u16, media: &str, fields: &str, body: &str) -> Vec<Step> {
    let head = head(status, media, &format!("{fields}content-length: {}\r\n", body.len()));
    vec![Step::Send((head + body).into_bytes())]
}

fn head(status: u16, media: &str, fields: &str) -> String {
    format!(
        "HTTP/1.1 {status} As Told\r\ncontent-type: {media}\r\nx-request-id: req_fake\r\nserver: fakeup\r\n{fields}\r\n"
    )
}
