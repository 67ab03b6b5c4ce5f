//! Opening a connection: name, TCP or Unix socket, TLS. The caller bounds the whole by `timeouts.connect`.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use evergate_core::config::Transport;
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::io::UpstreamIo;
use crate::tls::Trust;

/// What failed, for the records; the client only learns that no connection could be made.
#[derive(Debug)]
pub(crate) struct ConnectError {
    step: &'static str,
    cause: String,
}

impl ConnectError {
    fn new(step: &'static str, cause: impl fmt::Display) -> Self {
        Self { step, cause: cause.to_string() }
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.cause)
    }
}

/// Opens a connection.
pub(crate) async fn connect(
    transport: &Transport,
    trust: &Trust,
    open: &Arc<AtomicU32>,
) -> Result<UpstreamIo, ConnectError> {
    match transport {
        Transport::Unix { path } => {
            let stream = UnixStream::connect(path).await.map_err(|error| ConnectError::new("connect", error))?;
            Ok(UpstreamIo::unix(stream, open))
        }
        Transport::Http { host, port } => Ok(UpstreamIo::tcp(tcp(host, *port).await?, open)),
        Transport::Https { host, port } => {
            let config = trust.config().map_err(|error| ConnectError::new("tls", error))?;
            let name = ServerName::try_from(host.clone()).map_err(|error| ConnectError::new("tls", error))?;
            let stream = tcp(host, *port).await?;
            let stream = TlsConnector::from(config)
                .connect(name, stream)
                .await
                .map_err(|error| ConnectError::new("tls", error))?;
            Ok(UpstreamIo::tls(stream, open))
        }
    }
}

/// Tries the addresses of a name in the resolver's order (RFC 6724) and gives the last one's error.
async fn tcp(host: &str, port: u16) -> Result<TcpStream, ConnectError> {
    let stream = if let Ok(address) = host.parse::<IpAddr>() {
        TcpStream::connect((address, port)).await.map_err(|error| ConnectError::new("connect", error))?
    } else {
        let addresses =
            tokio::net::lookup_host((host, port)).await.map_err(|error| ConnectError::new("resolve", error))?;
        let mut last = ConnectError::new("resolve", "the name has no address");
        let mut found = None;
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    found = Some(stream);
                    break;
                }
                Err(error) => last = ConnectError::new("connect", error),
            }
        }
        found.ok_or(last)?
    };
    // Requests and events are small and complete when written: waiting for more only adds latency.
    stream.set_nodelay(true).map_err(|error| ConnectError::new("connect", error))?;
    Ok(stream)
}
