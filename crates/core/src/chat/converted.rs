//! A whole answer told as a stream, for upstreams that do not heed `stream: true`.
//!
//! One chunk per answer with everything in it: nothing is made up, nothing is cut into pieces that were never sent.

use serde_json::{Map, Value, json};

/// The events, `[DONE]` included, of a stream that says what the whole answer of `/chat/completions` (`is_chat`) or
/// `/completions` says; with a chunk of usage if the client asked for one (`stream_options.include_usage`). `None` for what
/// is no such answer.
#[must_use]
pub fn as_events(answer: &[u8], is_chat: bool, wants_usage: bool) -> Option<Vec<String>> {
    let answer = answer.strip_prefix(b"\xef\xbb\xbf").unwrap_or(answer);
    let mut chunk: Map<String, Value> = serde_json::from_slice(answer).ok()?;
    let usage = chunk.remove("usage").filter(|usage| !usage.is_null());
    let choices = chunk.get_mut("choices")?.as_array_mut()?;
    if is_chat {
        choices.iter_mut().try_for_each(message_to_delta)?;
        chunk.insert("object".into(), json!("chat.completion.chunk"));
    }
    let mut events = vec![event(&chunk)];
    if let Some(usage) = usage.filter(|_| wants_usage) {
        chunk.insert("choices".into(), json!([]));
        chunk.insert("usage".into(), usage);
        events.push(event(&chunk));
    }
    events.push("data: [DONE]\n\n".into());
    Some(events)
}

fn event(chunk: &Map<String, Value>) -> String {
    format!("data: {}\n\n", json!(chunk))
}

/// In a stream a choice has a `delta`, and its tool calls say which one they are a part of.
fn message_to_delta(choice: &mut Value) -> Option<()> {
    let choice = choice.as_object_mut()?;
    let mut message = choice.remove("message")?;
    let calls = message.as_object_mut()?.get_mut("tool_calls").and_then(Value::as_array_mut);
    for (index, call) in calls.into_iter().flatten().enumerate() {
        call.as_object_mut()?.entry("index").or_insert_with(|| json!(index));
    }
    choice.insert("delta".into(), message);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(events: &[String]) -> Vec<Value> {
        let data = events.iter().filter_map(|event| event.strip_prefix("data: ")?.strip_suffix("\n\n"));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    #[test]
    fn a_message_becomes_a_delta_and_the_rest_stays() {
        let answer = json!({
            "id": "c", "object": "chat.completion", "created": 1, "model": "m", "service_tier": "x",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "hi 😀\n"}, "logprobs": null, "finish_reason": "stop"},
                {"index": 1, "message": {"role": "assistant", "content": null, "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1"}},
                    {"id": "b", "type": "function", "function": {"name": "g", "arguments": ""}, "index": 7},
                ]}, "finish_reason": "tool_calls"},
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        });
        let events = as_events(answer.to_string().as_bytes(), true, true).unwrap();
        assert_eq!(events.last().unwrap(), "data: [DONE]\n\n");
        let [chunk, last] = &values(&events)[..] else { panic!("{events:?}") };
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!((&chunk["id"], &chunk["model"], &chunk["service_tier"]), (&json!("c"), &json!("m"), &json!("x")));
        let (first, second) = (&chunk["choices"][0], &chunk["choices"][1]);
        assert_eq!(first["delta"], json!({"role": "assistant", "content": "hi 😀\n"}));
        assert_eq!((&first["finish_reason"], first.get("message")), (&json!("stop"), None));
        let calls = second["delta"]["tool_calls"].as_array().unwrap();
        assert_eq!((&calls[0]["index"], &calls[1]["index"]), (&json!(0), &json!(7)));
        assert_eq!(calls[0]["function"]["arguments"], "{\"x\":1");
        assert!(chunk.get("usage").is_none());
        assert_eq!((&last["choices"], &last["usage"]["total_tokens"]), (&json!([]), &json!(3)));
    }

    #[test]
    fn usage_is_told_only_when_asked_for() {
        let answer = br#"{"id":"t","object":"text_completion","choices":[{"index":0,"text":"a","finish_reason":"stop"}],"usage":{"prompt_tokens":1}}"#;
        let plain = as_events(answer, false, false).unwrap();
        assert_eq!(values(&plain)[0]["choices"][0]["text"], "a");
        assert_eq!((plain.len(), as_events(answer, false, true).unwrap().len()), (2, 3));
        assert_eq!(as_events(br#"{"choices":[],"usage":null}"#, false, true).unwrap().len(), 2);
    }

    #[test]
    fn what_is_no_answer_is_none() {
        for answer in [
            "",
            "[]",
            "{}",
            r#"{"choices":{}}"#,
            r#"{"choices":[1]}"#,
            r#"{"choices":[{"text":"a"}]}"#,
            "{\"choices\":",
        ] {
            assert_eq!(as_events(answer.as_bytes(), true, true), None, "{answer}");
        }
    }
}
