//! What the shell holds for hosts: the sockets that outlive them, and the search for what they leave.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use evergate_board::Board;
use evergate_core::plan::Address;
use evergate_sys::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};

use crate::listen::Listener;
use crate::step::{MS, Ns};

/// Between two looks for what a KILL has not ended yet.
const SWEEP_PAUSE: Ns = 20 * MS;
/// It doubles up to this.
const SWEEP_PAUSE_MAX: Ns = 640 * MS;
/// Looks, which take somewhat more than `step::hosts::SWEEP_TIME`: what hangs in the kernel for longer is left alone, as the rules say.
const SWEEP_LOOKS: u32 = 24;

/// The hosts' sockets, by their rows.
#[derive(Debug)]
pub(crate) struct Hosts {
    folder: PathBuf,
    seats: BTreeMap<u32, Seat>,
    /// Epochs of buried hosts that have left something, and when it is looked for again.
    sweeps: Vec<Sweep>,
}

#[derive(Debug)]
struct Seat {
    name: String,
    listener: Result<Listener, String>,
    /// Where its program may have a socket of its own, which a host that was killed has left there.
    programs: PathBuf,
}

impl Drop for Seat {
    fn drop(&mut self) {
        // A bounded look: what else a program may have put there is not for us to go through.
        let _ = std::fs::remove_file(self.programs.join(evergate_core::inherit::PROGRAM_SOCKET));
        let _ = std::fs::remove_dir(&self.programs);
    }
}

impl Hosts {
    /// The sockets' folder: in the state folder, or under a hashed name in the user's runtime folder when a socket's path
    /// would be too long (107 bytes).
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self { folder: folder(state_dir), seats: BTreeMap::new(), sweeps: Vec::new() }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Claims a row and binds its socket, which is there for every host that will ever serve the row.
    pub(crate) fn add(&mut self, board: &Board, host: u32, name: String, fingerprint: u64) {
        if let Some(row) = board.host(host) {
            row.claim(fingerprint, &name);
        }
        let path = socket(&self.folder, fingerprint);
        let what = |error: io::Error| format!("its socket {} cannot be bound: {error}", path.display());
        let listener = bind(&self.folder, &path).map_err(what);
        let programs = self.folder.join(evergate_core::inherit::host_folder(fingerprint));
        self.seats.insert(host, Seat { name, listener, programs });
    }

    /// Empties a row; its socket goes with the seat.
    pub(crate) fn drop_host(&mut self, board: &Board, host: u32) {
        self.seats.remove(&host);
        if let Some(row) = board.host(host) {
            row.clear();
        }
    }

    /// The upstream's name; empty for a row that is nobody's.
    pub(crate) fn name(&self, host: u32) -> &str {
        self.seats.get(&host).map_or("", |seat| &seat.name)
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = u32> {
        self.seats.keys().copied()
    }

    /// What a host is given to accept from.
    pub(crate) fn listener(&self, host: u32) -> io::Result<BorrowedFd<'_>> {
        match self.seats.get(&host).map(|seat| &seat.listener) {
            Some(Ok(listener)) => Ok(listener.as_fd()),
            Some(Err(why)) => Err(io::Error::other(why.clone())),
            None => Err(io::Error::other("it has no socket")),
        }
    }

    /// Begins to look for what a buried host has left. Says whether there was nothing.
    pub(crate) fn sweep(&mut self, run_id: u64, epoch: u32, now: Ns) -> bool {
        let is_clean = kill_marked(run_id, epoch) == 0;
        if !is_clean {
            self.sweeps.push(Sweep { epoch, at: now.saturating_add(SWEEP_PAUSE), pause: SWEEP_PAUSE, looks: 1 });
        }
        is_clean
    }

    /// When to look again.
    pub(crate) fn due(&self) -> Option<Ns> {
        self.sweeps.iter().map(|sweep| sweep.at).min()
    }

    /// Looks again; gives the epochs of which nothing is left.
    pub(crate) fn swept(&mut self, run_id: u64, now: Ns) -> Vec<u32> {
        let mut clean = Vec::new();
        self.sweeps.retain_mut(|sweep| {
            if sweep.at > now {
                return true;
            }
            sweep.pause = sweep.pause.saturating_mul(2).min(SWEEP_PAUSE_MAX);
            sweep.at = now.saturating_add(sweep.pause);
            let is_clean = kill_marked(run_id, sweep.epoch) == 0;
            if is_clean {
                clean.push(sweep.epoch);
            }
            sweep.looks += 1;
            !is_clean && sweep.looks < SWEEP_LOOKS
        });
        clean
    }
}

/// The search for what the host of an epoch has left.
#[derive(Debug)]
struct Sweep {
    epoch: u32,
    at: Ns,
    pause: Ns,
    looks: u32,
}

/// Kills every process that carries a dead host's mark; says how many there were. A process without the mark is a
/// stranger, whatever its parent is. What has ended has no environment any more, so that nobody is killed twice.
fn kill_marked(run_id: u64, epoch: u32) -> usize {
    let mark = format!("{}={}", evergate_core::inherit::HOST_MARK, evergate_core::inherit::host_mark(run_id, epoch));
    let Ok(entries) = std::fs::read_dir("/proc") else { return 0 };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(Pid::from_raw);
    let own = rustix::process::getpid();
    let is_marked = |pid: &Pid| {
        // Of other users it cannot be read; those are no programs of ours, or of another identity, whose host knows them.
        let environ = std::fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
        environ.split(|byte| *byte == 0).any(|pair| pair == mark.as_bytes())
    };
    let mut killed = 0;
    for pid in pids.filter(|pid| *pid != own).filter(is_marked) {
        // Its number may be another's by now: what is held is looked at again before it is killed.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        if is_marked(&pid) && pidfd_send_signal(&process, Signal::KILL).is_ok() {
            killed += 1;
        }
    }
    killed
}

fn folder(state_dir: &Path) -> PathBuf {
    let plain = state_dir.join("hosts");
    if socket(&plain, 0).as_os_str().len() <= 107 {
        return plain;
    }
    let hash = crate::step::name_hash(&plain.to_string_lossy());
    let folder = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    folder.join(format!("evergate-{}-{hash:016x}", rustix::process::geteuid().as_raw()))
}

/// Where a section's host is reached.
pub(crate) fn socket(folder: &Path, fingerprint: u64) -> PathBuf {
    folder.join(evergate_core::inherit::host_socket(fingerprint))
}

/// To be called while holding the lock: a socket that is there already belongs to a dead run.
fn bind(folder: &Path, path: &Path) -> io::Result<Listener> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let metadata = std::fs::symlink_metadata(folder)?;
    let owner = std::os::unix::fs::MetadataExt::uid(&metadata);
    if !metadata.is_dir() || owner != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("its folder is somebody else's"));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let text = path.to_str().ok_or_else(|| io::Error::other("its path is not UTF-8"))?;
    // Mode 0600 from the first instant.
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = Listener::bind(&Address::Unix(text.to_owned()));
    rustix::process::umask(mask);
    bound
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;
    use std::process::{Child, Command, Stdio};

    /// Until the exec the environment is this test's.
    fn wait_exec(child: &Child) {
        let is_sleep = || std::fs::read(format!("/proc/{}/cmdline", child.id())).unwrap().starts_with(b"sleep");
        while !is_sleep() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn sockets_are_private_outlive_hosts_and_go_with_their_rows() {
        let folder = tempfile::tempdir().unwrap();
        let board = Board::create(evergate_board::Shape { children: 1, slots: 1, series: 1, labels: 2 }, 1).unwrap();
        let mut hosts = Hosts::new(folder.path());
        let path = socket(hosts.folder(), 7);
        // Of a run that was killed.
        std::fs::create_dir(hosts.folder()).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        hosts.add(&board, 3, "tiny".into(), 7);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert!(hosts.listener(3).is_ok() && hosts.listener(4).is_err());
        assert_eq!((hosts.name(3), board.host(3).unwrap().name()), ("tiny", "tiny".to_owned()));
        hosts.drop_host(&board, 3);
        assert!(!path.exists() && board.host(3).unwrap().fingerprint() == 0);

        let long = Hosts::new(&folder.path().join("x".repeat(120)));
        assert!(socket(long.folder(), u64::MAX).as_os_str().len() <= 107);
    }

    #[test]
    fn g10_what_a_dead_host_has_left_is_killed_and_nobody_else() {
        let run = u64::from(std::process::id()) << 32 | 0xabc;
        let start = |mark: &str| {
            let mut command = Command::new("sleep");
            command.arg("600").env("EVERGATE_HOST", mark).stdin(Stdio::null()).spawn().unwrap()
        };
        let mut ours = start(&evergate_core::inherit::host_mark(run, 5));
        let mut strangers = [
            start(&evergate_core::inherit::host_mark(run, 55)),
            start(&evergate_core::inherit::host_mark(run + 1, 5)),
            start(""),
        ];
        let folder = tempfile::tempdir().unwrap();
        let mut hosts = Hosts::new(folder.path());
        wait_exec(&ours);
        assert!(!hosts.sweep(run, 5, 0));
        assert!(hosts.due().is_some());
        ours.wait().unwrap();
        assert_eq!((hosts.swept(run, 1), hosts.swept(run, SWEEP_PAUSE)), (vec![], vec![5]));
        assert_eq!(hosts.due(), None);
        // There is another one each time: as if none of them ended.
        let (mut now, mut looks) = (0, 0);
        let mut others: Vec<Child> = Vec::new();
        let begin = |others: &mut Vec<Child>| {
            let child = start(&evergate_core::inherit::host_mark(run, 6));
            wait_exec(&child);
            others.push(child);
        };
        begin(&mut others);
        assert!(!hosts.sweep(run, 6, now));
        while let Some(at) = hosts.due() {
            begin(&mut others);
            (now, looks) = (at, looks + 1);
            assert!(hosts.swept(run, now).is_empty());
        }
        assert_eq!(looks, SWEEP_LOOKS - 1);
        assert!((crate::step::SWEEP_TIME..=2 * crate::step::SWEEP_TIME).contains(&now), "{now}");
        others.iter_mut().for_each(|child| assert!(!child.wait().unwrap().success()));
        for stranger in &mut strangers {
            assert_eq!(stranger.try_wait().unwrap(), None);
            stranger.kill().unwrap();
            stranger.wait().unwrap();
        }
    }
}
