//! From nothing to a master that can start children.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use evergate_board::{Board, MasterPhase, Shape, monotonic_ns};
use evergate_core::inherit::{self, code};
use evergate_core::plan::{Address, Plan};
use evergate_sys::{Pid, Signal, Signals, Status, unix_ms};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{PidfdFlags, Resource, Rlimit, getrlimit, kill_process, pidfd_open, setrlimit};

use crate::activation::Activation;
use crate::children::Estate;
use crate::compile::{Compile, Words};
use crate::control::{self, Control};
use crate::exits::{EXITS_FILE, Exits};
use crate::holder;
use crate::hosts::Hosts;
use crate::listen::Listener;
use crate::master::Master;
use crate::orphans::Orphans;
use crate::plain;
use crate::runfile::Run;
use crate::state_writer::StateWriter;
use crate::step::{Circumstances, Next, Refusal, Rules, State};
use crate::{Failure, Options, talk};

/// How long the configuration may take to be validated.
const COMPILE_TIME: Duration = Duration::from_secs(30);
/// How long a dead predecessor's children may keep its port.
const PORT_TIME: Duration = Duration::from_secs(5);
/// How long who is killed at the start may need to end: on a full machine it takes more than a moment.
const KILL_TIME: Duration = Duration::from_secs(5);

/// Every signal that the master answers.
const SIGNALS: [Signal; 10] = [
    Signal::TERM,
    Signal::INT,
    Signal::QUIT,
    Signal::HUP,
    Signal::TTIN,
    Signal::TTOU,
    Signal::USR1,
    Signal::USR2,
    Signal::WINCH,
    Signal::CHILD,
];

/// Adds what was attempted to the system's words.
fn attempt<T>(what: &str, outcome: Result<T, impl Into<io::Error>>) -> Result<T, Failure> {
    outcome.map_err(|error| Failure::system(format!("cannot {what}: {}", error.into())))
}

/// Everything up to the point where children can be started.
pub(crate) fn boot(options: &Options) -> Result<Master, Failure> {
    let activation = Activation::take()?;
    let signals = attempt("take signals", Signals::block(&SIGNALS))?;
    let exe = attempt("open our own program", evergate_sys::own_executable())?;
    let folder = attempt("find the state folder", std::path::absolute(&options.state_dir))?;
    let lock = lock(&folder)?;
    let (plan, config) = compile(options, &exe, &signals)?;
    let what = format!("open the exit records {}", folder.join(EXITS_FILE).display());
    let exits = attempt(&what, Exits::open(&folder))?;
    let writer = StateWriter::start(folder.clone(), exits);
    let mut writer = attempt("start the thread that writes the state folder", writer)?;
    let hosts = Hosts::new(&folder);
    let what = format!("read the run file {}", Run::path(&folder).display());
    let mut orphans = attempt(&what, Orphans::find(&folder, hosts.folder(), &mut writer))?;
    orphans.signal(Signal::TERM);
    let (listeners, admin) = bind_all(&plan, activation, &mut orphans, &signals)?;
    raise_descriptor_limit();
    attempt("become the parent of orphans", evergate_sys::become_subreaper())?;
    let board = Board::create(Shape::for_plan(&plan), run_id())
        .map_err(|error| Failure::system(format!("cannot make the board: {error}")))?;
    describe(&board, &plan);
    let control = control::path(&folder);
    let what = format!("open the control socket {}", control.display());
    let control = attempt(&what, Control::open(control))?;
    let rules = Rules::of_plan(&plan);
    let host_rows = Shape::host_rows(&plan);
    let given = Circumstances {
        rows: board.shape().children.saturating_sub(host_rows),
        host_rows,
        has_orphans: !orphans.is_empty(),
        halts_on_boot_error: options.halt_on_boot_error,
        seed: board.run_id(),
    };
    let state = State::new(rules, given, monotonic_ns()).with_hosts(Next::of_plan(&plan).hosts);
    let mut env = options.child_env.clone();
    env.push((inherit::HOSTS_DIR_VARIABLE.into(), hosts.folder().into()));
    let estate = Estate {
        exe,
        configs: BTreeMap::from([(1, config)]),
        life: attempt("make a pipe", pipe_with(PipeFlags::CLOEXEC))?,
        kick: attempt("make an eventfd", eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK))?,
        writers: attempt("make a pipe", pipe_with(PipeFlags::CLOEXEC))?,
        nothing: attempt(
            "open /dev/null",
            rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()),
        )?,
        listeners,
        admin,
        hosts,
        env,
        board,
    };
    Ok(Master::new(options.clone(), lock, signals, estate, writer, orphans, control, state, plan))
}

/// Makes the state folder and takes its lock, which the kernel gives back however this process ends (I6, I7).
fn lock(folder: &Path) -> Result<File, Failure> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    attempt(&format!("make the state folder {}", folder.display()), made)?;
    let path = folder.join("lock");
    let file = plain::open(OpenOptions::new().create(true).truncate(false).write(true).mode(0o600), &path);
    let file = attempt(&format!("open {}", path.display()), file)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let holder = Run::read(folder).ok().flatten().map(|run| format!(" (pid {})", run.pid));
            Err(Failure::system(format!(
                "another gateway{} runs with the state folder {}; stop it, or choose another with --state-dir",
                holder.unwrap_or_default(),
                folder.display()
            )))
        }
        Err(error) => attempt(&format!("lock {}", path.display()), Err(error)),
    }
}

/// Has a child validate the configuration: the plan for us, and the sealed configuration for the children. It says on
/// standard error what is wrong; its exit code becomes ours.
fn compile(options: &Options, exe: &OwnedFd, signals: &Signals) -> Result<(Plan, OwnedFd), Failure> {
    let compile = Compile::start(exe.as_fd(), &options.compile_args, Words::Inherited);
    let compile = attempt("start the validation of the configuration", compile)?;
    let status = await_compile(compile.pid, signals)?;
    compile.finish(status).map_err(|Refusal { code, why }| Failure { code, text: why })
}

fn await_compile(pid: Pid, signals: &Signals) -> Result<Status, Failure> {
    let process = attempt("watch the validation", pidfd_open(pid, PidfdFlags::empty()))?;
    let mut end = Instant::now() + COMPILE_TIME;
    let mut failure = None;
    loop {
        let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).ok();
        let mut fds = [PollFd::new(&process, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        let ready = poll(&mut fds, left.as_ref());
        if fds.first().is_some_and(|process| !process.revents().is_empty()) {
            break;
        }
        let has_stop = has_stop(signals);
        let is_over = ready == Ok(0);
        failure = match failure {
            // It hangs in the kernel.
            Some(failure) if is_over => return Err(failure),
            None if has_stop => Some(Failure { code: code::OK, text: String::new() }),
            None if is_over => Some(Failure::internal("the validation of the configuration did not end in time")),
            Some(_) | None => continue,
        };
        // Its end comes by the pidfd.
        let _ = kill_process(pid, Signal::KILL);
        end = Instant::now() + KILL_TIME;
    }
    let exit = attempt("take the validation's end", evergate_sys::reap(pid))?;
    failure.map_or(Ok(exit.status), Err)
}

/// Whether somebody wants us to stop; takes every pending signal.
fn has_stop(signals: &Signals) -> bool {
    let mut has_stop = false;
    while let Ok(Some(taken)) = signals.take() {
        has_stop |= [Signal::TERM, Signal::INT, Signal::QUIT].iter().any(|stop| stop.as_raw() == taken.number);
    }
    has_stop
}

fn bind_all(
    plan: &Plan,
    mut activation: Activation,
    orphans: &mut Orphans,
    signals: &Signals,
) -> Result<(Vec<Listener>, Option<Listener>), Failure> {
    let admin = plan.admin.as_ref().and_then(|address| activation.find(address)).or_else(|| activation.admin());
    let mut listeners = if plan.is_listen_default { activation.all(plan)? } else { Vec::new() };
    if listeners.is_empty() {
        for address in &plan.listen {
            let passed = activation.find(address);
            listeners.push(passed.map_or_else(|| bind(address, orphans, signals), Ok)?);
        }
    }
    activation.finish(plan)?;
    let admin = match (admin, &plan.admin) {
        (None, Some(address)) => Some(bind(address, orphans, signals)?),
        (admin, _) => admin,
    };
    Ok((listeners, admin))
}

/// Binds one address. A dead predecessor's children close theirs as soon as they see that it is gone; until then the
/// port is waited for.
fn bind(address: &Address, orphans: &mut Orphans, signals: &Signals) -> Result<Listener, Failure> {
    let kill_at = Instant::now() + PORT_TIME;
    let mut until = orphans.is_empty().then(Instant::now);
    loop {
        let error = match Listener::bind(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => error,
        };
        let now = Instant::now();
        if until.is_some_and(|until| until <= now) || error.kind() != io::ErrorKind::AddrInUse {
            return Err(match error.kind() {
                io::ErrorKind::AddrInUse => Failure::system(holder::told(address)),
                _ => Failure::system(format!("cannot listen on {address}: {error}")),
            });
        }
        if until.is_none() && kill_at <= now {
            // Whoever did not notice for so long does not notice any more.
            orphans.signal(Signal::KILL);
            until = Some(now + KILL_TIME);
        }
        let pause = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        let _ = poll(&mut [PollFd::new(signals, PollFlags::IN)], Some(&pause));
        if has_stop(signals) {
            return Err(Failure { code: code::OK, text: String::new() });
        }
    }
}

/// One descriptor per connection: the soft limit is often 1,024, for the sake of programs that use select(2).
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    if let Err(error) = raised {
        talk::say(&format!("cannot raise the limit of open files: {error}"));
    }
}

/// Random, so that request ids differ between runs; clock and pid serve where there is no random device.
fn run_id() -> u64 {
    let mut bytes = [0_u8; 8];
    match File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)) {
        Ok(()) => u64::from_ne_bytes(bytes),
        Err(_) => unix_ms() << 22 ^ monotonic_ns() ^ u64::from(std::process::id()),
    }
}

fn describe(board: &Board, plan: &Plan) {
    let row = board.master();
    let own = rustix::process::getpid();
    row.set_pid(own.as_raw_nonzero().get());
    row.set_start_ticks(evergate_sys::start_ticks(own).unwrap_or(0));
    row.set_started_unix_ms(unix_ms());
    row.set_beat_ns(monotonic_ns());
    row.set_workers_min(plan.workers_min);
    row.set_workers_max(plan.workers_max);
    row.set_workers_target(plan.workers_min);
    row.set_generation(1);
    row.set_phase(MasterPhase::Starting);
}
