//! Starting programs: pipes, marks, the fork, and patience when the machine has no room for one more.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use evergate_sys::{Confine, Exe, Spawn, Step};
use rustix::fs::{Mode, OFlags};
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::sleep;

use super::life::{self, Life, Live};
use super::streams::{self, Log, Open};
use super::tail::Tail;
use super::{MARK, NUMBER, Order, Plan, Program, State, Wiring, house};
use crate::report::{Report, Stream};
use crate::tasks;

/// After a fork that the machine had no room for, and doubled with each one more (G2).
const FORK_PAUSE: Duration = Duration::from_millis(20);
const FORK_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Searched when an environment has no `PATH`, as the C library does.
const PATH: &str = "/bin:/usr/bin";

/// Why there is no program.
#[derive(Debug)]
pub enum StartError {
    /// The program cannot be executed as it is configured.
    Failed(Failed),
    /// The machine has no room for one more process or descriptor, and had none until the deadline.
    NoRoom(io::Error),
    /// It was not executed in time.
    TooLate,
    /// The host is stopping.
    Stopping,
    /// Something else, such as a NUL in an argument.
    Io(io::Error),
}

/// A step of the start that failed, and its error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// The program, as configured.
    pub program: OsString,
    /// What was attempted.
    pub step: Step,
    /// The number of the error, as in errno(3).
    pub errno: i32,
}

impl Failed {
    pub(crate) fn lost() -> Self {
        Self { program: OsString::new(), step: Step::Bonds, errno: 0 }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attempted = match self.step {
            Step::Bonds => "make a process group for",
            Step::Group => "enter the cgroup of",
            Step::Descriptors => "hand descriptors to",
            Step::Dir => "enter the working folder of",
            Step::Limits => "set the limits of",
            Step::Ids => "change to the user of",
            Step::Sandbox => "confine",
            Step::Exec => "execute",
            Step::Interpreter => "execute the interpreter of",
        };
        let error = io::Error::from_raw_os_error(self.errno);
        write!(f, "cannot {attempted} {}: {error}", self.program.display())
    }
}

/// Starts programs, and sees each to its end. One per process, made and used on its first thread.
#[derive(Clone)]
pub struct Programs(Arc<Shared>);

struct Shared {
    mark: OsString,
    report: Arc<dyn Report>,
    nothing: OwnedFd,
    /// Programs that are not ended yet.
    live: watch::Sender<usize>,
    /// Said to all of them at once.
    all: watch::Sender<Order>,
    room: Mutex<Room>,
}

/// Whether forks are worth a try.
#[derive(Debug)]
struct Room {
    next: Instant,
    pause: Duration,
}

/// Numbers of programs; one series for the process, since its children are.
static NUMBERS: AtomicU64 = AtomicU64::new(1);

impl Programs {
    /// Begins to look after children: this process becomes the parent of its descendants' orphans. To be called within a
    /// runtime.
    ///
    /// # Errors
    /// What prctl(2), open(2) and the runtime say.
    pub fn new(mark: &OsStr, report: Arc<dyn Report>) -> io::Result<Self> {
        evergate_sys::become_subreaper()?;
        let nothing = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let shared = Arc::new(Shared {
            mark: mark.to_owned(),
            report,
            nothing,
            live: watch::Sender::new(0),
            all: watch::Sender::new(Order::Live),
            room: Mutex::new(Room { next: Instant::now(), pause: FORK_PAUSE }),
        });
        let weak = Arc::downgrade(&shared);
        tasks::finish(life::tidy(signal(SignalKind::child())?, move || weak.strong_count() > 0));
        Ok(Self(shared))
    }

    /// Starts a program, and waits until it is executed or `until` has come. Dropping the future ends what it began.
    ///
    /// # Errors
    /// Why there is none; then nothing of it is left, or will be in a moment.
    pub async fn start(&self, plan: &Plan, wiring: Wiring<'_>, until: Instant) -> Result<Program, StartError> {
        let mut program = self.launch_patiently(plan, wiring, until).await?;
        match tokio::time::timeout_at(until.into(), program.started()).await {
            Ok(Ok(())) => {
                self.0.report.started(program.pid());
                Ok(program)
            }
            Ok(Err(_)) if *self.0.all.borrow() != Order::Live => Err(StartError::Stopping),
            Ok(Err(failed)) => {
                self.0.report.failed(&failed);
                Err(StartError::Failed(failed))
            }
            Err(_) => {
                program.blame("it was not executed in time");
                Err(StartError::TooLate)
            }
        }
    }

    /// Programs that are not ended yet.
    #[must_use]
    pub fn live(&self) -> usize {
        *self.0.live.borrow()
    }

    /// Ends every program, and waits until nothing is left or `until` has come; says how many are left. No program can be
    /// started any more.
    pub async fn end_all(&self, until: Instant) -> usize {
        self.0.all.send_if_modified(|order| {
            *order == Order::Live && {
                *order = Order::End;
                true
            }
        });
        let mut live = self.0.live.subscribe();
        let _ = tokio::time::timeout_at(until.into(), live.wait_for(|live| *live == 0)).await;
        self.live()
    }

    /// Kills every program at once; [`Programs::end_all`] waits for it.
    pub fn kill_all(&self) {
        self.0.all.send_replace(Order::Kill);
    }

    /// Forks as soon as the machine has room. Everybody waits for the same moment, so that a full machine is not asked more
    /// often for being asked by many.
    async fn launch_patiently(&self, plan: &Plan, wiring: Wiring<'_>, until: Instant) -> Result<Program, StartError> {
        let mut full = None;
        loop {
            if *self.0.all.borrow() != Order::Live {
                return Err(StartError::Stopping);
            }
            let next = self.room().next;
            if next > until {
                return Err(full.map_or(StartError::TooLate, StartError::NoRoom));
            }
            let now = Instant::now();
            if next > now {
                sleep(next - now).await;
                continue;
            }
            match self.launch(plan, wiring) {
                Ok(program) => {
                    self.room().pause = FORK_PAUSE;
                    return Ok(program);
                }
                Err(error) if is_full(&error) => {
                    let mut room = self.room();
                    room.next = now + room.pause;
                    room.pause = (room.pause * 2).min(FORK_PAUSE_MAX);
                    if room.next > until {
                        return Err(StartError::NoRoom(error));
                    }
                    full = Some(error);
                }
                Err(error) => return Err(StartError::Io(error)),
            }
        }
    }

    /// Who hears of them.
    pub(crate) fn report(&self) -> &dyn Report {
        &*self.0.report
    }

    fn room(&self) -> MutexGuard<'_, Room> {
        self.0.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forks, and gives the child a life of its own before anything else can go wrong.
    fn launch(&self, plan: &Plan, wiring: Wiring<'_>) -> io::Result<Program> {
        let shared = &self.0;
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let (input, input_write) = wiring.has_input.then(streams::input).transpose()?.unzip();
        let (output, output_read) = streams::output()?;
        let (errors, errors_read) = streams::output()?;
        let stdin = input.as_ref().map_or(shared.nothing.as_fd(), AsFd::as_fd);
        let mut fds = vec![(stdin, 0), (output.as_fd(), 1), (errors.as_fd(), 2)];
        fds.extend_from_slice(wiring.fds);

        let group = plan.cgroups.as_ref().map(|cgroups| cgroups.group(number, plan.memory)).transpose();
        let mut group =
            group.map_err(|error| io::Error::new(error.kind(), format!("its cgroup: {error}")))?.unwrap_or_default();

        let (pid, exec) = house::enter(number, || {
            let starting = fork(plan, wiring.args, &self.environment(plan, number), (&fds, &group.entrances()))?;
            Ok((starting.pid, starting.report))
        })?;
        group.close();
        let (state, order) = (watch::Sender::new(State::default()), watch::Sender::new(Order::Live));
        let (open, logs) = (watch::Sender::new(0), watch::Sender::new(0));
        let (tail, why) = (Arc::<Mutex<Tail>>::default(), Arc::<OnceLock<String>>::default());
        // From here on its guard kills the child if we do not come to the end of this.
        let life = Life {
            number,
            pid,
            request: wiring.request.map(str::to_owned),
            program: plan.argv.first().cloned().unwrap_or_default(),
            grace: plan.grace,
            group,
            born: Instant::now(),
            state: state.clone(),
            order: order.subscribe(),
            all: shared.all.subscribe(),
            open: open.clone(),
            logs: logs.clone(),
            tail: Arc::clone(&tail),
            why: Arc::clone(&why),
            report: Arc::clone(&shared.report),
            _live: Live::new(&shared.live),
            is_buried: false,
        };
        streams::set_nonblocking(&exec)?;
        let exec = watch_for_reading(exec)?;
        let process = watch_for_reading(pidfd_open(pid, PidfdFlags::empty())?)?;
        let log = |stream: Stream, pipe: pipe::Receiver, tail: Option<Arc<Mutex<Tail>>>| {
            let (open, report) = ([&open, &logs].map(Open::new), Arc::clone(&shared.report));
            tasks::finish(Log { program: pid, stream, pipe, state: state.subscribe(), open, tail, report }.drain());
        };
        log(Stream::Error, errors_read, Some(Arc::clone(&tail)));
        let output = if wiring.has_output {
            Some(streams::reader(output_read, state.subscribe(), Open::new(&open)))
        } else {
            log(Stream::Output, output_read, None);
            None
        };
        tasks::finish(life.live(exec, process));
        Ok(Program { number, pid, input: input_write, output, tail, why, state: state.subscribe(), order })
    }

    fn environment(&self, plan: &Plan, number: u64) -> Vec<(OsString, OsString)> {
        let mut env = plan.env.clone();
        env.push((MARK.into(), self.0.mark.clone()));
        env.push((NUMBER.into(), house::mark_of(number).into()));
        env
    }
}

impl fmt::Debug for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Programs").field("live", &self.live()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

fn fork(
    plan: &Plan,
    args: &[OsString],
    env: &[(OsString, OsString)],
    (fds, entrances): (&[(BorrowedFd<'_>, i32)], &[BorrowedFd<'_>]),
) -> io::Result<evergate_sys::Starting> {
    let Some((program, rest)) = plan.argv.split_first() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no program is named"));
    };
    let args: Vec<OsString> = rest.iter().chain(args).cloned().collect();
    let confine = Confine {
        dir: plan.dir.as_deref(),
        limits: &plan.limits,
        ids: plan.ids,
        no_new_privs: true,
        landlock: plan.landlock.as_ref().map(|landlock| landlock.as_fd()),
        groups: entrances,
    };
    evergate_sys::start(&Spawn {
        exe: Exe::Paths(&candidates(program, env)),
        argv0: program,
        args: &args,
        env,
        fds,
        ignored: &[],
        own_group: true,
        dies_with_us: true,
        confine: Some(&confine),
    })
}

/// The files that a program's name may mean, in order. None of them is looked at here: that may take for ever.
fn candidates(program: &OsStr, env: &[(OsString, OsString)]) -> Vec<OsString> {
    if program.as_encoded_bytes().contains(&b'/') {
        return vec![program.to_owned()];
    }
    let path = env.iter().find(|(name, _)| name == "PATH").map_or(OsStr::new(PATH), |(_, value)| value);
    std::env::split_paths(path).map(|folder| folder.join(program).into_os_string()).collect()
}

fn watch_for_reading<T: AsRawFd>(fd: T) -> io::Result<AsyncFd<T>> {
    #[allow(deprecated, reason = "owned descriptors are what it asks for; its successor is unsafe to call")]
    AsyncFd::with_interest(fd, Interest::READABLE)
}

/// Whether the machine, not the program, is the reason.
fn is_full(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE]
        .iter()
        .any(|full| error.raw_os_error() == Some(full.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_a_slash_are_looked_up() {
        let env = |path: &str| vec![("PATH".into(), path.into())];
        assert_eq!(candidates("tr".as_ref(), &env("/a:/b")), ["/a/tr", "/b/tr"]);
        assert_eq!(candidates("./tr".as_ref(), &env("/a:/b")), ["./tr"]);
        assert_eq!(candidates("tr".as_ref(), &[]), ["/bin/tr", "/usr/bin/tr"]);
    }
}
