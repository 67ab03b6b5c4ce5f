//! The control socket: one line in, one answer out, and nobody can make the master wait.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use evergate_board::Board;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    accept_with, bind, listen, sendmsg, socket_with, sockopt::socket_peercred,
};

use crate::step::{Caller, Ns, Order, Refusal, SECOND, name_hash};

/// Longest request, bytes.
const REQUEST_MAX: usize = 512;
/// Most connections at a time whose request is still to come.
const CLIENTS_MAX: usize = 16;
/// Most that wait for the outcome of their order.
const CALLERS_MAX: usize = 64;
/// How long a client may take over its request.
const PATIENCE: Ns = SECOND;
/// How long nobody is accepted after an accept has failed for want of descriptors or memory: who waits in the queue would
/// wake us again in the same instant.
const RECOVERY: Ns = SECOND / 10;

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
    /// Whose order was given and who waits for what comes of it.
    callers: Vec<(Caller, OwnedFd)>,
    last_caller: Caller,
    /// Who waits for our end.
    mourners: Vec<OwnedFd>,
    /// When an accept that the system refused is tried again.
    retry_at: Option<Ns>,
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
        // Mode 0600 from the first instant; the thread that writes the state folder names its files' modes itself.
        let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = bind(&listener, &SocketAddrUnix::new(&path)?);
        rustix::process::umask(mask);
        bound?;
        listen(&listener, 64)?;
        Ok(Self {
            listener,
            path,
            clients: Vec::new(),
            callers: Vec::new(),
            last_caller: 0,
            mourners: Vec::new(),
            retry_at: None,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What to wait for. With all places taken the listener waits in turn.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let has_place = self.clients.len() < CLIENTS_MAX && self.retry_at.is_none();
        let listener = has_place.then(|| self.listener.as_fd());
        listener.into_iter().chain(self.clients.iter().map(|client| client.fd.as_fd()))
    }

    /// Whose hanging up is to be waited for, and nothing else: one that has closed its writing side is still there.
    pub(crate) fn callers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.callers.iter().map(|(_, fd)| fd.as_fd())
    }

    /// When the first client's patience ends, or accepting is tried again.
    pub(crate) fn due(&self) -> Option<Ns> {
        let ends = self.clients.iter().map(|client| client.since.saturating_add(PATIENCE));
        ends.chain(self.retry_at).min()
    }

    /// Takes whatever is there, answers what can be answered from the board, and gives the orders that were in it.
    pub(crate) fn turn(&mut self, board: &Board, now: Ns) -> Vec<Order> {
        if self.retry_at.is_none_or(|at| at <= now) {
            self.accept(now);
        }
        self.callers.retain(|(_, fd)| !has_hung_up(fd));
        self.mourners.retain(|fd| !has_hung_up(fd));
        let mut orders = Vec::new();
        for mut client in std::mem::take(&mut self.clients) {
            match client.read() {
                Heard::Nothing if now.saturating_sub(client.since) < PATIENCE => self.clients.push(client),
                Heard::Nothing | Heard::End => {}
                Heard::Line => orders.extend(self.obey(client, board)),
            }
        }
        orders
    }

    fn accept(&mut self, now: Ns) {
        self.retry_at = None;
        while self.clients.len() < CLIENTS_MAX {
            match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(fd) if is_allowed(&fd) => self.clients.push(Client { fd, request: Vec::new(), since: now }),
                // A stranger, or one that has gone again.
                Ok(_) | Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.retry_at = Some(now.saturating_add(RECOVERY));
                    return;
                }
            }
        }
    }

    /// Says what came of an order. Whoever has gone meanwhile is not told.
    pub(crate) fn answer(&mut self, caller: Caller, outcome: &Result<u32, Refusal>) {
        let Some(at) = self.callers.iter().position(|(number, _)| *number == caller) else { return };
        let (_, fd) = self.callers.remove(at);
        let text = match outcome {
            Ok(value) => format!("ok {value}\n"),
            Err(refusal) => format!("failed {}: {}\n", refusal.code, refusal.why),
        };
        // Not more than a socket's buffer holds, and the client is read to its end: nobody waits here.
        let _ = send(&fd, &text, None);
    }

    /// The master ends with this code.
    pub(crate) fn farewell(&mut self, code: u8) {
        for fd in self.mourners.drain(..) {
            let _ = send(&fd, &format!("ended {code}\n"), None);
        }
    }

    fn obey(&mut self, client: Client, board: &Board) -> Option<Order> {
        let line = client.request.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = std::str::from_utf8(line).unwrap_or_default();
        let workers = line.strip_prefix("scale ").and_then(|number| number.parse().ok());
        let (text, fd, order) = match line {
            _ if client.request.len() > REQUEST_MAX => ("error: the request is too long\n", None, None),
            "ping" => ("ok\n", None, None),
            "status" => ("ok\n", Some(board.fd()), None),
            "stop" => ("ok\n", None, Some(Order::Stop)),
            "stop now" => ("ok\n", None, Some(Order::StopNow)),
            "stop wait" | "stop now wait" if self.mourners.len() < CALLERS_MAX => {
                let _ = send(&client.fd, "ok\n", None);
                self.mourners.push(client.fd);
                return Some(if line == "stop wait" { Order::Stop } else { Order::StopNow });
            }
            "reload" => return self.wait(client, |caller| Order::Reload(Some(caller))),
            _ if line.starts_with("load ") || line.starts_with("unload ") => {
                let (order, name) = line.split_once(' ').unwrap_or_default();
                let (is_load, name) = (order == "load", name_hash(name));
                let order =
                    |caller| if is_load { Order::Load { name, caller } } else { Order::Unload { name, caller } };
                return self.wait(client, order);
            }
            _ => match workers {
                Some(workers) => return self.wait(client, |caller| Order::Scale { workers, caller }),
                None => ("error: no such command\n", None, None),
            },
        };
        // Whoever asks and does not take the answer gets none: a new socket's buffer has room for a line.
        let _ = send(&client.fd, text, fd);
        order
    }

    /// Keeps a client until its order has an outcome.
    fn wait(&mut self, client: Client, order: impl FnOnce(Caller) -> Order) -> Option<Order> {
        if self.callers.len() >= CALLERS_MAX {
            let _ = send(&client.fd, "error: too many wait for an answer\n", None);
            return None;
        }
        self.last_caller = self.last_caller.wrapping_add(1);
        self.callers.push((self.last_caller, client.fd));
        Some(order(self.last_caller))
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
        match read(&self.fd) {
            Ok(bytes) if bytes.is_empty() => return Heard::End,
            Ok(bytes) => self.request.extend_from_slice(&bytes),
            Err(Errno::AGAIN | Errno::INTR) => return Heard::Nothing,
            Err(_) => return Heard::End,
        }
        if self.request.contains(&b'\n') || self.request.len() > REQUEST_MAX { Heard::Line } else { Heard::Nothing }
    }
}

fn has_hung_up(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(1..))
}

fn read(fd: &OwnedFd) -> rustix::io::Result<Vec<u8>> {
    let mut bytes = [0_u8; 1024];
    let count = rustix::io::read(fd, &mut bytes)?;
    Ok(bytes.get(..count).unwrap_or_default().to_vec())
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

    /// Turns until so many wait for an outcome. A program that another test starts has a copy of every descriptor until its
    /// exec: what is closed here has hung up only then.
    fn turn_until(control: &mut Control, board: &Board, now: Ns, callers: usize) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
        loop {
            assert_eq!(control.turn(board, now), []);
            if control.callers.len() == callers {
                return;
            }
            assert!(std::time::Instant::now() < end, "{} wait, not {callers}", control.callers.len());
            std::thread::yield_now();
        }
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
    fn s31_strange_clients_cost_nothing() {
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
        assert_eq!(ask(b"scale many\n").0, "error: no such command\n");
        assert_eq!(ask(b"scale -1\n").0, "error: no such command\n");
        assert_eq!(ask(&[0xff, b'\n']).0, "error: no such command\n");
        assert_eq!(ask(&[b'x'; 600]).0, "error: the request is too long\n");
    }

    #[test]
    fn s31_callers_wait_for_their_outcome_and_take_nobodys_place() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("c.sock");
        let board = board();
        let mut control = Control::open(socket.clone()).unwrap();
        let call = |control: &mut Control, text: &str| {
            let mut client = UnixStream::connect(&socket).unwrap();
            client.write_all(text.as_bytes()).unwrap();
            (client, control.turn(&board, 0))
        };
        let (mut first, orders) = call(&mut control, "reload\n");
        // As `nc` does: nothing more to say, but still listening.
        first.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(orders, [Order::Reload(Some(1))]);
        let (mut second, orders) = call(&mut control, "scale 3\n");
        assert_eq!(orders, [Order::Scale { workers: 3, caller: 2 }]);
        let (_loads, orders) = call(&mut control, "load tiny\n");
        assert_eq!(orders, [Order::Load { name: name_hash("tiny"), caller: 3 }]);
        let (_unloads, orders) = call(&mut control, "unload tiny\n");
        assert_eq!(orders, [Order::Unload { name: name_hash("tiny"), caller: 4 }]);
        for caller in [3, 4] {
            control.answer(caller, &Ok(1));
        }
        // One that goes before the answer, and one that never reads it.
        let (gone, _) = call(&mut control, "reload\n");
        drop(gone);
        let (_deaf, _) = call(&mut control, "reload\n");
        // Who waits for an outcome is not dropped, who has gone is.
        turn_until(&mut control, &board, 100 * PATIENCE, 3);
        let said = |control: &mut Control, caller, outcome, from: &mut UnixStream| {
            control.answer(caller, &outcome);
            let mut answer = String::new();
            from.read_to_string(&mut answer).unwrap();
            answer
        };
        let refusal = Refusal { code: 78, why: "one\ntwo".into() };
        assert_eq!(said(&mut control, 1, Err(refusal.clone()), &mut first), "failed 78: one\ntwo\n");
        assert_eq!(said(&mut control, 2, Ok(3), &mut second), "ok 3\n");
        control.answer(5, &Ok(1));
        control.answer(6, &Err(Refusal { why: "x".repeat(100_000), ..refusal }));
        assert_eq!(control.callers.len(), 0);
        let mut many: Vec<_> = (0..64).map(|_| call(&mut control, "reload\n").0).collect();
        let (mut refused, orders) = call(&mut control, "reload\n");
        assert_eq!(orders, []);
        let mut answer = String::new();
        refused.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "error: too many wait for an answer\n");
        // The others still have their commands.
        assert_eq!(call(&mut control, "stop\n").1, [Order::Stop]);
        many.clear();
        turn_until(&mut control, &board, 0, 0);
        // Whoever waits for the end is told that the order was taken, and then with which code it came.
        let (mut waiting, orders) = call(&mut control, "stop now wait\n");
        assert_eq!((orders, control.turn(&board, 100 * PATIENCE)), (vec![Order::StopNow], vec![]));
        control.farewell(75);
        let mut answer = String::new();
        waiting.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "ok\nended 75\n");
    }
}
