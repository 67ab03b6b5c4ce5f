//! Request heads and framing that one server reads differently than the next: refused, each, and nothing is harmed.

use evergate_testkit::link::Gone;
use evergate_testkit::raw::get_request;
use evergate_testkit::{Evergate, Raw, Response};

use crate::support::{CHAT, LIMIT, assert_alive, assert_error, echo, echo_with};

/// Sends bytes on a connection of their own; the answer, after which the connection must have ended with nothing more.
#[track_caller]
fn only_answer(gateway: &Evergate, bytes: &[u8]) -> Response {
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(bytes);
    let response = match raw.try_read_response(LIMIT) {
        Ok(response) => response,
        Err(reason) => panic!("{reason} to {:?}", String::from_utf8_lossy(bytes)),
    };
    let (rest, _) = raw.read_to_close(LIMIT);
    assert!(
        rest.is_empty(),
        "{:?} came after the answer to {:?}",
        String::from_utf8_lossy(&rest),
        String::from_utf8_lossy(bytes)
    );
    response
}

/// B1, B2, B3, B5, B6.
#[test]
fn ambiguous_heads_are_refused() {
    let gateway = echo();
    // What follows each head must never be taken for a request.
    let smuggled = "GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n";
    for fields in [
        "Host: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Host: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "Host: localhost\r\nContent-Length: 0\r\nContent-Length: 0\r\n",
        "Host: localhost\r\nContent-Length: 0\r\nContent-Length: 4\r\n",
        "Host: localhost\r\nContent-Length: 0, 0\r\n",
        "Host: localhost\r\nContent-Length: +0\r\n",
        "Host: localhost\r\nContent-Length: -1\r\n",
        "Host: localhost\r\nContent-Length: 0x0\r\n",
        "Host: localhost\r\nContent-Length: 99999999999999999999\r\n",
        "Host: localhost\r\nContent-Length:\r\n",
        "Host: localhost\r\nTransfer-Encoding: gzip, chunked\r\n",
        "Host: localhost\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Host: localhost\r\nTransfer-Encoding: identity\r\n",
        "Host: localhost\r\nTransfer-Encoding: xchunked\r\n",
        "Host: localhost\r\nHost: localhost\r\n",
        "Host: localhost\r\nHost: other\r\n",
        "Host: a/b@c\r\n",
        "",
        "Host: localhost\r\nX-Bad : 1\r\n",
        "Host: localhost\r\nX-Folded: a\r\n b\r\n",
        "Host: localhost\r\nno colon\r\n",
        "Host: localhost\r\n: no name\r\n",
        "Host: localhost\r\nX: a\0b\r\n",
        "Host: localhost\r\nX: a\rb\r\n",
        "Host: localhost\nX: a\r\n",
    ] {
        let request = format!("POST {CHAT} HTTP/1.1\r\n{fields}\r\n{smuggled}");
        assert_error(&only_answer(&gateway, request.as_bytes()), 400, "malformed_request");
        assert_alive(&gateway);
    }
}

#[test]
fn bad_request_lines_are_refused() {
    let gateway = echo();
    for line in [
        "GET /healthz HTTP/1.1 x",
        "GET  /healthz HTTP/1.1",
        "GET /healthz",
        "G@T /healthz HTTP/1.1",
        "GET /healthz HTTP/2.0",
        "GET /healthz HTTP/1.2",
        "GET /healthz http/1.1",
        "hello",
        "GET http://other/healthz HTTP/1.1",
    ] {
        let request = format!("{line}\r\nhost: localhost\r\n\r\n");
        assert_error(&only_answer(&gateway, request.as_bytes()), 400, "malformed_request");
    }
    let old = format!("POST {CHAT} HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n");
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(old.as_bytes());
    let (bytes, _) = raw.read_to_close(LIMIT);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    assert!(text.contains(" 400 ") && text.contains("malformed_request"), "{text}");
    let lines = "GET /healthz HTTP/1.1\nhost: localhost\n\n";
    assert_error(&only_answer(&gateway, lines.as_bytes()), 400, "malformed_request");
    assert_alive(&gateway);
}

/// A refusal is answered in its turn, behind the answers to earlier requests.
#[test]
fn a_refusal_comes_after_earlier_answers() {
    let gateway = echo();
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(
        &[
            &get_request("/healthz", "")[..],
            b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
            &get_request("/healthz", ""),
        ]
        .concat(),
    );
    assert_eq!(raw.read_response(LIMIT).status, 200);
    assert_error(&raw.read_response(LIMIT), 400, "malformed_request");
    assert!(raw.read_to_close(LIMIT).0.is_empty());
}

/// B4.
#[test]
fn broken_chunks_are_refused() {
    let gateway = echo();
    let long_extension = format!("1;{}\r\nx\r\n0\r\n\r\n", "e".repeat(100_000));
    for body in [
        "x\r\n",
        "-1\r\n",
        "5\r\nhello!\r\n0\r\n\r\n",
        "fffffffffffffffff\r\nx",
        "2\n{}\n0\n\n",
        "\r\n",
        long_extension.as_str(),
    ] {
        let request = format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n{body}");
        let shown = &body[..body.len().min(30)];
        let mut raw = Raw::connect(&gateway.addr());
        let _ = raw.try_send(request.as_bytes());
        match raw.try_read_response(LIMIT) {
            Ok(response) => assert_error(&response, 400, "malformed_request"),
            Err(reason) => panic!("{shown:?}: {reason}"),
        }
        assert!(raw.read_to_close(LIMIT).0.is_empty(), "{shown:?}");
        assert_alive(&gateway);
    }
}

/// B7.
#[test]
fn heads_beyond_the_limits_are_refused() {
    let gateway = echo_with("[limits]\nheader = \"4KiB\"\nheaders = 10\nuri = \"1KiB\"\n");
    let large = get_request("/healthz", &format!("x: {}\r\n", "y".repeat(5000)));
    assert_error(&only_answer(&gateway, &large), 431, "headers_too_large");
    // Without an end there is nothing to wait for either.
    let endless = format!("GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: {}", "y".repeat(10_000));
    assert_error(&only_answer(&gateway, endless.as_bytes()), 431, "headers_too_large");
    let many = get_request("/healthz", &"x: y\r\n".repeat(10));
    assert_error(&only_answer(&gateway, &many), 431, "headers_too_large");
    let long = get_request(&format!("/{}", "x".repeat(1024)), "");
    assert_error(&only_answer(&gateway, &long), 414, "uri_too_long");

    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&get_request("/healthz", &"x: y\r\n".repeat(9)));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    raw.send(&get_request(&format!("/{}", "x".repeat(1023)), ""));
    assert_error(&raw.read_response(LIMIT), 404, "not_found");
}

#[test]
fn the_default_limits_hold() {
    let gateway = echo();
    let large = get_request("/healthz", &format!("x: {}\r\n", "y".repeat(500_000)));
    let mut raw = Raw::connect(&gateway.addr());
    let _ = raw.try_send(&large);
    assert_error(&raw.read_response(LIMIT), 431, "headers_too_large");
    let long = get_request(&format!("/{}", "x".repeat(10_000)), "");
    assert_error(&only_answer(&gateway, &long), 414, "uri_too_long");
    assert_alive(&gateway);
}

/// B17.
#[test]
fn tls_on_a_plain_port_is_closed_at_once() {
    let gateway = echo();
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03");
    let (bytes, gone) = raw.read_to_close(LIMIT);
    assert!(bytes.is_empty() && matches!(gone, Gone::Eof | Gone::Reset));
    assert_alive(&gateway);
}

/// B11: the unread body of a request that was answered early is never taken for the next request.
#[test]
fn an_unread_body_is_not_the_next_request() {
    let gateway = echo();
    let inner = String::from_utf8(get_request("/v1/models", "")).unwrap();
    let request =
        format!("POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{inner}", inner.len());
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&[request.as_bytes(), &get_request("/also-nothing", "")].concat());
    let first = raw.read_response(LIMIT);
    assert_eq!((first.status, first.error_code().as_str()), (404, "not_found"));
    // Either the connection ends here, or the next answer is to the next request.
    if let Ok(second) = raw.try_read_response(LIMIT) {
        assert_error(&second, 404, "not_found");
    }
    assert_alive(&gateway);
}

/// B12.
#[test]
fn an_upgrade_is_not_taken_up() {
    let gateway = echo();
    let mut raw = Raw::connect(&gateway.addr());
    for fields in [
        "connection: upgrade\r\nupgrade: websocket\r\n",
        "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
    ] {
        raw.send(&get_request("/healthz", fields));
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost:80\r\n\r\n");
    let response = raw.read_response(LIMIT);
    assert!((400..500).contains(&response.status), "{}", response.status);
    assert_alive(&gateway);
}
