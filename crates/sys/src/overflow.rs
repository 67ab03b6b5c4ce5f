//! What did not fit into the accept queue of a listening socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

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
}
