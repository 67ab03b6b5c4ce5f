//! Opening a connection: name, TCP or Unix socket, TLS; each step within its limit.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use evergate_core::config::Transport;
use evergate_core::deadline::Limit;
use evergate_core::{Deadline, Error, Fault};
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::certificate;
use crate::clock::Clock;
use crate::dial::dial;
use crate::io::{Care, UpstreamIo};
use crate::resolve::{Resolver, Unresolved};
use crate::tls::Trust;

/// What failed.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// The name has no address.
    Name(Arc<str>),
    /// Nobody answers at the address.
    Refused(io::Error),
    /// Every local port towards the address is taken.
    NoPort(io::Error),
    /// The peer is not who it should be, or speaks no TLS.
    Tls(String),
    /// A limit came first.
    Late(Step, Limit),
}

/// What was being waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Name,
    Connection,
    Tls,
}

impl ConnectError {
    /// For the client, which learns no addresses and nothing of certificates; those are the record's.
    pub(crate) fn error(&self, name: &str) -> Error {
        let failed = || {
            let message = format!("no connection to the upstream \"{name}\" could be made");
            Error::new(Fault::UpstreamConnectFailed, message)
        };
        match self {
            Self::Name(why) => failed().detail(format_args!("resolve: {why}")),
            Self::Refused(why) => failed().detail(format_args!("connect: {why}")),
            Self::Tls(why) => failed().detail(format_args!("tls: {why}")),
            Self::NoPort(why) => {
                let message = format!("there is no free port for a connection to the upstream \"{name}\"");
                Error::new(Fault::Overloaded, message).detail(format_args!("connect: {why}"))
            }
            Self::Late(step, limit) => limit.overrun(
                name,
                match step {
                    Step::Name => "was not found by its name within",
                    Step::Connection => "did not take a connection within",
                    Step::Tls => "did not finish the TLS handshake within",
                },
            ),
        }
    }
}

/// Opens connections to one upstream.
#[derive(Clone, Copy)]
pub(crate) struct Connector<'a> {
    pub(crate) transport: &'a Transport,
    pub(crate) trust: &'a Trust,
    pub(crate) resolver: &'a Resolver,
    pub(crate) clock: &'a Clock,
    /// `timeouts.dns`.
    pub(crate) dns: Duration,
    pub(crate) care: &'a Care,
}

impl Connector<'_> {
    /// Opens one.
    pub(crate) async fn connect(self, until: Deadline) -> Result<UpstreamIo, ConnectError> {
        match self.transport {
            Transport::Unix { path } => {
                let stream = self.within(until, Step::Connection, UnixStream::connect(path)).await?;
                Ok(UpstreamIo::unix(stream.map_err(ConnectError::Refused)?, self.care))
            }
            Transport::Http { host, port } => Ok(UpstreamIo::tcp(self.tcp(host, *port, until).await?, self.care)),
            Transport::Https { host, port } => Ok(UpstreamIo::tls(self.tls(host, *port, until).await?, self.care)),
        }
    }

    async fn within<F: Future>(self, until: Deadline, step: Step, future: F) -> Result<F::Output, ConnectError> {
        let ended = self.clock.timeout_at(until.at(), future).await;
        ended.map_err(|_| ConnectError::Late(step, until.limit()))
    }

    async fn tls(self, host: &str, port: u16, until: Deadline) -> Result<TlsStream<TcpStream>, ConnectError> {
        let config = self.trust.config().map_err(ConnectError::Tls)?;
        let name = ServerName::try_from(host.to_owned()).map_err(|error| ConnectError::Tls(error.to_string()))?;
        let stream = self.tcp(host, port, until).await?;
        let shaken = self.within(until, Step::Tls, TlsConnector::from(config).connect(name, stream)).await?;
        shaken.map_err(|error| ConnectError::Tls(certificate::words(&error)))
    }

    async fn tcp(self, host: &str, port: u16, until: Deadline) -> Result<TcpStream, ConnectError> {
        let addresses = match host.parse::<IpAddr>() {
            Ok(address) => Arc::from([address]),
            Err(_) => self.resolve(host, until).await?,
        };
        let dialled = self.within(until, Step::Connection, dial(&addresses, port, self.clock)).await?;
        let stream = dialled.map_err(|error| refused(error, &addresses, port))?;
        // Requests and events are small and complete when written: waiting for more only adds latency.
        stream.set_nodelay(true).map_err(ConnectError::Refused)?;
        Ok(stream)
    }

    async fn resolve(self, host: &str, until: Deadline) -> Result<Arc<[IpAddr]>, ConnectError> {
        let until = until.min(Deadline::new(Instant::now(), self.dns, Limit::Dns));
        self.resolver.resolve(host, until).await.map_err(|unresolved| match unresolved {
            Unresolved::Failed(why) => ConnectError::Name(why),
            Unresolved::Late => ConnectError::Late(Step::Name, until.limit()),
        })
    }
}

/// EADDRNOTAVAIL has two meanings (connect(2), ip(7)): no port is free, or this machine has no address of that family.
/// Connecting a datagram socket sends nothing, needs no port of TCP's, and tells them apart.
fn refused(error: io::Error, addresses: &[IpAddr], port: u16) -> ConnectError {
    let has_source = |address: &IpAddr| {
        let any = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { IpAddr::from(Ipv6Addr::UNSPECIFIED) };
        match UdpSocket::bind((any, 0)).and_then(|socket| socket.connect(SocketAddr::new(*address, port))) {
            Ok(()) => true,
            // Nor is there a port for datagrams.
            Err(error) => error.kind() == io::ErrorKind::AddrInUse,
        }
    };
    if error.kind() == io::ErrorKind::AddrNotAvailable && addresses.iter().any(has_source) {
        ConnectError::NoPort(error)
    } else {
        ConnectError::Refused(error)
    }
}
