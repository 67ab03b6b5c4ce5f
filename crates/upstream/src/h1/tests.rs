use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;
use crate::clock::Clock;
use crate::io::Care;
use crate::stall::Patience;

/// Runs a conversation; one that hangs fails.
fn talk<F: Future<Output = ()>>(conversation: impl FnOnce(Connection, UnixStream) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let patience = Patience { clock: Clock::new().unwrap(), limit: Duration::from_secs(60), unsent: |_| None };
        let care = Care { open: Arc::new(AtomicU32::new(0)), patience };
        let connection = Connection::new(UpstreamIo::unix(ours, &care));
        tokio::time::timeout(Duration::from_secs(20), conversation(connection, theirs)).await.unwrap();
    });
}

fn request(body_bytes: usize) -> Box<Outgoing> {
    let head = format!("POST / HTTP/1.1\r\ncontent-length: {body_bytes}\r\n\r\n");
    Box::new(Outgoing::new(head.into_bytes(), vec![b'x'; body_bytes].into()))
}

async fn ask(connection: &mut Connection, mut request: Box<Outgoing>) -> Result<u16, (Broken, bool)> {
    let head = poll_fn(|cx| connection.poll_head(&mut request, cx)).await;
    let head = head.map_err(|broken| (broken, request.has_begun()))?;
    connection.go_on_sending(request);
    Ok(head.status.as_u16())
}

/// The rest of the answer, and how it ends.
async fn rest(connection: &mut Connection) -> (String, Result<(), Broken>) {
    let mut text = String::new();
    loop {
        match poll_fn(|cx| connection.poll_body(cx)).await {
            Ok(Some(data)) => text.push_str(std::str::from_utf8(&data).unwrap()),
            Ok(None) => return (text, Ok(())),
            Err(broken) => return (text, Err(broken)),
        }
    }
}

#[test]
fn a_connection_takes_one_request_after_the_other() {
    talk(|mut connection, mut peer| async move {
        for _ in 0..3 {
            let answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\nt: u\r\n\r\n";
            let serve = async {
                let mut seen = [0; 512];
                let count = peer.read(&mut seen).await.unwrap();
                assert!(seen[..count].ends_with(b"\r\n\r\nxxxxx"));
                for byte in answer {
                    peer.write_all(&[*byte]).await.unwrap();
                    tokio::task::yield_now().await;
                }
            };
            let call = async {
                assert_eq!(ask(&mut connection, request(5)).await.unwrap(), 200);
                let (text, end) = rest(&mut connection).await;
                assert_eq!((text.as_str(), end.is_ok()), ("abc", true));
            };
            tokio::join!(serve, call);
            assert!(connection.is_reusable());
        }
    });
}

#[test]
fn a_byte_too_many_ends_a_connection() {
    for (answer, text) in [("content-length: 2\r\n\r\nabc", "ab"), ("transfer-encoding: chunked\r\n\r\n0\r\n\r\nx", "")]
    {
        talk(|mut connection, mut peer| async move {
            let serve = async {
                let _ = peer.read(&mut [0; 512]).await.unwrap();
                peer.write_all(format!("HTTP/1.1 200 OK\r\n{answer}").as_bytes()).await.unwrap();
            };
            let (status, ()) = tokio::join!(ask(&mut connection, request(1)), serve);
            assert_eq!(status.unwrap(), 200);
            assert_eq!(rest(&mut connection).await.0, text);
            assert!(!connection.is_reusable());
        });
    }
}

#[test]
fn nothing_is_sent_on_a_connection_that_is_not_silent() {
    for word in ["HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", ""] {
        talk(|mut connection, mut peer| async move {
            peer.write_all(word.as_bytes()).await.unwrap();
            peer.shutdown().await.unwrap();
            // The runtime hears of it in its next turn.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let (broken, has_begun) = ask(&mut connection, request(1)).await.unwrap_err();
            assert!(matches!(broken, Broken::Ended) && !has_begun, "{broken:?}");
            drop(connection);
            assert_eq!(peer.read(&mut [0; 8]).await.unwrap_or(0), 0);
        });
    }
}

#[test]
fn an_answer_that_comes_early_is_heard() {
    const BODY: usize = 8 << 20;
    // Read on while the rest of the request is taken; or everything is closed with the rest unread.
    for is_taken in [true, false] {
        talk(|mut connection, mut peer| async move {
            let serve = async move {
                let mut seen = vec![0; 1000];
                peer.read_exact(&mut seen).await.unwrap();
                peer.write_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\n").await.unwrap();
                if is_taken {
                    let left = BODY + request(BODY).head_len() - seen.len();
                    let mut rest = vec![0; left];
                    peer.read_exact(&mut rest).await.unwrap();
                }
                peer.write_all(b"no").await.unwrap();
                is_taken.then_some(peer)
            };
            let call = async {
                assert_eq!(ask(&mut connection, request(BODY)).await.unwrap(), 413);
                let (text, end) = rest(&mut connection).await;
                assert_eq!((text.as_str(), end.is_ok()), ("no", true));
            };
            let ((), _peer) = tokio::join!(call, serve);
            assert_eq!(connection.is_reusable(), is_taken);
        });
    }
}

#[test]
fn an_end_is_one_only_where_the_framing_has_it() {
    for (answer, text, is_whole) in [
        ("\r\nabc", "abc", true),
        ("content-length: 4\r\n\r\nabc", "abc", false),
        ("transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", "abc", false),
        ("transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\n\n", "abcd", false),
    ] {
        talk(|mut connection, mut peer| async move {
            let serve = async move {
                let _ = peer.read(&mut [0; 512]).await.unwrap();
                peer.write_all(format!("HTTP/1.1 200 OK\r\n{answer}").as_bytes()).await.unwrap();
            };
            let (status, ()) = tokio::join!(ask(&mut connection, request(1)), serve);
            assert_eq!(status.unwrap(), 200);
            let (seen, end) = rest(&mut connection).await;
            assert_eq!((seen.as_str(), end.is_ok()), (text, is_whole), "{answer:?}");
            assert!(!connection.is_reusable());
        });
    }
}
