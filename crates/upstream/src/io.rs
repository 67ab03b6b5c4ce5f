//! The one I/O type under an upstream connection.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

use crate::stall::{Patience, Stall};

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

/// A connection to an upstream.
#[derive(Debug)]
pub(crate) struct UpstreamIo {
    stream: Stream,
    stall: Stall,
    _open: Open,
}

/// What a connection is given beside its stream.
#[derive(Clone, Debug)]
pub(crate) struct Care {
    /// Counts open connections.
    pub(crate) open: Arc<AtomicU32>,
    pub(crate) patience: Patience,
}

impl Stream {
    fn socket(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Tls(stream) => stream.get_ref().0.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl UpstreamIo {
    pub(crate) fn tcp(stream: TcpStream, care: &Care) -> Self {
        Self::new(Stream::Tcp(stream), care)
    }

    pub(crate) fn tls(stream: TlsStream<TcpStream>, care: &Care) -> Self {
        Self::new(Stream::Tls(Box::new(stream)), care)
    }

    pub(crate) fn unix(stream: UnixStream, care: &Care) -> Self {
        Self::new(Stream::Unix(stream), care)
    }

    fn new(stream: Stream, care: &Care) -> Self {
        care.open.fetch_add(1, Ordering::Relaxed);
        Self { stream, stall: Stall::new(care.patience.clone()), _open: Open(Arc::clone(&care.open)) }
    }
}

macro_rules! each {
    ($streams:expr, $stream:ident => $body:expr) => {
        match $streams {
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
        each!(&mut self.get_mut().stream, stream => stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for UpstreamIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = each!(&mut this.stream, stream => stream.poll_write(cx, bytes));
        this.stall.watch(written, this.stream.socket(), cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = each!(&mut this.stream, stream => stream.poll_write_vectored(cx, parts));
        this.stall.watch(written, this.stream.socket(), cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = each!(&mut this.stream, stream => stream.poll_flush(cx));
        this.stall.watch(flushed, this.stream.socket(), cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut self.get_mut().stream, stream => stream.poll_shutdown(cx))
    }
}
