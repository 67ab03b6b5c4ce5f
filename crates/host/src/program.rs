//! One program's life: started without blocking, fed and read with bounds, ended with everything that it started.
//!
//! [`Programs`] is made once per process, on the thread that lives as long as it: the kernel kills a program when the
//! thread that forked it ends. Each program has a task of its own (`life.rs`) that sees it to its end whether or not
//! anybody still holds its [`Program`]; dropping that begins the end.

mod house;
mod life;
mod start;
mod streams;
mod tail;

use std::ffi::OsString;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use evergate_sys::{Exit, Landlock, Limit, Pid, Status};
use tokio::sync::watch;

use crate::cgroup::Cgroups;

pub(crate) use house::members;
pub use start::{Failed, Programs, StartError};
pub(crate) use streams::LINGER;
pub use streams::{Fed, Input, Output};
pub use tail::TAIL_BYTES;

/// The variable by which a program of this host, and whatever it starts, is known: the mark given to [`Programs::new`].
pub const MARK: &str = "EVERGATE_HOST";
/// The variable by which the host itself tells whose descendant an orphan is.
pub const NUMBER: &str = "EVERGATE_PROGRAM";

/// How a program is started.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Program and arguments. One without a slash is looked up in the `PATH` of `env`; one with a slash is resolved against
    /// `dir`. Never a shell's line.
    pub argv: Vec<OsString>,
    /// Its whole environment, but for the two marks.
    pub env: Vec<(OsString, OsString)>,
    /// Its working folder; none for the host's own.
    pub dir: Option<PathBuf>,
    /// What the kernel lets it use.
    pub limits: Vec<(Limit, u64)>,
    /// User and group to run as, for a host that is root.
    pub ids: Option<(u32, u32)>,
    /// What it may reach in the file system; none for whatever its user may.
    pub landlock: Option<Arc<Landlock>>,
    /// Where it gets a cgroup of its own; none leaves it in the host's.
    pub cgroups: Option<Arc<Cgroups>>,
    /// Bytes that its cgroup may use in memory, if it has one that bounds it.
    pub memory: Option<u64>,
    /// From TERM to KILL.
    pub grace: Duration,
}

/// What is different at each start of the same program.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wiring<'a> {
    /// Arguments after those of the plan.
    pub args: &'a [OsString],
    /// The request it is started for, for the record of its end.
    pub request: Option<&'a str>,
    /// Descriptors it finds under numbers from 3 on.
    pub fds: &'a [(BorrowedFd<'a>, i32)],
    /// Whether its standard input is a pipe of ours; otherwise it is empty.
    pub has_input: bool,
    /// Whether its standard output is read by us; otherwise it is a log, as standard error always is.
    pub has_output: bool,
}

/// What is known of a program's life so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    /// Whether its program runs, or why not.
    started: Option<Result<(), Failed>>,
    /// How and when its first process ended.
    exited: Option<(Status, Instant)>,
    /// When nothing of it was left that could write.
    swept: Option<Instant>,
    ended: Option<Ended>,
}

/// A program's end, when nothing of it is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its number among processes, which may be another's by now.
    pub pid: Pid,
    /// The request it was started for, if it was for one.
    pub request: Option<String>,
    /// How its first process ended, and what it used.
    pub exit: Exit,
    /// How far we had to go.
    pub ladder: Ladder,
    /// Why we did, where that was said; it may hold anything.
    pub why: Option<String>,
    /// From its start to its exit.
    pub age: Duration,
    /// Processes of its making that had to be killed, its own group aside.
    pub strays: u32,
    /// Processes of its making that a KILL did not end within two seconds; they are followed further.
    pub left: u32,
    /// Processes of it that the kernel has killed for want of memory; none where nobody counts them.
    pub oom_kills: Option<u64>,
    /// The last of what it wrote to standard error.
    pub tail: Vec<u8>,
}

/// How a program was brought to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ladder {
    /// Not at all: it ended by itself.
    Untouched,
    /// With TERM.
    Term,
    /// With KILL.
    Kill,
}

/// What a program's owner wants of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Order {
    Live,
    End,
    Kill,
}

/// A running program. Dropping it ends the program: TERM to its group within the same turn of the runtime, and the rest
/// of the ladder without anybody waiting.
#[derive(Debug)]
pub struct Program {
    number: u64,
    pid: Pid,
    input: Option<Input>,
    output: Option<Output>,
    tail: Arc<Mutex<tail::Tail>>,
    why: Arc<OnceLock<String>>,
    state: watch::Receiver<State>,
    order: watch::Sender<Order>,
}

impl Program {
    /// Its number among processes; it is not given to another before [`Program::ended`].
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its number among the programs of this process, which its marks name.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Waits until the program is executed. Cancel-safe. How long that may take is the caller's business: a start from a
    /// file system that does not answer takes for ever, and dropping ends it.
    ///
    /// # Errors
    /// Why it is not; then nothing of it is left.
    pub async fn started(&mut self) -> Result<(), Failed> {
        let state = self.state.wait_for(|state| state.started.is_some()).await;
        // The life that went without a word has panicked, and killed what it had.
        state.ok().and_then(|state| state.started.clone()).unwrap_or_else(|| Err(Failed::lost()))
    }

    /// Its standard input, once.
    pub fn take_input(&mut self) -> Option<Input> {
        self.input.take()
    }

    /// Its standard output, once.
    pub fn take_output(&mut self) -> Option<Output> {
        self.output.take()
    }

    /// Waits for the end of its first process. Cancel-safe. None when its life was lost to a defect of ours.
    pub async fn exited(&mut self) -> Option<Status> {
        let state = self.state.wait_for(|state| state.exited.is_some()).await.ok()?;
        state.exited.map(|(status, _)| status)
    }

    /// How its first process ended, if it has.
    #[must_use]
    pub fn exit_status(&self) -> Option<Status> {
        self.state.borrow().exited.map(|(status, _)| status)
    }

    /// Waits until nothing of it is left: no process, no zombie. Cancel-safe. Some time after [`Program::exited`], when
    /// descendants hold its output open or have to be looked for. None when its life was lost to a defect of ours.
    pub async fn ended(&mut self) -> Option<Ended> {
        self.state.wait_for(|state| state.ended.is_some()).await.ok()?.ended.clone()
    }

    /// As [`Program::ended`], for somebody who does not hold it.
    pub fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut state = self.state.clone();
        async move {
            // An error is its end too.
            let _ = state.wait_for(|state| state.ended.is_some()).await;
        }
    }

    /// Says why it is about to be ended, for the record of that. The first word counts, and none does if it ends by itself.
    pub fn blame(&self, why: impl fmt::Display) {
        let _ = self.why.set(why.to_string());
    }

    /// Asks it to end: TERM to its group, and KILL after the plan's grace.
    pub fn end(&self) {
        self.order.send_if_modified(|order| {
            *order == Order::Live && {
                *order = Order::End;
                true
            }
        });
    }

    /// Ends it at once: KILL to its group.
    pub fn kill(&self) {
        self.order.send_if_modified(|order| {
            *order != Order::Kill && {
                *order = Order::Kill;
                true
            }
        });
    }

    /// The last of what it wrote to standard error, up to [`TAIL_BYTES`].
    #[must_use]
    pub fn tail(&self) -> Vec<u8> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner).bytes()
    }
}
