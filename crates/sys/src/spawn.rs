//! Starting a program with an exact set of descriptors, environment, limits and rights.
//!
//! Not `std::process::Command`: its error pipe sits at a number of the system's choosing, which a child's fixed
//! descriptor numbers would overwrite; it cannot execute a descriptor; and it waits for the exec, which may hang on a
//! file system that does not answer. Between fork and exec the child does nothing but async-signal-safe calls.

use std::ffi::{CString, OsStr, OsString, c_char, c_int};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};

/// What to start.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// The program.
    pub exe: Exe<'a>,
    /// Shown in process lists.
    pub argv0: &'a OsStr,
    /// The arguments after it.
    pub args: &'a [OsString],
    /// The whole environment.
    pub env: &'a [(OsString, OsString)],
    /// Which descriptor the child finds under which number. Standard error and output are inherited unless named here;
    /// nothing else is.
    pub fds: &'a [(BorrowedFd<'a>, i32)],
    /// Signals that are ignored from the first instruction on; all others have their default action.
    pub ignored: &'a [Signal],
    /// Whether it leads a process group of its own.
    pub own_group: bool,
    /// Whether it is killed when the thread that starts it ends (prctl(2), `PR_SET_PDEATHSIG`): for callers whose thread
    /// lives as long as they do.
    pub dies_with_us: bool,
    /// What it may do and where; none leaves all that as it is with us.
    pub confine: Option<&'a Confine<'a>>,
}

/// The program to execute.
#[derive(Clone, Copy, Debug)]
pub enum Exe<'a> {
    /// An open file, as from [`own_executable`]; no script, whose interpreter could not open it.
    Descriptor(BorrowedFd<'a>),
    /// The first of these files that is there, looked for in the child, as execvp(3) does.
    Paths(&'a [OsString]),
}

/// What a child may do and where.
#[derive(Clone, Copy, Debug, Default)]
pub struct Confine<'a> {
    /// Its working folder.
    pub dir: Option<&'a Path>,
    /// Its limits, each both soft and hard.
    pub limits: &'a [(Limit, u64)],
    /// User and group, without any further group; for callers that are root.
    pub ids: Option<(u32, u32)>,
    /// Whether it and its descendants can never gain rights by executing a file (prctl(2), `PR_SET_NO_NEW_PRIVS`).
    pub no_new_privs: bool,
    /// What it may reach in the file system, as from [`crate::Landlock`]; needs `no_new_privs`.
    pub landlock: Option<BorrowedFd<'a>>,
    /// The files `cgroup.procs` of the cgroups that it is to be in, open for writing.
    pub groups: &'a [BorrowedFd<'a>],
}

/// A limit of setrlimit(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `RLIMIT_AS`, bytes.
    Memory,
    /// `RLIMIT_CORE`, bytes.
    Core,
    /// `RLIMIT_CPU`, seconds.
    Cpu,
    /// `RLIMIT_FSIZE`, bytes.
    FileSize,
    /// `RLIMIT_NOFILE`.
    OpenFiles,
    /// `RLIMIT_NPROC`, counted over all processes of the user.
    Processes,
}

/// A child between its fork and its exec.
#[derive(Debug)]
pub struct Starting {
    /// Its number; whoever starts it reaps it, also when the start fails.
    pub pid: Pid,
    /// Whether the program runs.
    pub report: ExecReport,
}

/// A pipe that ends when the program runs, or holds why it does not.
#[derive(Debug)]
pub struct ExecReport(OwnedFd);

/// What a start can fail at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Its process group, its death signal.
    Bonds = 1,
    /// Its descriptors.
    Descriptors,
    /// Its working folder.
    Dir,
    /// Its limits.
    Limits,
    /// Its user and group.
    Ids,
    /// `no_new_privs` or Landlock.
    Sandbox,
    /// The file cannot be executed.
    Exec,
    /// The file is there; what its first line or its header names as interpreter is not.
    Interpreter,
    /// Its cgroups.
    Group,
}

/// Why a program was not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed {
    /// At what.
    pub step: Step,
    /// The number of the error, as in errno(3).
    pub errno: i32,
}

/// Our own program, kept open so that every later child is of the same build, whatever replaces the file.
///
/// # Errors
/// What open(2) says; procfs must be mounted.
pub fn own_executable() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes the calling process the parent of its descendants' orphans.
///
/// # Errors
/// What prctl(2) says.
pub fn become_subreaper() -> io::Result<()> {
    // Any pid sets the attribute; `None` would clear it.
    Ok(rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// Starts a child, and waits until it executes its program.
///
/// # Errors
/// `InvalidInput` for a NUL byte in a string; else what fork(2) or execveat(2) says, the latter as seen in the child.
pub fn spawn(spec: &Spawn<'_>) -> io::Result<Pid> {
    let Starting { pid, report } = start(spec)?;
    match report.outcome()? {
        Ok(()) => Ok(pid),
        Err(failed) => {
            let mut status = 0;
            // SAFETY: our own child that is about to `_exit`; a plain wait for it.
            unsafe { libc::waitpid(pid.as_raw_nonzero().get(), &raw mut status, 0) };
            Err(io::Error::from_raw_os_error(failed.errno))
        }
    }
}

/// Starts a child without waiting for its exec, which may hang where a file system does.
///
/// # Errors
/// `InvalidInput` for a NUL byte in a string; else what fork(2), pipe(2) and fcntl(2) say.
pub fn start(spec: &Spawn<'_>) -> io::Result<Starting> {
    let above = spec.fds.iter().map(|(_, target)| *target).max().unwrap_or(2).max(2).saturating_add(1);
    let up = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, above);
    // All sources are first moved above every target, so that no dup2 closes what a later one needs.
    let held = spec.fds.iter().map(|(fd, target)| Ok((up(*fd)?, *target))).collect::<io::Result<Vec<_>>>()?;
    let moves: Vec<(c_int, c_int)> = held.iter().map(|(fd, target)| (fd.as_raw_fd(), *target)).collect();
    let (report, low) = pipe_with(PipeFlags::CLOEXEC)?;
    let write = up(low.as_fd())?;
    // Its end of file is the news that the exec succeeded: one copy only.
    drop(low);

    let text = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::from);
    let (exe, paths) = match spec.exe {
        Exe::Descriptor(exe) => (Some(up(exe)?), Vec::new()),
        Exe::Paths(paths) => (None, paths.iter().map(|path| text(path)).collect::<io::Result<_>>()?),
    };
    let mut args = vec![text(spec.argv0)?];
    for arg in spec.args {
        args.push(text(arg)?);
    }
    let mut env = Vec::with_capacity(spec.env.len());
    for (key, value) in spec.env {
        let mut pair = key.clone();
        pair.push("=");
        pair.push(value);
        env.push(text(&pair)?);
    }
    let confine = spec.confine.copied().unwrap_or_default();
    let dir = confine.dir.map(|dir| text(dir.as_os_str())).transpose()?;
    let landlock = confine.landlock.map(up).transpose()?;
    let groups = confine.groups.iter().map(|group| up(*group)).collect::<Result<Vec<_>, _>>()?;
    let group_numbers: Vec<c_int> = groups.iter().map(AsRawFd::as_raw_fd).collect();
    let (args, env) = (pointers(&args), pointers(&env));
    let unmapped: Vec<c_int> = (3..above).filter(|fd| !moves.iter().any(|(_, target)| target == fd)).collect();
    let plan = Plan {
        exe: exe.as_ref().map(AsRawFd::as_raw_fd),
        paths: &paths,
        args: &args,
        env: &env,
        moves: &moves,
        unmapped: &unmapped,
        above,
        ignored: spec.ignored,
        own_group: spec.own_group,
        parent: spec.dies_with_us.then(|| rustix::process::getpid().as_raw_nonzero().get()),
        dir: dir.as_ref().map(|dir| dir.as_ptr()),
        limits: confine.limits,
        ids: confine.ids,
        no_new_privs: confine.no_new_privs,
        landlock: landlock.as_ref().map(AsRawFd::as_raw_fd),
        groups: &group_numbers,
        report: write.as_raw_fd(),
    };
    Ok(Starting { pid: fork_blocked(&plan)?, report: ExecReport(report) })
}

impl ExecReport {
    /// What has become of the exec. Waits for it, unless the descriptor is made non-blocking.
    ///
    /// # Errors
    /// What read(2) says; `WouldBlock` while it is on its way.
    pub fn outcome(&self) -> io::Result<Result<(), Failed>> {
        let mut bytes = [0; 5];
        let count = rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut bytes))?;
        // One write of so few bytes is one read.
        Ok(Failed::read(bytes.get(..count).unwrap_or_default()).map_or(Ok(()), Err))
    }
}

impl AsFd for ExecReport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for ExecReport {
    fn as_raw_fd(&self) -> c_int {
        self.0.as_raw_fd()
    }
}

impl Failed {
    const STEPS: [Step; 9] = [
        Step::Bonds,
        Step::Descriptors,
        Step::Dir,
        Step::Limits,
        Step::Ids,
        Step::Sandbox,
        Step::Exec,
        Step::Interpreter,
        Step::Group,
    ];

    fn read(bytes: &[u8]) -> Option<Self> {
        let (step, errno) = bytes.split_first()?;
        let step = Self::STEPS.into_iter().find(|known| *known as u8 == *step)?;
        Some(Self { step, errno: c_int::from_ne_bytes(errno.try_into().ok()?) })
    }
}

impl Limit {
    const fn number(self) -> libc::__rlimit_resource_t {
        match self {
            Self::Memory => libc::RLIMIT_AS,
            Self::Core => libc::RLIMIT_CORE,
            Self::Cpu => libc::RLIMIT_CPU,
            Self::FileSize => libc::RLIMIT_FSIZE,
            Self::OpenFiles => libc::RLIMIT_NOFILE,
            Self::Processes => libc::RLIMIT_NPROC,
        }
    }
}

/// Everything the child needs, made before the fork: it must not allocate.
struct Plan<'a> {
    exe: Option<c_int>,
    paths: &'a [CString],
    args: &'a [*const c_char],
    env: &'a [*const c_char],
    moves: &'a [(c_int, c_int)],
    unmapped: &'a [c_int],
    above: c_int,
    ignored: &'a [Signal],
    own_group: bool,
    /// Whose end is its own.
    parent: Option<c_int>,
    dir: Option<*const c_char>,
    limits: &'a [(Limit, u64)],
    ids: Option<(u32, u32)>,
    no_new_privs: bool,
    landlock: Option<c_int>,
    groups: &'a [c_int],
    report: c_int,
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Forks with every signal blocked, so that none is handled in the child between fork and exec.
fn fork_blocked(plan: &Plan<'_>) -> io::Result<Pid> {
    // SAFETY: the sets are initialised by sigfillset and pthread_sigmask before use; between fork and exec the child
    // runs `child` only, which makes async-signal-safe calls and never returns.
    let pid = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
        let pid = libc::fork();
        if pid == 0 {
            child(plan);
        }
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, std::ptr::null_mut());
        if pid < 0 {
            return Err(error);
        }
        pid
    };
    Pid::from_raw(pid).ok_or_else(|| io::Error::other("fork gave no pid"))
}

/// The child's part.
///
/// # Safety
/// To be called in a freshly forked child with all signals blocked; the plan's pointers are to strings that live.
unsafe fn child(plan: &Plan<'_>) -> ! {
    // SAFETY: all of these are async-signal-safe (signal-safety(7)) or bare system calls; pointers and descriptors
    // come from the plan, which the parent made and keeps alive in the memory we are a copy of.
    unsafe {
        let failed = match prepare(plan) {
            Ok(()) => execute(plan),
            Err(step) => (step, errno()),
        };
        let [a, b, c, d] = failed.1.to_ne_bytes();
        let bytes = [failed.0 as u8, a, b, c, d];
        libc::write(plan.report, bytes.as_ptr().cast(), bytes.len());
        libc::_exit(127)
    }
}

/// All that comes before the exec; the error number says why a step failed.
///
/// # Safety
/// As [`child`].
unsafe fn prepare(plan: &Plan<'_>) -> Result<(), Step> {
    let check = |step: Step, outcome: c_int| if outcome < 0 { Err(step) } else { Ok(()) };
    // SAFETY: as in `child`.
    unsafe {
        // The kernel's own structure, all zero: the default action. The C library would keep two signals to itself, which
        // we may have been started with ignored.
        let default = [0_u64; 4];
        for number in 1..=64 {
            // KILL and STOP fail, and that is fine.
            let size: libc::size_t = 8;
            libc::syscall(libc::SYS_rt_sigaction, number, default.as_ptr(), std::ptr::null::<u64>(), size);
        }
        for signal in plan.ignored {
            libc::signal(signal.as_raw(), libc::SIG_IGN);
        }
        if plan.own_group {
            check(Step::Bonds, libc::setpgid(0, 0))?;
        }
        for (from, to) in plan.moves {
            check(Step::Descriptors, libc::dup2(*from, *to))?;
        }
        for fd in plan.unmapped {
            libc::close(*fd);
        }
        confine(plan)?;
        if let Some(parent) = plan.parent {
            // After the change of user, which clears it.
            let signal = libc::c_ulong::from(libc::SIGKILL.unsigned_abs());
            check(Step::Bonds, libc::prctl(libc::PR_SET_PDEATHSIG, signal))?;
            // It may have ended before that.
            if libc::getppid() != parent {
                libc::_exit(127);
            }
        }
        // Whatever we were started with ourselves: not ours to hand on. Before Linux 5.11 the flag is unknown and such
        // descriptors stay, which harms nobody but their owner.
        let flags: libc::c_ulong = 4; // CLOSE_RANGE_CLOEXEC
        let above = libc::c_ulong::from(plan.above.unsigned_abs());
        libc::syscall(libc::SYS_close_range, above, libc::c_ulong::from(u32::MAX), flags);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
    Ok(())
}

/// Cgroups, folder, limits, user and rights, in the order in which each still has the right to do it.
///
/// # Safety
/// As [`child`].
unsafe fn confine(plan: &Plan<'_>) -> Result<(), Step> {
    // Bare calls: the C library's own would tell its other threads of a change of user, and the child has none.
    let check = |step: Step, outcome: libc::c_long| if outcome < 0 { Err(step) } else { Ok(()) };
    // SAFETY: as in `child`.
    unsafe {
        for group in plan.groups {
            // While it is who we are; a 0 is the process that writes it.
            check(Step::Group, libc::write(*group, c"0".as_ptr().cast(), 1) as libc::c_long)?;
        }
        if let Some(dir) = plan.dir {
            check(Step::Dir, libc::c_long::from(libc::chdir(dir)))?;
        }
        for (limit, value) in plan.limits {
            let value = libc::rlimit { rlim_cur: *value, rlim_max: hard(*limit, *value) };
            check(Step::Limits, libc::c_long::from(libc::setrlimit(limit.number(), &raw const value)))?;
        }
        if let Some((uid, gid)) = plan.ids {
            let (uid, gid) = (libc::c_ulong::from(uid), libc::c_ulong::from(gid));
            check(Step::Ids, libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()))?;
            check(Step::Ids, libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
            check(Step::Ids, libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
        }
        if plan.no_new_privs {
            let (yes, none): (libc::c_ulong, libc::c_ulong) = (1, 0);
            let outcome = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, yes, none, none, none);
            check(Step::Sandbox, libc::c_long::from(outcome))?;
        }
        if let Some(ruleset) = plan.landlock {
            check(Step::Sandbox, libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0))?;
        }
    }
    Ok(())
}

/// The hard limit that goes with a soft one. For processor time it is a second more, if that may be: the soft one's XCPU tells
/// what it was, where the hard one's KILL could be anybody's.
///
/// # Safety
/// As [`child`].
unsafe fn hard(limit: Limit, soft: u64) -> u64 {
    let mut now = libc::rlimit { rlim_cur: soft, rlim_max: soft };
    // SAFETY: as in `child`; the structure is ours.
    let is_known = limit == Limit::Cpu && unsafe { libc::getrlimit(limit.number(), &raw mut now) } == 0;
    if is_known { soft.saturating_add(1).min(now.rlim_max.max(soft)) } else { soft }
}

/// Executes the program; returns why that failed.
///
/// # Safety
/// As [`child`].
unsafe fn execute(plan: &Plan<'_>) -> (Step, c_int) {
    // SAFETY: as in `child`.
    unsafe {
        if let Some(exe) = plan.exe {
            libc::syscall(
                libc::SYS_execveat,
                libc::c_long::from(exe),
                c"".as_ptr(),
                plan.args.as_ptr(),
                plan.env.as_ptr(),
                libc::c_long::from(libc::AT_EMPTY_PATH),
            );
            return (Step::Exec, errno());
        }
        let mut failed = (Step::Exec, libc::ENOENT);
        for path in plan.paths {
            libc::execve(path.as_ptr(), plan.args.as_ptr(), plan.env.as_ptr());
            match errno() {
                libc::ENOENT if libc::access(path.as_ptr(), libc::F_OK) == 0 => {
                    return (Step::Interpreter, libc::ENOENT);
                }
                libc::ENOENT | libc::ENOTDIR => {}
                // Another folder may have one that may be executed; if none has, this is the reason.
                libc::EACCES => failed = (Step::Exec, libc::EACCES),
                other => return (Step::Exec, other),
            }
        }
        failed
    }
}

fn errno() -> c_int {
    // SAFETY: the C library's own thread-local; always a valid pointer.
    unsafe { *libc::__errno_location() }
}
