//! Bad requests: what they are told, and that nothing else is harmed. Framing is in `framing.rs`.

use std::time::{Duration, Instant};

use evergate_testkit::raw::{chat_request, get_request, post, post_request};
use evergate_testkit::{FakeUpstream, Raw, Response, gateway_config};
use serde_json::{Value, json};

use crate::support::{
    CHAT, EXE, LIMIT, assert_alive, assert_counted, assert_error, assert_error_shape, assert_request_id, before, echo,
    echo_with,
};

fn post_bytes(path: &str, fields: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\n{fields}content-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

const JSON: &str = "content-type: application/json\r\n";

/// C1, C2, C3, C5, C6. All on one connection: each answer leaves it usable.
#[test]
fn bad_bodies_are_told_what_is_wrong() {
    let gateway = echo();
    let deep = format!(r#"{{"model":"echo","messages":{}{}}}"#, "[".repeat(200), "]".repeat(200));
    let bomb = "[".repeat(100_000);
    let mut raw = Raw::connect(&gateway.addr());
    for (body, status, code, param) in [
        (&b""[..], 400, "invalid_json", Value::Null),
        (b"   ", 400, "invalid_json", Value::Null),
        (br#"{"model":"#, 400, "invalid_json", Value::Null),
        (br#"{"model":"echo",}"#, 400, "invalid_json", Value::Null),
        (br#"{"model":"echo"} {}"#, 400, "invalid_json", Value::Null),
        (br#"{'model':'echo'}"#, 400, "invalid_json", Value::Null),
        (br#"{"model":"echo","seed":01}"#, 400, "invalid_json", Value::Null),
        (b"[]", 400, "invalid_json", Value::Null),
        (b"null", 400, "invalid_json", Value::Null),
        (b"\xef\xbb\xbf{\"model\":\"echo\"}", 400, "invalid_json", Value::Null),
        (b"{\"model\":\"echo\",\"user\":\"\xff\"}", 400, "invalid_json", Value::Null),
        (b"{\x00\"\x00m\x00\"\x00", 400, "invalid_json", Value::Null),
        (br#"{"model":"echo","user":"\ud800"}"#, 400, "invalid_json", Value::Null),
        (deep.as_bytes(), 400, "invalid_json", Value::Null),
        (bomb.as_bytes(), 400, "invalid_json", Value::Null),
        (b"{}", 400, "invalid_value", json!("model")),
        (br#"{"messages":[]}"#, 400, "invalid_value", json!("model")),
        (br#"{"model":null}"#, 400, "invalid_value", json!("model")),
        (br#"{"model":7}"#, 400, "invalid_value", json!("model")),
        (br#"{"model":["echo"]}"#, 400, "invalid_value", json!("model")),
        (br#"{"model":""}"#, 400, "invalid_value", json!("model")),
        (br#"{"model":"echo","model":"echo"}"#, 400, "invalid_value", json!("model")),
        (br#"{"model":"echo","mo\u0064el":"other"}"#, 400, "invalid_value", json!("model")),
        (br#"{"model":"echo","stream":"yes"}"#, 400, "invalid_value", json!("stream")),
        (br#"{"model":"echo","stream":true,"stream":false}"#, 400, "invalid_value", json!("stream")),
        (br#"{"model":"echo","n":1,"n":1000000}"#, 400, "invalid_value", json!("n")),
        (br#"{"model":"echo"}"#, 400, "invalid_value", json!("messages")),
        (br#"{"model":"echo","messages":"hi"}"#, 400, "invalid_value", json!("messages")),
        (br#"{"model":"echo","messages":[]}"#, 400, "invalid_value", json!("messages")),
        (br#"{"model":"gpt-unknown","messages":[]}"#, 404, "model_not_found", json!("model")),
        (br#"{"model":"openai/gpt-4o","messages":[]}"#, 404, "model_not_found", json!("model")),
        (br#"{"model":"ECHO","messages":[]}"#, 404, "model_not_found", json!("model")),
    ] {
        raw.send(&post_bytes(CHAT, JSON, body));
        let response = raw.read_response(LIMIT);
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        assert_eq!((response.status, response.error_code().as_str()), (status, code), "{shown:?}");
        assert_error(&response, status, code);
        assert_eq!(response.json()["error"]["param"], param, "{shown:?}");
    }
    raw.send(&chat_request("echo", false, &Value::Null));
    assert_eq!(raw.read_response(LIMIT).status, 200);
}

/// What is refused by its body is on record and counted, and reaches no upstream.
#[track_caller]
fn assert_refused(bodies: &[(&[u8], &str)], status: u16, code: &str, check: impl Fn(&Response)) {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[models.hidden]\ntargets = [{ upstream = \"fake\", model = \"ok\" }]\n");
    let mut raw = Raw::connect(&gateway.addr());
    for (n, (body, words)) in bodies.iter().enumerate() {
        let id = format!("refused-{n}");
        raw.send(&post_bytes(CHAT, &format!("{JSON}x-request-id: {id}\r\n"), body));
        let response = raw.read_response(LIMIT);
        assert_error(&response, status, code);
        let message = response.error_message();
        assert!(message.contains(words), "{message:?} does not say {words:?}");
        assert!(!message.contains("CANARY"), "{message:?}");
        check(&response);
        let record = gateway.wait_access(&id, LIMIT);
        assert_eq!((&record["cause"], &record["status"]), (&json!(code), &json!(status)), "{record}");
        assert_eq!(record["attempts"], 0, "{record}");
    }
    assert_counted(&gateway, status, code, bodies.len() as u64);
    assert_eq!(fake.connections().len(), 0, "nobody is called for a refused body");
    raw.send(&chat_request("hidden", false, &Value::Null));
    assert_eq!((raw.read_response(LIMIT).status, fake.request_count()), (200, 1));
}

/// C1: what is wrong and at which byte, without a word of the body.
#[test]
fn c1_a_body_that_is_no_json_is_refused_at_its_byte() {
    let utf16: Vec<u8> = r#"{"model":"hidden"}"#.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let bodies: &[(&[u8], &str)] = &[
        (br#"{"model":"hidden","user":"CANARY"#, "byte 32"),
        (br#"{"model":"hidden","messages":[{"role":"user","content":"CANARY"}]"#, "byte 65"),
        (br#"{"model":"hidden","messages":[]} CANARY"#, "byte 33"),
        (br#"{"model":"hidden",CANARY}"#, "byte 18"),
        (b"\xef\xbb\xbf{\"model\":\"hidden\",\"messages\":[]}", "byte 0"),
        (&utf16, "byte 1"),
        (b"", "is empty"),
    ];
    assert_refused(bodies, 400, "invalid_json", |_| ());
}

/// C6: told its name and where the list is; not what else there is.
#[test]
fn c6_an_unknown_model_is_refused_and_no_other_is_named() {
    let bodies: &[(&[u8], &str)] = &[
        (br#"{"model":"hiddem","messages":[]}"#, "'hiddem'"),
        (br#"{"model":"hidden ","messages":[]}"#, "'hidden '"),
        (br#"{"model":"other/ok","messages":[]}"#, "'other/ok'"),
        (br#"{"model":"fake/","messages":[]}"#, "'fake/'"),
    ];
    assert_refused(bodies, 404, "model_not_found", |response| {
        assert_eq!(response.json()["error"]["param"], "model");
        assert!(!response.error_message().contains("hidden'"), "{}", response.text());
    });
}

/// C8: what we do not know is the upstream's to judge: it arrives as it was written, down to spaces and digits.
#[test]
fn c8_fields_that_nobody_knows_arrive_as_they_were_written() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let body = |model: &str| {
        let fields =
            r#""x_new" : {"b":1, "a":[1.50, 1e2,-0], "\u0061":null}, "top_k":40 ,"seed":12345678901234567890123"#;
        format!(r#" {{ "messages":[{{"role":"user","content":"hi","x":true}}],"model" :"{model}", {fields} }} "#)
    };
    for stream in ["", ",\"stream\":true"] {
        let written = |model: &str| body(model).trim_end().strip_suffix('}').unwrap().to_owned() + stream + "}";
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&post_request(CHAT, "x-request-id: unknown-fields\r\n", &written("fake/ok")));
        let response = raw.read_response(LIMIT);
        assert_eq!(response.status, 200, "{}", response.text());
        let arrived = fake.requests().pop().unwrap().request.body;
        assert_eq!(String::from_utf8(arrived).unwrap(), written("ok"));
    }
    assert_counted(&gateway, 200, "ok", 2);
    assert_eq!(gateway.wait_access("unknown-fields", LIMIT)["cause"], "ok");
}

#[test]
fn other_endpoints_name_their_own_field() {
    let gateway = echo();
    for (path, body, param) in [
        ("/v1/embeddings", r#"{"model":"echo"}"#, "input"),
        ("/v1/embeddings", r#"{"model":"echo","input":[]}"#, "input"),
        ("/v1/embeddings", r#"{"model":"echo","input":"a","dimensions":-1}"#, "dimensions"),
        ("/v1/embeddings", r#"{"model":"echo","input":"a","encoding_format":"hex"}"#, "encoding_format"),
        ("/v1/embeddings", r#"{"input":"a"}"#, "model"),
        ("/v1/completions", r#"{"prompt":"a"}"#, "model"),
    ] {
        let response = post(&gateway.addr(), path, body);
        assert_error(&response, 400, "invalid_value");
        assert_eq!(response.json()["error"]["param"], param, "{body}");
    }
}

#[test]
fn an_error_never_repeats_the_body() {
    let gateway = echo();
    let response = post(&gateway.addr(), CHAT, r#"{"model":"echo","messages":[SECRET-PROMPT]}"#);
    assert_error(&response, 400, "invalid_json");
    assert!(!response.text().contains("SECRET-PROMPT"));
    let long = "m".repeat(5000);
    let response = post(&gateway.addr(), CHAT, &format!(r#"{{"model":"{long}"}}"#));
    assert_error(&response, 404, "model_not_found");
    assert!(response.body.len() < 1000, "a name of 5,000 characters came back");
}

#[test]
fn unknown_paths_are_404_and_the_connection_goes_on() {
    let gateway = echo();
    let mut raw = Raw::connect(&gateway.addr());
    for path in
        ["/", "/v1", "/v1/", "/v1/chat", "/v2/models", "/metrics", "/status", "/V1/models", "/v1/chat/completionsx"]
    {
        raw.send(&get_request(path, ""));
        assert_error(&raw.read_response(LIMIT), 404, "not_found");
        raw.send(&post_request(path, "", r#"{"model":"echo"}"#));
        assert_error(&raw.read_response(LIMIT), 404, "not_found");
    }
    raw.send(&chat_request("echo", false, &Value::Null));
    assert_eq!(raw.read_response(LIMIT).status, 200);
}

#[test]
fn a_query_does_not_hide_a_path() {
    let gateway = echo();
    let request = post_request(
        "/v1/chat/completions?api-version=1",
        "",
        r#"{"model":"echo","messages":[{"role":"user","content":"q"}]}"#,
    );
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&request);
    assert_eq!(raw.read_response(LIMIT).content(), "q");
}

/// B8: refused before the body is read, and the client can read the answer though it goes on sending.
#[test]
fn too_large_by_its_length_is_refused_before_the_body() {
    let gateway = echo_with("[limits]\nbody = \"4KiB\"\n");
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{JSON}content-length: 1073741824\r\n\r\n").as_bytes());
    assert_error(&refused(raw), 413, "request_too_large");

    let mut raw = Raw::connect(&gateway.addr());
    let _ = raw.try_send(&post_bytes(CHAT, JSON, &vec![b' '; 150_000]));
    assert_error(&refused(raw), 413, "request_too_large");

    // One byte over, and just as many as are allowed.
    let body = |size: usize| {
        let start = r#"{"model":"echo","messages":[{"role":"user","content":"x"}]}"#;
        format!("{start}{}", " ".repeat(size - start.len()))
    };
    assert_error(&post(&gateway.addr(), CHAT, &body(4097)), 413, "request_too_large");
    assert_eq!(post(&gateway.addr(), CHAT, &body(4096)).content(), "x");
    assert_alive(&gateway);
}

fn refused(mut raw: Raw) -> Response {
    let response = raw.read_response(LIMIT);
    let (rest, _) = raw.read_to_close(LIMIT);
    assert!(rest.is_empty());
    response
}

/// B9.
#[test]
fn too_large_in_chunks_is_refused_at_the_limit() {
    let gateway = echo_with("[limits]\nbody = \"4KiB\"\n");
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{JSON}transfer-encoding: chunked\r\n\r\n").as_bytes());
    let chunk = format!("400\r\n{}\r\n", " ".repeat(1024));
    // No last chunk: it could go on for ever.
    for _ in 0..20 {
        if raw.try_send(chunk.as_bytes()).is_err() {
            break;
        }
    }
    assert_error(&refused(raw), 413, "request_too_large");
    assert_alive(&gateway);
}

#[test]
fn chunked_bodies_are_taken() {
    let gateway = echo();
    let mut raw = Raw::connect(&gateway.addr());
    let body = r#"{"model":"echo","messages":[{"role":"user","content":"in pieces"}]}"#;
    let pieces: String = body
        .as_bytes()
        .chunks(7)
        .map(|piece| format!("{:x}\r\n{}\r\n", piece.len(), String::from_utf8_lossy(piece)))
        .collect();
    let request =
        format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{JSON}transfer-encoding: chunked\r\n\r\n{pieces}0\r\n\r\n");
    for _ in 0..2 {
        raw.send(request.as_bytes());
        assert_eq!(raw.read_response(LIMIT).content(), "in pieces");
    }
}

/// B15: a body that parses is taken whatever it is called, unless a web page may have sent it.
#[test]
fn media_types_matter_where_a_browser_sends() {
    let text = "[server]\nlisten = [\"127.0.0.1:0\"]\nauth = \"keys\"\n[admin]\nlisten = \"127.0.0.1:0\"\n\
                [keys.a]\nsecret = { env = \"KEY_A\" }\n[models.echo]\ntargets = [{ upstream = \"echo\" }]\n";
    let gateway = evergate_testkit::Evergate::builder(EXE).config(text).env("KEY_A", "0123456789abcdef").start();
    let key = "authorization: Bearer 0123456789abcdef\r\n";
    let body = br#"{"model":"echo","messages":[{"role":"user","content":"x"}]}"#;
    let mut raw = Raw::connect(&gateway.addr());
    for (fields, status) in [
        ("", 200),
        ("content-type: text/plain\r\n", 200),
        ("content-type: application/json; charset=utf-8\r\n", 200),
        ("content-type: application/json\r\norigin: https://app.example\r\n", 200),
        ("content-type: text/plain\r\norigin: https://app.example\r\n", 415),
        ("origin: https://app.example\r\n", 415),
        ("content-type: application/x-www-form-urlencoded\r\norigin: null\r\n", 415),
    ] {
        raw.send(&post_bytes(CHAT, &format!("{key}{fields}"), body));
        let response = raw.read_response(LIMIT);
        assert_eq!(response.status, status, "{fields:?}: {}", response.text());
        if status == 415 {
            assert_error(&response, 415, "unsupported_media_type");
        }
    }
}

/// B18.
#[test]
fn a_well_formed_request_id_comes_back_and_another_does_not() {
    let gateway = echo();
    let mut raw = Raw::connect(&gateway.addr());
    let longest = "x".repeat(64);
    for good in ["abc", "A-b.c_d:9", &longest] {
        for path in ["/healthz", "/nothing"] {
            raw.send(&get_request(path, &format!("x-request-id: {good}\r\n")));
            assert_eq!(raw.read_response(LIMIT).header("x-request-id"), Some(good));
        }
    }
    let too_long = "x".repeat(65);
    for bad in ["", "a b", "<script>", "a\u{e9}", "a,b", &too_long] {
        raw.send(&get_request("/healthz", &format!("x-request-id: {bad}\r\n")));
        let response = raw.read_response(LIMIT);
        assert_request_id(&response);
        assert_ne!(response.header("x-request-id"), Some(bad));
    }
}

#[test]
fn no_bad_request_reaches_the_upstream() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for body in ["", "{", r#"{"model":"fake/ok","model":"fake/ok"}"#, r#"{"model":"fake/"}"#, r#"{"model":"other/ok"}"#]
    {
        assert_error_shape(&post(&gateway.addr(), CHAT, body));
    }
    assert_eq!(post(&gateway.addr(), CHAT, r#"{"model":"fake/ok","messages":[]}"#).status, 200);
    assert_eq!(fake.request_count(), 1);
}

#[test]
fn an_upstream_can_be_kept_to_its_named_models() {
    let fake = FakeUpstream::start();
    let text = gateway_config(fake.base_url(), &["ok"], "").replace("dialect", "any_model = false\ndialect");
    let gateway = evergate_testkit::Evergate::builder(EXE).config(text).start();
    let ask = |model: &str| evergate_testkit::post_chat(&gateway.addr(), model, false, &Value::Null);
    assert_eq!(ask("ok").status, 200);
    assert_error(&ask("fake/ok"), 404, "model_not_found");
    let list = gateway.get("/v1/models").json();
    assert_eq!(list["data"].as_array().unwrap().len(), 1);
    assert_eq!(list["data"][0]["id"], "ok");
}

/// C9: reading a large body that was made to be slow holds up nobody else: the longest wait of small requests on the same
/// worker is a fraction of it.
#[test]
fn c9_a_large_body_is_read_beside_the_others() {
    let gateway = echo_with(crate::support::ONE_WORKER);
    let body = format!(r#"{{"model":"nobody","x":"{}"}}"#, "\\n".repeat(10_000_000));
    let large = post_request(CHAT, "", &body);
    let (mut longest, mut count) = (Duration::ZERO, 0);
    let took = std::thread::scope(|scope| {
        let (gateway, large) = (&gateway, &large);
        let asking = scope.spawn(move || {
            let mut raw = Raw::connect(&gateway.addr());
            raw.send(large);
            let sent = Instant::now();
            assert_error(&raw.read_response(LIMIT), 404, "model_not_found");
            sent.elapsed()
        });
        let mut raw = Raw::connect(&gateway.addr());
        while !asking.is_finished() {
            let began = Instant::now();
            raw.send(&chat_request("echo", false, &Value::Null));
            assert_eq!(raw.read_response(LIMIT).status, 200);
            longest = longest.max(began.elapsed());
            count += 1;
        }
        asking.join().unwrap()
    });
    println!("the large one took {took:?} from its last byte, {count} small ones at most {longest:?}");
    assert!(longest < took / 2, "{longest:?} of {took:?}");
}

/// H14: one large body is read at a time, and whoever's turn does not come within the time that there is has met an overload,
/// unless that time was its own.
#[test]
fn h14_large_bodies_whose_turn_does_not_come_are_refused() {
    let gateway = echo_with(&format!("{}[timeouts]\ntotal = \"300ms\"\n", crate::support::ONE_WORKER));
    let body = format!(r#"{{"model":"nobody","x":"{}"}}"#, "\\n".repeat(10_000_000));
    let ask = |fields: &str| {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&post_request(CHAT, fields, &body));
        raw.read_response(LIMIT)
    };
    let ask = &ask;
    let answers: Vec<(bool, Response)> = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..8)
            .map(|n| scope.spawn(move || (n < 6, ask(if n < 6 { "" } else { "x-request-timeout: 200ms\r\n" }))))
            .collect();
        asking.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let mut refused = 0;
    for (is_ours, response) in &answers {
        match response.status {
            404 => {}
            503 if *is_ours => {
                assert_error(response, 503, "overloaded");
                assert!(response.error_message().contains("timeouts.total"), "{}", response.text());
                refused += 1;
            }
            _ => {
                assert!(!is_ours, "{}", response.text());
                assert_error(response, 504, "deadline_exceeded");
                assert!(response.error_message().contains("x-request-timeout"), "{}", response.text());
            }
        }
    }
    assert!(refused > 0, "{answers:?}");
    assert_alive(&gateway);
}

/// C9: no tree of gigabytes for the built-in model.
#[test]
fn c9_the_built_in_model_builds_no_huge_tree() {
    // An unoptimized build works on the last body for seconds, and longer on a full machine: nobody is ended for that here.
    let gateway = echo_with("[workers]\nhang_timeout = \"10m\"\n");
    for unit in ["[],", "{},", "1,"] {
        let body = format!(r#"{{"model":"echo","messages":[{}1]}}"#, unit.repeat(3_000_000));
        assert_error(&post(&gateway.addr(), CHAT, &body), 413, "request_too_large");
    }
    let text = "many words, ".repeat(100_000);
    let body =
        evergate_testkit::raw::chat_body("echo", false, &json!({"messages": [{"role": "user", "content": text}]}));
    assert_eq!(post(&gateway.addr(), CHAT, &body).content(), text);
}
