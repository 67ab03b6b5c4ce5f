//! HTTP/2, by prior knowledge and by ALPN, with hyper's own client.

use std::future::Future;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_testkit::raw::chat_body;
use evergate_testkit::sse::{Event, Reader, text_of};
use evergate_testkit::{Evergate, FakeUpstream, Identity, Raw, wait_until};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::h2_wire::{DATA, END, Frame, HEADERS, RESET, WINDOW_UPDATE, Wire};
use crate::support::{
    CHAT, EXE, LIMIT, ONE_WORKER, assert_alive, assert_counted, assert_good_stream, assert_left_soon, before, echo,
    echo_with, is_full,
};
use crate::until::until;

/// For what must not come.
const NOTHING: Duration = Duration::from_millis(200);

type Client = SendRequest<Full<Bytes>>;

/// Runs a test's client side, at most as long as any test may take.
fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(3 * LIMIT, test).await.expect("in time") })
}

async fn connect(gateway: &Evergate) -> Client {
    over(TokioIo::new(TcpStream::connect(gateway.addr()).await.unwrap())).await
}

#[allow(clippy::disallowed_methods, reason = "a task of the test, which ends with its runtime")]
async fn over<T>(io: T) -> Client
where
    T: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::runtime::Handle::current().spawn(connection);
    sender
}

fn post(model: &str, stream: bool, extra: &Value) -> Request<Full<Bytes>> {
    request(Method::POST, CHAT, &chat_body(model, stream, extra))
}

fn request(method: Method, path: &str, body: &str) -> Request<Full<Bytes>> {
    Request::builder()
        .method(method)
        .uri(format!("http://localhost{path}"))
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body.to_owned())))
        .unwrap()
}

async fn ask(client: &mut Client, request: Request<Full<Bytes>>) -> (StatusCode, Value) {
    let response = client.send_request(request).await.unwrap();
    assert!(response.headers().contains_key("x-request-id"));
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

/// The events of a stream, each data frame holding whole ones.
async fn events(mut body: Incoming) -> Vec<Event> {
    let (mut reader, mut events) = (Reader::default(), Vec::new());
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.unwrap().into_data() {
            events.extend(reader.push(&data, Instant::now()));
            assert!(reader.rest().is_empty(), "a frame ends within an event");
        }
    }
    events
}

#[test]
fn prior_knowledge_answers_whole_and_streaming() {
    let gateway = echo();
    run(async {
        let mut client = connect(&gateway).await;
        for _ in 0..3 {
            let (status, value) = ask(&mut client, post("echo", false, &Value::Null)).await;
            assert_eq!((status.as_u16(), &value["choices"][0]["message"]["content"]), (200, &json!("Say hello")));
            let response = client.send_request(post("echo", true, &Value::Null)).await.unwrap();
            assert_eq!(response.headers()["content-type"], "text/event-stream");
            assert!(!response.headers().contains_key("connection"));
            let events = events(response.into_body()).await;
            assert_eq!(text_of(&events), "Say hello");
            assert_good_stream(&events, true);
        }
    });
}

#[test]
fn errors_are_those_of_the_table() {
    let gateway = echo_with("[limits]\nbody = \"4KiB\"\n");
    run(async {
        for (request, status, code) in [
            (request(Method::POST, CHAT, ""), 400, "invalid_json"),
            (request(Method::POST, CHAT, "{}"), 400, "invalid_value"),
            (post("unknown", false, &Value::Null), 404, "model_not_found"),
            (request(Method::GET, CHAT, ""), 405, "method_not_allowed"),
            (request(Method::GET, "/nothing", ""), 404, "not_found"),
            (request(Method::POST, CHAT, &" ".repeat(5000)), 413, "request_too_large"),
        ] {
            let mut client = connect(&gateway).await;
            let (found, value) = ask(&mut client, request).await;
            assert_eq!((found.as_u16(), &value["error"]["code"]), (status, &json!(code)), "{value}");
        }
        // One stream's mistake is not the connection's.
        let mut client = connect(&gateway).await;
        for model in ["unknown", "echo", "unknown", "echo"] {
            let (status, _) = ask(&mut client, post(model, false, &Value::Null)).await;
            assert_eq!(status.as_u16(), if model == "echo" { 200 } else { 404 });
        }
    });
}

/// B7: what a head may be does not depend on the protocol; `framing` has the same for HTTP/1.1.
#[test]
fn b7_heads_beyond_the_limits_are_refused() {
    let gateway = echo_with("[limits]\nheader = \"4KiB\"\nheaders = 10\nuri = \"1KiB\"\n");
    let get = |path: &str, fields: &[(String, String)]| {
        let mut request = request(Method::GET, path, "");
        request.headers_mut().clear();
        for (name, value) in fields {
            request.headers_mut().append(http::HeaderName::try_from(name).unwrap(), value.parse().unwrap());
        }
        request
    };
    // The host is a field too.
    let many = |count: usize| vec![("x".to_owned(), "y".to_owned()); count - 1];
    let long = |bytes: usize| format!("/{}", "x".repeat(bytes - 1));
    let one = |bytes: usize| vec![("x-request-id".to_owned(), "b7".to_owned()), ("x".to_owned(), "y".repeat(bytes))];
    run(async {
        let mut client = connect(&gateway).await;
        for (request, status, code) in [
            (get("/healthz", &many(10)), 200, None),
            (get("/healthz", &many(11)), 431, Some("headers_too_large")),
            (get(&long(1024), &[]), 404, Some("not_found")),
            (get(&long(1025), &[]), 414, Some("uri_too_long")),
            (get("/healthz", &one(3_900)), 200, None),
            (get("/healthz", &one(4_100)), 431, Some("headers_too_large")),
            (get("/healthz", &one(20_000)), 431, Some("headers_too_large")),
        ] {
            let (found, value) = ask(&mut client, request).await;
            assert_eq!((found.as_u16(), value["error"]["code"].as_str()), (status, code), "{value}");
        }
        // Far beyond, the library answers by itself; the connection goes on.
        let response = client.send_request(get("/healthz", &one(40_000))).await.unwrap();
        assert_eq!(response.status(), 431);
        assert_eq!(ask(&mut client, get("/healthz", &[])).await.0, 200);
    });
    run(async {
        let mut fields = one(4_100);
        fields[0].1 = "b7-known".to_owned();
        ask(&mut connect(&gateway).await, get("/v1/models", &fields)).await;
    });
    assert_counted(&gateway, 431, "headers_too_large", 4);
    assert_counted(&gateway, 414, "uri_too_long", 1);
    let record = gateway.wait_access("b7-known", LIMIT);
    assert_eq!((&record["method"], &record["route"]), (&json!("GET"), &json!("/v1/models")), "{record}");
    let record = gateway.wait_access("b7", LIMIT);
    assert_eq!((&record["status"], &record["route"]), (&json!(431), &json!("other")), "{record}");
    assert_alive(&gateway);
}

#[test]
fn a_foreign_authority_or_origin_is_refused() {
    let gateway = echo();
    run(async {
        let mut client = connect(&gateway).await;
        let mut foreign = post("echo", false, &Value::Null);
        *foreign.uri_mut() = format!("http://evil.example{CHAT}").parse().unwrap();
        let mut page = post("echo", false, &Value::Null);
        page.headers_mut().insert("origin", "https://evil.example".parse().unwrap());
        for request in [foreign, page] {
            let (status, value) = ask(&mut client, request).await;
            assert_eq!((status.as_u16(), &value["error"]["code"]), (403, &json!("origin_not_allowed")));
        }
    });
}

#[test]
fn many_requests_share_a_connection_at_once() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    run(async {
        let client = connect(&gateway).await;
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..20 {
            let mut client = client.clone();
            tasks.spawn(async move {
                if n % 2 == 0 {
                    ask(&mut client, post("fake/hold", false, &Value::Null)).await.0.as_u16()
                } else {
                    let response = client.send_request(post("fake/hold-mid", true, &Value::Null)).await.unwrap();
                    assert_good_stream(&events(response.into_body()).await, true);
                    200
                }
            });
        }
        until("all twenty at the upstream at once", LIMIT, || fake.request_count() == 20).await;
        fake.release();
        while let Some(status) = tasks.join_next().await {
            assert_eq!(status.unwrap(), 200);
        }
    });
}

/// A3: one stream is left; its upstream hears of it, its neighbour on the connection does not.
#[test]
fn a_cancelled_stream_stops_its_upstream_only() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    assert_left_soon("a stream of HTTP/2", || {
        fake.hold();
        run(async {
            let mut client = connect(&gateway).await;
            let kept = client.send_request(post("fake/hold-mid", true, &Value::Null)).await.unwrap();
            let mut times = Vec::new();
            for _ in 0..10 {
                let index = fake.request_count();
                let left = client.send_request(post("fake/idle-mid", true, &Value::Null)).await.unwrap();
                let began = Instant::now();
                drop(left);
                // Lets the connection's task send the reset while this thread waits for its effect.
                until("the upstream was left", LIMIT, || fake.requests()[index].end.is_some()).await;
                times.push(fake.wait_closed(index, LIMIT).saturating_duration_since(began));
            }
            fake.release();
            assert_good_stream(&events(kept.into_body()).await, true);
            times
        })
    });
}

#[test]
fn alpn_chooses_the_protocol() {
    let identity = Identity::generate();
    let config = identity.client_config(&["http/1.1"]);
    let text = "[server]\nlisten = [\"127.0.0.1:0\"]\ntls = { cert = \"cert.pem\", key = \"key.pem\" }\n\
                [admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\ntargets = [{ upstream = \"echo\" }]\n";
    let gateway = Evergate::builder(EXE)
        .config(text)
        .file("cert.pem", &identity.cert_pem)
        .file("key.pem", &identity.key_pem)
        .tls(&config)
        .start();
    run(async {
        let connector = tokio_rustls::TlsConnector::from(Arc::clone(&identity.client_config(&["h2", "http/1.1"])));
        let tcp = TcpStream::connect(gateway.addr()).await.unwrap();
        let tls = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
        assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let mut client = over(TokioIo::new(tls)).await;
        let mut request = post("echo", true, &Value::Null);
        *request.uri_mut() = format!("https://localhost{CHAT}").parse().unwrap();
        let response = client.send_request(request).await.unwrap();
        assert_good_stream(&events(response.into_body()).await, true);
    });
    wait_until("its access record", LIMIT, || !gateway.access().is_empty());
}

/// A6: a client that reads its connection and opens no window for a stream loses that stream and no other.
#[test]
fn a_stream_without_a_window_is_ended() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\nclient_stall = \"500ms\"\n");
    let mut wire = Wire::connect(&gateway);
    for (n, script) in ["flood", "huge-2000000"].into_iter().enumerate() {
        let (stuck, next) = (1 + 4 * n as u32, 3 + 4 * n as u32);
        // The connection's window is opened, the stream's is not.
        wire.send(WINDOW_UPDATE, 0, 0, &10_000_000_u32.to_be_bytes());
        wire.post_body(stuck, &chat_body(&format!("fake/{script}"), script == "flood", &Value::Null));
        let mut bytes = 0;
        let reset = loop {
            let frame = wire.next().expect("the connection goes on");
            assert_eq!(frame.stream, stuck, "{frame:?}");
            match frame.kind {
                DATA => bytes += frame.payload.len(),
                RESET => break frame,
                _ => {}
            }
        };
        assert!(bytes <= 65_535, "{script}: {bytes}");
        // CANCEL (RFC 9113, 7).
        assert_eq!(reset.payload, [0, 0, 0, 8], "{script}");
        if script == "flood" {
            let _ = fake.wait_closed(n, LIMIT);
        }
        wait_until("its record", LIMIT, || {
            gateway.access().iter().filter(|record| record["cause"] == "client_stalled").count() == n + 1
        });
        wire.get(next);
        assert!(wire.answer(next).0);
    }
}

/// RFC 9110, 9.3.2: the fields say the length that there would be, and nothing comes behind it.
#[test]
fn b16_head_is_refused_without_a_body_over_http2() {
    let gateway = echo();
    let mut wire = Wire::connect(&gateway);
    let mut raw = Raw::connect(&gateway.addr());
    for (n, path) in [CHAT, "/v1/models", "/healthz", "/nothing"].into_iter().enumerate() {
        let stream = 2 * n as u32 + 1;
        wire.ask(stream, END, "HEAD", path);
        let head = wire.skip_to(HEADERS);
        assert_eq!((head.stream, head.flags & END), (stream, END), "{path}");
        raw.send(format!("HEAD {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes());
        let as_h1 = raw.read_head(LIMIT);
        let answer =
            run(async { connect(&gateway).await.send_request(request(Method::HEAD, path, "")).await.unwrap() });
        assert_eq!(answer.status().as_u16(), as_h1.status, "{path}");
        let length = answer.headers()["content-length"].to_str().unwrap();
        assert_eq!(Some(length), as_h1.header("content-length"), "{path}");
        let told = curl(&gateway, &["-I"], path);
        assert!(told.starts_with(&format!("HTTP/2 {}", as_h1.status)) && told.contains(length), "{path}: {told}");
    }
    // Nothing of theirs lies between.
    wire.get(9);
    assert!(wire.answer(9).0);
}

/// What curl says of a path, over HTTP/2 by prior knowledge.
fn curl(gateway: &Evergate, args: &[&str], path: &str) -> String {
    let url = format!("http://{}{path}", gateway.addr());
    let own = ["-sS", "-m", "5", "--http2-prior-knowledge"];
    let output = Command::new("curl").args(own).args(args).arg(url).output().expect("curl, which the tests need");
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

/// B8, B11: a refusal that comes before the body has is read by clients that take the reset behind it for the answer's.
#[test]
fn b8_a_refusal_over_http2_is_read_though_the_body_was_not() {
    let gateway = echo_with("[limits]\nbody = \"4KiB\"\n");
    let body = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(body.path(), vec![b' '; 60_000]).unwrap();
    let data = format!("@{}", body.path().display());
    for _ in 0..if is_full() { 500 } else { 30 } {
        for (path, fields, status) in [
            (CHAT, &[][..], "413"),
            (CHAT, &["-H", "transfer-encoding: chunked"], "413"),
            (CHAT, &["-H", "content-encoding: gzip"], "413"),
            (CHAT, &["-H", "origin: https://evil.example"], "403"),
            ("/nothing", &[], "404"),
            ("/v1/models", &[], "405"),
        ] {
            let args = [fields, &["-o", "/dev/null", "-w", "%{http_code}", "--data-binary", &data]].concat();
            // Again, since a busy machine may keep curl from sending for the gateway's 100 ms.
            let told: Vec<_> = (0..3).map(|_| curl(&gateway, &args, path)).take_while(|told| told != status).collect();
            assert!(told.len() < 3, "{path} {fields:?}: {told:?}");
        }
    }
    assert_alive(&gateway);
}

/// A body that comes to its end soon after its refusal leaves the stream to end in order.
#[test]
fn b11_a_refused_body_that_ends_soon_is_read_over_http2() {
    let gateway = echo();
    let mut wire = Wire::connect(&gateway);
    let ends_in_order = |stream: &u32| {
        wire.ask(*stream, 0, "POST", "/nothing");
        assert_eq!(wire.skip_to(HEADERS).flags & END, 0);
        let content = wire.skip_to(DATA);
        assert!(!content.payload.is_empty() && content.flags & END == 0, "{content:?}");
        wire.send(DATA, END, *stream, b"late");
        let end = wire.next().unwrap();
        let rest = if end.flags & END == 0 { Some(end.kind) } else { None };
        // One that the machine kept from sending for 100 ms is reset behind its end.
        rest.is_none() && !matches!(wire.next_within(NOTHING), Ok(Some(Frame { kind: RESET, .. })))
    };
    assert!([1, 3, 5, 7, 9, 11, 13, 15].iter().any(ends_in_order), "each was reset");
}

/// What is thrown away of a body that nobody asked for is bounded in size and in time, and holds nothing.
#[test]
fn b11_a_refused_body_is_not_waited_for_long_over_http2() {
    let gateway = echo_with(ONE_WORKER);
    let mut wire = Wire::connect(&gateway);
    // Late, or too large: the stream is reset behind the whole answer.
    for (stream, bytes) in [(1, 0), (3, 65_000)] {
        let began = Instant::now();
        wire.ask(stream, 0, "POST", "/nothing");
        (0..bytes / 13_000).for_each(|_| wire.send(DATA, 0, stream, &[b' '; 13_000]));
        wire.send(DATA, 0, stream, &vec![b' '; if bytes == 0 { 0 } else { 2_000 }]);
        assert!(wire.answer(stream).1.contains("not_found"));
        let reset = wire.next().unwrap();
        assert_eq!((reset.kind, reset.stream, &reset.payload[..]), (RESET, stream, &[0; 4][..]), "NO_ERROR");
        assert!(began.elapsed() < LIMIT / 4, "{stream}: {:?}", began.elapsed());
    }
    // Their records and counts are there before the end is: nobody waits for it.
    wire.ask(5, 0, "POST", "/nothing");
    wire.skip_to(HEADERS);
    assert_counted(&gateway, 404, "not_found", 3);
    assert!(wire.answer(5).1.contains("not_found"));
}
