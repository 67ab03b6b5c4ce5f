//! Signals as a descriptor, and signals to processes that may be somebody else by now.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Signals blocked in the calling thread and read from a descriptor instead: no handler runs, nothing is done in
/// signal context, and a child between fork and exec cannot write into its parent's pipe.
#[derive(Debug)]
pub struct Signals(OwnedFd);

/// One signal as it was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Its number.
    pub number: i32,
    /// Who sent it; 0 for the kernel.
    pub sender: u32,
}

impl Signals {
    /// Blocks the signals and opens the descriptor. To be called before any other thread exists, because the mask is
    /// per thread; [`crate::spawn`] clears it in children.
    ///
    /// # Errors
    /// What sigprocmask(2) and signalfd(2) say.
    pub fn block(signals: &[Signal]) -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the whole set; sigaddset is given an initialised set and valid numbers.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in signals {
                libc::sigaddset(set.as_mut_ptr(), signal.as_raw());
            }
            set.assume_init()
        };
        // Who was started with CHLD ignored has inherited that (execve(2)), and the kernel would keep no child's end for it.
        if signals.contains(&Signal::CHILD) {
            // SAFETY: the default action runs no code of ours.
            unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
        }
        // SAFETY: the set is initialised; no old mask is asked for.
        let outcome = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if outcome != 0 {
            return Err(io::Error::from_raw_os_error(outcome));
        }
        // SAFETY: the set is initialised; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The next pending signal; none when there is none.
    ///
    /// # Errors
    /// What read(2) says.
    pub fn take(&self) -> io::Result<Option<Taken>> {
        const SIZE: usize = size_of::<libc::signalfd_siginfo>();
        let mut bytes = [0_u8; SIZE];
        match rustix::io::read(&self.0, &mut bytes) {
            Ok(SIZE) => {}
            Ok(_) => return Ok(None),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // SAFETY: `signalfd_siginfo` is made of integers, so every bit pattern is one; the read is unaligned because
        // the buffer is of bytes.
        let info = unsafe { bytes.as_ptr().cast::<libc::signalfd_siginfo>().read_unaligned() };
        Ok(Some(Taken { number: i32::try_from(info.ssi_signo).unwrap_or(0), sender: info.ssi_pid }))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// When a process started, in clock ticks since boot: with the pid it names a process for good (field 22 of
/// `/proc/PID/stat`, proc_pid_stat(5)). None when there is no such process.
#[must_use]
pub fn start_ticks(pid: Pid) -> Option<u64> {
    stat(pid).map(|(_, ticks)| ticks)
}

/// Whether this very process is there and has not ended; a zombie that nobody reaps has.
#[must_use]
pub fn is_alive(pid: Pid, ticks: u64) -> bool {
    stat(pid).is_some_and(|(state, start)| start == ticks && !matches!(state, 'Z' | 'X'))
}

/// Whether a KILL is on its way through this process: it is pending, or the process has given back its memory already.
#[must_use]
pub fn is_being_killed(pid: Pid) -> bool {
    let Ok(text) = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())) else { return false };
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let is_pending = |name: &str| {
        let mask = field(name).and_then(|mask| u64::from_str_radix(mask, 16).ok());
        mask.is_some_and(|mask| mask & 1 << (libc::SIGKILL - 1) != 0)
    };
    is_pending("SigPnd:") || is_pending("ShdPnd:") || field("VmRSS:").is_none()
}

/// State and start time.
fn stat(pid: Pid) -> Option<(char, u64)> {
    let stat = std::fs::read(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name in field 2 may hold spaces and parentheses; the last one closes it. Field 3 comes first after it.
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = std::str::from_utf8(stat.get(end + 1..)?).ok()?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(22 - 4)?.parse().ok()?))
}

/// Sends a signal to a process that need not be our child, unless it is gone or its number belongs to another by now.
/// Says whether it was sent.
///
/// # Errors
/// What pidfd_open(2) and pidfd_send_signal(2) say, except that the process is gone.
pub fn kill_if_same(pid: Pid, ticks: u64, signal: Signal) -> io::Result<bool> {
    // The descriptor first, then the check: once it is open, it means this process and no later one.
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    if start_ticks(pid) != Some(ticks) {
        return Ok(false);
    }
    match pidfd_send_signal(&process, signal) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::SRCH) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_names_a_process() {
        let own = rustix::process::getpid();
        let ticks = start_ticks(own).unwrap();
        assert!(ticks > 0 && is_alive(own, ticks) && !is_alive(own, ticks + 1));
        assert!(!is_being_killed(own));
        // Signal 0 does not exist as a `Signal`; CONT does nothing to a running process.
        assert!(kill_if_same(own, ticks, Signal::CONT).unwrap());
        assert!(!kill_if_same(own, ticks + 1, Signal::KILL).unwrap());
        assert_eq!(start_ticks(Pid::from_raw(i32::MAX).unwrap()), None);
    }

    #[test]
    fn blocked_signals_are_read_one_by_one() {
        // In a thread of its own: the mask is per thread, and this signal is sent to this thread only.
        let taken = std::thread::spawn(|| {
            let signals = Signals::block(&[Signal::USR2]).unwrap();
            assert_eq!(signals.take().unwrap(), None);
            // SAFETY: sends a blocked signal to the calling thread.
            unsafe { libc::raise(libc::SIGUSR2) };
            let taken = signals.take().unwrap();
            assert_eq!(signals.take().unwrap(), None);
            taken
        })
        .join()
        .unwrap();
        assert_eq!(taken.unwrap().number, libc::SIGUSR2);
        assert_eq!(taken.unwrap().sender, std::process::id());
    }
}
