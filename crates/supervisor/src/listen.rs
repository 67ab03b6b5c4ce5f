//! The listening sockets: bound once by the master, shared by all, never closed before the last stop.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use evergate_core::plan::Address;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

/// The kernel cuts it to `net.core.somaxconn`, 4,096 by default since Linux 5.4.
const BACKLOG: i32 = 4096;

/// A bound socket that listens.
#[derive(Debug)]
pub(crate) struct Listener {
    fd: OwnedFd,
    /// Where it really listens: with the port that the system chose.
    pub(crate) address: Address,
    is_open: bool,
    /// Whether the service manager bound it: then it is not ours to close.
    pub(crate) is_passed: bool,
}

impl Listener {
    /// One that listens already, by the service manager's doing.
    pub(crate) fn passed(fd: OwnedFd, address: Address) -> Self {
        Self { fd, address, is_open: true, is_passed: true }
    }

    /// Binds and listens, not blocking.
    pub(crate) fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => bind_tcp(*address),
            Address::Unix(path) => bind_unix(path),
        }
    }

    /// Connections that wait to be accepted; a Unix socket does not tell.
    pub(crate) fn queue(&self) -> u32 {
        match self.address {
            Address::Tcp(_) if self.is_open => evergate_sys::tcp_queue(&self.fd).map_or(0, |(waiting, _)| waiting),
            Address::Tcp(_) | Address::Unix(_) => 0,
        }
    }

    /// Connects that its full queue turned away since it was bound; a Unix socket makes its clients wait instead.
    pub(crate) fn overflows(&self) -> u32 {
        match self.address {
            Address::Tcp(_) => evergate_sys::tcp_overflows(&self.fd).unwrap_or(0),
            Address::Unix(_) => 0,
        }
    }

    /// Refuses connects from now on, although children still have the socket: shutdown(2) on a listening TCP socket
    /// closes it for all. A Unix socket goes on until the last owner is gone, so its name goes.
    pub(crate) fn close(&mut self) {
        if !self.is_open || self.is_passed {
            return;
        }
        self.is_open = false;
        match &self.address {
            Address::Tcp(_) => {
                // Already closed is as good.
                let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
            }
            Address::Unix(path) => {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Nothing of ours stays behind, however the master ends: a Unix socket's file would.
impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}

fn socket(family: AddressFamily) -> io::Result<OwnedFd> {
    Ok(socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?)
}

fn bind_tcp(address: SocketAddr) -> io::Result<Listener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = socket(family)?;
    // Connections of the run before that linger in TIME_WAIT do not keep the port; a listening socket still does.
    rustix::net::sockopt::set_socket_reuseaddr(&fd, true)?;
    bind(&fd, &address)?;
    listen(&fd, BACKLOG)?;
    let real = SocketAddr::try_from(rustix::net::getsockname(&fd)?)?;
    Ok(Listener { fd, address: Address::Tcp(real), is_open: true, is_passed: false })
}

/// A path that is taken is freed only if nobody answers there (I7).
fn bind_unix(path: &str) -> io::Result<Listener> {
    let fd = socket(AddressFamily::UNIX)?;
    let address = SocketAddrUnix::new(path)?;
    match bind(&fd, &address) {
        Err(rustix::io::Errno::ADDRINUSE) if is_stale(path) => {
            std::fs::remove_file(path)?;
            bind(&fd, &address)?;
        }
        outcome => outcome?,
    }
    listen(&fd, BACKLOG)?;
    Ok(Listener { fd, address: Address::Unix(path.to_owned()), is_open: true, is_passed: false })
}

fn is_stale(path: &str) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(Path::new(path)).is_ok_and(|meta| meta.file_type().is_socket());
    // Not blocking: somebody may listen there and never accept.
    let connect =
        || rustix::net::connect(&socket(AddressFamily::UNIX)?, &SocketAddrUnix::new(path)?).map_err(io::Error::from);
    is_socket && connect().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_taken_port_is_refused_and_a_closed_one_refuses() {
        let mut one = Listener::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let Address::Tcp(real) = one.address else { panic!("{:?}", one.address) };
        assert_ne!(real.port(), 0);
        let error = Listener::bind(&one.address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let _client = TcpStream::connect(real).unwrap();
        // A child's copy of the descriptor does not keep it open.
        let _copy = one.as_fd().try_clone_to_owned().unwrap();
        one.close();
        assert_eq!(TcpStream::connect(real).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    /// Specification, line 28: a burst waits in the queue, not for the second try of its clients' kernels.
    #[test]
    fn s28_the_queue_holds_as_many_as_the_system_allows() {
        let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let (_, limit) = evergate_sys::tcp_queue(&listener).unwrap();
        let most: u32 = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap().trim().parse().unwrap();
        assert_eq!(limit, most.min(4096));
        assert_eq!((listener.queue(), listener.overflows()), (0, 0));
    }

    #[test]
    fn a_stale_unix_socket_is_replaced_and_a_living_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.sock");
        let address = Address::Unix(path.to_str().unwrap().to_owned());
        let stale = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(Listener::bind(&address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(stale);
        let one = Listener::bind(&address).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(one);
        assert!(!path.exists());
        // A file that is no socket is somebody's data.
        std::fs::write(&path, "data").unwrap();
        assert!(Listener::bind(&address).is_err());
        assert!(path.exists());
    }
}
