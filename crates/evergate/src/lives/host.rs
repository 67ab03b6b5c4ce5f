//! A host's life: one upstream's program, served to the workers at a socket of the master's.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use evergate_board::{Board, ChildRow, HostRow, Phase, monotonic_ns};
use evergate_core::config::process::Process;
use evergate_core::config::{Sealed, Shutdown};
use evergate_core::exit::Kind;
use evergate_core::inherit::{self, code};
use evergate_core::redact::Redactor;
use evergate_core::{Fault, json};
use evergate_host::service::{self, Front, Stage};
use evergate_host::{Cause, Programs};
use evergate_sys::is_alive;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::{ChildArgs, Inherited, kick, master_gone, rss_kib, state_dir_from_env};
use crate::panics;
use crate::tasks::{Caught, Tasks};
use crate::telemetry::talk;

mod ear;
mod folders;
mod model;

use ear::Ear;
pub(crate) use ear::{EXITS_SUFFIX, FOLDER, LOG_SUFFIX, OLD_SUFFIX};
use folders::Folders;
use model::{Model, Parts};

/// How often the runtime shows that it turns.
const BEAT: Duration = Duration::from_millis(250);
/// Beats between two looks at the resident set.
const BEATS_PER_RSS: u32 = 8;
/// Between two looks for workers when the master is gone. They leave within their own drain.
const WORKERS_LOOK: Duration = Duration::from_millis(50);
/// So long after a bad end the next host is on trial.
const TRIAL: Duration = Duration::from_secs(60);
/// However short `idle_stop` is, who has waited for the start gets to it.
const STAY: Duration = Duration::from_secs(1);

/// What the master tells a host on its command line.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct HostArgs {
    /// What it tells every child.
    #[command(flatten)]
    pub child: ChildArgs,
    /// The upstream whose program it runs.
    #[arg(long)]
    pub name: String,
}

/// Lives it; gives the exit code.
#[must_use]
pub fn run(args: &HostArgs) -> u8 {
    let inherited = match Inherited::adopt(&args.child) {
        Ok(inherited) => inherited,
        Err(reason) => {
            talk::print(&format!("evergate host: {reason}"));
            return code::INTERNAL;
        }
    };
    let board = inherited.board.clone();
    panics::note("host", &board, (args.child.row, args.child.epoch));
    let failed = |reason: &str, code: u8| {
        if let Some(child) = board.child(args.child.row) {
            child.set_note(reason);
        }
        talk::print(&format!("evergate host {}: {reason}", args.name));
        code
    };
    // Programs are forked on this thread, which lives as long as the process.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("the runtime did not start: {error}"), code::SYSTEM),
    };
    match runtime.block_on(Caught::of(Box::pin(live(args, inherited)))) {
        Ok(Ok(code)) => code,
        Ok(Err((reason, code))) => failed(&reason, code),
        Err(_) => failed("its main task panicked", code::INTERNAL),
    }
}

/// Why it ends otherwise than it was told, and its exit code.
type Ended = (String, u8);

fn broken(reason: impl Into<String>) -> Ended {
    (reason.into(), code::FAILED)
}

/// What tells it to go.
struct Orders {
    term: Signal,
    quit: Signal,
    gone: Pin<Box<dyn Future<Output = io::Result<()>> + Send>>,
}

/// How it is to go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// What it has may finish.
    Drain,
    Cut,
}

impl Orders {
    fn new(life: OwnedFd, board: Board, shutdown: &Shutdown) -> io::Result<Self> {
        let (term, quit) = (signal(SignalKind::terminate())?, signal(SignalKind::quit())?);
        let workers_time = shutdown.drain + shutdown.cancel + shutdown.cleanup;
        let gone = async move {
            let gone = master_gone(life).await;
            // One that is frozen is not waited for.
            let _ = tokio::time::timeout(workers_time, workers_gone(&board)).await;
            gone
        };
        Ok(Self { term, quit, gone: Box::pin(gone) })
    }

    /// Cancel-safe: `recv` loses no signal, and the rest stays what it is. To be called once.
    async fn first(&mut self) -> Order {
        tokio::select! {
            _ = self.term.recv() => Order::Drain,
            _ = self.quit.recv() => Order::Cut,
            _ = &mut self.gone => Order::Drain,
        }
    }

    async fn cut(&mut self) {
        self.quit.recv().await;
    }
}

/// Waits until no worker is left who could ask: without a master, nobody else tells that they went first.
async fn workers_gone(board: &Board) {
    let is_there = |child: &ChildRow| {
        let pid = rustix::process::Pid::from_raw(child.pid());
        child.kind() == Some(Kind::Worker) && pid.is_some_and(|pid| is_alive(pid, child.start_ticks()))
    };
    while board.children().any(|(_, child)| is_there(child)) {
        tokio::time::sleep(WORKERS_LOOK).await;
    }
}

/// Where it stands, and what it is to do there.
struct Host {
    board: Board,
    child: ChildArgs,
    /// Its row among the hosts'.
    host: u32,
    process: Process,
    shutdown: Shutdown,
    limits: service::Limits,
    ear: Arc<Ear>,
    programs: Programs,
    redactor: Arc<Redactor>,
    kicker: Arc<OwnedFd>,
    _folders: Folders,
}

async fn live(args: &HostArgs, inherited: Inherited) -> Result<u8, Ended> {
    let Inherited { board, sealed, life, kick, listeners, .. } = inherited;
    let mut orders =
        Orders::new(life, board.clone(), &sealed.config.shutdown).map_err(|error| broken(error.to_string()))?;
    super::boot_fault::meet_host().map_err(broken)?;
    let (host, model) = Host::new(args, board, &sealed, kick).map_err(broken)?;
    drop(sealed);
    let listener = listener(listeners).map_err(|error| broken(format!("its socket cannot be used: {error}")))?;
    let tasks = Tasks::new("host");
    let beat = host.beat();
    drop(tasks.keep("beat", move || beat.clone().run()));
    let lived = tokio::select! {
        lived = host.serve(&model, listener, &mut orders) => lived,
        kind = tasks.failed() => return Err(broken(format!("the task {kind} panicked again and again"))),
    };
    let left = host.end(&model, &mut orders, lived.is_hasty).await;
    host.ear.close(host.shutdown.cleanup).await;
    match lived.failure {
        Some(cause) => Err(broken(host.tell(&cause))),
        None if left > 0 => Err((format!("{left} of its programs could not be ended in time"), code::FORCED)),
        None => Ok(code::OK),
    }
}

/// How it came to the end of its service.
#[derive(Default)]
struct Lived {
    is_hasty: bool,
    failure: Option<Cause>,
}

impl Host {
    fn new(args: &HostArgs, board: Board, sealed: &Sealed, kick: OwnedFd) -> Result<(Self, Arc<Model>), String> {
        let process = sealed.config.upstreams.get(&args.name).and_then(|upstream| upstream.process.clone());
        let process = process.ok_or("its upstream has no program in its configuration")?;
        let fingerprint = process.fingerprint(&args.name);
        let is_ours = |row: &HostRow| row.fingerprint() == fingerprint && row.epoch() == args.child.epoch;
        let host = board.hosts().find_map(|(host, row)| is_ours(row).then_some(host));
        let host = host.ok_or("the board has no row for it")?;
        let folder = state_dir_from_env().ok_or("no state folder in the environment")?.join(FOLDER);
        let redactor = Arc::new(Redactor::new(sealed.secrets.values().map(String::as_str)));
        let is_kept = !matches!(process.mode, evergate_core::config::process::Mode::Command(_));
        let place = ear::Place { board: board.clone(), host, child: args.child, name: args.name.clone(), is_kept };
        let ear = Ear::start(&folder, place, Arc::clone(&redactor));
        let ear = Arc::new(ear.map_err(|error| format!("cannot write in {}: {error}", folder.display()))?);
        let mark = inherit::host_mark(board.run_id(), args.child.epoch);
        let programs = Programs::new(OsStr::new(&mark), ear.clone());
        let programs = programs.map_err(|error| format!("cannot look after programs: {error}"))?;
        let (name, report) = (args.name.as_str(), ear.clone());
        let folders = Folders::make(folder.join(name), &process, fingerprint)?;
        let has_failed = board.host(host).is_some_and(has_failed_lately);
        let parts =
            Parts { name, process: &process, sealed, folders: &folders, programs: &programs, report, has_failed };
        let model = Arc::new(Model::new(parts)?);
        let limits = service::Limits {
            body_bytes_max: usize::try_from(sealed.config.limits.body_bytes).unwrap_or(usize::MAX),
            json: json::Limits { depth: sealed.config.limits.json_depth, choices: sealed.config.limits.choices },
        };
        let (shutdown, child, kicker) = (sealed.config.shutdown.clone(), args.child, Arc::new(kick));
        let host =
            Self { board, child, host, process, shutdown, limits, ear, programs, redactor, kicker, _folders: folders };
        Ok((host, model))
    }

    /// Waits for the program, serves it until the host is to go or the program cannot be kept up, and finishes what there
    /// is.
    async fn serve(
        &self,
        model: &Arc<Model>,
        (listener, queue): (UnixListener, OwnedFd),
        orders: &mut Orders,
    ) -> Lived {
        let begun = tokio::select! {
            // Both are cancel-safe, here and below.
            begun = model.ready() => begun,
            order = orders.first() => return Lived { is_hasty: order == Order::Cut, failure: None },
        };
        if let Err(cause) = begun {
            return Lived { is_hasty: false, failure: Some(cause) };
        }
        let (stage, heard) = watch::channel(Stage::Serving);
        let front = Front { mode: Arc::clone(model), limits: self.limits, board: Some(self.board.clone()) };
        let mut served = pin!(service::serve(listener, front, heard));
        self.ready();
        let mut lived = Lived::default();
        tokio::select! {
            order = orders.first() => lived.is_hasty = order == Order::Cut,
            cause = model.failed() => lived.failure = Some(cause),
            // It does not end before it is told to.
            _ = &mut served => {}
        }
        self.enter(Phase::Draining);
        stage.send_replace(if lived.is_hasty { Stage::Cutting } else { Stage::Draining });
        let is_over = tokio::select! {
            _ = &mut served => true,
            () = tokio::time::sleep(self.shutdown.drain) => false,
            () = orders.cut() => { lived.is_hasty = true; false },
        };
        if !is_over {
            self.enter(Phase::Cancelling);
            stage.send_replace(Stage::Cutting);
            // Who is cut off here hears it from the worker.
            let _ = tokio::time::timeout(self.shutdown.cancel, &mut served).await;
        }
        // Whoever connected before the row said that this one goes waits in the socket for the next.
        if has_queue(&queue)
            && let Some(row) = self.row()
        {
            row.set_is_wanted(true);
        }
        lived
    }

    /// Ends every program, within the time that the master gives; says how many are left.
    async fn end(&self, model: &Model, orders: &mut Orders, is_hasty: bool) -> usize {
        self.enter(Phase::Cleaning);
        let (now, end_time) = (Instant::now(), self.process.end_time());
        if is_hasty {
            // They hear that nothing more comes; TERM tells the rest.
            model.stop(now).await;
        } else {
            tokio::select! {
                () = model.stop(now + end_time + self.shutdown.cleanup) => {}
                () = orders.cut() => {}
            }
        }
        let until = (now + end_time).max(Instant::now() + self.process.grace) + self.shutdown.cleanup;
        self.programs.end_all(until).await
    }

    /// Tells clients and operators why it cannot serve.
    fn tell(&self, cause: &Cause) -> String {
        let place = Fault::ALL.iter().position(|fault| *fault == cause.fault);
        let number = place.and_then(|place| u32::try_from(place + 1).ok()).unwrap_or(0);
        if let Some(row) = self.row() {
            row.tell(number, &cause.message);
        }
        // Of a traceback the last line says most.
        let words = self.redactor.redact(&cause.detail);
        match words.lines().rev().find(|line| !line.trim().is_empty()) {
            Some(last) => format!("{}: {}", cause.message, last.trim()),
            None => cause.message.clone(),
        }
    }

    fn row(&self) -> Option<&HostRow> {
        self.board.host(self.host)
    }

    fn enter(&self, phase: Phase) {
        if let Some(child) = self.board.child(self.child.row) {
            child.set_phase(phase);
        }
    }

    fn ready(&self) {
        if let Some(child) = self.board.child(self.child.row) {
            child.set_beat_ns(monotonic_ns());
            child.set_rss_kib(rss_kib());
            child.set_ready_ns(monotonic_ns());
            child.set_phase(Phase::Ready);
        }
        self.ear.ready();
        if let Some(row) = self.row() {
            row.set_ready_epoch(self.child.epoch);
        }
        kick(&*self.kicker);
    }

    fn beat(&self) -> Beat {
        let idle_stop =
            (!self.process.preload && !self.process.idle_stop.is_zero()).then(|| self.process.idle_stop.max(STAY));
        let (board, ear, kicker) = (self.board.clone(), Arc::clone(&self.ear), Arc::clone(&self.kicker));
        Beat { board, row: self.child.row, ear, kicker, idle_stop }
    }
}

/// Whether the last host of a row has come to a bad end, for which it was to be tried again not long ago.
fn has_failed_lately(row: &HostRow) -> bool {
    row.failures() > 0
        && monotonic_ns().saturating_sub(row.retry_ns()) < TRIAL.as_nanos().try_into().unwrap_or(u64::MAX)
}

/// The socket, and a second look at its queue.
fn listener(listeners: Vec<OwnedFd>) -> io::Result<(UnixListener, OwnedFd)> {
    let fd = listeners.into_iter().next().ok_or_else(|| io::Error::other("there is none"))?;
    let queue = fd.try_clone()?;
    Ok((UnixListener::from_std(StdUnixListener::from(fd))?, queue))
}

fn has_queue(listener: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&listener, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
}

/// Shows that the loop turns, and that nobody has needed the program for long.
#[derive(Clone)]
struct Beat {
    board: Board,
    row: u32,
    ear: Arc<Ear>,
    kicker: Arc<OwnedFd>,
    idle_stop: Option<Duration>,
}

impl Beat {
    async fn run(self) {
        for count in 0_u32.. {
            let before = Instant::now();
            tokio::time::sleep(BEAT).await;
            let Some(child) = self.board.child(self.row) else { return };
            let lag = before.elapsed().saturating_sub(BEAT).as_micros();
            child.set_loop_lag_us(u32::try_from(lag).unwrap_or(u32::MAX));
            child.set_beat_ns(monotonic_ns());
            if count.is_multiple_of(BEATS_PER_RSS) {
                child.set_rss_kib(rss_kib());
            }
            if self.idle_stop.is_some_and(|after| self.ear.offer_to_go(after)) {
                kick(&*self.kicker);
            }
        }
    }
}
