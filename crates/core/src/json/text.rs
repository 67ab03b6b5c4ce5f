//! What a request says, for the built-in model only: nothing that is passed on is read this way.

use serde_json::Value;

use crate::error::{Error, Fault};

/// The text that `echo` answers with: the last user message's (a string, or its text parts, one a line), else the
/// last message's; for completions and embeddings the `prompt` or `input`, several one a line, token ids as numbers.
///
/// # Errors
/// `InvalidValue` with the param that is missing or cannot be used, `InvalidJson` for what `scan_request` did not check.
pub fn messages_text(body: &[u8]) -> Result<String, Error> {
    let value = parse(body)?;
    if let Some(messages) = value.get("messages").filter(|messages| !messages.is_null()) {
        return from_messages(messages);
    }
    for param in ["prompt", "input"] {
        if let Some(value) = value.get(param).filter(|value| !value.is_null()) {
            let texts = inputs(value).ok_or_else(|| wrong(param, "must be a string or an array of strings"))?;
            return Ok(texts.join("\n"));
        }
    }
    Err(wrong("messages", "must be given: an array of messages"))
}

/// Most values in a body that a tree is built of: 20 MiB of empty brackets would be a tree of gigabytes, built for seconds.
const VALUES_MAX: usize = 1 << 18;

/// Parses a whole body. Numbers beyond a float's range and nesting beyond 128 levels are refused here only.
pub(crate) fn parse(body: &[u8]) -> Result<Value, Error> {
    // Those within strings are counted too, which errs on the safe side.
    if memchr::memchr3_iter(b'[', b'{', b',', body).count() > VALUES_MAX {
        let message = format!("the built-in model takes at most {VALUES_MAX} values and commas in a request");
        return Err(Error::new(Fault::RequestTooLarge, message));
    }
    serde_json::from_slice(body).map_err(|error| {
        let message = "the request body holds JSON that the built-in model cannot read";
        Error::new(Fault::InvalidJson, message).detail(error)
    })
}

/// One text for each input of `prompt` or `input`: a string, an array of strings, one of token ids, or one of those.
pub(crate) fn inputs(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(items) if !items.is_empty() && items.iter().all(Value::is_u64) => Some(vec![tokens(items)]),
        Value::Array(items) => items.iter().map(input).collect(),
        _ => None,
    }
}

fn input(item: &Value) -> Option<String> {
    match item {
        Value::String(text) => Some(text.clone()),
        Value::Array(items) if items.iter().all(Value::is_u64) => Some(tokens(items)),
        _ => None,
    }
}

fn tokens(items: &[Value]) -> String {
    items.iter().map(Value::to_string).collect::<Vec<_>>().join(" ")
}

fn from_messages(messages: &Value) -> Result<String, Error> {
    let messages = messages.as_array().ok_or_else(|| wrong("messages", "must be an array"))?;
    if !messages.iter().all(Value::is_object) {
        return Err(wrong("messages", "must hold objects only"));
    }
    let is_user = |message: &&Value| message.get("role").and_then(Value::as_str) == Some("user");
    let message = messages.iter().rfind(is_user).or(messages.last());
    let message = message.ok_or_else(|| wrong("messages", "must not be empty"))?;
    Ok(match message.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let texts: Vec<_> = parts.iter().filter_map(|part| part.get("text")?.as_str()).collect();
            texts.join("\n")
        }
        _ => String::new(),
    })
}

pub(crate) fn wrong(param: &'static str, what: &str) -> Error {
    Error::new(Fault::InvalidValue, format!("the {param} parameter {what}")).param(param)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_user_message_speaks() {
        for (body, text) in [
            (
                r#"{"messages":[{"role":"user","content":"a"},{"role":"user","content":"b"},{"role":"assistant","content":"c"}]}"#,
                "b",
            ),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url","image_url":{}},{"type":"text","text":"b"}]}]}"#,
                "a\nb",
            ),
            (r#"{"messages":[{"role":"system","content":"only me"}]}"#, "only me"),
            (r#"{"messages":[{"role":"user","content":null}]}"#, ""),
            (r#"{"prompt":"p"}"#, "p"),
            (r#"{"prompt":["p","q"]}"#, "p\nq"),
            (r#"{"input":[1,2]}"#, "1 2"),
            (r#"{"input":[[1,2],[3]]}"#, "1 2\n3"),
        ] {
            assert_eq!(messages_text(body.as_bytes()).unwrap(), text, "{body}");
        }
    }

    #[test]
    fn what_cannot_be_echoed_names_its_field() {
        for (body, param) in [
            ("{}", Some("messages")),
            (r#"{"messages":{}}"#, Some("messages")),
            (r#"{"messages":[]}"#, Some("messages")),
            (r#"{"messages":[7]}"#, Some("messages")),
            (r#"{"prompt":7}"#, Some("prompt")),
            (r#"{"input":[{}]}"#, Some("input")),
            (r#"{"temperature":1e400}"#, None),
        ] {
            let error = messages_text(body.as_bytes()).unwrap_err();
            assert_eq!(error.param.as_deref(), param, "{body}");
        }
    }
}
