//! Who may ask: keys, web pages, host names, TLS.

use evergate_testkit::link::Gone;
use evergate_testkit::raw::{chat_body, get_request, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Identity, Raw, Response, gateway_config, wait_until};
use serde_json::Value;

use crate::metrics::{samples, sum};
use crate::support::{CHAT, EXE, LIMIT, assert_alive, assert_error, assert_error_shape, before, echo_with};

const KEY_A: &str = "sk-alpha-0123456789abcdef";
const KEY_B: &str = "sk-beta-0123456789abcdef";

/// Where it listens is said on the command line.
const BARE: &str = "[admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\ntargets = [{ upstream = \"echo\" }]\n";

fn with_keys() -> Evergate {
    let text = "[server]\nlisten = [\"127.0.0.1:0\"]\nauth = \"keys\"\n[admin]\nlisten = \"127.0.0.1:0\"\n\
                [keys.team-a]\nsecret = { env = \"TEAM_A\" }\n[keys.team-b]\nsecret = { file = \"team-b\" }\n\
                [models.echo]\ntargets = [{ upstream = \"echo\" }]\n";
    Evergate::builder(EXE).config(text).env("TEAM_A", KEY_A).file("team-b", &format!("{KEY_B}\n")).start()
}

fn chat_with(fields: &str) -> Vec<u8> {
    post_request(CHAT, fields, &chat_body("echo", false, &Value::Null))
}

#[test]
fn a_right_key_opens_and_any_other_does_not() {
    let gateway = with_keys();
    let mut raw = Raw::connect(&gateway.addr());
    for (key, name) in [(KEY_A, "team-a"), (KEY_B, "team-b")] {
        raw.send(&chat_with(&format!("authorization: Bearer {key}\r\nx-request-id: as-{name}\r\n")));
        assert_eq!(raw.read_response(LIMIT).status, 200);
        assert_eq!(gateway.wait_access(&format!("as-{name}"), LIMIT)["tenant"], name);
    }
    // Who used what: the prompt's tokens are counted under the key's name.
    let tokens =
        |key| sum(&samples(&gateway.metrics()), "evergate_tokens_in_total", &[("model", "echo"), ("key", key)]);
    for name in ["team-a", "team-b"] {
        wait_until("its tokens", LIMIT, || tokens(name) > 0.0);
    }
    let (prefix, longer) = (&KEY_A[..20], format!("{KEY_A}x"));
    let almost = KEY_A.replace("cdef", "cdee");
    for field in [
        String::new(),
        "authorization: \r\n".into(),
        "authorization: Bearer\r\n".into(),
        "authorization: Bearer \r\n".into(),
        format!("authorization: Bearer {prefix}\r\n"),
        format!("authorization: Bearer {longer}\r\n"),
        format!("authorization: Bearer {almost}\r\n"),
        format!("authorization: {KEY_A}\r\n"),
        format!("authorization: Basic {KEY_A}\r\n"),
        "authorization: Basic c2stYWxwaGE6eA==\r\n".into(),
        "authorization: Bearer team-a\r\n".into(),
        "authorization: Bearer \u{e9}\r\n".into(),
        format!("cookie: key={KEY_A}\r\n"),
    ] {
        raw.send(&chat_with(&field));
        let response = raw.read_response(LIMIT);
        assert_eq!(response.status, 401, "{field:?}");
        assert_error(&response, 401, "invalid_api_key");
        assert!(!response.text().contains("sk-"), "{}", response.text());
    }
    for path in ["/v1/models", "/v1/models/echo"] {
        raw.send(&get_request(path, ""));
        assert_error(&raw.read_response(LIMIT), 401, "invalid_api_key");
        raw.send(&get_request(path, &format!("authorization: Bearer {KEY_A}\r\n")));
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    for path in ["/healthz", "/readyz"] {
        raw.send(&get_request(path, ""));
        assert_eq!(raw.read_response(LIMIT).status, 200, "a load balancer has no key: {path}");
    }
}

/// B10: without a key nobody is asked for a body.
#[test]
fn a_body_without_a_key_is_not_read() {
    let gateway = with_keys();
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(
        format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 1000\r\n\r\n")
            .as_bytes(),
    );
    let (bytes, _) = raw.read_to_close(LIMIT);
    assert!(bytes.starts_with(b"HTTP/1.1 401 "), "{:?}", String::from_utf8_lossy(&bytes));
    // A gigabyte is not drained for a stranger either.
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000000\r\n\r\n").as_bytes());
    let response = raw.read_response(LIMIT);
    assert_error_shape(&response);
    assert!(matches!(response.status, 401 | 413));
    assert!(raw.read_to_close(LIMIT).0.is_empty());
}

#[test]
fn no_key_is_seen_anywhere() {
    let gateway = with_keys();
    let mut raw = Raw::connect(&gateway.addr());
    for key in [KEY_A, KEY_B, "sk-wrong-0123456789abcdef"] {
        raw.send(&chat_with(&format!("authorization: Bearer {key}\r\n")));
        let _ = raw.read_response(LIMIT);
    }
    wait_until("three access records", LIMIT, || gateway.access().len() >= 3);
    let access = std::fs::read_to_string(gateway.state_dir().join("access.jsonl")).unwrap();
    let run = std::fs::read_to_string(gateway.state_dir().join("run.json")).unwrap();
    let status = String::from_utf8(gateway.cli(&["status", "--json"]).stdout).unwrap();
    for text in [access, run, status, gateway.metrics(), gateway.stderr(), gateway.stdout()] {
        assert!(!text.contains("0123456789abcdef"), "{text}");
    }
    for child in gateway.children() {
        for name in ["environ", "cmdline"] {
            let bytes = std::fs::read(format!("/proc/{}/{name}", child.pid)).unwrap();
            assert!(!String::from_utf8_lossy(&bytes).contains("0123456789abcdef"), "{name} of {}", child.kind);
        }
    }
}

#[test]
fn the_environment_alone_can_ask_for_a_key() {
    let gateway = Evergate::builder(EXE).without_config().env("EVERGATE_API_KEY", KEY_A).start();
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&chat_with(""));
    assert_error(&raw.read_response(LIMIT), 401, "invalid_api_key");
    raw.send(&chat_with(&format!("authorization: Bearer {KEY_A}\r\nx-request-id: by-env\r\n")));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    assert_eq!(gateway.wait_access("by-env", LIMIT)["tenant"], "default");
    // With a key it may listen to others, without it may not.
    let everywhere = || Evergate::builder(EXE).config(BARE).arg("--listen").arg("0.0.0.0:0");
    let gateway = everywhere().env("EVERGATE_API_KEY", KEY_A).start();
    let mut raw = Raw::connect(&gateway.addr().replace("0.0.0.0", "127.0.0.1"));
    raw.send(&chat_with(&format!("authorization: Bearer {KEY_A}\r\n")));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    let ended = everywhere().try_start().err().unwrap();
    assert!(ended.code() == 78 && ended.stderr.contains("0.0.0.0:0"), "{}", ended.stderr);
    // Empty is not set.
    let gateway = Evergate::builder(EXE).without_config().env("EVERGATE_API_KEY", "").start();
    assert_alive(&gateway);
}

/// Any web page could spend the operator's money otherwise.
#[test]
fn foreign_pages_and_hosts_are_refused_while_auth_is_off() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let body = chat_body("fake/ok", false, &Value::Null);
    let post = |host: &str, fields: &str| {
        format!("POST {CHAT} HTTP/1.1\r\nhost: {host}\r\n{fields}content-length: {}\r\n\r\n{body}", body.len())
    };
    let mut raw = Raw::connect(&gateway.addr());
    for (host, fields) in [
        ("evil.example", ""),
        ("localhost.evil.example", ""),
        ("127.0.0.1.evil.example:4700", ""),
        ("localhost", "origin: https://evil.example\r\n"),
        ("localhost", "origin: null\r\n"),
        ("localhost", "origin: https://localhost.evil.example\r\ncontent-type: application/json\r\n"),
        ("evil.example", "origin: http://evil.example\r\n"),
    ] {
        raw.send(post(host, fields).as_bytes());
        let response = raw.read_response(LIMIT);
        assert_eq!(response.status, 403, "{host} {fields:?}");
        assert_error(&response, 403, "origin_not_allowed");
        assert!(!response.headers.iter().any(|(name, _)| name.starts_with("access-control-")), "CORS is off");
    }
    assert_eq!(fake.request_count(), 0);
    let port = gateway.addr().rsplit(':').next().unwrap().to_owned();
    for host in
        ["localhost", "LOCALHOST", "127.0.0.1", "[::1]", &gateway.addr(), &format!("localhost:{port}"), "localhost:1"]
    {
        raw.send(post(host, "").as_bytes());
        let response = raw.read_response(LIMIT);
        assert_eq!(response.status, 200, "{host}: {}", response.text());
    }
}

#[test]
fn named_hosts_and_keys_make_a_host_welcome() {
    let gateway = Evergate::builder(EXE)
        .config(
            "[server]\nlisten = [\"127.0.0.1:0\"]\nhosts = [\"gw.internal\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n\
                 [models.echo]\ntargets = [{ upstream = \"echo\" }]\n",
        )
        .start();
    let mut raw = Raw::connect(&gateway.addr());
    for (host, status) in [("gw.internal", 200), ("GW.internal:8080", 200), ("x.gw.internal", 403)] {
        raw.send(format!("GET /v1/models HTTP/1.1\r\nhost: {host}\r\n\r\n").as_bytes());
        assert_eq!(raw.read_response(LIMIT).status, status, "{host}");
    }
    let gateway = with_keys();
    let mut raw = Raw::connect(&gateway.addr());
    let fields = format!("authorization: Bearer {KEY_A}\r\norigin: https://any.example\r\n");
    raw.send(String::from_utf8(chat_with(&fields)).unwrap().replace("localhost", "any.example").as_bytes());
    assert_eq!(raw.read_response(LIMIT).status, 200);
}

#[test]
fn no_auth_beyond_this_machine_is_refused_at_the_start() {
    let text = "[server]\nlisten = [\"0.0.0.0:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n";
    let ended = Evergate::builder(EXE).config(text).try_start().err().unwrap();
    assert_eq!(ended.code(), 78, "{}", ended.stderr);
    assert!(ended.stderr.contains("evergate.toml:2:") && ended.stderr.contains("0.0.0.0:0"), "{}", ended.stderr);
}

#[test]
fn a_missing_secret_is_named_by_its_reference() {
    let text = "[server]\nlisten = [\"127.0.0.1:0\"]\nauth = \"keys\"\n[keys.a]\nsecret = { env = \"NOT_SET\" }\n\
                [keys.b]\nsecret = { file = \"not-there\" }\n";
    let ended = Evergate::builder(EXE).config(text).try_start().err().unwrap();
    assert_eq!(ended.code(), 78);
    assert!(ended.stderr.contains("NOT_SET") && ended.stderr.contains("not-there"), "{}", ended.stderr);
}

const TLS: &str = "[server]\nlisten = [\"127.0.0.1:0\"]\ntls = { cert = \"cert.pem\", key = \"key.pem\" }\n\
                   [admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\ntargets = [{ upstream = \"echo\" }]\n\
                   [timeouts]\nheader = \"500ms\"\nclient_idle = \"500ms\"\n";

#[test]
fn a_listener_speaks_tls() {
    let identity = Identity::generate();
    let config = identity.client_config(&["http/1.1"]);
    let gateway = Evergate::builder(EXE)
        .config(TLS)
        .file("cert.pem", &identity.cert_pem)
        .file("key.pem", &identity.key_pem)
        .tls(&config)
        .start();
    for alpn in [&["http/1.1"][..], &[]] {
        let mut raw = Raw::connect_tls(&gateway.addr(), &identity.client_config(alpn));
        for _ in 0..2 {
            raw.send(&chat_with(""));
            assert_eq!(raw.read_response(LIMIT).content(), "Say hello");
        }
        assert_eq!(raw.link().alpn(), alpn.first().map(|name| name.as_bytes()));
    }
    // Plain HTTP on the TLS port, and half a handshake: closed, and nobody else notices (B17).
    for bytes in [&get_request("/healthz", "")[..], b"\x16\x03\x01", b""] {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(bytes);
        let (_, gone) = raw.read_to_close(LIMIT);
        assert!(matches!(gone, Gone::Eof | Gone::Reset));
    }
    let mut raw = Raw::connect_tls(&gateway.addr(), &config);
    raw.send(&get_request("/healthz", ""));
    assert_eq!(raw.read_response(LIMIT).status, 200);
}

#[test]
fn a_certificate_that_cannot_serve_stops_the_start() {
    let (one, other) = (Identity::generate(), Identity::generate());
    for (cert, key) in
        [(&one.cert_pem[..], &other.key_pem[..]), ("no certificate", &one.key_pem), (&one.cert_pem, "no key")]
    {
        let ended = Evergate::builder(EXE).config(TLS).file("cert.pem", cert).file("key.pem", key).try_start();
        let ended = ended.err().unwrap();
        assert_eq!(ended.code(), 78, "{}", ended.stderr);
        assert!(ended.stderr.contains(".pem"), "{}", ended.stderr);
    }
}

#[test]
fn echo_needs_a_line_in_a_file() {
    let fake = FakeUpstream::start();
    let gateway = Evergate::builder(EXE).config(gateway_config(fake.base_url(), &["ok"], "")).start();
    let response = evergate_testkit::post_chat(&gateway.addr(), "echo", false, &Value::Null);
    assert_error(&response, 404, "model_not_found");
    assert_alive(&echo_with(""));
}

const PAGE: &str = "https://app.example";

/// B16: what a page on the list is told, with auth off and with keys; another page is treated as if there were no list.
#[test]
fn b16_listed_pages_may_call_and_others_may_not() {
    let open = "[server]\nlisten = [\"127.0.0.1:0\"]\ncors = [\"https://app.example\", \"http://localhost:3000\"]\n";
    let keyed = format!("{open}auth = \"keys\"\n");
    let rest = "[admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\ntargets = [{ upstream = \"echo\" }]\n";
    let key = format!("authorization: Bearer {KEY_A}\r\n");
    for (text, key, refusal) in [
        (format!("{open}{rest}"), "", (403, "origin_not_allowed")),
        (format!("{keyed}{rest}[keys.a]\nsecret = {{ env = \"TEAM_A\" }}\n"), key.as_str(), (401, "invalid_api_key")),
    ] {
        let gateway = Evergate::builder(EXE).config(text).env("TEAM_A", KEY_A).start();
        let mut raw = Raw::connect(&gateway.addr());
        for origin in [PAGE, "http://localhost:3000"] {
            let asked = "access-control-request-method: POST\r\n\
                         access-control-request-headers: Authorization, content-type,x-stainless-os, x-evil\r\n";
            raw.send(&options(CHAT, &format!("origin: {origin}\r\nsec-fetch-site: cross-site\r\n{asked}")));
            let told = raw.read_response(LIMIT);
            assert_eq!((told.status, told.body.len()), (204, 0), "{}", told.text());
            assert_page(&told, Some(origin));
            assert_eq!(told.header("access-control-allow-methods"), Some("GET, POST, DELETE"));
            assert_eq!(
                told.header("access-control-allow-headers"),
                Some("authorization, content-type, x-stainless-os")
            );
            assert_eq!(told.header("access-control-max-age"), Some("600"));

            let page = format!("origin: {origin}\r\nsec-fetch-site: cross-site\r\n");
            raw.send(&chat_with(&format!("{page}{key}")));
            let answer = raw.read_response(LIMIT);
            assert_eq!(answer.content(), "Say hello");
            assert_page(&answer, Some(origin));
            raw.send(&post_request(CHAT, &format!("{page}{key}"), &chat_body("echo", true, &Value::Null)));
            assert_page(&raw.read_response(LIMIT), Some(origin));
            raw.send(&post_request(CHAT, &format!("{page}{key}"), "{"));
            let error = raw.read_response(LIMIT);
            assert_error(&error, 400, "invalid_json");
            assert_page(&error, Some(origin));
        }
        for origin in [
            "https://evil.example",
            "https://app.example.evil.example",
            "https://app.example:8443",
            "http://app.example",
            "HTTPS://APP.EXAMPLE",
            "null",
            "https://app.example, https://app.example",
            "https://app.example\r\norigin: https://app.example",
        ] {
            raw.send(&options(CHAT, &format!("origin: {origin}\r\naccess-control-request-method: POST\r\n")));
            let told = raw.read_response(LIMIT);
            assert_error(&told, refusal.0, refusal.1);
            assert_page(&told, None);
            raw.send(&chat_with(&format!("origin: {origin}\r\n{key}")));
            let answer = raw.read_response(LIMIT);
            assert_eq!(answer.status, if key.is_empty() { 403 } else { 200 }, "{origin}");
            assert_page(&answer, None);
        }
        // No question of a browser, no origin, another host: as without a list.
        raw.send(&options(CHAT, &format!("origin: {PAGE}\r\n{key}")));
        assert_error(&raw.read_response(LIMIT), 405, "method_not_allowed");
        raw.send(&chat_with(key));
        assert_page(&raw.read_response(LIMIT), None);
        let foreign = format!("GET /v1/models HTTP/1.1\r\nhost: evil.example\r\norigin: {PAGE}\r\n\r\n");
        raw.send(foreign.as_bytes());
        assert_error(&raw.read_response(LIMIT), refusal.0, refusal.1);
    }
}

/// Without a list nothing is said to browsers.
#[test]
fn b16_pages_are_told_nothing_by_default() {
    let gateway = with_keys();
    let mut raw = Raw::connect(&gateway.addr());
    let key = format!("authorization: Bearer {KEY_A}\r\n");
    raw.send(&options(CHAT, &format!("{key}origin: {PAGE}\r\naccess-control-request-method: POST\r\n")));
    let told = raw.read_response(LIMIT);
    assert_error(&told, 405, "method_not_allowed");
    assert_page(&told, None);
    raw.send(&chat_with(&format!("{key}origin: {PAGE}\r\n")));
    assert_page(&raw.read_response(LIMIT), None);
}

fn options(path: &str, fields: &str) -> Vec<u8> {
    format!("OPTIONS {path} HTTP/1.1\r\nhost: localhost\r\n{fields}\r\n").into_bytes()
}

/// The answer is for that page, or says nothing to any; credentials are for none.
#[track_caller]
fn assert_page(response: &Response, origin: Option<&str>) {
    let said = |name: &str| response.header(name);
    assert_eq!(said("access-control-allow-origin"), origin);
    assert_eq!(said("vary"), origin.map(|_| "Origin"));
    assert_eq!(said("access-control-expose-headers").is_some(), origin.is_some());
    assert_eq!(said("access-control-allow-credentials"), None);
    assert!(origin.is_some() || !response.headers.iter().any(|(name, _)| name.starts_with("access-control-")));
}
