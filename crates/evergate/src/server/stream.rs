//! How a connection reaches us, and what the kernel can be asked about it.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::server::TlsStream;

/// How a connection reaches us.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
    /// A Unix socket.
    Unix(UnixStream),
}

macro_rules! each {
    ($self:ident, $stream:ident => $body:expr) => {
        match $self {
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

impl Stream {
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_read(cx, buf))
    }

    /// Writes the parts one behind the other, as far as they go; says how many bytes went.
    pub(super) fn poll_write_parts(&mut self, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match parts {
            [one] => each!(self, stream => stream.poll_write(cx, one)),
            parts => each!(self, stream => stream.poll_write_vectored(cx, parts)),
        }
    }

    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_flush(cx))
    }

    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_shutdown(cx))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Tls(stream) => stream.get_ref().0.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }

    /// Whether HTTP/2 was agreed on in the TLS handshake.
    pub(super) fn is_h2_by_alpn(&self) -> bool {
        matches!(self, Self::Tls(stream) if stream.get_ref().1.alpn_protocol() == Some(b"h2"))
    }

    /// Takes what lies in the kernel by now, before the runtime has been told of it. Nothing where TLS is in between,
    /// where nothing lies there, and after an end or an error, which the next ordinary read says in its own way.
    pub(super) fn take_now(&self, piece: &mut [u8]) -> usize {
        let read = match self {
            Self::Tcp(stream) => rustix::net::recv(stream, piece, RecvFlags::DONTWAIT),
            Self::Unix(stream) => rustix::net::recv(stream, piece, RecvFlags::DONTWAIT),
            Self::Tls(_) => return 0,
        };
        read.map_or(0, |(read, _)| read)
    }

    /// Whether bytes lie in the kernel that were not read, whatever the runtime knows of them.
    pub(super) fn has_unread(&self) -> bool {
        let mut byte = [0; 1];
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        rustix::net::recv(self.fd(), &mut byte[..], flags).is_ok_and(|(read, _)| read > 0)
    }

    /// Bytes that were written and that the other side's kernel has not taken yet; 0 when the system does not say.
    pub(super) fn unsent(&self) -> u32 {
        evergate_sys::unsent_bytes(self.fd()).unwrap_or(0)
    }

    /// Makes the close that follows a reset, which also frees what lies in the kernel unsent.
    pub(super) fn reset_at_close(&self) {
        // A socket that refuses is dead already.
        let _ = rustix::net::sockopt::set_socket_linger(self.fd(), Some(Duration::ZERO));
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Self::poll_read(self.get_mut(), cx, buf)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// The instant that `has_unread` is for: the bytes are there and the runtime says "nothing".
    #[test]
    fn bytes_are_seen_before_the_runtime_hears_of_them() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            let (mut client, server) = std::os::unix::net::UnixStream::pair().unwrap();
            server.set_nonblocking(true).unwrap();
            let mut stream = Stream::Unix(UnixStream::from_std(server).unwrap());
            assert!(!stream.has_unread());
            client.write_all(b"GET").unwrap();
            let mut piece = [0; 8];
            let mut buf = ReadBuf::new(&mut piece);
            let told = std::future::poll_fn(|cx| Poll::Ready(stream.poll_read(cx, &mut buf))).await;
            assert!(told.is_pending() && stream.has_unread());
            assert_eq!((stream.take_now(&mut [0; 8]), stream.has_unread()), (3, false));
        });
    }
}
