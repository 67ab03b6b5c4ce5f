//! The one I/O type under an upstream connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

/// Counts open connections for as long as one lives.
#[derive(Debug)]
struct Open(Arc<AtomicU32>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

/// A connection to an upstream. Writes are never vectored, so that every byte passes one place in order.
#[derive(Debug)]
pub(crate) struct UpstreamIo {
    stream: Stream,
    _open: Open,
}

impl UpstreamIo {
    pub(crate) fn tcp(stream: TcpStream, open: &Arc<AtomicU32>) -> Self {
        Self::new(Stream::Tcp(stream), open)
    }

    pub(crate) fn tls(stream: TlsStream<TcpStream>, open: &Arc<AtomicU32>) -> Self {
        Self::new(Stream::Tls(Box::new(stream)), open)
    }

    pub(crate) fn unix(stream: UnixStream, open: &Arc<AtomicU32>) -> Self {
        Self::new(Stream::Unix(stream), open)
    }

    fn new(stream: Stream, open: &Arc<AtomicU32>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self { stream, _open: Open(Arc::clone(open)) }
    }
}

macro_rules! each {
    ($self:ident, $stream:ident => $body:expr) => {
        match &mut $self.get_mut().stream {
            Stream::Tcp($stream) => {
                let $stream = Pin::new($stream);
                $body
            }
            Stream::Tls($stream) => {
                let $stream = Pin::new(&mut **$stream);
                $body
            }
            Stream::Unix($stream) => {
                let $stream = Pin::new($stream);
                $body
            }
        }
    };
}

impl AsyncRead for UpstreamIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for UpstreamIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, stream => stream.poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_shutdown(cx))
    }
}
