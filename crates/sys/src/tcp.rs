//! What the kernel says of a socket's queues.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd};

/// How many connections wait to be accepted, and how many may.
///
/// For a socket in LISTEN, `tcpi_unacked` and `tcpi_sacked` of `TCP_INFO` carry the queue's length and its limit
/// (`tcp_get_info` in the kernel's `net/ipv4/tcp.c`).
///
/// # Errors
/// What getsockopt(2) says, such as that this is no TCP socket.
pub fn tcp_queue(listener: impl AsFd) -> io::Result<(u32, u32)> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap_or(0);
    // SAFETY: the descriptor is borrowed and so open; the kernel writes at most `length` bytes, which is the size of
    // `info`.
    let outcome = unsafe {
        libc::getsockopt(
            listener.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `tcp_info` is made of integers only, and every byte was zeroed before the kernel wrote its part.
    let info = unsafe { info.assume_init() };
    Ok((info.tcpi_unacked, info.tcpi_sacked))
}

/// How many bytes were written to a stream socket and not yet acknowledged by the other side's kernel (`SIOCOUTQ`,
/// tcp(7) and unix(7)).
///
/// # Errors
/// What ioctl(2) says, such as that this is no socket.
pub fn unsent_bytes(socket: impl AsFd) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is borrowed and so open; the kernel writes one int to the place it is given.
    let outcome = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u32::try_from(bytes).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn waiting_connections_are_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (waiting, limit) = tcp_queue(&listener).unwrap();
        assert_eq!(waiting, 0);
        assert!(limit > 0);
        let address = listener.local_addr().unwrap();
        let _clients: Vec<_> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
        // A loopback connect returns when the client's side is established; the listener's side follows on the last
        // ACK, in the same softirq or a moment later.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while tcp_queue(&listener).unwrap().0 < 3 {
            assert!(std::time::Instant::now() < deadline, "the queue never showed three");
            std::thread::yield_now();
        }
        listener.accept().unwrap();
        assert_eq!(tcp_queue(&listener).unwrap().0, 2);
    }

    #[test]
    fn other_sockets_are_refused() {
        let (one, _two) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(tcp_queue(&one).is_err());
    }

    #[test]
    fn what_nobody_reads_is_unsent() {
        use std::io::Write;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_server, _) = listener.accept().unwrap();
        assert_eq!(unsent_bytes(&client).unwrap(), 0);
        client.set_nonblocking(true).unwrap();
        while client.write(&[0; 65_536]).is_ok() {}
        assert!(unsent_bytes(&client).unwrap() > 0);
    }
}
