//! What reaches an upstream, and how: bytes, headers, connections, transports.

use std::path::Path;

use evergate_testkit::fake::TEXT;
use evergate_testkit::raw::{chat_body, post, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Identity, Raw, gateway_config, wait_until};
use serde_json::Value;

use crate::support::{CHAT, EXE, LIMIT, ONE_WORKER, assert_error, before, chat, via};

/// Everything but the model's name is forwarded byte for byte (C8; DESIGN 5.3: spliced, never re-serialised).
#[test]
fn a_body_is_forwarded_byte_for_byte() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let huge_number = format!(r#"{{"model":"fake/echo-request","x":{}}}"#, "9".repeat(400));
    for (index, body) in [
        r#"{"model":"fake/echo-request"}"#,
        " {\r\n\t\"messages\" : [ ] ,\n  \"model\"  :\t\"fake/echo-request\" } \n",
        r#"{"a":1.0,"b":1e400,"c":-0,"d":0.10,"e":123456789012345678901234567890,"model":"fake/echo-request"}"#,
        r#"{"model":"fake/echo-request","messages":[{"role":"user","content":"\u00e9\u0041\/\ud83d\ude00 é😀"}]}"#,
        r#"{"model":"fake/echo-request","user":"x","user":"y","unknown":{"model":"fake/echo-request","stream":[true]}}"#,
        r#"{"model":"fake/echo-request","messages":[{"role":"user","content":[{"type":"text","text":"what is it?"},{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw0KGgo=","detail":"low"}},{"type":"input_audio","input_audio":{"data":"","format":"wav"}}]}]}"#,
        r#"{"tools":[{"type":"function","function":{"name":"f","strict":true,"parameters":{"type":"object","properties":{"model":{"type":"string"}}}}}],"tool_choice":{"type":"function","function":{"name":"f"}},"parallel_tool_calls":false,"model":"fake/echo-request"}"#,
        r#"{"response_format":{"type":"json_schema","json_schema":{"name":"s","schema":{}}},"logprobs":true,"top_logprobs":5,"reasoning_effort":"high","model":"fake/echo-request","max_completion_tokens":16,"seed":7,"stop":["\n"]}"#,
        r#"{"model":"fake/echo-request","stream":false,"stream_options":null,"":null}"#,
        &huge_number,
    ]
    .into_iter()
    .enumerate()
    {
        // What the fake's own JSON reader makes of it is not the matter.
        let _ = post(&gateway.addr(), CHAT, body);
        // Only the first of the names is the top level's: the nested ones stay.
        let expected = match body.find("\"model\"  :") {
            Some(_) => body.replace("fake/echo-request", "echo-request"),
            None => forwarded(body),
        };
        assert_eq!(String::from_utf8(fake.wait_request(index, LIMIT).request.body).unwrap(), expected);
    }
}

/// The body with the model's name at its top level replaced; in the bodies above that name is the only one that
/// follows `"model":` outside of `unknown`.
fn forwarded(body: &str) -> String {
    let at = body.find(r#""model":"fake/"#).unwrap() + r#""model":""#.len();
    format!("{}{}", &body[..at], &body[at + "fake/".len()..])
}

#[test]
fn a_name_written_with_escapes_is_the_same_name() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let answer = post(&gateway.addr(), CHAT, r#"{"n":1,"mo\u0064el":"f\u0061ke\/echo-request","z":[ ]}"#);
    assert_eq!(answer.json()["received"]["body"], r#"{"n":1,"mo\u0064el":"echo-request","z":[ ]}"#);
}

#[test]
fn a_configured_name_is_replaced_by_the_targets() {
    let fake = FakeUpstream::start();
    let more = "[models.\"my:model@1\"]\ntargets = [{ upstream = \"fake\", model = \"echo-request\" }]";
    let gateway = before(&fake, more);
    let answer = post(&gateway.addr(), CHAT, r#"{"model":"my:model@1","x":"my:model@1"}"#);
    assert_eq!(answer.json()["received"]["body"], r#"{"model":"echo-request","x":"my:model@1"}"#);
}

#[test]
fn each_endpoint_is_forwarded_to_its_own() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let answer = post(&gateway.addr(), "/v1/embeddings", r#"{"model":"fake/ok","input":["a","b"],"dimensions":4}"#);
    assert_eq!((answer.status, answer.json()["data"][1]["embedding"].as_array().unwrap().len()), (200, 4));
    let answer = post(&gateway.addr(), "/v1/completions", r#"{"model":"fake/ok","prompt":"x"}"#);
    assert_eq!(answer.json()["choices"][0]["text"], TEXT);
    assert_eq!(chat(&gateway, "ok", false).content(), TEXT);
    let targets: Vec<String> = fake.requests().iter().map(|one| one.request.target.clone()).collect();
    assert_eq!(targets, ["/v1/embeddings", "/v1/completions", "/v1/chat/completions"]);
}

#[test]
fn only_what_may_travel_travels() {
    let fake = FakeUpstream::start();
    let more = "[upstreams.fake.api_key]\nenv = \"FAKE_KEY\"\n";
    let text = gateway_config(fake.base_url(), &[], more);
    let gateway = Evergate::builder(EXE).config(text).env("FAKE_KEY", "sk-upstream-0123456789").start();
    let fields = "authorization: Bearer sk-client-0123456789\r\napi-key: sk-client\r\nx-api-key: sk-client\r\n\
                  cookie: a=b\r\nproxy-authorization: Basic x\r\nx-forwarded-for: 1.2.3.4\r\nforwarded: for=1.2.3.4\r\n\
                  te: trailers\r\nconnection: x-drop\r\nx-drop: 1\r\naccept-encoding: gzip, br\r\nx-evergate-x: 1\r\n";
    let body = chat_body(&via("ok"), false, &Value::Null);
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(CHAT, fields, &body));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    let sent = fake.requests()[0].request.clone();
    let one = |name: &str| {
        let all: Vec<&str> = sent.headers.iter().filter(|(key, _)| key == name).map(|(_, value)| &value[..]).collect();
        assert!(all.len() <= 1, "{name}: {all:?}");
        all.first().map(|value| (*value).to_owned())
    };
    assert_eq!(one("authorization").unwrap(), "Bearer sk-upstream-0123456789");
    assert_eq!(one("host").unwrap(), fake.address());
    assert_eq!(one("content-type").unwrap(), "application/json");
    assert_eq!(one("content-length").unwrap(), (body.len() - "fake/".len()).to_string());
    assert!(one("user-agent").unwrap().starts_with("evergate/"));
    assert!(!String::from_utf8_lossy(&sent.head).contains("sk-client"));
    for name in [
        "cookie",
        "proxy-authorization",
        "x-forwarded-for",
        "forwarded",
        "te",
        "x-drop",
        "accept-encoding",
        "x-evergate-x",
        "expect",
    ] {
        assert_eq!(one(name), None, "{name}");
    }
}

#[test]
fn without_a_key_of_its_own_an_upstream_gets_none() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(CHAT, "authorization: Bearer sk-client\r\n", &chat_body(&via("ok"), false, &Value::Null)));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    assert_eq!(fake.requests()[0].request.header("authorization"), None);
}

#[test]
fn a_valid_traceparent_is_forwarded_and_an_invalid_one_is_not() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let mut raw = Raw::connect(&gateway.addr());
    let cases = [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", true),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00", true),
        ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-adds", true),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more", false),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", false),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", false),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", false),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", false),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7", false),
        ("nonsense", false),
    ];
    for (index, (value, is_valid)) in cases.into_iter().enumerate() {
        let fields = format!("traceparent: {value}\r\n");
        raw.send(&post_request(CHAT, &fields, &chat_body(&via("ok"), false, &Value::Null)));
        assert_eq!(raw.read_response(LIMIT).status, 200);
        let sent = fake.requests()[index].request.header("traceparent").map(str::to_owned);
        assert_eq!(sent.as_deref() == Some(value), is_valid, "{value}: {sent:?}");
    }
    // Two cannot both be the parent.
    let two = format!("traceparent: {}\r\ntraceparent: {}\r\n", cases[0].0, cases[1].0);
    raw.send(&post_request(CHAT, &two, &chat_body(&via("ok"), false, &Value::Null)));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    assert_eq!(fake.requests()[cases.len()].request.header("traceparent"), None);
}

#[test]
fn an_upstream_over_tls_is_trusted_by_its_root_only() {
    let identity = Identity::generate();
    let fake = FakeUpstream::start_tls(&identity);
    let config = gateway_config(fake.base_url(), &[], "[upstreams.fake.roots]\nfile = \"ca.pem\"\n");
    let gateway = Evergate::builder(EXE).config(config.clone()).file("ca.pem", &identity.cert_pem).start();
    assert_eq!(chat(&gateway, "ok", false).content(), TEXT);
    assert!(chat(&gateway, "stream-5", true).events().last().unwrap().is_done());

    // The system's own list, where OpenSSL's variable says it is.
    let system = config.replace("[upstreams.fake.roots]\nfile = \"ca.pem\"\n", "");
    let system = system.replace("[upstreams.fake]\n", "[upstreams.fake]\nroots = \"system\"\n");
    let gateway = |pem: &Path| {
        let start = Evergate::builder(EXE).config(system.clone()).env("SSL_CERT_FILE", pem.to_str().unwrap());
        start.env("SSL_CERT_DIR", "").start()
    };
    let folder = tempfile::tempdir().unwrap();
    let pem = folder.path().join("system.pem");
    std::fs::write(&pem, &identity.cert_pem).unwrap();
    assert_eq!(chat(&gateway(&pem), "ok", false).content(), TEXT);
    std::fs::write(&pem, &Identity::generate().cert_pem).unwrap();
    assert_error(&chat(&gateway(&pem), "ok", false), 502, "upstream_connect_failed");

    // D7: an authority that did not sign it, a name that is not on it, and the bundled list.
    let stranger = Identity::generate();
    let gateway = Evergate::builder(EXE).config(config).file("ca.pem", &stranger.cert_pem).start();
    assert_error(&chat(&gateway, "ok", false), 502, "upstream_connect_failed");
    let gateway = before(&fake, "");
    assert_error(&chat(&gateway, "ok", true), 502, "upstream_connect_failed");
    let elsewhere = Identity::for_names(&["elsewhere.example"]);
    let fake = FakeUpstream::start_tls(&elsewhere);
    let config = gateway_config(fake.base_url(), &[], "[upstreams.fake.roots]\nfile = \"ca.pem\"\n");
    let gateway = Evergate::builder(EXE).config(config).file("ca.pem", &elsewhere.cert_pem).start();
    assert_error(&chat(&gateway, "ok", false), 502, "upstream_connect_failed");
    assert_eq!(fake.request_count(), 0);
}

#[test]
fn an_upstream_over_a_unix_socket_answers() {
    let folder = tempfile::tempdir().unwrap();
    let fake = FakeUpstream::start_unix(&folder.path().join("up.sock"));
    let gateway = before(&fake, ONE_WORKER);
    for _ in 0..3 {
        assert_eq!(chat(&gateway, "ok", false).content(), TEXT);
        assert!(chat(&gateway, "ok", true).events().last().unwrap().is_done());
    }
    assert_eq!(fake.connections().len(), 1);
    assert_eq!(fake.requests()[0].request.header("authorization"), None);
}

#[test]
fn a_connection_is_used_again() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    for stream in [false, true, false, true, true, false] {
        assert!(chat(&gateway, "ok", stream).is_complete);
    }
    assert_eq!(fake.connections().len(), 1, "six requests, one after the other");
}

/// D9: one that the upstream has closed meanwhile costs no request.
#[test]
fn a_stale_connection_costs_no_request() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    for n in 0..10 {
        // Closed by the script and by the upstream itself; once the FIN is there nothing may be sent on it.
        assert_eq!(chat(&gateway, "stale", n % 2 == 0).status, 200);
        wait_until("the end of every connection", LIMIT, || fake.open_connections() == 0);
        assert_eq!(chat(&gateway, "ok", false).content(), TEXT);
        fake.close_connections();
        wait_until("the end of every connection", LIMIT, || fake.open_connections() == 0);
    }
}

/// E7: bytes after an answer's end are nobody's next answer.
#[test]
fn bytes_after_an_answer_spoil_its_connection() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    for n in 0..3 {
        assert_eq!(chat(&gateway, "too-long", false).content(), TEXT);
        // All of its bytes are there before the next request is.
        let _ = fake.wait_end(2 * n, LIMIT);
        assert_eq!(chat(&gateway, "ok", false).content(), TEXT);
    }
}

/// D11.
#[test]
fn proxy_variables_are_not_obeyed() {
    let fake = FakeUpstream::start();
    let nobody = format!("http://{}", evergate_testkit::fake::refused_address());
    let gateway = Evergate::builder(EXE)
        .config(gateway_config(fake.base_url(), &[], ""))
        .env("HTTP_PROXY", &nobody)
        .env("http_proxy", &nobody)
        .env("ALL_PROXY", &nobody)
        .start();
    assert_eq!(chat(&gateway, "ok", false).content(), TEXT);
}
