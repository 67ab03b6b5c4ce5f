//! Whole answers: chat and text completions in one piece.

use super::Reply;
use crate::json::write_string;

/// A `CreateChatCompletionResponse` with one choice.
#[must_use]
pub fn completion(reply: &Reply) -> String {
    let mut out = String::with_capacity(reply.text.len() + 384);
    reply.write_head(&mut out, "chat.completion");
    out.push_str("\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":");
    write_string(&mut out, &reply.text);
    out.push_str(",\"refusal\":null},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":");
    reply.write_usage(&mut out);
    out.push('}');
    out
}

/// A `CreateCompletionResponse` with one choice.
#[must_use]
pub fn text_completion(reply: &Reply) -> String {
    let mut out = String::with_capacity(reply.text.len() + 320);
    reply.write_head(&mut out, "text_completion");
    out.push_str("\"choices\":[{\"text\":");
    write_string(&mut out, &reply.text);
    out.push_str(",\"index\":0,\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":");
    reply.write_usage(&mut out);
    out.push('}');
    out
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn reply() -> Reply {
        Reply {
            id: "chatcmpl-1".into(),
            created: 1_700_000_000,
            model: "my \"echo\"".into(),
            text: "hello, \"world\"\n😀".into(),
            tokens_in: None,
            wants_usage: false,
        }
    }

    #[test]
    fn a_chat_completion_has_every_required_field() {
        let value: Value = serde_json::from_str(&completion(&reply())).unwrap();
        let expected = json!({
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "my \"echo\"",
            "choices": [{
                "index": 0,
                "message": { "role": "assistant", "content": "hello, \"world\"\n😀", "refusal": null },
                "logprobs": null,
                "finish_reason": "stop",
            }],
            "usage": { "prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10 },
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn a_text_completion_has_every_required_field() {
        let value: Value = serde_json::from_str(&text_completion(&reply())).unwrap();
        let choice = json!({ "text": "hello, \"world\"\n😀", "index": 0, "logprobs": null, "finish_reason": "stop" });
        assert_eq!(value["choices"], json!([choice]));
        assert_eq!(value["object"], "text_completion");
        assert_eq!(value["usage"]["total_tokens"], 10);
    }

    #[test]
    fn our_own_answers_are_read_back_by_our_own_scanner() {
        let answer = crate::json::scan_answer(completion(&reply()).as_bytes()).unwrap();
        let usage = answer.usage.unwrap();
        assert_eq!((usage.tokens_in, usage.tokens_out, usage.is_suspect), (5, 5, false));
        assert!(answer.has_choices_or_data && !answer.has_error);
    }
}
