//! The access record: one JSON line per request, written by the worker that served it or, if that died, on its behalf.

use crate::digits::push_decimal;
use crate::json::{write_string, write_text};

/// Longest line: as much of it as people and log shippers take, and what a pipe in the place of the file takes whole (`PIPE_BUF`, pipe(7)).
pub const LINE_BYTES_MAX: usize = 4096;

/// The end of a line that the master wrote; the clerk looks for it.
const BY_MASTER: &str = ",\"by_master\":true}\n";

/// One attempt of a request that came to several.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The upstream that was called.
    pub upstream: String,
    /// How it ended: `ok`, a fault's code, `client_gone` ...
    pub cause: &'static str,
    /// Milliseconds from its begin to its end.
    pub ms: f64,
}

/// What one request came to.
#[derive(Clone, Debug, Default)]
pub struct Access<'a> {
    /// Wall clock at its end, Unix milliseconds.
    pub at_ms: u64,
    /// Our id.
    pub request_id: &'a str,
    /// The client's own id, empty if it gave none.
    pub client_id: &'a str,
    /// Name of the key it came with, empty without auth.
    pub tenant: &'a str,
    /// Method, such as `POST`.
    pub method: &'a str,
    /// Path as labelled, `other` for an unknown one.
    pub route: &'a str,
    /// Model as the client named it, cut to 128 bytes; empty if none was read.
    pub model: &'a str,
    /// Upstream that was called last; empty if none was.
    pub backend: &'a str,
    /// Calls made to upstreams.
    pub attempts: u32,
    /// The attempts, if there were several; the configuration allows eight. Not known of a request whose worker died.
    pub path: &'a [Step],
    /// Status that was sent, 499 when the client left before one was, 0 when the worker died.
    pub status: u16,
    /// How it ended: `ok`, a fault's code, `client_gone`, `worker_lost`.
    pub cause: &'a str,
    /// Whether it was a stream.
    pub is_stream: bool,
    /// Request body bytes.
    pub bytes_in: u64,
    /// Response body bytes.
    pub bytes_out: u64,
    /// Milliseconds to the first byte of the answer's body; none if there was none.
    pub first_byte_ms: Option<f64>,
    /// Milliseconds from admission to the end.
    pub duration_ms: f64,
    /// Prompt tokens, as the upstream reported them.
    pub tokens_in: Option<u64>,
    /// Completion tokens, as the upstream reported them.
    pub tokens_out: Option<u64>,
    /// Whether the upstream's counts cannot be right, so that these are not to be billed by.
    pub is_usage_suspect: bool,
    /// Our note on the cause; never a prompt, a key or a body.
    pub detail: &'a str,
    /// Process that served it.
    pub pid: i32,
    /// Written by the master for a worker that died.
    pub is_by_master: bool,
}

impl Access<'_> {
    /// Appends the line, with its line end, to `out`; at most `LINE_BYTES_MAX` bytes, the detail is cut to fit.
    pub fn write_line(&self, out: &mut String) {
        let start = out.len();
        out.push_str("{\"at_ms\":");
        push_decimal(out, self.at_ms);
        for (key, value) in [
            (",\"request_id\":\"", self.request_id),
            ("\",\"client_id\":\"", self.client_id),
            ("\",\"tenant\":\"", self.tenant),
            ("\",\"method\":\"", self.method),
            ("\",\"route\":\"", self.route),
            ("\",\"model\":\"", self.model),
            ("\",\"backend\":\"", self.backend),
            ("\",\"cause\":\"", self.cause),
        ] {
            // With the quotes around the value, which most often is none.
            out.push_str(key);
            if !value.is_empty() {
                write_text(out, cut(value, 256));
            }
        }
        out.push('"');
        push_number(out, ",\"attempts\":", Some(self.attempts.into()));
        self.write_path(out);
        push_number(out, ",\"status\":", Some(self.status.into()));
        out.push_str(if self.is_stream { ",\"stream\":true" } else { ",\"stream\":false" });
        push_number(out, ",\"bytes_in\":", Some(self.bytes_in));
        push_number(out, ",\"bytes_out\":", Some(self.bytes_out));
        push_ms(out, ",\"first_byte_ms\":", self.first_byte_ms);
        push_ms(out, ",\"duration_ms\":", Some(self.duration_ms));
        push_number(out, ",\"tokens_in\":", self.tokens_in);
        push_number(out, ",\"tokens_out\":", self.tokens_out);
        if self.is_usage_suspect {
            out.push_str(",\"usage\":\"suspect\"");
        }
        push_number(out, ",\"pid\":", u64::try_from(self.pid).ok());
        if !self.detail.is_empty() {
            out.push_str(",\"detail\":");
            // One byte of text becomes at most six of JSON; what precedes fits in half the line unless it is hostile.
            let room = LINE_BYTES_MAX.saturating_sub(out.len() - start + 8 + BY_MASTER.len()) / 6;
            write_string(out, cut(self.detail, room));
        }
        out.push_str(if self.is_by_master { BY_MASTER } else { "}\n" });
        if out.len() - start > LINE_BYTES_MAX {
            // Eight fields of 256 control characters each; keep the fact and drop the words. What is kept is ours and
            // short; that it is cut all the same makes this the last attempt for certain.
            let lean = Access {
                request_id: cut(self.request_id, 64),
                method: cut(self.method, 64),
                route: cut(self.route, 64),
                cause: cut(self.cause, 64),
                client_id: "",
                tenant: "",
                model: "",
                backend: "",
                detail: "",
                path: &[],
                ..self.clone()
            };
            out.truncate(start);
            lean.write_line(out);
        }
    }

    fn write_path(&self, out: &mut String) {
        for (index, step) in self.path.iter().enumerate() {
            out.push_str(if index == 0 { ",\"path\":[{\"upstream\":" } else { ",{\"upstream\":" });
            write_string(out, cut(&step.upstream, 64));
            out.push_str(",\"cause\":");
            write_string(out, step.cause);
            push_ms(out, ",\"ms\":", Some(step.ms));
            out.push('}');
        }
        if !self.path.is_empty() {
            out.push(']');
        }
    }
}

fn push_number(out: &mut String, key: &str, value: Option<u64>) {
    out.push_str(key);
    match value {
        Some(value) => push_decimal(out, value),
        None => out.push_str("null"),
    }
}

/// Milliseconds with three decimals, by way of whole microseconds: formatting a float costs ten times as much.
fn push_ms(out: &mut String, key: &str, ms: Option<f64>) {
    out.push_str(key);
    let Some(ms) = ms else { return out.push_str("null") };
    let us = (ms.max(0.0) * 1000.0 + 0.5) as u64;
    push_decimal(out, us / 1000);
    let thousandths = us % 1000;
    out.push_str(match thousandths {
        0..10 => ".00",
        10..100 => ".0",
        _ => ".",
    });
    push_decimal(out, thousandths);
}

fn cut(text: &str, bytes_max: usize) -> &str {
    if text.len() <= bytes_max {
        return text;
    }
    let end = (0..=bytes_max).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.get(..end).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_json_and_never_longer_than_a_pipe_takes_whole() {
        let hostile = "\u{1}".repeat(5000);
        for text in ["gpt-4o", &hostile, "é\"\\"] {
            let mut out = String::from("kept ");
            Access { model: text, client_id: text, tenant: text, detail: text, backend: text, ..Access::default() }
                .write_line(&mut out);
            let line = out.strip_prefix("kept ").unwrap();
            assert!(line.len() <= LINE_BYTES_MAX, "{}", line.len());
            assert!(line.ends_with("}\n") && line.matches('\n').count() == 1);
            serde_json::from_str::<serde_json::Value>(line).unwrap();
        }
    }

    #[test]
    fn the_path_of_the_most_attempts_fits_and_is_there_only_if_there_were_several() {
        let step = |ms| Step { upstream: "u".repeat(64), cause: "upstream_connect_failed", ms };
        let path: Vec<Step> = (0..8).map(|n| step(f64::from(n) * 1000.5)).collect();
        let longest = "m".repeat(256);
        let mut out = String::new();
        Access {
            path: &path,
            attempts: 8,
            model: &longest,
            client_id: &longest,
            tenant: &longest,
            detail: &"d".repeat(4096),
            ..Access::default()
        }
        .write_line(&mut out);
        assert!(out.len() <= LINE_BYTES_MAX, "{}", out.len());
        let line: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!((line["path"].as_array().unwrap().len(), &line["model"]), (8, &serde_json::json!(longest)));
        assert_eq!(
            line["path"][7],
            serde_json::json!({
                "upstream": "u".repeat(64), "cause": "upstream_connect_failed", "ms": 7003.5
            })
        );
        // Names that no configuration lets through: the words go, the line stays whole.
        let hostile = vec![Step { upstream: "\u{1}".repeat(64), cause: "ok", ms: 1.0 }; 20];
        let mut out = String::new();
        Access { path: &hostile, ..Access::default() }.write_line(&mut out);
        assert!(out.len() <= LINE_BYTES_MAX, "{}", out.len());
        assert!(serde_json::from_str::<serde_json::Value>(&out).unwrap()["path"].is_null());
        let mut out = String::new();
        Access { attempts: 1, ..Access::default() }.write_line(&mut out);
        assert!(!out.contains("path"), "{out}");
    }
}
