//! Right answers in OpenAI's shapes (openai/openai-openapi, `openapi.yaml`), without a clock: `created` is fixed.

use serde_json::{Value, json};

use super::request::Request;

/// `usage.prompt_tokens` of every answer.
pub const PROMPT_TOKENS: u64 = 11;
/// `created` of every answer.
pub const CREATED: u64 = 1_700_000_000;
/// Text of the plain right answer.
pub const TEXT: &str = "Hello from the fake upstream";

/// Text of `one-byte`: characters of one to four bytes.
pub const MANY_BYTES_TEXT: &str = "Hello é € 😀 👩‍💻 there";

/// Which endpoint a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    Chat,
    Text,
    Embeddings,
}

/// What an answer is made for: one request and the words that shall stand in it.
pub(super) struct Answer {
    pub(super) endpoint: Endpoint,
    pub(super) words: Vec<String>,
    /// Arguments of a tool call that takes the text's place.
    pub(super) tool: Option<String>,
    model: String,
    id: String,
    wants_usage: bool,
    /// Inputs to embed, and whether as base64.
    inputs: Vec<Value>,
    wants_base64: bool,
    dimensions: usize,
}

impl Answer {
    pub(super) fn new(endpoint: Endpoint, request: &Request, index: usize) -> Self {
        let body = request.json();
        let inputs = match &body["input"] {
            Value::Array(items) if items.first().is_some_and(Value::is_number) => vec![body["input"].clone()],
            Value::Array(items) => items.clone(),
            other => vec![other.clone()],
        };
        let prefix = if endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
        Self {
            endpoint,
            words: words_of(TEXT),
            tool: None,
            model: request.model(),
            id: format!("{prefix}-fake-{index}"),
            wants_usage: body["stream_options"]["include_usage"] == true,
            inputs,
            wants_base64: body["encoding_format"] == "base64",
            dimensions: body["dimensions"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(16),
        }
    }

    /// A whole answer.
    pub(super) fn unary(&self) -> Value {
        match self.endpoint {
            Endpoint::Chat => json!({
                "id": self.id, "object": "chat.completion", "created": CREATED, "model": self.model,
                "choices": [{"index": 0, "message": self.message(), "logprobs": null, "finish_reason": self.finish()}],
                "usage": self.usage(), "system_fingerprint": "fp_fake",
            }),
            Endpoint::Text => json!({
                "id": self.id, "object": "text_completion", "created": CREATED, "model": self.model,
                "choices": [{"index": 0, "text": self.words.concat(), "logprobs": null, "finish_reason": "stop"}],
                "usage": self.usage(),
            }),
            Endpoint::Embeddings => self.embeddings(),
        }
    }

    /// The events of a stream, each whole with its blank line, `[DONE]` not among them.
    pub(super) fn events(&self) -> Vec<String> {
        let mut deltas = Vec::new();
        match (&self.tool, self.endpoint) {
            (Some(arguments), _) => {
                let half = arguments.len() / 2;
                deltas.push(json!({"role": "assistant", "content": null, "tool_calls": [{"index": 0,
                    "id": "call_fake", "type": "function", "function": {"name": "weather", "arguments": ""}}]}));
                for part in [&arguments[..half], &arguments[half..]] {
                    deltas.push(json!({"tool_calls": [{"index": 0, "function": {"arguments": part}}]}));
                }
            }
            (None, Endpoint::Chat) => {
                deltas.push(json!({"role": "assistant", "content": "", "refusal": null}));
                deltas.extend(self.words.iter().map(|word| json!({"content": word})));
            }
            (None, _) => deltas.extend(self.words.iter().map(|word| json!(word))),
        }
        let mut events: Vec<String> = deltas.into_iter().map(|delta| self.chunk(delta, &Value::Null)).collect();
        let last = if self.endpoint == Endpoint::Chat { json!({}) } else { json!("") };
        events.push(self.chunk(last, &json!(self.finish())));
        if self.wants_usage {
            let mut value = self.envelope();
            value["choices"] = json!([]);
            value["usage"] = self.usage();
            events.push(event(&value));
        }
        events
    }

    /// One event with this piece of text.
    pub(super) fn text_event(&self, text: &str) -> String {
        let delta = if self.endpoint == Endpoint::Chat { json!({"content": text}) } else { json!(text) };
        self.chunk(delta, &Value::Null)
    }

    fn chunk(&self, delta: Value, finish: &Value) -> String {
        let mut value = self.envelope();
        let key = if self.endpoint == Endpoint::Chat { "delta" } else { "text" };
        value["choices"] = json!([{"index": 0, "logprobs": null, "finish_reason": finish}]);
        value["choices"][0][key] = delta;
        if self.wants_usage {
            value["usage"] = Value::Null;
        }
        event(&value)
    }

    fn envelope(&self) -> Value {
        let object = if self.endpoint == Endpoint::Chat { "chat.completion.chunk" } else { "text_completion" };
        json!({"id": self.id, "object": object, "created": CREATED, "model": self.model})
    }

    fn message(&self) -> Value {
        match &self.tool {
            None => json!({"role": "assistant", "content": self.words.concat(), "refusal": null}),
            Some(arguments) => json!({"role": "assistant", "content": null, "refusal": null, "tool_calls": [{
                "id": "call_fake", "type": "function", "function": {"name": "weather", "arguments": arguments}}]}),
        }
    }

    fn finish(&self) -> &'static str {
        if self.tool.is_some() { "tool_calls" } else { "stop" }
    }

    fn usage(&self) -> Value {
        let completion = self.words.len() as u64;
        json!({"prompt_tokens": PROMPT_TOKENS, "completion_tokens": completion,
               "total_tokens": PROMPT_TOKENS + completion})
    }

    fn embeddings(&self) -> Value {
        let data = self.inputs.iter().enumerate().map(|(index, input)| {
            let vector = vector(&input.to_string(), self.dimensions);
            let embedding = if self.wants_base64 { json!(base64(&vector)) } else { json!(vector) };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        });
        let data: Vec<Value> = data.collect();
        json!({"object": "list", "data": data, "model": self.model,
               "usage": {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS}})
    }
}

/// An event with its blank line.
pub(super) fn event(value: &Value) -> String {
    format!("data: {value}\n\n")
}

/// An error body as OpenAI's own.
pub(super) fn error(status: u16) -> Value {
    let (kind, code) = match status {
        401 => ("invalid_request_error", "invalid_api_key"),
        403 => ("permission_error", "forbidden"),
        404 => ("invalid_request_error", "model_not_found"),
        429 => ("rate_limit_error", "rate_limit_exceeded"),
        400..500 => ("invalid_request_error", "invalid_value"),
        _ => ("server_error", "internal_error"),
    };
    json!({"error": {"message": format!("the fake upstream says {status}"), "type": kind, "param": null, "code": code}})
}

/// The list of models, or one of them.
pub(super) fn models(one: Option<&str>) -> Value {
    let model = |id: &str| json!({"id": id, "object": "model", "created": CREATED, "owned_by": "fake"});
    match one {
        Some(id) => model(id),
        None => {
            let data = ["ok", "tools", "stream-5"].map(model);
            json!({"object": "list", "data": data})
        }
    }
}

/// Splits into words that join to the same text.
pub(super) fn words_of(text: &str) -> Vec<String> {
    text.split_inclusive(' ').map(str::to_owned).collect()
}

/// Another direction for each text: FNV-1a seeds SplitMix64.
fn vector(text: &str, dimensions: usize) -> Vec<f32> {
    let mut state = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let mut numbers: Vec<f32> = (0..dimensions)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            f32::from(((z >> 48) as u16).cast_signed()) / 32768.0
        })
        .collect();
    let length = numbers.iter().map(|x| x * x).sum::<f32>().sqrt();
    numbers.iter_mut().for_each(|x| *x /= length);
    numbers
}

/// Little-endian floats in base64, which is what the official SDKs ask for unless told otherwise.
fn base64(vector: &[f32]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut out = String::new();
    for group in bytes.chunks(3) {
        let number = (0..3).fold(0_usize, |number, at| number << 8 | usize::from(*group.get(at).unwrap_or(&0)));
        for at in 0..4 {
            let letter = char::from(LETTERS[number >> (18 - 6 * at) & 63]);
            out.push(if at <= group.len() { letter } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        assert_eq!(base64(&[0.0]), "AAAAAA==");
        assert_eq!(base64(&[1.0, -2.5]), "AACAPwAAIMA=");
    }

    #[test]
    fn vectors_differ_and_have_length_one() {
        let (a, b) = (vector("a", 16), vector("b", 16));
        assert!(a != b && vector("a", 16) == a);
        assert!((a.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-4);
    }
}
