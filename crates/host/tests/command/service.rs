//! The service around the mode: what it refuses, and how it ends.

use evergate_host::service::Stage;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::support::{LONG, exists, plan, run, sim, until};
use super::wire::{chat, read, serve, setup};

#[test]
fn what_is_no_request_for_a_model_is_refused_before_a_program_is_started() {
    run(|house| async move {
        let mut setup = setup(plan(&["cat"]));
        setup.body_bytes_max = 1000;
        let host = serve(&house, setup);
        host.ask_at("/v1/models", "", &chat("x")).await.assert_error(404, "not_found", "0");
        host.say(&"x".repeat(1000)).await.assert_error(413, "request_too_large", "0");
        let path = "/v1/chat/completions";
        read(host.send(path, "", b"{").await).await.assert_error(400, "invalid_json", "0");
        read(host.send(path, "", b"{}").await).await.assert_error(400, "invalid_value", "0");
        read(host.send(path, "", br#"{"model":"m"}"#).await).await.assert_error(400, "invalid_value", "0");
        let mut stream = host.connect().await;
        stream.write_all(b"GET /v1/embeddings HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").await.unwrap();
        let response = read(stream).await;
        response.assert_error(405, "method_not_allowed", "0");
        assert_eq!(response.header("allow"), Some("POST"));
        assert_eq!(house.ear.ended.lock().unwrap().len(), 0);
    });
}

#[test]
fn a_connection_serves_one_request_after_another() {
    run(|house| async move {
        let host = serve(&house, setup(plan(&["cat"])));
        let mut stream = host.connect().await;
        let body = chat("again").to_string();
        for _ in 0..3 {
            let head =
                format!("POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).await.unwrap();
            let mut seen = Vec::new();
            while !String::from_utf8_lossy(&seen).contains("\"total_tokens\":4}}") {
                assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
            }
        }
    });
}

#[test]
fn a_drain_finishes_what_there_is_and_takes_nothing_new() {
    run(|house| async move {
        let folder = super::support::folder();
        let go = folder.path().join("go");
        let host = serve(&house, setup(sim(&["pid", &format!("await:{}", go.display()), "out:done"])));
        let mut idle = host.connect().await;
        let busy = host.send("/v1/chat/completions", "", chat("x").to_string().as_bytes()).await;
        house.heard("pid ", 1).await;
        host.stage.send_replace(Stage::Draining);
        assert_eq!(idle.read(&mut [0]).await.unwrap(), 0, "an idle connection is closed");
        // It is in the socket's queue, which another host would find it in.
        let later = host.send("/v1/chat/completions", "", chat("x").to_string().as_bytes()).await;
        std::fs::write(&go, "").unwrap();
        assert_eq!(read(busy).await.content(), "done");
        assert_eq!(tokio::time::timeout(LONG, host.served).await.unwrap().unwrap(), 0);
        assert_eq!(house.ear.ended.lock().unwrap().len(), 1);
        drop(later);
    });
}

#[test]
fn a_stop_cuts_off_what_is_left() {
    run(|house| async move {
        let host = serve(&house, setup(sim(&["pid", "hang"])));
        let mut idle = host.connect().await;
        let busy = host.send("/v1/chat/completions", "", chat("x").to_string().as_bytes()).await;
        let pid = house.heard("pid ", 1).await[0];
        host.stage.send_replace(Stage::Draining);
        assert_eq!(idle.read(&mut [0]).await.unwrap(), 0, "the drain has begun");
        assert!(exists(pid) && !host.served.is_finished());
        host.stage.send_replace(Stage::Cutting);
        assert_eq!(tokio::time::timeout(LONG, host.served).await.unwrap().unwrap(), 1);
        until("its program is gone too", || !exists(pid)).await;
        drop(busy);
    });
}
