//! Whether the program itself listens at its port: nobody else who answers there may be taken for it (G22).

use std::fs;

use evergate_sys::Pid;

use crate::program::members;

/// Who listens at a port of 127.0.0.1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Listener {
    /// The program, through this descriptor.
    Program(Held),
    /// Somebody else, or nobody of whom it can be told.
    Stranger,
    Nobody,
}

/// A listening socket in a program's hands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    /// Its entry in the process's table of descriptors.
    link: String,
    /// What that entry reads while it is that socket.
    target: String,
}

impl Held {
    /// Whether the program still has it.
    pub(crate) fn is_held(&self) -> bool {
        fs::read_link(&self.link).is_ok_and(|target| target.to_str() == Some(&self.target))
    }
}

/// Looks who listens.
pub(crate) fn find(number: u64, pid: Pid, port: u16) -> Listener {
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    let sockets = listening(&tables.concat(), port);
    if sockets.is_empty() {
        return Listener::Nobody;
    }
    let members: Vec<i32> = members(number, pid).into_iter().collect();
    // Several may share a port; each of them has to be the program's.
    let held: Option<Vec<Held>> = sockets.iter().map(|socket| holder(&members, *socket)).collect();
    held.and_then(|held| held.into_iter().next()).map_or(Listener::Stranger, Listener::Program)
}

fn holder(members: &[i32], socket: u64) -> Option<Held> {
    let target = format!("socket:[{socket}]");
    members.iter().find_map(|pid| {
        let mut entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
        let entry = entries.find(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.to_str() == Some(&target)))?;
        Some(Held { link: entry.path().to_str()?.to_owned(), target: target.clone() })
    })
}

/// The sockets that a connect to 127.0.0.1 may meet, by inode, from `/proc/net/tcp` and `tcp6` (proc_net(5)). One that is
/// bound to that address is met before those that are bound to all.
fn listening(table: &str, port: u16) -> Vec<u64> {
    let (mut exact, mut any) = (Vec::new(), Vec::new());
    for line in table.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (Some(local), Some(&"0A"), Some(inode)) = (fields.get(1), fields.get(3), fields.get(9)) else { continue };
        let Some((address, number)) = local.split_once(':') else { continue };
        let (true, Ok(inode)) = (u16::from_str_radix(number, 16) == Ok(port), inode.parse()) else { continue };
        // The address is in the machine's own byte order, word by word.
        let loopback = format!("{:08X}", u32::from_ne_bytes([127, 0, 0, 1]));
        let mapped = format!("{:016X}{:08X}{loopback}", 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]));
        if address == loopback || address == mapped {
            exact.push(inode);
        } else if address.bytes().all(|digit| digit == b'0') {
            any.push(inode);
        }
    }
    if exact.is_empty() { any } else { exact }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_tells_who_a_connect_may_meet() {
        if cfg!(target_endian = "big") {
            return;
        }
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 11 1 0 100 0 0 10 0\n\
            1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12 1 0 100 0 0 10 0\n\
            2: 0100007F:1F90 0100007F:9999 01 00000000:00000000 00:00000000 00000000  1000        0 13 1 0 100 0 0 10 0\n\
            3: 0200007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 14 1 0 100 0 0 10 0\n\
            4: 00000000000000000000000000000000:1F91 00000000000000000000000000000000:0000 0A 0:0 00:0 0  1000  0 15 1\n\
            5: 0000000000000000FFFF00000100007F:1F92 00000000000000000000000000000000:0000 0A 0:0 00:0 0  1000  0 16 1\n";
        assert_eq!(listening(table, 8080), [11]);
        assert_eq!(listening(table, 8081), [15]);
        assert_eq!(listening(table, 8082), [16]);
        assert!(listening(table, 8083).is_empty());
    }
}
