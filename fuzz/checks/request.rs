//! A request's body, against a parser that builds a tree.

use evergate_core::Fault;
use evergate_core::json::{Limits, scan_answer, scan_chunk, scan_request, splice};
use serde_json::Value;

const DEPTH: u32 = 64;

/// A name that has to be escaped.
const NAME: &str = "other \"m\\del\"\n\u{1}é😀";

/// The bytes are a body. What an upstream sends is read by a lenient walk over the same bytes.
pub fn check(bytes: &[u8]) {
    let limits = Limits { depth: DEPTH, choices: 128 };
    let tree = serde_json::from_slice::<Value>(bytes);
    match scan_request(bytes, &limits) {
        Ok(request) => {
            let text = std::str::from_utf8(bytes).expect("taken, but it is not UTF-8");
            assert_eq!(text[request.model_span.clone()].trim(), &text[request.model_span.clone()]);
            let spliced = splice(bytes, request.model_span.clone(), NAME);
            let again = scan_request(&spliced, &limits).expect("not taken any more with another name");
            assert_eq!(
                (again.model.as_str(), again.is_stream, again.wants_usage),
                (NAME, request.is_stream, request.wants_usage)
            );
            let (before, after) = (&bytes[..request.model_span.start], &bytes[request.model_span.end..]);
            assert!(spliced.starts_with(before) && spliced.ends_with(after), "more than the name has changed");
            match tree {
                Ok(tree) => {
                    assert_eq!(tree["model"], request.model, "another model");
                    assert_eq!(tree["stream"] == true, request.is_stream, "another stream");
                }
                // A float's range is the reader's own limit, not JSON's.
                Err(error) => assert!(error.to_string().contains("number out of range"), "taken, but: {error}"),
            }
        }
        Err(error) if error.fault == Fault::InvalidJson => {
            let is_right = tree.is_ok_and(|tree| tree.is_object()) && depth(bytes) <= DEPTH;
            assert!(!is_right, "refused though it is right: {}", error.message);
        }
        Err(error) => assert!(error.fault == Fault::InvalidValue && error.param.is_some(), "{error:?}"),
    }
    answer(bytes);
}

/// The lenient readers take whatever the strict one takes, and see an error where the tree has one.
fn answer(bytes: &[u8]) {
    let chunk = scan_chunk(bytes);
    let Ok(tree) = serde_json::from_slice::<Value>(bytes) else { return };
    if !tree.is_object() {
        return;
    }
    let answer = scan_answer(bytes).expect("the strict reader takes it, the lenient one does not");
    // A doubled key can hide either from a tree.
    if !tree["error"].is_null() {
        assert!(answer.has_error || bytes.windows(7).filter(|key| key == b"\"error\"").count() != 1);
        assert!(chunk.has_error || bytes.windows(7).filter(|key| key == b"\"error\"").count() != 1);
    }
}

/// Most open brackets outside strings of bytes that are JSON.
fn depth(bytes: &[u8]) -> u32 {
    let (mut open, mut most, mut in_string, mut is_escaped) = (0_u32, 0, false, false);
    for byte in bytes {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = in_string,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                open += 1;
                most = most.max(open);
            }
            b'}' | b']' if !in_string => open -= 1,
            _ => {}
        }
    }
    most
}
