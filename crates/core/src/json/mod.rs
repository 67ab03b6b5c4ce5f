//! JSON without a tree: strings out, and an iterative scanner for what passes straight through.

mod answer;
mod chunk;
mod escape;
mod request;
mod scan;
pub(crate) mod text;
mod usage;

pub use answer::{Answer, scan_answer};
pub use chunk::{Chunk, scan_chunk};
pub use request::{Limits, Request, scan_request, splice};
pub use scan::Broken;
pub use text::messages_text;
pub use usage::{TOKENS_MAX, Usage};

/// Appends `text` as a JSON string with its quotes (RFC 8259, section 7).
pub fn write_string(out: &mut String, text: &str) {
    const HEX: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    out.push('"');
    let mut plain = 0;
    for (at, byte) in text.bytes().enumerate() {
        let escape = match byte {
            b'"' => "\\\"",
            b'\\' => "\\\\",
            b'\n' => "\\n",
            b'\r' => "\\r",
            b'\t' => "\\t",
            0..=0x1f | 0x7f => "",
            _ => continue,
        };
        // Only ASCII bytes get here, so both ends are character boundaries.
        out.push_str(text.get(plain..at).unwrap_or_default());
        plain = at + 1;
        if escape.is_empty() {
            out.push_str("\\u00");
            for nibble in [byte >> 4, byte & 0xf] {
                out.push(HEX.get(usize::from(nibble)).copied().unwrap_or('0'));
            }
        } else {
            out.push_str(escape);
        }
    }
    out.push_str(text.get(plain..).unwrap_or_default());
    out.push('"');
}
