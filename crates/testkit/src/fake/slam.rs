//! An upstream that closes each connection in the breath in which it finishes the TLS handshake: whoever connects has a
//! connection, sees its end at once, and has sent nothing.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;

use rustls::ServerConnection;

use super::loopback;
use crate::tls::Identity;

/// Slams the door so many times.
pub struct Slam {
    base_url: String,
    slamming: JoinHandle<usize>,
}

impl Slam {
    /// For so many connections, by that name.
    #[must_use]
    pub fn start(identity: &Identity, connections: usize) -> Self {
        let (listener, address) = loopback();
        let identity = identity.clone();
        let slamming = std::thread::spawn(move || (0..connections).map(|_| slam(&listener, &identity)).sum());
        Self { base_url: format!("https://localhost:{}/v1", address.port()), slamming }
    }

    /// With the path of the API.
    #[must_use]
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// Waits for all of them; gives the bytes of requests that came all the same.
    #[must_use]
    pub fn join(self) -> usize {
        self.slamming.join().expect("the slamming thread")
    }
}

fn slam(listener: &TcpListener, identity: &Identity) -> usize {
    let (mut stream, _) = listener.accept().expect("a connection");
    let mut tls = ServerConnection::new(identity.server_config()).expect("a TLS server");
    while !tls.wants_write() {
        tls.read_tls(&mut stream).expect("the client's hello");
        tls.process_new_packets().expect("a good hello");
    }
    tls.send_close_notify();
    let mut all = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut all).expect("room in memory");
    }
    // One write, so that the client reads the end together with the handshake.
    stream.write_all(&all).expect("a client that listens");
    stream.shutdown(Shutdown::Write).expect("an open socket");
    read_on(&mut tls, &mut stream)
}

/// Bytes of requests until the client's end.
fn read_on(tls: &mut ServerConnection, stream: &mut TcpStream) -> usize {
    let mut requests = Vec::new();
    while let Ok(1..) = tls.read_tls(stream) {
        if tls.process_new_packets().is_err() {
            break;
        }
        // Nothing more for now is an error here.
        let _ = tls.reader().read_to_end(&mut requests);
    }
    requests.len()
}
