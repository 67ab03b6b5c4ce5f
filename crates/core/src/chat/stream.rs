//! Answers as a stream of events, a word at a time.

use super::Reply;
use crate::json::write_string;

/// What ends a stream that told everything.
pub const DONE: &str = "data: [DONE]\n\n";

/// Which endpoint's shape the events have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Chat,
    Text,
}

/// Makes the events of one stream, each with its blank line: for chat a role, then pieces of text, the end, the usage if
/// it is wanted; [`DONE`] comes last.
#[derive(Clone, Debug)]
pub struct Events {
    shape: Shape,
    wants_usage: bool,
    /// What every event begins with.
    head: String,
}

impl Events {
    /// The events of a chat completion, each a `CreateChatCompletionStreamResponse`. The reply's text is not looked at.
    #[must_use]
    pub fn chat(reply: &Reply) -> Self {
        Self::new(reply, Shape::Chat, "chat.completion.chunk")
    }

    /// The events of a text completion, each a `CreateCompletionResponse` whose `finish_reason` is null until the end,
    /// as OpenAI sends it. The reply's text is not looked at.
    #[must_use]
    pub fn text(reply: &Reply) -> Self {
        Self::new(reply, Shape::Text, "text_completion")
    }

    fn new(reply: &Reply, shape: Shape, object: &str) -> Self {
        let mut head = String::with_capacity(192);
        head.push_str("data: ");
        reply.write_head(&mut head, object);
        head.push_str("\"choices\":[");
        Self { shape, wants_usage: reply.wants_usage, head }
    }

    /// What comes before the first piece: for chat, whose the answer is.
    #[must_use]
    pub fn role(&self) -> Option<String> {
        let delta = "{\"role\":\"assistant\",\"content\":\"\",\"refusal\":null}";
        (self.shape == Shape::Chat).then(|| self.choice("delta", |out| out.push_str(delta), "null"))
    }

    /// A piece of the text.
    #[must_use]
    pub fn piece(&self, text: &str) -> String {
        match self.shape {
            Shape::Text => self.choice("text", |out| write_string(out, text), "null"),
            Shape::Chat => {
                let delta = |out: &mut String| {
                    out.push_str("{\"content\":");
                    write_string(out, text);
                    out.push('}');
                };
                self.choice("delta", delta, "null")
            }
        }
    }

    /// A piece in an upstream's own words: for chat a `delta`'s object, else a text's JSON string. It must be on one line.
    #[must_use]
    pub fn raw(&self, json: &str) -> String {
        let key = if self.shape == Shape::Chat { "delta" } else { "text" };
        self.choice(key, |out| out.push_str(json), "null")
    }

    /// The end of the text.
    #[must_use]
    pub fn finish(&self) -> String {
        self.finish_for("stop")
    }

    /// The end of the text, for a reason of the answer's own, such as `length`.
    #[must_use]
    pub fn finish_for(&self, reason: &str) -> String {
        let (mut quoted, (key, nothing)) = (
            String::new(),
            match self.shape {
                Shape::Text => ("text", "\"\""),
                Shape::Chat => ("delta", "{}"),
            },
        );
        write_string(&mut quoted, reason);
        self.choice(key, |out| out.push_str(nothing), &quoted)
    }

    /// The usage, for who wants it (`stream_options.include_usage`).
    #[must_use]
    pub fn usage(&self, tokens_in: u64, tokens_out: u64) -> String {
        let mut out = self.head.clone();
        out.push_str("],\"usage\":");
        super::write_usage(&mut out, tokens_in, tokens_out);
        out.push_str("}\n\n");
        out
    }

    /// An event with one choice, whose `key` holds what `write` writes.
    fn choice(&self, key: &str, write: impl FnOnce(&mut String), finish_reason: &str) -> String {
        let mut out = String::with_capacity(self.head.len() + 192);
        out.push_str(&self.head);
        // OpenAI's order: a chat's index comes first, a text's after it.
        if self.shape == Shape::Chat {
            out.push_str("{\"index\":0,\"");
        } else {
            out.push_str("{\"");
        }
        out.push_str(key);
        out.push_str("\":");
        write(&mut out);
        if self.shape == Shape::Text {
            out.push_str(",\"index\":0");
        }
        out.push_str(",\"logprobs\":null,\"finish_reason\":");
        out.push_str(finish_reason);
        out.push_str("}]");
        if self.wants_usage {
            out.push_str(",\"usage\":null");
        }
        out.push_str("}\n\n");
        out
    }
}

/// What comes next.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Role,
    /// The words from this byte of the text on.
    Words(usize),
    Usage,
    Done,
    End,
}

/// The events of a whole text, one for each word with the white space after it, and `[DONE]`.
#[derive(Clone, Debug)]
pub struct Chunks {
    reply: Reply,
    events: Events,
    stage: Stage,
}

impl Chunks {
    /// As a chat completion.
    #[must_use]
    pub fn chat(reply: Reply) -> Self {
        Self { events: Events::chat(&reply), reply, stage: Stage::Role }
    }

    /// As a text completion.
    #[must_use]
    pub fn text(reply: Reply) -> Self {
        Self { events: Events::text(&reply), reply, stage: Stage::Role }
    }

    fn usage(&self) -> Option<String> {
        if !self.reply.wants_usage {
            return None;
        }
        let (tokens_in, tokens_out) = self.reply.tokens();
        Some(self.events.usage(tokens_in, tokens_out))
    }

    /// The next word and where the one after it begins.
    fn word(&self, from: usize) -> Option<(&str, usize)> {
        let word = self.reply.text.get(from..)?.split_inclusive(char::is_whitespace).next()?;
        Some((word, from + word.len()))
    }
}

impl Iterator for Chunks {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            let (event, next) = match self.stage {
                Stage::Role => (self.events.role(), Stage::Words(0)),
                Stage::Words(from) => match self.word(from) {
                    Some((word, next)) => (Some(self.events.piece(word)), Stage::Words(next)),
                    None => (Some(self.events.finish()), Stage::Usage),
                },
                Stage::Usage => (self.usage(), Stage::Done),
                Stage::Done => (Some(String::from(DONE)), Stage::End),
                Stage::End => return None,
            };
            self.stage = next;
            if event.is_some() {
                return event;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn reply(text: &str, wants_usage: bool) -> Reply {
        Reply { id: "id-1".into(), created: 7, model: "echo".into(), text: text.into(), tokens_in: None, wants_usage }
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
            .map(|chunk| {
                (
                    chunk.is_object,
                    chunk.has_content,
                    chunk.finished != crate::json::Choices::default(),
                    chunk.usage.is_some(),
                )
            })
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
