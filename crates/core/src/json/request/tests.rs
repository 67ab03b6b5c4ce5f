use proptest::prelude::*;
use serde_json::Value;

use super::*;

const LIMITS: Limits = Limits { depth: 128, choices: 128 };

fn read(body: &str) -> Result<Request, Error> {
    scan_request(body.as_bytes(), &LIMITS)
}

fn refusal(body: &[u8]) -> Error {
    scan_request(body, &LIMITS).unwrap_err()
}

#[test]
fn what_routes_a_request_is_read() {
    let body = r#" {"messages":[{"content":"\"model\":\"no\""}],"model" : "a\/b\u00e9\ud83d\ude00","stream":true,
        "stream_options":{"x":{"include_usage":false},"include_usage":true}} "#;
    let request = read(body).unwrap();
    assert_eq!(request.model, "a/bé😀");
    assert_eq!(&body[request.model_span], r#""a\/b\u00e9\ud83d\ude00""#);
    assert!(request.is_stream && request.wants_usage);
    let escaped = read(r#"{"mo\u0064el":"m","str\u0065am":true}"#).unwrap();
    assert!(escaped.model == "m" && escaped.is_stream);
    for body in [
        r#"{"model":"m"}"#,
        r#"{"model":"m","stream":null,"stream_options":null,"n":-0.5e+7}"#,
        r#"{"model":"m","stream":false,"stream_options":{"include_usage":null}}"#,
        r#"{"model":"m","a":{"model":1,"model":2,"stream":7},"stream_options":[]}"#,
    ] {
        let request = read(body).unwrap();
        assert!(request.model == "m" && !request.is_stream && !request.wants_usage, "{body}");
    }
}

#[test]
fn c3_doubled_routing_keys_are_refused_by_name() {
    for (body, param) in [
        (r#"{"model":"a","model":"a"}"#, "model"),
        (r#"{"model":"a","mo\u0064el":"b"}"#, "model"),
        (r#"{"stream":true,"stream":true}"#, "stream"),
        (r#"{"n":1,"n":2,"model":"a"}"#, "n"),
        (r#"{"max_tokens":1,"max_tokens":2}"#, "max_tokens"),
        (r#"{"max_completion_tokens":1,"\u006d\u0061\u0078_completion_tokens":2}"#, "max_completion_tokens"),
        (r#"{"stream_options":{},"stream_options":{}}"#, "stream_options"),
    ] {
        let error = refusal(body.as_bytes());
        assert_eq!((error.fault, error.param.as_deref()), (Fault::InvalidValue, Some(param)), "{body}");
        assert!(error.message.contains(param), "{}", error.message);
    }
    assert!(read(r#"{"model":"a","temperature":1,"temperature":2}"#).is_ok());
}

#[test]
fn c4_absurd_numbers_of_choices_are_refused_by_name() {
    for value in ["129", "1000000", "1e6", "128.5", "1e400", "99999999999999999999999", "\"1\"", "true", "[]", "{}"] {
        for key in ["n", "best_of"] {
            let error = refusal(format!(r#"{{"model":"a","{key}":{value}}}"#).as_bytes());
            assert_eq!((error.fault, error.param.as_deref()), (Fault::InvalidValue, Some(key)), "{value}");
        }
    }
    for value in ["1", "128", "1.28e2", "null", "0", "-1", "-1e400"] {
        let body = format!(r#"{{"model":"a","n":{value},"best_of":{value},"max_tokens":-1,"x":{{"n":1000000}}}}"#);
        assert!(read(&body).is_ok(), "{value}");
    }
}

#[test]
fn a_model_or_stream_that_cannot_be_used_names_its_field() {
    for (body, param) in [
        ("{}", "model"),
        (r#"{"messages":[]}"#, "model"),
        (r#"{"model":""}"#, "model"),
        (r#"{"model":7}"#, "model"),
        (r#"{"model":null}"#, "model"),
        (r#"{"model":["a"]}"#, "model"),
        (r#"{"model":"a","stream":"true"}"#, "stream"),
        (r#"{"model":"a","stream":1}"#, "stream"),
        (r#"{"model":"a","stream":{}}"#, "stream"),
    ] {
        let error = refusal(body.as_bytes());
        assert_eq!((error.fault, error.param.as_deref()), (Fault::InvalidValue, Some(param)), "{body}");
    }
    assert_eq!(refusal(b"{}").message, "you must provide a model parameter");
}

#[test]
fn c1_c5_broken_json_is_refused_with_its_offset() {
    for (body, at) in [
        (&b"   "[..], 3),
        (b"[]", 0),
        (b"\"secret\"", 0),
        (b"\xef\xbb\xbf{}", 0),
        (b"\xff\xfe{\0", 0),
        (b"{\"a\":\"\xff\"}", 6),
        (b"{\"a\":\"\xed\xa0\x80\"}", 6),
        (b"{", 1),
        (b"{\"a\"", 4),
        (b"{\"a\":", 5),
        (b"{\"a\":1", 6),
        (b"{\"a\":1,}", 7),
        (b"{,}", 1),
        (b"{a:1}", 1),
        (b"{'a':1}", 1),
        (b"{\"a\" 1}", 5),
        (b"{\"a\":1 2}", 7),
        (b"{\"a\":1}{", 7),
        (b"{\"a\":1}\0", 7),
        (b"{\"a\":[1,]}", 8),
        (b"{\"a\":[1}", 7),
        (b"{\"a\":[1 2]}", 8),
        (b"{\"a\":{\"b\":1]}", 11),
        (b"{\"a\":{1:1}}", 6),
        (b"{\"a\":01}", 6),
        (b"{\"a\":+1}", 5),
        (b"{\"a\":-}", 6),
        (b"{\"a\":.5}", 5),
        (b"{\"a\":1.}", 7),
        (b"{\"a\":1.e5}", 7),
        (b"{\"a\":1e}", 7),
        (b"{\"a\":1e+}", 8),
        (b"{\"a\":NaN}", 5),
        (b"{\"a\":Infinity}", 5),
        (b"{\"a\":True}", 5),
        (b"{\"a\":nul}", 5),
        (b"{\"a\":truex}", 9),
        (b"{\"a\":\"\t\"}", 6),
        (b"{\"a\":\"\n\"}", 6),
        (b"{\"a\":\"x", 7),
        (b"{\"a\":\"\\x\"}", 6),
        (b"{\"a\":\"\\u12g4\"}", 6),
        (b"{\"a\":\"\\u12\"}", 6),
        (b"{\"a\":\"\\ud800\"}", 6),
        (b"{\"a\":\"\\ud800\\ud800\"}", 6),
        (b"{\"a\":\"\\ud800x\"}", 6),
        (b"{\"a\":\"\\udc00\\ud800\"}", 6),
        (b"{\"\\ud800\":1}", 2),
        (b"{\"a\":/**/1}", 5),
    ] {
        let error = refusal(body);
        assert_eq!(error.fault, Fault::InvalidJson, "{body:?}: {error}");
        assert!(
            error.message.ends_with(&format!("byte {at}")) || error.message.contains(&format!("(byte {at})")),
            "{body:?}: {error}"
        );
        assert!(!error.message.contains("secret"));
    }
    assert_eq!(refusal(b"").message, "the request body is empty; send a JSON object");
}

#[test]
fn c2_a_nesting_bomb_is_refused_with_the_limit() {
    let nested = |levels: usize, open: &str, close: &str| {
        format!("{{\"model\":\"m\",\"a\":{}{}}}", open.repeat(levels), close.repeat(levels))
    };
    assert!(read(&nested(127, "[", "]")).is_ok());
    for body in [nested(128, "[", "]"), nested(1_000_000, "[", "]"), nested(200, "[{\"a\":", "}]"), "[".repeat(200)] {
        let error = refusal(body.as_bytes());
        assert_eq!(error.fault, Fault::InvalidJson);
    }
    let error = refusal(nested(128, "[", "]").as_bytes());
    assert!(error.message.contains("128 levels"), "{}", error.message);
    // Brackets that are closed again do not count, and a limit beyond the first group of bits holds too.
    assert!(read(&format!("{{\"model\":\"m\",\"a\":[{}1]}}", "[[[]]],".repeat(1000))).is_ok());
    let deep = nested(1000, "[{\"a\":[", "]}]").replace("[]", "[1]");
    assert!(scan_request(deep.as_bytes(), &Limits { depth: 3001, choices: 128 }).is_ok());
    assert!(scan_request(deep.as_bytes(), &Limits { depth: 3000, choices: 128 }).is_err());
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
            prop::collection::btree_map(any::<String>(), inner, 0..8)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn a_splice_changes_the_model_and_nothing_else(
        model in any::<String>().prop_filter("empty", |model| !model.is_empty()),
        other in any::<String>(),
        before in json(),
        after in json(),
        pretty in any::<bool>(),
    ) {
        let body = serde_json::json!({ "a": before, "model": model, "z": after });
        let body = if pretty { serde_json::to_vec_pretty(&body) } else { serde_json::to_vec(&body) }.unwrap();
        let request = scan_request(&body, &LIMITS).unwrap();
        prop_assert_eq!(&request.model, &model);
        let span = request.model_span;
        let spliced = splice(&body, span.clone(), &other);
        prop_assert!(spliced.starts_with(&body[..span.start]));
        prop_assert!(spliced.ends_with(&body[span.end..]));
        let middle = &spliced[span.start..spliced.len() - (body.len() - span.end)];
        prop_assert_eq!(serde_json::from_slice::<String>(middle).unwrap(), other);
    }

    /// serde_json is the oracle; it differs on lone surrogates and on numbers beyond a float's range only.
    #[test]
    fn damaged_json_is_judged_as_serde_json_does(
        value in json(),
        at in any::<prop::sample::Index>(),
        with in prop::collection::vec(prop::sample::select(&b"{}[]\":,\\u0129eE+-.tfn \n\x01\xc3\xa9"[..]), 0..3),
        cut in 0..3_usize,
    ) {
        let mut body = serde_json::to_vec(&serde_json::json!({ "model": "m", "v": value })).unwrap();
        let at = at.index(body.len());
        let end = (at + cut).min(body.len());
        body.splice(at..end, with);
        let oracle = serde_json::from_slice::<Value>(&body);
        if oracle.as_ref().is_err_and(|error| error.to_string().contains("out of range")) {
            return Ok(());
        }
        let is_object = oracle.as_ref().is_ok_and(Value::is_object);
        match scan_request(&body, &LIMITS) {
            Ok(_) => prop_assert!(is_object, "{:?}", String::from_utf8_lossy(&body)),
            Err(error) if error.fault == Fault::InvalidJson => {
                prop_assert!(!is_object, "{:?}: {}", String::from_utf8_lossy(&body), error);
            }
            Err(_) => {}
        }
    }

    #[test]
    fn no_bytes_make_a_scan_panic(body in prop::collection::vec(any::<u8>(), 0..200), depth in 0..4_u32) {
        let _ = scan_request(&body, &Limits { depth, choices: 128 });
        let _ = crate::json::scan_answer(&body);
        let _ = crate::json::scan_chunk(&body);
        let mut object = b"{".to_vec();
        object.extend(&body);
        object.push(b'}');
        let _ = crate::json::scan_chunk(&object);
    }
}
