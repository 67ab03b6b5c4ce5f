//! A cgroup for each program, where the machine lets us make one (cgroups(7)): nothing that a program started escapes the kill
//! at its end, whatever it hides; its memory is bounded as a whole; and a kill for want of memory is told from any other.
//!
//! The groups of a host lie in a folder of its own, its home, which it holds by a lock (flock(2)). A home that nobody holds is
//! a dead host's: whoever makes one next kills what is left in it and removes it.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use evergate_core::cgroup::{self, Version};
use evergate_sys::{Pid, Signal};
use rustix::fs::{Access, FlockOperation, access, flock, getxattr};
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};

/// What the names of homes begin with.
const NAME: &str = "evergate-host-";
/// Groups that a program has made within its own are looked for so deep.
const DEPTH: u32 = 8;
/// Names that are tried for a home: the first may be that of a host in another process namespace.
const TRIES: u32 = 4;
/// Homes of one process, which is a host and has one; a test's has more.
static HOMES: AtomicU64 = AtomicU64::new(0);

/// Where a host makes groups: in one hierarchy, or in one of each version, where the memory controller is in version 1's.
#[derive(Debug)]
pub struct Cgroups {
    homes: Vec<Home>,
    /// Why there is none, or none that has memory.
    why: String,
}

/// A host's own folder in a hierarchy.
#[derive(Debug)]
struct Home {
    folder: PathBuf,
    version: Version,
    has_memory: bool,
    /// Held by its lock for as long as the host lives.
    _lock: File,
}

/// A program's group, in each hierarchy. Its folders are removed when it is dropped, if nothing is in them.
#[derive(Debug, Default)]
pub(crate) struct Group {
    rooms: Vec<Room>,
    entrances: Vec<File>,
}

#[derive(Debug)]
struct Room {
    folder: PathBuf,
    version: Version,
    has_memory: bool,
}

impl Cgroups {
    /// Makes a home in each hierarchy in which this process may, as `/proc/self` tells of them.
    #[must_use]
    pub fn make() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let places = cgroup::places(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"));
        let (mut homes, mut whys): (Vec<Home>, Vec<String>) = Default::default();
        for (version, folder) in places {
            // One that has memory is enough, and one of each version is all there can be.
            if homes.iter().any(|home| home.has_memory || home.version == version) {
                continue;
            }
            let base = delegated(&folder, version).unwrap_or(folder);
            match Home::make(&base, version) {
                Ok(home) => homes.push(home),
                Err(error) => whys.push(format!("version {}: {error}", version.number())),
            }
        }
        if whys.is_empty() && homes.is_empty() {
            whys.push("no hierarchy is mounted".to_owned());
        }
        Self { homes, why: whys.join("; ") }
    }

    /// Whether a program can have a group at all.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check(&self) -> Result<(), &str> {
        if self.homes.is_empty() { Err(&self.why) } else { Ok(()) }
    }

    /// Whether groups bound and count memory.
    #[must_use]
    pub fn has_memory(&self) -> bool {
        self.homes.iter().any(|home| home.has_memory)
    }

    /// Makes the group of a program, whose memory is bounded to so many bytes.
    pub(crate) fn group(&self, number: u64, memory: Option<u64>) -> io::Result<Group> {
        let mut group = Group::default();
        for Home { folder, version, has_memory, .. } in &self.homes {
            let (folder, version, has_memory) = (folder.join(number.to_string()), *version, *has_memory);
            fs::create_dir(&folder)?;
            // From here on it is removed whatever fails.
            group.rooms.push(Room { folder: folder.clone(), version, has_memory });
            if let Some(bytes) = memory.filter(|_| has_memory) {
                put(&folder.join(version.memory_limit()), &bytes.to_string())?;
            }
            group.entrances.push(OpenOptions::new().write(true).open(folder.join(PROCS))?);
        }
        Ok(group)
    }
}

impl fmt::Display for Cgroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.homes.is_empty() {
            return write!(f, "none ({})", self.why);
        }
        for (at, home) in self.homes.iter().enumerate() {
            let (comma, memory) = (if at > 0 { ", " } else { "" }, if home.has_memory { " with memory" } else { "" });
            write!(f, "{comma}version {}{memory}", home.version.number())?;
        }
        Ok(())
    }
}

/// Where processes are told and entered.
const PROCS: &str = "cgroup.procs";

/// The group above the own one, where systemd says that it is the gateway's to divide (`Delegate=` with `DelegateSubgroup=`):
/// only a group without processes of its own can hand the memory controller down.
fn delegated(own: &Path, version: Version) -> Option<PathBuf> {
    let parent = own.parent().filter(|_| version == Version::Two)?;
    let is_given = |name: &str| {
        let mut value = [0; 8];
        getxattr(parent, name, &mut value).is_ok_and(|length| value.get(..length) == Some(b"1".as_slice()))
    };
    (is_given("user.delegate") || is_given("trusted.delegate")).then(|| parent.to_owned())
}

impl Home {
    fn make(base: &Path, version: Version) -> io::Result<Self> {
        // Who moves a process needs this as well.
        access(base.join(PROCS), Access::WRITE_OK)?;
        let handed_down = version == Version::One || hand_down(base);
        tidy(base);
        let (folder, lock) = settle(base)?;
        let has_memory = match version {
            Version::One => folder.join(version.memory_limit()).exists(),
            Version::Two => handed_down && hand_down(&folder),
        };
        Ok(Self { folder, version, has_memory, _lock: lock })
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        remove(&self.folder, DEPTH);
    }
}

/// Makes a folder and holds it. Until it is held, another host's `tidy` may take it for a dead one's.
fn settle(base: &Path) -> io::Result<(PathBuf, File)> {
    let mut last = io::ErrorKind::AlreadyExists.into();
    for _ in 0..TRIES {
        let number = HOMES.fetch_add(1, Ordering::Relaxed);
        let folder = base.join(format!("{NAME}{}-{number}", std::process::id()));
        let held = fs::create_dir(&folder).and_then(|()| File::open(&folder)).and_then(|lock| {
            flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            let is_there = fs::metadata(&folder)?.ino() == lock.metadata()?.ino();
            if is_there { Ok(lock) } else { Err(io::ErrorKind::NotFound.into()) }
        });
        match held {
            Ok(lock) => return Ok((folder, lock)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Whether the memory controller reaches the groups below, after it was asked to.
fn hand_down(folder: &Path) -> bool {
    let control = folder.join("cgroup.subtree_control");
    let _ = put(&control, "+memory");
    fs::read_to_string(control).is_ok_and(|given| given.split_ascii_whitespace().any(|one| one == "memory"))
}

/// Removes the homes of hosts that are gone, with what is left in them.
fn tidy(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let is_home = entry.file_name().to_str().is_some_and(|name| name.starts_with(NAME));
        let Some(home) = is_home.then(|| File::open(entry.path()).ok()).flatten() else { continue };
        if flock(&home, FlockOperation::NonBlockingLockExclusive).is_ok() {
            kill(&entry.path());
            remove(&entry.path(), DEPTH);
        }
    }
}

/// As far as nothing is in it any more.
fn remove(folder: &Path, depth: u32) {
    // Without groups within it, which is nearly always, it is one call.
    if fs::remove_dir(folder).is_ok() || depth == 0 {
        return;
    }
    below(folder).iter().for_each(|inner| remove(inner, depth - 1));
    let _ = fs::remove_dir(folder);
}

fn below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// The living processes of a group and of those within it.
fn processes(folder: &Path, depth: u32) -> Vec<i32> {
    let text = fs::read_to_string(folder.join(PROCS)).unwrap_or_default();
    let mut found: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    if depth > 0 {
        found.extend(below(folder).iter().flat_map(|inner| processes(inner, depth - 1)));
    }
    found
}

/// All of a group at once (version 2, Linux 5.14), or one by one.
fn kill(folder: &Path) {
    if put(&folder.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    for pid in processes(folder, DEPTH) {
        let Some(process) = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
            continue;
        };
        // Its number may have become another's since; now it cannot any more.
        if processes(folder, DEPTH).contains(&pid) {
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
    }
}

fn put(file: &Path, text: &str) -> io::Result<()> {
    // One write, and no file made where there is none.
    rustix::io::write(OpenOptions::new().write(true).open(file)?, text.as_bytes())?;
    Ok(())
}

impl Group {
    /// Where a process that writes `0` enters.
    pub(crate) fn entrances(&self) -> Vec<BorrowedFd<'_>> {
        self.entrances.iter().map(AsFd::as_fd).collect()
    }

    /// To be called when its first process is born.
    pub(crate) fn close(&mut self) {
        self.entrances.clear();
    }

    /// Its living processes.
    pub(crate) fn members(&self) -> Vec<i32> {
        let mut all: Vec<i32> = self.rooms.iter().flat_map(|room| processes(&room.folder, DEPTH)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Kills them.
    pub(crate) fn kill(&self) {
        self.rooms.iter().for_each(|room| kill(&room.folder));
    }

    /// Processes of it that the kernel has killed for want of memory; none where nobody counts them.
    pub(crate) fn oom_kills(&self) -> Option<u64> {
        let room = self.rooms.iter().find(|room| room.has_memory)?;
        cgroup::value(&fs::read_to_string(room.folder.join(room.version.memory_events())).ok()?, "oom_kill")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.rooms.iter().for_each(|room| remove(&room.folder, DEPTH));
    }
}
