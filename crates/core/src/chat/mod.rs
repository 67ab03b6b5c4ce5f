//! What we answer ourselves, in OpenAI's shapes.
//!
//! The schemas are those of openai/openai-openapi, `openapi.yaml`: `CreateChatCompletionResponse`,
//! `CreateChatCompletionStreamResponse`, `CreateCompletionResponse`, `CreateEmbeddingResponse`, `ListModelsResponse`
//! and `Model`. Fields that may be null but are required (`logprobs`, `refusal`, `finish_reason`) are always there.

mod converted;
mod embedding;
mod models;
mod stream;
mod whole;

pub use converted::as_events;
pub use embedding::embeddings;
pub use models::{Listed, model, models_list};
pub use stream::{Chunks, DONE, Events};
pub use whole::{completion, text_completion};

use std::fmt::Write as _;

use crate::json::write_string;

/// Bytes that make a token, about what English text comes to with OpenAI's own tokenizers.
const TOKEN_BYTES: usize = 4;

/// One answer of our own: the built-in model's, or a program's that writes plain text.
#[derive(Clone, Debug)]
pub struct Reply {
    /// `id`.
    pub id: String,
    /// `created`, Unix seconds.
    pub created: u64,
    /// `model`, as the client named it.
    pub model: String,
    /// The answer's text.
    pub text: String,
    /// What the prompt is counted as; none where the text is the prompt too, as an echo's is.
    pub tokens_in: Option<u64>,
    /// Whether a stream ends with a chunk of usage (`stream_options.include_usage`); a whole answer always has it.
    pub wants_usage: bool,
}

/// How many tokens a text is counted as: each word, cut at white space, one for every four bytes begun. An estimate
/// that needs no vocabulary; it is the same in whole answers, streams and embeddings.
#[must_use]
pub fn count_tokens(text: &str) -> u64 {
    let tokens = text.split_whitespace().map(|word| word.len().div_ceil(TOKEN_BYTES)).sum::<usize>();
    u64::try_from(tokens).unwrap_or(u64::MAX)
}

impl Reply {
    /// Opens an object of kind `object` and writes what all of them begin with, up to a comma.
    fn write_head(&self, out: &mut String, object: &str) {
        out.push_str("{\"id\":");
        write_string(out, &self.id);
        out.push_str(",\"object\":");
        write_string(out, object);
        // Writing to a string cannot fail.
        let _ = write!(out, ",\"created\":{},\"model\":", self.created);
        write_string(out, &self.model);
        out.push(',');
    }

    /// Writes a `CompletionUsage`.
    fn write_usage(&self, out: &mut String) {
        let (tokens_in, tokens_out) = self.tokens();
        write_usage(out, tokens_in, tokens_out);
    }

    /// Of the prompt and of the text.
    fn tokens(&self) -> (u64, u64) {
        let tokens_out = count_tokens(&self.text);
        (self.tokens_in.unwrap_or(tokens_out), tokens_out)
    }
}

fn write_usage(out: &mut String, tokens_in: u64, tokens_out: u64) {
    let total = tokens_in.saturating_add(tokens_out);
    // Writing to a string cannot fail.
    let _ =
        write!(out, "{{\"prompt_tokens\":{tokens_in},\"completion_tokens\":{tokens_out},\"total_tokens\":{total}}}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_words_in_pieces_of_four_bytes() {
        for (text, tokens) in [("", 0), (" \n", 0), ("a", 1), ("four", 1), ("fives", 2), ("a bc\tdef", 3), ("éé é", 2)]
        {
            assert_eq!(count_tokens(text), tokens, "{text:?}");
        }
    }
}
