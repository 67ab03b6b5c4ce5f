//! What a program that takes text is given of a request.

use evergate_core::{Error, Fault, json};
use serde_json::Value;

/// The last user message, or `template` with its names filled in: `{last}`, `{system}` (every system and developer
/// message) and `{messages}` (all of them, each as `role: text`). `{{` and `}}` are brackets. What is filled in is never
/// looked through again, so that no message can say what the program is told about another.
///
/// # Errors
/// As `json::messages_text`.
pub(crate) fn text(body: &[u8], template: Option<&str>) -> Result<String, Error> {
    let last = json::messages_text(body)?;
    let Some(template) = template else { return Ok(last) };
    let request: Value = serde_json::from_slice(body)
        .map_err(|error| Error::new(Fault::InvalidJson, "the request body cannot be read").detail(error))?;
    let messages = request.get("messages").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    Ok(fill(template, &last, messages))
}

fn fill(template: &str, last: &str, messages: &[Value]) -> String {
    let mut out = String::new();
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        let (plain, special) = rest.split_at_checked(at).unwrap_or((rest, ""));
        out.push_str(plain);
        rest = match special {
            special if special.starts_with("{{") => pushed(&mut out, "{", special, 2),
            special if special.starts_with("}}") => pushed(&mut out, "}", special, 2),
            special if special.starts_with("{last}") => pushed(&mut out, last, special, 6),
            special if special.starts_with("{system}") => pushed(&mut out, &system(messages), special, 8),
            special if special.starts_with("{messages}") => pushed(&mut out, &transcript(messages), special, 10),
            // The configuration's check lets no other through.
            special => pushed(&mut out, special.get(..1).unwrap_or_default(), special, 1),
        };
    }
    out.push_str(rest);
    out
}

fn pushed<'a>(out: &mut String, text: &str, special: &'a str, length: usize) -> &'a str {
    out.push_str(text);
    special.get(length..).unwrap_or_default()
}

fn role(message: &Value) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or("user")
}

fn system(messages: &[Value]) -> String {
    let ours = messages.iter().filter(|message| matches!(role(message), "system" | "developer"));
    ours.map(content).collect::<Vec<_>>().join("\n")
}

fn transcript(messages: &[Value]) -> String {
    messages.iter().map(|message| format!("{}: {}", role(message), content(message))).collect::<Vec<_>>().join("\n")
}

fn content(message: &Value) -> String {
    match message.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            parts.iter().filter_map(|part| part.get("text")?.as_str()).collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &str = r#"{"messages":[
        {"role":"system","content":"be {last}"},
        {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
        {"role":"assistant","content":"c"},
        {"role":"user","content":"d {system} }}"}]}"#;

    #[test]
    fn a_template_is_filled_in_once() {
        for (template, expected) in [
            (None, "d {system} }}"),
            (Some("{last}"), "d {system} }}"),
            (Some("<{system}> {{{last}}}"), "<be {last}> {d {system} }}}"),
            (
                Some("{messages}\nassistant:"),
                "system: be {last}\nuser: a\nb\nassistant: c\nuser: d {system} }}\nassistant:",
            ),
            (Some("é{unknown}é"), "é{unknown}é"),
            (Some(""), ""),
        ] {
            assert_eq!(text(BODY.as_bytes(), template).unwrap(), expected);
        }
    }

    #[test]
    fn a_prompt_is_a_text_too() {
        assert_eq!(text(br#"{"prompt":"p"}"#, Some("[{last}{messages}]")).unwrap(), "[p]");
        assert_eq!(text(b"{}", None).unwrap_err().fault, Fault::InvalidValue);
    }
}
