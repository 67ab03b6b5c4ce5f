//! The one reaper: look first, then take exactly that one, so that nobody's status is stolen.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

use rustix::process::Pid;

/// How a process ended, and what it used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// How.
    pub status: Status,
    /// Its largest resident set, KiB.
    pub rss_max_kib: u64,
    /// User plus system CPU of it and of the children it waited for, milliseconds.
    pub cpu_ms: u64,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// `exit(code)`.
    Code(u8),
    /// By a signal.
    Signal {
        /// 1 to 64.
        number: u8,
        /// Whether a core was dumped.
        core: bool,
    },
}

/// A child of ours that has ended and was not reaped yet. It stays a zombie, so its number cannot be given to another.
///
/// # Errors
/// What waitid(2) says, except that there are no children.
pub fn peek_exit() -> io::Result<Option<Pid>> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` is a writable siginfo_t; P_ALL ignores the id.
    let outcome = unsafe { libc::waitid(libc::P_ALL, 0, info.as_mut_ptr(), options) };
    if outcome != 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ECHILD) => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: zeroed before the call, and a siginfo_t of zeros is valid; with WNOHANG and no exit the kernel leaves
    // the pid 0 (waitid(2)).
    let pid = unsafe { info.assume_init().si_pid() };
    Ok(Pid::from_raw(pid))
}

/// How a child of ours has ended, without taking its status: it stays a zombie, and its number its own. None while it
/// runs.
///
/// # Errors
/// What waitid(2) says.
pub fn peek_status(pid: Pid) -> io::Result<Option<Status>> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let id = pid.as_raw_nonzero().get().unsigned_abs();
    // SAFETY: `info` is a writable siginfo_t.
    let outcome =
        unsafe { libc::waitid(libc::P_PID, id, info.as_mut_ptr(), libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed before the call, and filled by it for a child that has ended; a siginfo_t of zeros is valid.
    let (ended, code, status) = unsafe {
        let info = info.assume_init();
        (info.si_pid(), info.si_code, info.si_status())
    };
    Ok((ended != 0).then(|| match code {
        libc::CLD_EXITED => Status::Code(byte(status)),
        _ => Status::Signal { number: byte(status), core: code == libc::CLD_DUMPED },
    }))
}

/// Takes the status of an ended child; the number may belong to another process from then on.
///
/// # Errors
/// What wait4(2) says, and `WouldBlock` when the child has not ended.
pub fn reap(pid: Pid) -> io::Result<Exit> {
    let mut status = 0;
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: both pointers are to writable values of the right types.
    let taken = unsafe { libc::wait4(pid.as_raw_nonzero().get(), &raw mut status, libc::WNOHANG, usage.as_mut_ptr()) };
    if taken < 0 {
        return Err(io::Error::last_os_error());
    }
    if taken == 0 {
        return Err(io::Error::new(io::ErrorKind::WouldBlock, "the child has not ended"));
    }
    // SAFETY: zeroed before the call; a rusage is made of integers.
    let usage = unsafe { usage.assume_init() };
    let ms = |time: libc::timeval| {
        let whole = u64::try_from(time.tv_sec).unwrap_or(0).saturating_mul(1000);
        whole.saturating_add(u64::try_from(time.tv_usec).unwrap_or(0) / 1000)
    };
    Ok(Exit {
        status: decode(status),
        rss_max_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
        cpu_ms: ms(usage.ru_utime).saturating_add(ms(usage.ru_stime)),
    })
}

fn decode(status: i32) -> Status {
    if libc::WIFSIGNALED(status) {
        Status::Signal { number: byte(libc::WTERMSIG(status)), core: libc::WCOREDUMP(status) }
    } else {
        Status::Code(byte(libc::WEXITSTATUS(status)))
    }
}

/// As the kernel lays it out since 6.13, the first version of 64 bytes (linux/pidfd.h).
#[repr(C)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    ids: [u32; 11],
    exit_code: i32,
}

/// How a process ended that need not be our child: none before it was reaped, and on kernels that do not tell (it came
/// with Linux 6.15). What it used is not known.
///
/// # Errors
/// What ioctl(2) says, but for a kernel or a process without an answer.
pub fn exit_of(process: impl AsFd) -> io::Result<Option<Exit>> {
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    // _IOWR(0xff, 11, struct pidfd_info) with its first size.
    const PIDFD_GET_INFO: libc::Ioctl = 0xc040_ff0b_u32 as libc::Ioctl;
    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, cgroup: 0, ids: [0; 11], exit_code: 0 };
    // SAFETY: `info` has the 64 bytes that the request's number announces, all of them initialised and writable.
    let outcome = unsafe { libc::ioctl(process.as_fd().as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
    if outcome < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ENOTTY | libc::EINVAL | libc::ESRCH) => Ok(None),
            _ => Err(error),
        };
    }
    let status = (info.mask & PIDFD_INFO_EXIT != 0).then(|| decode(info.exit_code));
    Ok(status.map(|status| Exit { status, rss_max_kib: 0, cpu_ms: 0 }))
}

fn byte(value: i32) -> u8 {
    u8::try_from(value & 0xff).unwrap_or(0)
}
