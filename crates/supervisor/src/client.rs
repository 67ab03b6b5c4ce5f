//! The other end of the control socket: what `evergate status` and `evergate stop` use.

use std::fmt;
use std::io::{self, BufRead as _, BufReader, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use evergate_core::inherit::code;
use evergate_sys::{Pid, start_ticks};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect as connect_to, recvmsg, socket_with,
};
use rustix::process::{PidfdFlags, pidfd_open};

use crate::runfile::Run;
use crate::{control, diagnosis};

/// How long a master may take to answer; it does so in its next turn.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the master said.
#[derive(Debug)]
pub struct Reply {
    /// Its words, such as `ok`, without a line end.
    pub text: String,
    /// The board, for `status`.
    pub fd: Option<OwnedFd>,
}

/// Why there is no reply.
#[derive(Debug)]
pub enum ClientError {
    /// No master runs with this state folder.
    NotRunning,
    /// The master refused, in its own words.
    Refused(String),
    /// What was ordered did not come off.
    Failed {
        /// The exit code that says so.
        code: u8,
        /// Why, in several lines if there are several mistakes.
        why: String,
    },
    /// It runs and has said nothing in time: stopped, or starved.
    Silent {
        /// The master's process id, 0 where the run file does not tell.
        pid: i32,
    },
    /// The system did.
    Io(io::Error),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRunning => write!(f, "no gateway runs with this state folder"),
            Self::Refused(words) => write!(f, "the gateway refused: {words}"),
            Self::Failed { why, .. } => f.write_str(why),
            Self::Silent { pid } => write!(
                f,
                "the gateway's master (pid {pid}, {}) has not answered for {} s; what was asked of it may still happen",
                diagnosis::state(*pid),
                PATIENCE.as_secs()
            ),
            Self::Io(_) => write!(f, "cannot talk to the gateway"),
        }
    }
}

impl std::error::Error for ClientError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            Self::NotRunning | Self::Refused(_) | Self::Failed { .. } | Self::Silent { .. } => None,
        }
    }
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Sends one command (`ping`, `status`, `stop`, `stop now`, `scale N`) to the master of a state folder.
///
/// # Errors
/// See [`ClientError`].
pub fn request(state_dir: &Path, command: &str) -> Result<Reply, ClientError> {
    ask(state_dir, command, PATIENCE)
}

/// Has the master read its configuration again and waits for what comes of it; the reply's text ends with the number of
/// the generation. A reload that is under way is waited for first.
///
/// # Errors
/// See [`ClientError`]; [`ClientError::Failed`] if everything stays as it was.
pub fn reload(state_dir: &Path, patience: Duration) -> Result<Reply, ClientError> {
    // One that stands still would be waited for as long as one that reloads.
    ask(state_dir, "ping", PATIENCE)?;
    ask(state_dir, "reload", patience)
}

/// Gives an order whose outcome may take long (`load NAME`, `unload NAME`), and waits for it.
///
/// # Errors
/// See [`ClientError`]; [`ClientError::Failed`] if it does not come about.
pub fn order(state_dir: &Path, order: &str, patience: Duration) -> Result<Reply, ClientError> {
    // One that stands still would be waited for as long.
    ask(state_dir, "ping", PATIENCE)?;
    ask(state_dir, order, patience)
}

/// Gives the order to stop (`stop`, `stop now`) and waits for the master's last word: the code that it ends with. None when
/// it has ended without one, as one that is killed does.
///
/// # Errors
/// See [`ClientError`]; [`ClientError::Io`] with [`io::ErrorKind::TimedOut`] when it still stops after `patience`.
pub fn stop(state_dir: &Path, order: &str, patience: Duration) -> Result<Option<u8>, ClientError> {
    let run = Run::read(state_dir).ok().flatten();
    let exchange = || {
        let socket = connect(state_dir, run.as_ref())?;
        socket.set_read_timeout(Some(PATIENCE))?;
        io::Write::write_all(&mut &socket, format!("{order} wait\n").as_bytes())?;
        let mut reader = BufReader::new(socket);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        Ok((reader, line))
    };
    let (reader, line) = exchange().map_err(|error| or_silent(error, run.as_ref()))?;
    match line.trim_end() {
        "ok" => {}
        // A master that dies before it answers.
        "" => return Err(ClientError::NotRunning),
        line => return Err(ClientError::Refused(line.trim_start_matches("error: ").to_owned())),
    }
    let (socket, mut lines) = (reader.get_ref().try_clone()?, reader.lines());
    socket.set_read_timeout(Some(patience))?;
    match lines.next().transpose() {
        Ok(line) => Ok(line.and_then(|line| line.strip_prefix("ended ")?.parse().ok())),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        // It was killed with something of ours unread.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A time limit of the socket's is the master's silence.
fn or_silent(error: ClientError, run: Option<&Run>) -> ClientError {
    match error {
        ClientError::Io(error) if error.kind() == io::ErrorKind::WouldBlock => {
            ClientError::Silent { pid: run.map_or(0, |run| run.pid) }
        }
        other => other,
    }
}

fn ask(state_dir: &Path, command: &str, patience: Duration) -> Result<Reply, ClientError> {
    let run = Run::read(state_dir).ok().flatten();
    let exchange = || {
        let socket = connect(state_dir, run.as_ref())?;
        socket.set_read_timeout(Some(patience))?;
        io::Write::write_all(&mut &socket, format!("{command}\n").as_bytes())?;
        receive(&socket)
    };
    let (bytes, fd) = exchange().map_err(|error| or_silent(error, run.as_ref()))?;
    let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
    if let Some((code, why)) = text.strip_prefix("failed ").and_then(|rest| rest.split_once(": ")) {
        return Err(ClientError::Failed { code: code.parse().unwrap_or(code::FAILED), why: why.to_owned() });
    }
    match text.strip_prefix("error: ") {
        Some(words) => Err(ClientError::Refused(words.to_owned())),
        // A master that dies before it answers.
        None if text.is_empty() => Err(ClientError::NotRunning),
        None => Ok(Reply { text, fd }),
    }
}

/// Waits for a process to be gone: the master of a run file, as from [`Run::read`]. Says whether it is.
///
/// # Errors
/// What pidfd_open(2) and poll(2) say.
pub fn wait_gone(pid: i32, ticks: u64, timeout: Duration) -> io::Result<bool> {
    let Some(pid) = Pid::from_raw(pid) else { return Ok(true) };
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(Errno::SRCH) => return Ok(true),
        Err(error) => return Err(error.into()),
    };
    if start_ticks(pid) != Some(ticks) {
        return Ok(true);
    }
    let limit = Timespec::try_from(timeout).map_err(io::Error::other)?;
    loop {
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The run file's path first: the master may have been started in another environment than this command.
fn connect(state_dir: &Path, run: Option<&Run>) -> Result<UnixStream, ClientError> {
    let named = run.map(|run| run.control.as_str()).filter(|path| !path.is_empty());
    let path = named.map_or_else(|| control::path(state_dir), Into::into);
    let system = |error: Errno| io::Error::from(error);
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(system)?;
    // For the connect too: with a full queue in front of a master that stands still it would wait for ever.
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE)).map_err(system)?;
    let outcome = SocketAddrUnix::new(&path).and_then(|address| connect_to(&socket, &address));
    match outcome {
        Err(Errno::NOENT | Errno::CONNREFUSED) => return Err(ClientError::NotRunning),
        outcome => outcome.map_err(system)?,
    }
    let socket = UnixStream::from(socket);
    // In a shared temporary folder anybody could have put a socket under our name.
    let peer = socket_peercred(&socket).map_err(io::Error::from)?.uid;
    if peer.is_root() || peer == rustix::process::geteuid() || rustix::process::geteuid().is_root() {
        return Ok(socket);
    }
    Err(ClientError::Refused("the control socket belongs to another user".into()))
}

fn receive(socket: &UnixStream) -> Result<(Vec<u8>, Option<OwnedFd>), ClientError> {
    let (mut text, mut fd) = (Vec::new(), None);
    loop {
        let mut bytes = [0_u8; 512];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Err(Errno::INTR) => continue,
            outcome => outcome.map_err(io::Error::from)?,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fd = fds.last().or(fd);
            }
        }
        if got.bytes == 0 || text.len() > 64 << 10 {
            return Ok((text, fd));
        }
        text.extend_from_slice(bytes.get(..got.bytes).unwrap_or_default());
    }
}
