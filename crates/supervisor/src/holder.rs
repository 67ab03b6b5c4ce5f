//! Who has an address that cannot be bound, as far as the system tells: a sentence for the operator.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use evergate_core::plan::Address;

/// The state LISTEN in `/proc/net/tcp` (proc_net(5); include/net/tcp_states.h).
const LISTEN: &str = "0A";

/// Says why an address is in use.
pub(crate) fn told(address: &Address) -> String {
    match address {
        Address::Tcp(tcp) => match holder(*tcp) {
            Some(holder) if holder.is_us => format!(
                "{address} is taken by another listener of this configuration ([server] or [admin]); keep one of them"
            ),
            Some(Holder { name, pid, .. }) => format!("{address} is taken by another program: {name} (pid {pid})"),
            None => format!("{address} is taken by another program"),
        },
        Address::Unix(path) => match at(Path::new(path)) {
            None => format!("{address} is taken by another program"),
            Some(what) => format!("cannot listen on {address}: {what} is there; remove it, or choose another path"),
        },
    }
}

/// What stands at a socket's path, if it is no socket.
fn at(path: &Path) -> Option<&'static str> {
    let kind = fs::symlink_metadata(path).ok()?.file_type();
    let is_dangling = || fs::metadata(path).is_err();
    match kind {
        _ if kind.is_socket() => None,
        _ if kind.is_dir() => Some("a folder"),
        _ if kind.is_symlink() && is_dangling() => Some("a symbolic link to nothing"),
        _ if kind.is_symlink() => Some("a symbolic link"),
        _ if kind.is_file() => Some("a file"),
        _ => Some("something that is no socket"),
    }
}

struct Holder {
    pid: u32,
    name: String,
    is_us: bool,
}

/// The process that listens there. Of other users' processes the system tells nothing.
fn holder(address: SocketAddr) -> Option<Holder> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    let inodes: Vec<String> =
        tables.iter().flat_map(|table| table.lines().skip(1)).filter_map(|line| inode(line, address)).collect();
    let links: Vec<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    let has = |pid: u32| {
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let mut targets = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        targets.any(|target| links.iter().any(|link| target.as_os_str() == link.as_str())).then_some(pid)
    };
    if links.is_empty() {
        return None;
    }
    // Our own children inherit what we have bound.
    let own = std::process::id();
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let pid = has(own).or_else(|| pids.filter(|pid| *pid != own).find_map(has))?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    // A program chooses its own name.
    let name = name.trim_end().chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    Some(Holder { pid, name, is_us: pid == own })
}

/// The inode of a line's socket, if it listens where `address` cannot be bound beside it.
fn inode(line: &str, address: SocketAddr) -> Option<String> {
    let mut fields = line.split_whitespace().skip(1);
    let (ip, port) = fields.next()?.split_once(':')?;
    let state = fields.nth(1)?;
    if u16::from_str_radix(port, 16) != Ok(address.port()) || state != LISTEN {
        return None;
    }
    let (ip, wanted) = (ip_of(ip)?.to_canonical(), address.ip().to_canonical());
    let overlaps = ip == wanted || ip.is_unspecified() || wanted.is_unspecified();
    // After the remote address and the state: queues, timer, retransmits, user, timeout.
    overlaps.then(|| fields.nth(5)).flatten().map(str::to_owned)
}

/// An address of the tables: words of 32 bits in the machine's own order, as hexadecimal digits.
fn ip_of(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(hex.get(at..at.checked_add(8)?)?, 16).ok().map(u32::to_ne_bytes);
    if hex.len() == 8 {
        return Some(IpAddr::from(word(0)?));
    }
    let words = [word(0)?, word(8)?, word(16)?, word(24)?];
    let mut bytes = [0_u8; 16];
    bytes.iter_mut().zip(words.iter().flatten()).for_each(|(to, from)| *to = *from);
    Some(IpAddr::from(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_listener_is_found_in_both_families_and_one_that_is_not_there_is_not() {
        for bound in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            // A machine may have no IPv6.
            let Ok(listener) = TcpListener::bind(bound) else { continue };
            let address = listener.local_addr().unwrap();
            let holder = holder(address).unwrap();
            assert!(holder.is_us && holder.pid == std::process::id(), "{bound}");
            assert!(told(&Address::Tcp(address)).contains("another listener of this configuration"));
            let elsewhere = SocketAddr::from(([127, 0, 0, 77], address.port()));
            assert_eq!(super::holder(elsewhere).is_some(), address.ip().is_unspecified(), "{bound}");
        }
    }

    #[test]
    fn what_stands_at_a_sockets_path_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("file"), "").unwrap();
        fs::create_dir(path("folder")).unwrap();
        std::os::unix::fs::symlink("nowhere", path("dangling")).unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        for (name, what) in [
            ("file", "a file is there"),
            ("folder", "a folder is there"),
            ("dangling", "a symbolic link to nothing is there"),
            ("link", "a symbolic link is there"),
            ("socket", "is taken by another program"),
        ] {
            let told = told(&Address::Unix(path(name).to_str().unwrap().to_owned()));
            assert!(told.contains(what), "{told}");
        }
    }
}
