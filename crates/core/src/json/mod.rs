//! JSON without a tree: strings out, and an iterative scanner for what passes straight through.

use crate::digits::write_hex;
use plain::plain_length;

mod answer;
mod chunk;
mod escape;
mod fields;
mod plain;
mod request;
mod scan;
pub(crate) mod text;
mod usage;

pub use answer::{Answer, scan_answer};
pub use chunk::{Choices, Chunk, ChunkReader, scan_chunk};
pub use fields::filter_fields;
pub use request::{Limits, Request, scan_request, splice};
pub use scan::Broken;
pub use text::messages_text;
pub use usage::{TOKENS_MAX, Usage};

/// Appends `text` as a JSON string with its quotes (RFC 8259, section 7).
pub fn write_string(out: &mut String, text: &str) {
    out.push('"');
    write_text(out, text);
    out.push('"');
}

/// Appends what stands between the quotes of `text` as a JSON string.
pub(crate) fn write_text(out: &mut String, text: &str) {
    let mut rest = text;
    loop {
        // Only ASCII bytes end a plain part, so both ends are character boundaries.
        let (plain, special) = rest.split_at_checked(plain_length(rest.as_bytes())).unwrap_or((rest, ""));
        out.push_str(plain);
        let Some(byte) = special.bytes().next() else { break };
        match byte {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            _ => {
                let mut digits = [0; 2];
                write_hex(&mut digits, u64::from(byte));
                out.push_str("\\u00");
                out.extend(digits.map(char::from));
            }
        }
        rest = special.get(1..).unwrap_or_default();
    }
}
