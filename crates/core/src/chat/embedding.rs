//! Embeddings of the built-in model: vectors that depend on the text and on nothing else.
//!
//! They mean nothing, but equal texts have equal vectors and others have others, on every machine, so that a client's
//! code can be tried against them.

use std::fmt::Write as _;

use serde_json::Value;

use super::count_tokens;
use crate::error::Error;
use crate::json::text::{inputs, parse, wrong};
use crate::json::write_string;

/// Dimensions without a `dimensions` parameter.
const DIMENSIONS: usize = 64;
/// The fewest and the most dimensions; the most are those of OpenAI's smaller models.
const DIMENSIONS_RANGE: std::ops::RangeInclusive<usize> = 8..=1536;
/// Most inputs of one request, as OpenAI has it.
const INPUTS_MAX: usize = 2048;

/// A `CreateEmbeddingResponse` for a request body: `input` is a string, an array of strings, one of token ids or one
/// of those; `dimensions` is 8 to 1536, by default 64; `encoding_format` is `float` (the default) or `base64` (what the
/// official SDKs ask for: little-endian 32-bit floats). Vectors have unit length. `model` is the name to answer with.
///
/// # Errors
/// `InvalidValue` with its param, `InvalidJson` for what `scan_request` did not check.
pub fn embeddings(body: &[u8], model: &str) -> Result<String, Error> {
    let request = parse(body)?;
    let texts = texts(request.get("input"))?;
    let dimensions = dimensions(request.get("dimensions"))?;
    let write_vector = encoding(request.get("encoding_format"))?;
    let mut out = String::from("{\"object\":\"list\",\"data\":[");
    for (index, text) in texts.iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        let _ = write!(out, "{comma}{{\"object\":\"embedding\",\"index\":{index},\"embedding\":");
        write_vector(&mut out, &vector(text, dimensions));
        out.push('}');
    }
    out.push_str("],\"model\":");
    write_string(&mut out, model);
    let tokens = texts.iter().map(|text| count_tokens(text)).sum::<u64>();
    let _ = write!(out, ",\"usage\":{{\"prompt_tokens\":{tokens},\"total_tokens\":{tokens}}}}}");
    Ok(out)
}

fn texts(input: Option<&Value>) -> Result<Vec<String>, Error> {
    let input = input.filter(|input| !input.is_null()).ok_or_else(|| wrong("input", "must be given"))?;
    let texts =
        inputs(input).ok_or_else(|| wrong("input", "must be a string, or an array of strings or of token ids"))?;
    if texts.is_empty() || texts.iter().any(String::is_empty) {
        return Err(wrong("input", "must not be empty"));
    }
    if texts.len() > INPUTS_MAX {
        return Err(wrong("input", "must have at most 2048 items"));
    }
    Ok(texts)
}

fn dimensions(value: Option<&Value>) -> Result<usize, Error> {
    let Some(value) = value.filter(|value| !value.is_null()) else {
        return Ok(DIMENSIONS);
    };
    let dimensions = value.as_u64().and_then(|number| usize::try_from(number).ok());
    dimensions
        .filter(|dimensions| DIMENSIONS_RANGE.contains(dimensions))
        .ok_or_else(|| wrong("dimensions", "must be an integer from 8 to 1536"))
}

fn encoding(value: Option<&Value>) -> Result<fn(&mut String, &[f32]), Error> {
    match value.filter(|value| !value.is_null()).map(Value::as_str) {
        None | Some(Some("float")) => Ok(write_floats),
        Some(Some("base64")) => Ok(write_base64),
        Some(_) => Err(wrong("encoding_format", "must be \"float\" or \"base64\"")),
    }
}

/// The vector of a text: FNV-1a of its bytes is the seed of a SplitMix64 sequence, scaled to unit length.
fn vector(text: &str, dimensions: usize) -> Vec<f32> {
    let mut state = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut vector: Vec<f32> = (0..dimensions).map(|_| component(split_mix(&mut state))).collect();
    let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    for x in &mut vector {
        *x /= length;
    }
    vector
}

/// The upper 16 bits as a number within -1 to 1 that is never 0, so that no vector has the length 0.
fn component(bits: u64) -> f32 {
    let upper = u16::try_from(bits >> 48).unwrap_or(u16::MAX);
    (f32::from(upper) - 32767.5) / 32768.0
}

/// One step of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bits = *state;
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

fn write_floats(out: &mut String, vector: &[f32]) {
    for (number, x) in vector.iter().enumerate() {
        let before = if number > 0 { ',' } else { '[' };
        let _ = write!(out, "{before}{x}");
    }
    out.push(']');
}

/// Writes the vector's bytes in base64 (RFC 4648, section 4) as a JSON string.
fn write_base64(out: &mut String, vector: &[f32]) {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    out.push('"');
    for group in bytes.chunks(3) {
        let byte = |at: usize| group.get(at).copied().unwrap_or(0);
        let (a, b, c) = (byte(0), byte(1), byte(2));
        let digits = [a >> 2, (a & 3) << 4 | b >> 4, (b & 15) << 2 | c >> 6, c & 63];
        for (at, digit) in digits.into_iter().enumerate() {
            let digit = DIGITS.get(usize::from(digit)).copied().filter(|_| at <= group.len());
            out.push(char::from(digit.unwrap_or(b'=')));
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(body: &str) -> Value {
        serde_json::from_str(&embeddings(body.as_bytes(), "echo").unwrap()).unwrap()
    }

    fn floats(item: &Value) -> Vec<f32> {
        item["embedding"].as_array().unwrap().iter().map(|x| x.to_string().parse().unwrap()).collect()
    }

    /// The reverse of `write_base64`, written another way.
    fn decode(text: &str) -> Vec<f32> {
        let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut bits = String::new();
        for byte in text.trim_end_matches('=').bytes() {
            bits.push_str(&format!("{:06b}", digits.iter().position(|digit| *digit == byte).unwrap()));
        }
        let bytes: Vec<u8> = bits
            .as_bytes()
            .chunks_exact(8)
            .map(|byte| u8::from_str_radix(str::from_utf8(byte).unwrap(), 2).unwrap())
            .collect();
        bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
    }

    #[test]
    fn five_inputs_have_five_vectors_of_unit_length() {
        let value = answer(r#"{"input":["a","b","ab","ba"," a"]}"#);
        assert_eq!((&value["object"], &value["model"]), (&Value::from("list"), &Value::from("echo")));
        assert_eq!(value["usage"], serde_json::json!({ "prompt_tokens": 5, "total_tokens": 5 }));
        let data = value["data"].as_array().unwrap();
        let vectors: Vec<_> = data.iter().map(floats).collect();
        for (index, item) in data.iter().enumerate() {
            assert_eq!((&item["object"], &item["index"]), (&Value::from("embedding"), &Value::from(index)));
            let length: f32 = vectors[index].iter().map(|x| x * x).sum();
            assert!((length - 1.0).abs() < 1e-5 && vectors[index].len() == DIMENSIONS);
            for other in &vectors[..index] {
                // Random directions: far from parallel.
                let cosine: f32 = vectors[index].iter().zip(other).map(|(x, y)| x * y).sum();
                assert!(cosine.abs() < 0.7, "{cosine}");
            }
        }
        assert_eq!(floats(&answer(r#"{"input":"a"}"#)["data"][0]), vectors[0]);
    }

    #[test]
    fn base64_says_the_same_as_floats() {
        for dimensions in [8, 9, 10, 1536] {
            let body =
                |format: &str| format!(r#"{{"input":"x","dimensions":{dimensions},"encoding_format":{format}}}"#);
            let plain = floats(&answer(&body("\"float\""))["data"][0]);
            let packed = answer(&body("\"base64\""));
            let packed = packed["data"][0]["embedding"].as_str().unwrap();
            assert_eq!(packed.len() % 4, 0);
            assert_eq!(decode(packed), plain);
            assert_eq!((plain.len(), floats(&answer(&body("null"))["data"][0])), (dimensions, plain));
        }
    }

    #[test]
    fn token_ids_are_inputs_too() {
        assert_eq!(answer(r#"{"input":[1,2,3]}"#)["data"].as_array().unwrap().len(), 1);
        assert_eq!(answer(r#"{"input":[[1,2],[3]]}"#)["data"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn what_cannot_be_embedded_names_its_field() {
        let many = format!("{{\"input\":[{}\"x\"]}}", "\"x\",".repeat(INPUTS_MAX));
        for (body, param) in [
            ("{}", "input"),
            (r#"{"input":null}"#, "input"),
            (r#"{"input":""}"#, "input"),
            (r#"{"input":[]}"#, "input"),
            (r#"{"input":[[]]}"#, "input"),
            (r#"{"input":["a",1]}"#, "input"),
            (r#"{"input":{}}"#, "input"),
            (many.as_str(), "input"),
            (r#"{"input":"a","dimensions":7}"#, "dimensions"),
            (r#"{"input":"a","dimensions":1537}"#, "dimensions"),
            (r#"{"input":"a","dimensions":64.0}"#, "dimensions"),
            (r#"{"input":"a","encoding_format":"hex"}"#, "encoding_format"),
            (r#"{"input":"a","encoding_format":7}"#, "encoding_format"),
        ] {
            let error = embeddings(body.as_bytes(), "echo").unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body:.60}");
        }
    }
}
