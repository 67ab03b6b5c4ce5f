//! The accept queue of a listening socket, and what did not fit into it.

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

/// Place of the drop counter in what `SO_MEMINFO` gives (`SK_MEMINFO_DROPS` in `linux/sock_diag.h`).
const DROPS: usize = 8;

/// How many connects a listening socket has turned away since it was made, because its queue was full or for want of
/// memory; the client's kernel tries again after a second.
///
/// Unlike `ListenOverflows` in `/proc/net/netstat`, which counts for all programs since boot, this is the socket's own
/// (`tcp_listendrop` in the kernel's `include/net/tcp.h`; since Linux 4.12). It wraps at 32 bits.
///
/// # Errors
/// What getsockopt(2) says.
pub fn tcp_overflows(listener: impl AsFd) -> io::Result<u32> {
    // Longer than any kernel's list, of which there are nine or ten so far.
    let mut counts = [0_u32; 32];
    let mut length = libc::socklen_t::try_from(size_of_val(&counts)).unwrap_or(0);
    // SAFETY: the descriptor is borrowed and so open; the kernel writes at most `length` bytes, which is the size of
    // `counts`, and any bytes are integers.
    let outcome = unsafe {
        libc::getsockopt(
            listener.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            counts.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(counts.get(DROPS).copied().unwrap_or(0))
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
    fn connects_that_did_not_fit_are_counted() {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, listen, socket_with};
        let socket = |flags| socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        let listener = socket(SocketFlags::CLOEXEC);
        bind(&listener, &"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap()).unwrap();
        listen(&listener, 1).unwrap();
        assert_eq!(tcp_overflows(&listener).unwrap(), 0);
        let address = std::net::SocketAddr::try_from(rustix::net::getsockname(&listener).unwrap()).unwrap();
        let mut clients = Vec::new();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while tcp_overflows(&listener).unwrap() == 0 {
            assert!(std::time::Instant::now() < deadline, "{} connects, none turned away", clients.len());
            let client = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
            // Under way; whether it comes about is what is counted.
            let _ = connect(&client, &address);
            clients.push(client);
        }
        assert!(clients.len() >= 2, "{}", clients.len());
    }

    #[test]
    fn other_sockets_are_refused() {
        let (one, _two) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(tcp_queue(&one).is_err());
    }
}
