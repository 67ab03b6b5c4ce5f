//! How near this worker is to a limit of memory, and what it refuses for that (J3). The rungs are `core/memory.rs`'s; here
//! the limits are looked at: those of the cgroups that the process is in, or the machine's; stalls; and its own.
//!
//! A look costs a few short reads of files that are open. It is taken with each beat, and before a large body is let in,
//! since bodies come faster than beats.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use evergate_board::{Board, monotonic_ns};
use evergate_core::memory::{Machine, Rung, Usage, stalled_percent, stalled_rung};
use evergate_core::{Error, Fault, cgroup};

use crate::lives::rss_kib;
use crate::telemetry::names::{self, Spared};

/// A body is large beyond this: the others are no more than what a connection costs anyway.
pub const LARGE_BYTES: u64 = 64 * 1024;
/// What a body takes until its answer begins, in its lengths: itself; what it was copied from as it grew, which the allocator
/// gives back some seconds later; one with the target's name of the model; and what an
/// HTTP library writes from. (Measured with hyper's client and server; ours take less, decisions 24 and 26.)
const COMING: u64 = 4;
/// The last two of them come when all of it is there.
const CALL: u64 = 2;
/// How long a look is good for.
const FRESH_NS: u64 = 5_000_000;
/// Below this share of the limit, in percent, nobody asks what of it the kernel could take back: the answer is not cheap.
const ASK_PERCENT: u64 = 80;

/// A worker's view of its memory.
#[derive(Debug)]
pub struct Memory {
    board: Board,
    row: u32,
    is_on: bool,
    sources: Vec<Source>,
    /// What the machine has left, and how long all stand still for want of it.
    machine_file: Option<File>,
    stalls_file: Option<File>,
    rung: AtomicU8,
    /// As of the last look, the fullest of each kind.
    cgroup: Seen,
    own: Seen,
    machine: Seen,
    /// Percent of the time.
    stalled: AtomicU64,
    looked_ns: AtomicU64,
    /// Bytes of large bodies that were let in and have not come yet.
    coming: AtomicU64,
}

/// What was seen: bytes used, or left, of all that there may be. The two may be those of two looks, which differ by a few
/// milliseconds.
#[derive(Debug, Default)]
struct Seen(AtomicU64, AtomicU64);

impl Seen {
    fn usage(&self) -> Usage {
        Usage { used: self.0.load(Ordering::Relaxed), limit: self.1.load(Ordering::Relaxed) }
    }

    fn machine(&self) -> Machine {
        Machine { left: self.0.load(Ordering::Relaxed), total: self.1.load(Ordering::Relaxed) }
    }

    fn set(&self, bytes: u64, of: u64) {
        self.0.store(bytes, Ordering::Relaxed);
        self.1.store(of, Ordering::Relaxed);
    }
}

/// Something with a limit.
#[derive(Debug)]
enum Source {
    Cgroup(Cgroup),
    /// This process: half as much again as the resident set at which it is replaced. A successor is on its way then; who
    /// grows on all the same has to save itself.
    Own(u64),
}

/// The files of one cgroup.
#[derive(Debug)]
struct Cgroup {
    current: File,
    limits: Vec<File>,
    stat: File,
    inactive: &'static str,
}

/// Names of a cgroup's files: what is used, its limits, and the key of what the kernel takes back first. Version 2 before 1.
const FILES: [(&str, &[&str], &str); 2] = [
    ("memory.current", &["memory.max", "memory.high"], "inactive_file"),
    ("memory.usage_in_bytes", &["memory.limit_in_bytes"], "total_inactive_file"),
];

fn read(file: &File) -> Option<String> {
    // Of the longest, memory.stat, what is asked for stands in the first kilobytes.
    let mut bytes = [0; 4096];
    let count = file.read_at(&mut bytes, 0).ok()?;
    Some(String::from_utf8_lossy(bytes.get(..count)?).into_owned())
}

impl Cgroup {
    fn open(folder: &Path) -> Option<Self> {
        FILES.into_iter().find_map(|(current, limits, inactive)| {
            let open = |name: &str| File::open(folder.join(name)).ok();
            Some(Self {
                current: open(current)?,
                limits: limits.iter().filter_map(|name| open(name)).collect(),
                stat: open("memory.stat")?,
                inactive,
            })
        })
    }

    /// The limit is read each time: it can be changed while the process runs.
    fn usage(&self) -> Usage {
        let Some(limit) = self.limits.iter().filter_map(|file| cgroup::limit(&read(file)?)).min() else {
            return Usage::default();
        };
        let used = read(&self.current).and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let all = Usage { used, limit };
        if all.percent() < ASK_PERCENT {
            return all;
        }
        // Files that were read once count as used, and go before anybody is killed.
        let inactive = read(&self.stat).and_then(|text| cgroup::value(&text, self.inactive)).unwrap_or(0);
        Usage { used: used.saturating_sub(inactive), limit }
    }
}

impl Source {
    fn usage(&self) -> Usage {
        match self {
            Self::Cgroup(group) => group.usage(),
            Self::Own(limit) => Usage { used: rss_kib().saturating_mul(1024), limit: *limit },
        }
    }
}

/// In debug builds, a folder with the files of a cgroup and of the machine, in place of the real ones.
fn planted() -> Option<PathBuf> {
    std::env::var_os("EVERGATE_FAULT_MEMORY").filter(|_| cfg!(debug_assertions)).map(Into::into)
}

/// Our own cgroup and those above it.
fn folders() -> Vec<PathBuf> {
    if let Some(planted) = planted() {
        return vec![planted];
    }
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let own = cgroup::folders(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"));
    own.iter().flat_map(|folder| folder.ancestors().map(Path::to_path_buf)).collect()
}

/// The files of the machine's memory and of stalls, by preference those of our own cgroup.
fn machine_files() -> [Option<File>; 2] {
    let open = |path: &Path| File::open(path).ok();
    let folders = folders();
    if let Some(planted) = folders.first().filter(|_| planted().is_some()) {
        return [open(&planted.join("meminfo")), open(&planted.join("memory.pressure"))];
    }
    let own = folders.iter().find_map(|folder| open(&folder.join("memory.pressure")));
    [open(Path::new("/proc/meminfo")), own.or_else(|| open(Path::new("/proc/pressure/memory")))]
}

impl Memory {
    /// Of the child that owns `row`. `rss_max` is `workers.rss_max`; unless `is_on`, nothing is ever looked at.
    #[must_use]
    pub fn new(board: Board, row: u32, rss_max: u64, is_on: bool) -> Self {
        let mut sources: Vec<Source> = Vec::new();
        if is_on {
            sources.extend(folders().iter().filter_map(|folder| Cgroup::open(folder)).map(Source::Cgroup));
            sources.extend((rss_max > 0).then(|| Source::Own(rss_max.saturating_add(rss_max / 2))));
        }
        let [machine_file, stalls_file] = if is_on { machine_files() } else { [None, None] };
        Self {
            board,
            row,
            is_on,
            sources,
            machine_file,
            stalls_file,
            rung: AtomicU8::new(0),
            cgroup: Seen::default(),
            own: Seen::default(),
            machine: Seen::default(),
            stalled: AtomicU64::new(0),
            looked_ns: AtomicU64::new(0),
            coming: AtomicU64::new(0),
        }
    }

    /// As of the last look.
    #[must_use]
    pub fn rung(&self) -> Rung {
        Rung::from_number(self.rung.load(Ordering::Relaxed))
    }

    /// As of the last look.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.cgroup.usage().max(self.own.usage()).max(self.machine.machine().usage())
    }

    /// Looks, and shows the rung on the board.
    pub fn look(&self) -> Rung {
        let fullest = |is_own: bool| {
            let of_kind = self.sources.iter().filter(|source| matches!(source, Source::Own(_)) == is_own);
            of_kind.map(Source::usage).fold(Usage::default(), Usage::max)
        };
        let (cgroup, own) = (fullest(false), fullest(true));
        self.cgroup.set(cgroup.used, cgroup.limit);
        self.own.set(own.used, own.limit);
        let machine = self.look_at_machine(cgroup.limit).unwrap_or_default();
        self.machine.set(machine.left, machine.total);
        let stalled = self.stalls_file.as_ref().and_then(|file| stalled_percent(&read(file)?)).unwrap_or(0);
        self.stalled.store(stalled, Ordering::Relaxed);
        self.looked_ns.store(monotonic_ns(), Ordering::Relaxed);
        let rung = self.usage().rung().max(stalled_rung(stalled));
        self.rung.store(rung as u8, Ordering::Relaxed);
        if let Some(child) = self.board.child(self.row) {
            child.set_memory_rung(rung as u32);
        }
        rung
    }

    /// The machine's memory, unless a cgroup's limit keeps us from it.
    fn look_at_machine(&self, limit: u64) -> Option<Machine> {
        let machine = Machine::parse(&read(self.machine_file.as_ref()?)?)?;
        (limit == 0 || limit >= machine.total).then_some(machine)
    }

    /// Lets a request in whose body is that long, as far as its head says.
    ///
    /// # Errors
    /// `overloaded`.
    pub fn admit(self: &Arc<Self>, length: Option<u64>) -> Result<Option<Coming>, Error> {
        if self.rung() >= Rung::New {
            return Err(self.refuse(Spared::Request));
        }
        match length {
            Some(bytes) if bytes > LARGE_BYTES => {
                // Shown before the look, so that of two workers one sees the other's at least.
                let coming = Coming::new(self, bytes.saturating_mul(COMING));
                self.admit_large(0).map(|()| Some(coming))
            }
            // One without a length is looked at while it grows.
            _ => Ok(None),
        }
    }

    /// Whether there is room for so many bytes of a large body, beside those that are on their way to any worker.
    ///
    /// # Errors
    /// `overloaded`.
    pub fn admit_large(&self, bytes: u64) -> Result<(), Error> {
        if !self.is_on {
            return Ok(());
        }
        if monotonic_ns().saturating_sub(self.looked_ns.load(Ordering::Relaxed)) > FRESH_NS {
            self.look();
        }
        let all = self.board.children().fold(bytes, |sum, (_, child)| sum.saturating_add(child.coming()));
        let own = bytes.saturating_add(self.coming.load(Ordering::Relaxed));
        let then = self.cgroup.usage().with(all).max(self.own.usage().with(own));
        let then = then.max(self.machine.machine().without(all).usage()).rung();
        let stalled = stalled_rung(self.stalled.load(Ordering::Relaxed));
        if then.max(stalled) >= Rung::Large { Err(self.refuse(Spared::LargeBody)) } else { Ok(()) }
    }

    /// Counts what was given up.
    pub fn count(&self, spared: Spared) {
        if let Some(series) = self.board.series(self.row) {
            series.add(names::key(names::SPARED, spared as u16, 0, 0), 1);
        }
    }

    fn show_coming(&self, bytes: u64) {
        if let Some(child) = self.board.child(self.row) {
            child.set_coming(bytes);
        }
    }

    fn refuse(&self, spared: Spared) -> Error {
        self.count(spared);
        let message = match spared {
            Spared::LargeBody => "the gateway is short of memory and takes no large request body now; try again",
            Spared::Request | Spared::UnderWay => "the gateway is short of memory and takes no request now; try again",
        };
        Error::new(Fault::Overloaded, message).detail(self)
    }
}

/// For the records.
impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (usage, machine) = (self.usage(), self.machine.machine());
        let stalled = self.stalled.load(Ordering::Relaxed);
        if stalled_rung(stalled) > usage.rung() {
            return write!(f, "memory: all stand still for it {stalled} % of the time");
        }
        if usage.limit > 0 && usage == machine.usage() {
            return write!(f, "memory: {} MiB of the machine's are left", machine.left >> 20);
        }
        write!(f, "memory: {} % of {} MiB used", usage.percent(), usage.limit >> 20)
    }
}

/// A large body that is on its way, as the board shows it.
#[derive(Debug)]
pub struct Coming {
    memory: Arc<Memory>,
    bytes: u64,
}

impl Coming {
    fn new(memory: &Arc<Memory>, bytes: u64) -> Self {
        let coming = Self { memory: Arc::clone(memory), bytes };
        let before = memory.coming.fetch_add(bytes, Ordering::Relaxed);
        memory.show_coming(before.saturating_add(bytes));
        coming
    }

    /// It is there; the copies for the upstream are still to come.
    pub fn has_come(&mut self) {
        let rest = self.bytes / COMING * CALL;
        let gone = self.bytes.saturating_sub(rest);
        self.bytes = rest;
        let before = self.memory.coming.fetch_sub(gone, Ordering::Relaxed);
        self.memory.show_coming(before.saturating_sub(gone));
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        let before = self.memory.coming.fetch_sub(self.bytes, Ordering::Relaxed);
        self.memory.show_coming(before.saturating_sub(self.bytes));
    }
}
