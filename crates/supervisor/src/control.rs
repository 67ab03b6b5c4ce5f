//! The control socket: one line in, one line out, and nobody can make the master wait.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use evergate_board::Board;
use rustix::fs::Mode;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    accept_with, bind, listen, sendmsg, socket_with, sockopt::socket_peercred,
};

use crate::step::{Ns, Order, SECOND};

/// Longest request, bytes.
const REQUEST_MAX: usize = 512;
/// Most connections at a time.
const CLIENTS_MAX: usize = 16;
/// How long a client may take over its request.
const PATIENCE: Ns = SECOND;

/// Where the control socket of a state folder is: in it, or under a hashed name in the user's runtime folder when a
/// Unix socket cannot have so long a path (107 bytes).
pub(crate) fn path(state_dir: &Path) -> PathBuf {
    let plain = state_dir.join("control.sock");
    if plain.as_os_str().len() <= 107 {
        return plain;
    }
    let hash = plain.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        // FNV-1a, 64 bits.
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let folder = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    folder.join(format!("evergate-{}-{hash:016x}.sock", rustix::process::geteuid().as_raw()))
}

/// The listening socket and who is connected to it.
#[derive(Debug)]
pub(crate) struct Control {
    listener: OwnedFd,
    path: PathBuf,
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    fd: OwnedFd,
    request: Vec<u8>,
    since: Ns,
}

impl Control {
    /// To be called while holding the lock: a socket that is there already belongs to a dead run.
    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Mode 0600 from the first instant; nobody else is in this process to be surprised by the mask.
        let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = bind(&listener, &SocketAddrUnix::new(&path)?);
        rustix::process::umask(mask);
        bound?;
        listen(&listener, 64)?;
        Ok(Self { listener, path, clients: Vec::new() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What to wait for. With all places taken the listener waits in turn.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let listener = (self.clients.len() < CLIENTS_MAX).then(|| self.listener.as_fd());
        listener.into_iter().chain(self.clients.iter().map(|client| client.fd.as_fd()))
    }

    /// When the first client's patience ends.
    pub(crate) fn due(&self) -> Option<Ns> {
        self.clients.iter().map(|client| client.since.saturating_add(PATIENCE)).min()
    }

    /// Takes whatever is there, answers it, and gives the orders that were in it.
    pub(crate) fn turn(&mut self, board: &Board, now: Ns) -> Vec<Order> {
        while self.clients.len() < CLIENTS_MAX {
            let Ok(fd) = accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) else { break };
            if is_allowed(&fd) {
                self.clients.push(Client { fd, request: Vec::new(), since: now });
            }
        }
        let mut orders = Vec::new();
        self.clients.retain_mut(|client| {
            let is_waiting = match client.read() {
                Heard::Nothing => true,
                Heard::Line => {
                    orders.extend(client.answer(board));
                    false
                }
                Heard::End => false,
            };
            is_waiting && now.saturating_sub(client.since) < PATIENCE
        });
        orders
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Ourselves and root; the file's mode says the same, but a mode can be changed.
fn is_allowed(client: &OwnedFd) -> bool {
    socket_peercred(client).is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

enum Heard {
    Nothing,
    Line,
    End,
}

impl Client {
    fn read(&mut self) -> Heard {
        let mut bytes = [0_u8; 1024];
        match rustix::io::read(&self.fd, &mut bytes) {
            Ok(0) => return Heard::End,
            Ok(count) => self.request.extend_from_slice(bytes.get(..count).unwrap_or_default()),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Heard::Nothing,
            Err(_) => return Heard::End,
        }
        if self.request.contains(&b'\n') || self.request.len() > REQUEST_MAX { Heard::Line } else { Heard::Nothing }
    }

    fn answer(&self, board: &Board) -> Option<Order> {
        let line = self.request.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let (text, fd, order) = match line {
            _ if line.len() > REQUEST_MAX => ("error: the request is too long\n", None, None),
            b"ping" => ("ok\n", None, None),
            b"status" => ("ok\n", Some(board.fd()), None),
            b"stop" => ("ok\n", None, Some(Order::Stop)),
            b"stop now" => ("ok\n", None, Some(Order::StopNow)),
            _ => ("error: no such command\n", None, None),
        };
        // Whoever asks and does not take the answer gets none: a new socket's buffer has room for a line.
        let _ = send(&self.fd, text, fd);
        order
    }
}

fn send(to: &OwnedFd, text: &str, fd: Option<BorrowedFd<'_>>) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(to, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use evergate_board::Shape;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn board() -> Board {
        Board::create(Shape { children: 1, slots: 1, series: 1, labels: 2 }, 1).unwrap()
    }

    #[test]
    fn long_paths_are_hashed_and_short_ones_are_not() {
        let short = tempfile::tempdir().unwrap();
        assert_eq!(path(short.path()), short.path().join("control.sock"));
        let long = short.path().join("x".repeat(120));
        assert!(path(&long).as_os_str().len() <= 107);
        assert_ne!(path(&long), path(&long.join("y")));
    }

    #[test]
    fn strange_clients_cost_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("c.sock");
        let board = board();
        let mut control = Control::open(socket.clone()).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);

        let connect = || UnixStream::connect(&socket).unwrap();
        // Twenty that say nothing: sixteen are let in, and all are gone after their second.
        let _silent: Vec<_> = (0..20).map(|_| connect()).collect();
        control.turn(&board, 0);
        assert_eq!(control.clients.len(), 16);
        control.turn(&board, PATIENCE);
        control.turn(&board, PATIENCE + 1);
        assert_eq!(control.clients.len(), 4);
        control.turn(&board, 3 * PATIENCE);
        assert_eq!(control.clients.len(), 0);

        let mut ask = |text: &[u8]| {
            let mut client = connect();
            client.write_all(text).unwrap();
            let orders = control.turn(&board, 10 * PATIENCE);
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            (answer, orders)
        };
        assert_eq!(ask(b"ping\n"), ("ok\n".into(), vec![]));
        assert_eq!(ask(b"stop\n"), ("ok\n".into(), vec![Order::Stop]));
        assert_eq!(ask(b"stop now\n"), ("ok\n".into(), vec![Order::StopNow]));
        assert_eq!(ask(b"dance\n").0, "error: no such command\n");
        assert_eq!(ask(&[b'x'; 600]).0, "error: the request is too long\n");
    }
}
