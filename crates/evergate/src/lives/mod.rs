//! What the processes of a running gateway do, and how each comes into what it inherited.
//!
//! `evergate serve` is the master; it starts `compile` once and `clerk` and `worker` for good, all of them this same
//! program (`evergate_core::inherit` is the contract).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use clap::Args;
use evergate_board::Board;
use evergate_core::config::Sealed;
use evergate_core::inherit;
use tokio::net::unix::pipe::Receiver;

mod boot_fault;
pub mod clerk;
pub mod compile;
mod descriptors;
pub(crate) mod dns_fault;
pub mod host;
pub mod serve;
mod thrift;
pub mod worker;

/// Names the state folder to a child, absolute.
pub const STATE_DIR_VARIABLE: &str = "EVERGATE_STATE_DIR";

/// The access log, in the state folder.
pub(crate) const ACCESS_FILE: &str = "access.jsonl";
/// The part before it.
pub(crate) const ACCESS_OLD_FILE: &str = "access.jsonl.1";

/// Most listeners a child inherits; descriptors can be adopted up to 63.
const LISTENERS_MAX: u32 = 48;

/// What the master tells a child on its command line.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChildArgs {
    /// Its row on the board.
    #[arg(long)]
    pub row: u32,
    /// Its number within the run, from 1.
    #[arg(long)]
    pub epoch: u32,
    /// Generation of its configuration.
    #[arg(long)]
    pub generation: u32,
    /// How many listening sockets it inherits.
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=i64::from(LISTENERS_MAX)))]
    pub listeners: u32,
}

/// What a child inherits, by name instead of by number.
#[derive(Debug)]
pub struct Inherited {
    /// The board.
    pub board: Board,
    /// The generation's configuration with its secrets.
    pub sealed: Sealed,
    /// Its end of file is the master's end: see [`master_gone`].
    pub life: OwnedFd,
    /// For [`kick`].
    pub kick: OwnedFd,
    /// A pipe by which the clerk knows whether anybody is left who may write records: its read end there, its write end elsewhere.
    pub writers: OwnedFd,
    /// Listening sockets in the order of the configuration, not blocking.
    pub listeners: Vec<OwnedFd>,
}

impl Inherited {
    /// Takes over everything; to be called once in a process.
    ///
    /// # Errors
    /// Names what is missing or unusable: this program was not started by its own master, or not by this build.
    pub fn adopt(args: &ChildArgs) -> Result<Self, String> {
        let take = |what: &str, number: i32| {
            evergate_sys::adopt(number)
                .map_err(|error| format!("cannot take over {what} (descriptor {number}): {error}"))
        };
        let board = Board::attach(take("the board", inherit::BOARD)?).map_err(|error| error.to_string())?;
        if board.child(args.row).is_none() {
            return Err(format!("the board has no row {}", args.row));
        }
        let mut listeners = Vec::new();
        for (number, _) in (inherit::LISTENERS..).zip(0..args.listeners) {
            listeners.push(take("a listener", number)?);
        }
        Ok(Self {
            board,
            sealed: read_sealed(take("the configuration", inherit::CONFIG)?)?,
            life: take("the master's pipe", inherit::LIFE)?,
            kick: take("the master's eventfd", inherit::KICK)?,
            writers: take("the writers' pipe", inherit::WRITERS)?,
            listeners,
        })
    }
}

fn read_sealed(fd: OwnedFd) -> Result<Sealed, String> {
    let mut bytes = Vec::new();
    File::from(fd).read_to_end(&mut bytes).map_err(|error| format!("cannot read the configuration: {error}"))?;
    // The parser's words could quote a secret; its position does not.
    serde_json::from_slice(&bytes).map_err(|error| {
        format!("the sealed configuration is not ours (line {}, column {})", error.line(), error.column())
    })
}

/// The state folder, as the master tells its children; none in a process that no master started.
#[must_use]
pub fn state_dir_from_env() -> Option<PathBuf> {
    std::env::var_os(STATE_DIR_VARIABLE).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// Tells the master that something it waits for has changed on the board.
pub fn kick(fd: impl AsFd) {
    // A full counter means that the master has been told often enough; it looks every half second anyway.
    let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
}

/// Waits for the master's end: its life pipe has no writer any more.
///
/// # Errors
/// What registering with epoll(7) says, to be taken for a failed start.
pub async fn master_gone(life: OwnedFd) -> io::Result<()> {
    // Shared with all other children, for whom not blocking is right too.
    let life = Receiver::from_owned_fd(life)?;
    loop {
        life.readable().await?;
        match life.try_read(&mut [0; 8]) {
            Ok(0) => return Ok(()),
            // Nothing is ever written; readiness may be a false alarm.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// This process's resident set in KiB; 0 where procfs does not say.
#[must_use]
pub fn rss_kib() -> u64 {
    // In one read: the file says no size, and it is looked at every other second.
    let mut text = [0; 4096];
    let read = File::open("/proc/self/status").and_then(|mut file| file.read(&mut text)).unwrap_or(0);
    let text = String::from_utf8_lossy(text.get(..read).unwrap_or_default());
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::time::Duration;

    #[test]
    fn life_ends_with_the_last_writer() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
            let mut gone = std::pin::pin!(master_gone(read));
            assert!(tokio::time::timeout(Duration::from_millis(50), &mut gone).await.is_err());
            drop(write);
            tokio::time::timeout(Duration::from_secs(5), gone).await.unwrap().unwrap();
        });
    }

    #[test]
    fn own_memory_is_seen() {
        assert!(rss_kib() > 100);
    }
}
