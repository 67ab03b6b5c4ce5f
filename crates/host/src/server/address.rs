//! Where a program listens, and how it is told.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;

use evergate_core::inherit::PROGRAM_SOCKET;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// A port of 127.0.0.1 and a socket's path; the program takes the one it is told of.
#[derive(Clone, Debug)]
pub(crate) struct Address {
    /// None if the program is not told one.
    pub(crate) port: Option<u16>,
    pub(crate) socket: PathBuf,
}

/// A connection to a program.
pub(crate) type Stream = Pin<Box<dyn Io>>;

/// Bytes both ways.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Io for T {}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}:{port}", Ipv4Addr::LOCALHOST),
            None => write!(f, "{}", self.socket.display()),
        }
    }
}

impl Address {
    /// For a program that is told of it by `templates`. A port is one that is free now; somebody may take it before the
    /// program does, which is found out before anything is said there.
    ///
    /// # Errors
    /// No port is free, or what an earlier program left at the path cannot be removed.
    pub(crate) fn reserve<'a>(folder: &Path, mut templates: impl Iterator<Item = &'a OsStr>) -> io::Result<Self> {
        let has_port = templates.any(|template| memchr::memmem::find(template.as_bytes(), b"{port}").is_some());
        let socket = folder.join(PROGRAM_SOCKET);
        let port = if has_port {
            Some(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
        } else {
            match std::fs::remove_file(&socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => None,
            }
        };
        Ok(Self { port, socket })
    }

    /// Fills in `{port}`, `{socket}` and, for the command that stops it, `{pid}`.
    pub(crate) fn fill(&self, template: &OsStr, pid: Option<i32>) -> OsString {
        let mut text = template.as_bytes().to_vec();
        let port = self.port.map(|port| port.to_string());
        let pid = pid.map(|pid| pid.to_string());
        let values = [
            (&b"{port}"[..], port.as_ref().map(String::as_bytes)),
            (b"{pid}", pid.as_ref().map(String::as_bytes)),
            (b"{socket}", Some(self.socket.as_os_str().as_bytes())),
        ];
        for (name, value) in values {
            if let Some(value) = value {
                text = replace(&text, name, value);
            }
        }
        OsString::from_vec(text)
    }

    pub(crate) async fn connect(&self) -> io::Result<Stream> {
        match self.port {
            Some(port) => {
                let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
                stream.set_nodelay(true)?;
                Ok(Box::pin(stream))
            }
            None => Ok(Box::pin(UnixStream::connect(&self.socket).await?)),
        }
    }
}

fn replace(text: &[u8], name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + value.len());
    let mut rest = text;
    while let Some(at) = memchr::memmem::find(rest, name) {
        let (before, behind) = rest.split_at(at);
        out.extend_from_slice(before);
        out.extend_from_slice(value);
        rest = behind.get(name.len()..).unwrap_or_default();
    }
    out.extend_from_slice(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_filled_in_wherever_they_stand() {
        let address = Address { port: Some(80), socket: "/s/p".into() };
        let fill = |text: &str| address.fill(text.as_ref(), Some(7)).into_string().unwrap();
        assert_eq!(fill("--a={port},{port}{"), "--a=80,80{");
        assert_eq!(fill("{pid}-{socket}-{other}"), "7-/s/p-{other}");
    }
}
