//! Starting a program from an open descriptor with an exact set of descriptors and environment.
//!
//! Not `std::process::Command`: its error pipe sits at a number of the system's choosing, which a child's fixed
//! descriptor numbers would overwrite; and it cannot execute a descriptor. The caller is small and single-threaded (the
//! master), so that fork is cheap and safe; still the child does nothing but async-signal-safe calls.

use std::ffi::{CString, OsStr, OsString, c_char, c_int};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};

/// What to start.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// The program, as from [`own_executable`].
    pub exe: BorrowedFd<'a>,
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

/// Starts a child.
///
/// # Errors
/// `InvalidInput` for a NUL byte in a string; else what fork(2) or execveat(2) says, the latter as seen in the child.
pub fn spawn(spec: &Spawn<'_>) -> io::Result<Pid> {
    let above = spec.fds.iter().map(|(_, target)| *target).max().unwrap_or(2).max(2).saturating_add(1);
    let up = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, above);
    // All sources are first moved above every target, so that no dup2 closes what a later one needs.
    let exe = up(spec.exe)?;
    let held = spec.fds.iter().map(|(fd, target)| Ok((up(*fd)?, *target))).collect::<io::Result<Vec<_>>>()?;
    let moves: Vec<(c_int, c_int)> = held.iter().map(|(fd, target)| (fd.as_raw_fd(), *target)).collect();
    let (read, low) = pipe_with(PipeFlags::CLOEXEC)?;
    let write = up(low.as_fd())?;
    // Its end of file is the news that the exec succeeded: one copy only.
    drop(low);

    let text = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::from);
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
    let args = pointers(&args);
    let env = pointers(&env);
    let unmapped: Vec<c_int> = (3..above).filter(|fd| !moves.iter().any(|(_, target)| target == fd)).collect();
    let plan = Plan {
        exe: exe.as_raw_fd(),
        args: &args,
        env: &env,
        moves: &moves,
        unmapped: &unmapped,
        above,
        ignored: spec.ignored,
        own_group: spec.own_group,
        parent: spec.dies_with_us.then(|| rustix::process::getpid().as_raw_nonzero().get()),
        report: write.as_raw_fd(),
    };
    let pid = fork_blocked(&plan)?;
    drop(write);
    await_exec(pid, read)
}

/// Everything the child needs, made before the fork: it must not allocate.
struct Plan<'a> {
    exe: c_int,
    args: &'a [*const c_char],
    env: &'a [*const c_char],
    moves: &'a [(c_int, c_int)],
    unmapped: &'a [c_int],
    above: c_int,
    ignored: &'a [Signal],
    own_group: bool,
    /// Whose end is its own.
    parent: Option<c_int>,
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
        let failed = 'steps: {
            for number in 1..=64 {
                // KILL, STOP and the C library's own two fail, and that is fine.
                libc::signal(number, libc::SIG_DFL);
            }
            for signal in plan.ignored {
                libc::signal(signal.as_raw(), libc::SIG_IGN);
            }
            if plan.own_group && libc::setpgid(0, 0) != 0 {
                break 'steps errno();
            }
            if let Some(parent) = plan.parent {
                let signal = libc::c_ulong::from(libc::SIGKILL.unsigned_abs());
                if libc::prctl(libc::PR_SET_PDEATHSIG, signal) != 0 {
                    break 'steps errno();
                }
                // It may have ended before that.
                if libc::getppid() != parent {
                    libc::_exit(127);
                }
            }
            for (from, to) in plan.moves {
                if libc::dup2(*from, *to) < 0 {
                    break 'steps errno();
                }
            }
            for fd in plan.unmapped {
                libc::close(*fd);
            }
            // Whatever the master itself was started with: not ours to hand on. Before Linux 5.11 the flag is unknown
            // and such descriptors stay, which harms nobody but their owner.
            let flags: libc::c_ulong = 4; // CLOSE_RANGE_CLOEXEC
            libc::syscall(
                libc::SYS_close_range,
                libc::c_ulong::from(plan.above.unsigned_abs()),
                libc::c_ulong::from(u32::MAX),
                flags,
            );
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            libc::syscall(
                libc::SYS_execveat,
                libc::c_long::from(plan.exe),
                c"".as_ptr(),
                plan.args.as_ptr(),
                plan.env.as_ptr(),
                libc::c_long::from(libc::AT_EMPTY_PATH),
            );
            errno()
        };
        let bytes = failed.to_ne_bytes();
        libc::write(plan.report, bytes.as_ptr().cast(), bytes.len());
        libc::_exit(127)
    }
}

fn errno() -> c_int {
    // SAFETY: the C library's own thread-local; always a valid pointer.
    unsafe { *libc::__errno_location() }
}

/// The report pipe closes by itself when the exec succeeds, and carries the error number when it does not.
fn await_exec(pid: Pid, report: OwnedFd) -> io::Result<Pid> {
    let mut bytes = Vec::new();
    File::from(report).take(4).read_to_end(&mut bytes)?;
    match <[u8; 4]>::try_from(bytes.as_slice()) {
        Err(_) => Ok(pid),
        Ok(number) => {
            let mut status = 0;
            // SAFETY: our own child that is about to `_exit`; a plain wait for it.
            unsafe { libc::waitpid(pid.as_raw_nonzero().get(), &raw mut status, 0) };
            Err(io::Error::from_raw_os_error(c_int::from_ne_bytes(number)))
        }
    }
}
