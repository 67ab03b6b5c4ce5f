//! A host's life: one upstream's program, served to the workers at a socket of the master's.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use evergate_board::{Board, HostRow, Phase, monotonic_ns};
use evergate_core::config::process::{EnvValue, Mode, PASSED, Process, ProcessLimits};
use evergate_core::config::{Sealed, Shutdown};
use evergate_core::inherit::{self, code};
use evergate_core::json;
use evergate_core::redact::Redactor;
use evergate_host::command::{Bounds, Command};
use evergate_host::gate::Gate;
use evergate_host::service::{self, Stage};
use evergate_host::{Plan, Programs};
use evergate_sys::{Landlock, Limit};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::{ChildArgs, Inherited, kick, master_gone, rss_kib, state_dir_from_env};
use crate::panics;
use crate::tasks::{Caught, Tasks};

mod ear;

use ear::Ear;
pub(crate) use ear::{EXITS_SUFFIX, FOLDER, LOG_SUFFIX, OLD_SUFFIX};

/// How often the runtime shows that it turns.
const BEAT: Duration = Duration::from_millis(250);
/// Beats between two looks at the resident set.
const BEATS_PER_RSS: u32 = 8;

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
            eprintln!("evergate host: {reason}");
            return code::INTERNAL;
        }
    };
    let board = inherited.board.clone();
    panics::note("host", &board, (args.child.row, args.child.epoch));
    let failed = |reason: &str, code: u8| {
        eprintln!("evergate host {}: {reason}", args.name);
        if let Some(child) = board.child(args.child.row) {
            child.set_note(reason);
        }
        code
    };
    // Programs are forked on this thread, which lives as long as the process.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("the runtime did not start: {error}"), code::SYSTEM),
    };
    match runtime.block_on(Caught::of(Box::pin(live(args, inherited)))) {
        Ok(lived) => lived.unwrap_or_else(|reason| failed(&reason, code::FAILED)),
        Err(_) => failed("its main task panicked", code::INTERNAL),
    }
}

async fn live(args: &HostArgs, inherited: Inherited) -> Result<u8, String> {
    let of = |kind| signal(kind).map_err(|error| error.to_string());
    let (mut term, mut quit) = (of(SignalKind::terminate())?, of(SignalKind::quit())?);
    super::boot_fault::meet_host()?;
    let Inherited { board, sealed, life, kick: kicker, listeners, .. } = inherited;
    let shutdown = sealed.config.shutdown.clone();
    let ChildArgs { row, epoch, .. } = args.child;
    let process = sealed.config.upstreams.get(&args.name).and_then(|upstream| upstream.process.clone());
    let process = process.ok_or_else(|| "its upstream has no program in its configuration".to_owned())?;
    let fingerprint = process.fingerprint(&args.name);
    let is_ours = |row: &HostRow| row.fingerprint() == fingerprint && row.epoch() == epoch;
    let host = board.hosts().find_map(|(host, row)| is_ours(row).then_some(host));
    let host = host.ok_or_else(|| "the board has no row for it".to_owned())?;
    let folder = state_dir_from_env().ok_or_else(|| "no state folder in the environment".to_owned())?.join(FOLDER);
    let redactor = Redactor::new(sealed.secrets.values().map(String::as_str));
    let ear = Ear::start(&folder, &args.name, (board.clone(), host, args.child), redactor);
    let ear = Arc::new(ear.map_err(|error| format!("cannot write in {}: {error}", folder.display()))?);
    let mark = inherit::host_mark(board.run_id(), epoch);
    let programs = Programs::new(OsStr::new(&mark), ear.clone());
    let programs = programs.map_err(|error| format!("cannot look after programs: {error}"))?;
    let plan = plan(&process, &args.name, &sealed, &folder)?;
    let limits = service::Limits {
        body_bytes_max: usize::try_from(sealed.config.limits.body_bytes).unwrap_or(usize::MAX),
        json: json::Limits { depth: sealed.config.limits.json_depth, choices: sealed.config.limits.choices },
    };
    let Mode::Command(config) = process.mode.clone() else {
        return Err("this version has no host for its mode".to_owned());
    };
    let gate = Gate::new(process.in_flight_max, process.queue, ear.clone());
    let bounds = Bounds { start_timeout: process.start_timeout, output_bytes_max: process.output_bytes_max };
    let mode = Arc::new(Command::new(programs.clone(), plan, config, bounds, gate));
    let (listener, queue) = listener(listeners).map_err(|error| format!("its socket cannot be used: {error}"))?;
    let (stage, heard) = watch::channel(Stage::Serving);
    let mut served = std::pin::pin!(service::serve(listener, mode, limits, heard));
    let tasks = Tasks::new("host");
    let beating = board.clone();
    drop(tasks.keep("beat", move || beat(beating.clone(), row)));
    ready(&board, row, host, epoch);
    kick(&kicker);

    let mut gone = std::pin::pin!(master_gone(life));
    let is_hasty = tokio::select! {
        // Cancel-safe: `recv` loses no signal; the rest stays what it is.
        _ = term.recv() => false,
        _ = quit.recv() => true,
        _ = &mut gone => false,
        kind = tasks.failed() => return Err(format!("the task {kind} panicked again and again")),
        _ = &mut served => return Err("its service has ended".to_owned()),
    };
    let enter = |phase| {
        if let Some(child) = board.child(row) {
            child.set_phase(phase);
        }
    };
    enter(Phase::Draining);
    stage.send_replace(if is_hasty { Stage::Cutting } else { Stage::Draining });
    let cut = tokio::select! {
        cut = &mut served => Some(cut),
        () = tokio::time::sleep(shutdown.drain) => None,
        _ = quit.recv() => None,
    };
    if cut.is_none() {
        enter(Phase::Cancelling);
        stage.send_replace(Stage::Cutting);
        // Who is cut off here hears it from the worker.
        let _ = tokio::time::timeout(shutdown.cancel, &mut served).await;
    }
    enter(Phase::Cleaning);
    let left = end(&programs, &process, &shutdown).await;
    // Whoever connected before the row said that this one goes waits in the socket for the next.
    if has_queue(&queue)
        && let Some(row) = board.host(host)
    {
        row.set_is_wanted(true);
    }
    ear.close(shutdown.cleanup).await;
    if left > 0 {
        let note = format!("{left} of its programs could not be ended in time");
        eprintln!("evergate host {}: {note}", args.name);
        if let Some(child) = board.child(row) {
            child.set_note(&note);
        }
        return Ok(code::FORCED);
    }
    Ok(code::OK)
}

/// Ends every program, within the time that the master gives.
async fn end(programs: &Programs, process: &Process, shutdown: &Shutdown) -> usize {
    programs.end_all(Instant::now() + process.grace + shutdown.cleanup).await
}

fn ready(board: &Board, row: u32, host: u32, epoch: u32) {
    if let Some(child) = board.child(row) {
        child.set_beat_ns(monotonic_ns());
        child.set_rss_kib(rss_kib());
        child.set_ready_ns(monotonic_ns());
        child.set_phase(Phase::Ready);
    }
    if let Some(host) = board.host(host) {
        host.set_ready_epoch(epoch);
    }
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

/// How the program is started, from its section.
fn plan(process: &Process, name: &str, sealed: &Sealed, folder: &Path) -> Result<Plan, String> {
    let dir = match &process.dir {
        Some(dir) => PathBuf::from(dir),
        None => {
            let dir = folder.join(name);
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
            made.map_err(|error| format!("cannot make the working folder {}: {error}", dir.display()))?;
            dir
        }
    };
    let landlock = match &process.sandbox {
        None => None,
        Some(sandbox) => landlock(sandbox, &dir).map_err(|error| format!("cannot make the sandbox: {error}"))?,
    };
    Ok(Plan {
        argv: process.argv.iter().map(OsString::from).collect(),
        env: env(process, sealed)?,
        dir: Some(dir),
        limits: limits(&process.limits),
        ids: process.user.map(|ids| (ids.uid, ids.gid)),
        landlock: landlock.map(Arc::new),
        grace: process.grace,
    })
}

fn env(process: &Process, sealed: &Sealed) -> Result<Vec<(OsString, OsString)>, String> {
    let passed = PASSED.iter().copied().chain(process.pass_env.iter().map(String::as_str));
    let mut env: Vec<(OsString, OsString)> = Vec::new();
    let mut set = |name: &str, value: &str| {
        env.retain(|(known, _)| known != name);
        env.push((name.into(), value.into()));
    };
    for name in passed {
        if let Some(value) = sealed.variables.get(name) {
            set(name, value);
        }
    }
    for (name, value) in &process.env {
        match value {
            EnvValue::Text(text) => set(name, text),
            EnvValue::Secret(reference) => {
                let secret = sealed.secret(reference);
                set(name, secret.ok_or_else(|| format!("the secret {reference} was not handed over"))?);
            }
        }
    }
    Ok(env)
}

fn limits(limits: &ProcessLimits) -> Vec<(Limit, u64)> {
    let all = [
        (Limit::Memory, limits.memory),
        (Limit::OpenFiles, limits.open_files.map(u64::from)),
        (Limit::Processes, limits.processes.map(u64::from)),
        (Limit::Cpu, limits.cpu_s.map(u64::from)),
        (Limit::FileSize, limits.file_size),
    ];
    all.into_iter().filter_map(|(limit, value)| Some((limit, value?))).collect()
}

/// What a confined program needs of the system besides its own paths.
const SYSTEM: [&str; 9] =
    ["/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/dev/urandom", "/dev/zero", "/proc/self"];

fn landlock(sandbox: &evergate_core::config::process::Sandbox, dir: &Path) -> io::Result<Option<Landlock>> {
    let Some(rules) = Landlock::new()? else {
        eprintln!("evergate host: this kernel has no Landlock: the sandbox confines nothing");
        return Ok(None);
    };
    for path in SYSTEM.iter().map(Path::new).filter(|path| path.exists()) {
        rules.read(path)?;
    }
    for path in sandbox.read.iter().map(Path::new) {
        rules.read(path)?;
    }
    for path in sandbox.write.iter().map(Path::new).chain([dir, Path::new("/dev/null")]) {
        rules.write(path)?;
    }
    Ok(Some(rules))
}

/// Shows that the loop turns.
async fn beat(board: Board, row: u32) {
    for count in 0_u32.. {
        let before = Instant::now();
        tokio::time::sleep(BEAT).await;
        let Some(child) = board.child(row) else { return };
        let lag = before.elapsed().saturating_sub(BEAT).as_micros();
        child.set_loop_lag_us(u32::try_from(lag).unwrap_or(u32::MAX));
        child.set_beat_ns(monotonic_ns());
        if count.is_multiple_of(BEATS_PER_RSS) {
            child.set_rss_kib(rss_kib());
        }
    }
}
