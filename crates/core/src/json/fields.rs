//! Top-level fields of a request, left out or set.

use std::collections::BTreeMap;

use super::scan::{Key, Scanner, Stop};

/// Copies an object that `scan_request` has read, without the fields of `strip` and with those of `set`, whose values are
/// JSON. What stays keeps its bytes. An object that is none is copied as it is.
#[must_use]
pub fn filter_fields(body: &[u8], strip: &[String], set: &BTreeMap<String, String>) -> Vec<u8> {
    let mut out = vec![b'{'];
    let mut scanner = Scanner::lenient(body);
    scanner.space();
    let walked = scanner.members(|scanner, key| member(scanner, &key, strip, set, &mut out));
    if walked.is_err() {
        return body.to_vec();
    }
    for (name, value) in set {
        let mut field = String::with_capacity(name.len() + value.len() + 3);
        super::write_string(&mut field, name);
        field.push(':');
        field.push_str(value);
        push(&mut out, field.as_bytes());
    }
    out.push(b'}');
    out
}

fn member(
    scanner: &mut Scanner<'_>,
    key: &Key,
    strip: &[String],
    set: &BTreeMap<String, String>,
    out: &mut Vec<u8>,
) -> Result<(), Stop> {
    let name = scanner.full_name(key);
    let is_left_out = strip.iter().chain(set.keys()).any(|left_out| *left_out == name);
    let start = key.start();
    let value = scanner.skip_value()?;
    if !is_left_out {
        push(out, scanner.slice(start..value.end));
    }
    Ok(())
}

fn push(out: &mut Vec<u8>, field: &[u8]) {
    if out.len() > 1 {
        out.push(b',');
    }
    out.extend_from_slice(field);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(body: &str, strip: &[&str], set: &[(&str, &str)]) -> String {
        let strip: Vec<String> = strip.iter().map(ToString::to_string).collect();
        let set = set.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        String::from_utf8(filter_fields(body.as_bytes(), &strip, &set)).unwrap()
    }

    #[test]
    fn fields_are_left_out_however_they_are_written_and_the_rest_keeps_its_bytes() {
        let body = r#" {"a" : 1.50e1, "\u0073eed":7,"n":{"seed":1},"z":"\ud83d\ude00","seed":8 } "#;
        assert_eq!(filter(body, &["seed"], &[]), r#"{"a" : 1.50e1,"n":{"seed":1},"z":"\ud83d\ude00"}"#);
        assert_eq!(filter(r#"{"seed":1}"#, &["seed"], &[]), "{}");
        assert_eq!(filter("{}", &["seed"], &[]), "{}");
    }

    #[test]
    fn fields_are_set_over_what_was_there() {
        let set = [("k\"", "[1, 2]"), ("temperature", "0.5")];
        let expected = r#"{"m":"x","k\"":[1, 2],"temperature":0.5}"#;
        assert_eq!(filter(r#"{"temperature":1,"m":"x"}"#, &[], &set), expected);
        assert_eq!(filter("{}", &[], &set[1..]), r#"{"temperature":0.5}"#);
    }

    #[test]
    fn a_long_name_with_escapes_is_known_too() {
        let name = "s".repeat(100);
        let body = format!("{{\"{}\":1}}", "\\u0073".repeat(100));
        assert_eq!(filter(&body, &[&name], &[]), "{}");
    }
}
