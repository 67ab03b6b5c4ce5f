//! Answers as a stream of events, a word at a time.

use super::Reply;
use crate::json::write_string;

/// Which endpoint's shape the events have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Chat,
    Text,
}

/// What comes next.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Role,
    /// The words from this byte of the text on.
    Words(usize),
    Finish,
    Usage,
    Done,
    End,
}

/// The events of a stream, each with its blank line: for chat a role, then one for each word with the white space
/// after it, the end, the usage if it is wanted, and `[DONE]`.
#[derive(Clone, Debug)]
pub struct Chunks {
    reply: Reply,
    shape: Shape,
    stage: Stage,
    /// What every event begins with.
    head: String,
}

impl Chunks {
    /// The events of a chat completion, each a `CreateChatCompletionStreamResponse`.
    #[must_use]
    pub fn chat(reply: Reply) -> Self {
        Self::new(reply, Shape::Chat, "chat.completion.chunk", Stage::Role)
    }

    /// The events of a text completion, each a `CreateCompletionResponse` whose `finish_reason` is null until the end,
    /// as OpenAI sends it.
    #[must_use]
    pub fn text(reply: Reply) -> Self {
        Self::new(reply, Shape::Text, "text_completion", Stage::Words(0))
    }

    fn new(reply: Reply, shape: Shape, object: &str, stage: Stage) -> Self {
        let mut head = String::with_capacity(192);
        head.push_str("data: ");
        reply.write_head(&mut head, object);
        head.push_str("\"choices\":[");
        Self { reply, shape, stage, head }
    }

    /// The next word and where the one after it begins.
    fn word(&self, from: usize) -> Option<(&str, usize)> {
        let word = self.reply.text.get(from..)?.split_inclusive(char::is_whitespace).next()?;
        Some((word, from + word.len()))
    }

    /// An event that carries `content`; with `finish_reason` "stop" if it is the last of the choice.
    fn choice(&self, content: &str, finish_reason: &str) -> String {
        let mut out = String::with_capacity(self.head.len() + content.len() + 128);
        out.push_str(&self.head);
        match (self.shape, self.stage) {
            (Shape::Text, _) => {
                out.push_str("{\"text\":");
                write_string(&mut out, content);
                out.push_str(",\"index\":0");
            }
            (Shape::Chat, Stage::Role) => {
                out.push_str("{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\",\"refusal\":null}");
            }
            (Shape::Chat, Stage::Words(_)) => {
                out.push_str("{\"index\":0,\"delta\":{\"content\":");
                write_string(&mut out, content);
                out.push('}');
            }
            (Shape::Chat, _) => out.push_str("{\"index\":0,\"delta\":{}"),
        }
        out.push_str(",\"logprobs\":null,\"finish_reason\":");
        out.push_str(finish_reason);
        out.push_str("}]");
        if self.reply.wants_usage {
            out.push_str(",\"usage\":null");
        }
        out.push_str("}\n\n");
        out
    }

    fn usage(&self) -> String {
        let mut out = self.head.clone();
        out.push_str("],\"usage\":");
        self.reply.write_usage(&mut out);
        out.push_str("}\n\n");
        out
    }
}

impl Iterator for Chunks {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let (event, next) = match self.stage {
            Stage::Role => (self.choice("", "null"), Stage::Words(0)),
            Stage::Words(from) => match self.word(from) {
                Some((word, next)) => (self.choice(word, "null"), Stage::Words(next)),
                None => {
                    self.stage = Stage::Finish;
                    return self.next();
                }
            },
            Stage::Finish => {
                let next = if self.reply.wants_usage { Stage::Usage } else { Stage::Done };
                (self.choice("", "\"stop\""), next)
            }
            Stage::Usage => (self.usage(), Stage::Done),
            Stage::Done => (String::from("data: [DONE]\n\n"), Stage::End),
            Stage::End => return None,
        };
        self.stage = next;
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn reply(text: &str, wants_usage: bool) -> Reply {
        Reply { id: "id-1".into(), created: 7, model: "echo".into(), text: text.into(), wants_usage }
    }

    /// The events' data, of which the last is `[DONE]` and cut off.
    fn events(chunks: Chunks) -> Vec<Value> {
        let mut data: Vec<_> = chunks
            .map(|event| {
                let data = event.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
                assert!(!data.contains('\n'));
                data.to_owned()
            })
            .collect();
        assert_eq!(data.pop().unwrap(), "[DONE]");
        data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    #[test]
    fn a_chat_stream_has_a_role_words_an_end_and_the_usage_that_was_asked_for() {
        let text = "hello  \"world\"\n😀";
        let events = events(Chunks::chat(reply(text, true)));
        for event in &events {
            assert_eq!(event["object"], "chat.completion.chunk");
            assert_eq!((&event["id"], &event["created"], &event["model"]), (&json!("id-1"), &json!(7), &json!("echo")));
        }
        let (usage, choices) = events.split_last().unwrap();
        assert_eq!(usage["choices"], json!([]));
        assert_eq!(usage["usage"], json!({ "prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10 }));
        assert!(choices.iter().all(|event| event.get("usage") == Some(&Value::Null)));
        let (last, rest) = choices.split_last().unwrap();
        assert_eq!(last["choices"], json!([{ "index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop" }]));
        assert!(rest.iter().all(|event| event["choices"][0].get("finish_reason") == Some(&Value::Null)));
        assert_eq!(rest[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "", "refusal": null }));
        let words: String =
            rest.iter().map(|event| event["choices"][0]["delta"]["content"].as_str().unwrap()).collect();
        assert_eq!((words.as_str(), rest.len()), (text, 5));
    }

    #[test]
    fn without_being_asked_a_stream_says_nothing_of_usage() {
        for chunks in [Chunks::chat(reply("a b", false)), Chunks::text(reply("a b", false))] {
            assert!(events(chunks).iter().all(|event| event.get("usage").is_none()));
        }
        assert_eq!(events(Chunks::chat(reply("", false))).len(), 2);
    }

    #[test]
    fn a_text_stream_has_words_and_an_end() {
        let events = events(Chunks::text(reply("a b", true)));
        let choices: Vec<_> = events.iter().map(|event| event["choices"].clone()).collect();
        let choice = |text: &str, finish: Value| json!([{ "text": text, "index": 0, "logprobs": null, "finish_reason": finish }]);
        assert_eq!(
            choices,
            [choice("a ", Value::Null), choice("b", Value::Null), choice("", json!("stop")), json!([])]
        );
        assert!(events.iter().all(|event| event["object"] == "text_completion"));
        assert_eq!(events.last().unwrap()["usage"]["total_tokens"], 4);
    }

    #[test]
    fn our_own_events_are_read_back_by_our_own_scanner() {
        let read: Vec<_> = Chunks::chat(reply("a \"b\"", true))
            .map(|event| crate::json::scan_chunk(event.trim_start_matches("data: ").as_bytes()))
            .map(|chunk| (chunk.is_object, chunk.has_content, chunk.finish, chunk.usage.is_some()))
            .collect();
        let content = (true, true, false, false);
        let expected = [
            (true, false, false, false),
            content,
            content,
            (true, false, true, false),
            (true, false, false, true),
            (false, false, false, false),
        ];
        assert_eq!(read, expected);
    }
}
