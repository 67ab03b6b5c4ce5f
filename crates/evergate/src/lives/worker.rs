//! A worker's life: boot in order, serve, drain in stages, stop in reverse order.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use evergate_board::{Board, MasterPhase, Phase, monotonic_ns};
use evergate_core::Cause;
use evergate_core::inherit::code;
use evergate_core::redact::Redactor;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;

use super::descriptors::{self, Strays};
use super::thrift::Thrift;
use super::{ChildArgs, Inherited, kick, master_gone, rss_kib};
use crate::gate::{Gate, Stage};
use crate::http::app::App;
use crate::http::fault::{Place, pass_by};
use crate::http::local::Wake;
use crate::lifespan::{Lifespan, nothing};
use crate::panics;
use crate::server::accept::{Acceptor, Listener};
use crate::server::tls;
use crate::tasks::{self, Caught, Tasks};
use crate::telemetry::access::AccessLog;
use crate::telemetry::names;
use crate::telemetry::talk;

/// How often the runtime shows that it turns while it has something to do; the timer of it is a millisecond's, so that
/// up to one more is no lateness.
const BEAT: Duration = Duration::from_millis(100);
/// And when it has nothing: four times a second cost nothing that can be measured.
const BEAT_IDLE: Duration = Duration::from_millis(250);
/// Every so many beats it looks how much memory it has.
const RSS_BEATS: u32 = 8;

/// How often idle upstream connections are looked through.
const SWEEP: Duration = Duration::from_secs(5);

/// How long connections that are being closed may take: `ClientIo` reads on for half a second behind its own end.
const CLOSING: Duration = Duration::from_secs(1);

/// Lives it; gives the exit code.
#[must_use]
pub fn run(args: &ChildArgs) -> u8 {
    let inherited = match Inherited::adopt(args) {
        Ok(inherited) => inherited,
        Err(reason) => {
            talk::print(&format!("evergate worker: {reason}"));
            return code::INTERNAL;
        }
    };
    let board = inherited.board.clone();
    panics::note("worker", &board, (args.row, args.epoch));
    let failed = |reason: &str, code: u8| {
        talk::print(&format!("evergate worker: {reason}"));
        if let Some(child) = board.child(args.row) {
            child.set_note(reason);
        }
        code
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Nothing of a worker goes there; look-ups of names have threads of their own.
        .max_blocking_threads(1)
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("the runtime did not start: {error}"), code::SYSTEM),
    };
    let lived = runtime.block_on(Caught::of(Box::pin(live(args, inherited))));
    match lived {
        Ok(lived) => lived.unwrap_or_else(|reason| failed(&reason, code::FAILED)),
        Err(_) => failed("its main task panicked", code::INTERNAL),
    }
}

struct Signals {
    term: Signal,
    quit: Signal,
}

async fn live(args: &ChildArgs, inherited: Inherited) -> Result<u8, String> {
    let Inherited { board, sealed, life, kick: kicker, writers, listeners } = inherited;
    let shutdown = sealed.config.shutdown.clone();
    let boot = sealed.config.workers.boot_timeout;
    let kicker = Arc::new(kicker);
    let tasks = Tasks::new("worker");
    let mut lifespan = Lifespan::default();
    let failed = |failed: crate::lifespan::Failed| failed.to_string();

    let signals = async {
        let of = |kind| signal(kind).map_err(|error| error.to_string());
        Ok((Signals { term: of(SignalKind::terminate())?, quit: of(SignalKind::quit())? }, nothing()))
    };
    let mut signals = lifespan.start("signal handling", boot, signals).await.map_err(failed)?;

    super::boot_fault::meet(board.child(args.row).map_or(0, evergate_board::ChildRow::slot)).await?;
    lifespan.start("planted", boot, async { Ok(((), super::boot_fault::stop())) }).await.map_err(failed)?;

    let places = (sealed.config.workers.slots, sealed.config.limits.queue);
    let connections = descriptors::connections(&sealed.config);
    let waker = Arc::clone(&kicker);
    let tell = Box::new(move || kick(&*waker));
    let redactor = Arc::new(Redactor::new(sealed.secrets.values().map(String::as_str)));
    let log = AccessLog::new(board.record_writer(args.row), writers, Arc::clone(&redactor));
    let gate = Gate::new(board.clone(), (args.row, args.epoch), places, log, tell);
    let waker = Arc::clone(&kicker);
    let wake: Wake = Arc::new(move || kick(&*waker));
    let app = async {
        let app = Arc::new(App::new(sealed, Arc::clone(&gate), tasks.clone(), redactor, &wake)?);
        let clients = Arc::clone(&app);
        let stop = async move {
            // What has ended in order has given everything back; the rest is the master's to free.
            debug_assert!(clients.gate.live() > 0 || clients.limits.values().all(|limit| limit.is_idle()));
            clients.clients.values().for_each(|client| client.close_idle());
        };
        Ok((app, Box::pin(stop) as _))
    };
    let app = lifespan.start("upstreams", boot, app).await.map_err(failed)?;

    let acceptor = async {
        let files = &app.sealed.files;
        let tls = match &app.sealed.config.server.tls {
            None => None,
            Some(paths) => {
                let read = |path: &String| files.get(path).ok_or_else(|| format!("the content of {path} is missing"));
                Some(tls::acceptor(read(&paths.cert)?, read(&paths.key)?)?)
            }
        };
        Ok((tls, nothing()))
    };
    let tls = lifespan.start("TLS", boot, acceptor).await.map_err(failed)?;

    let listening = start_listening(args, &app, &tasks, tls, listeners, connections, &kicker);
    lifespan.start("listeners", boot, async { listening.map(|()| ((), nothing())) }).await.map_err(failed)?;
    keep_house(&tasks, args.row, &app);

    if let Some(child) = board.child(args.row) {
        gate.load().show_beat();
        child.set_ready_ns(monotonic_ns());
        child.set_accepting(true);
        child.set_phase(Phase::Ready);
    }
    kick(&*kicker);

    let why = tokio::select! {
        // Cancel-safe: `recv` loses no signal, and the master's end and a failed task stay what they are.
        _ = signals.term.recv() => Why::Told,
        _ = signals.quit.recv() => Why::Hastened,
        kind = tasks.failed() => Why::Failed(kind),
        gone = master_gone(life) => {
            gone.map_err(|error| format!("the master's pipe cannot be watched: {error}"))?;
            Why::Told
        }
    };
    Ok(stop(args, &board, &gate, &mut signals, &mut lifespan, &shutdown, why).await)
}

/// Why a worker goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// The master says so, or is gone.
    Told,
    /// The same, without `drain`.
    Hastened,
    /// This kept task does nothing but panic. Requests may still finish: another worker is on its way.
    Failed(&'static str),
}

/// Starts what a worker cannot do without.
fn keep_house(tasks: &Tasks, row: u32, app: &Arc<App>) {
    let of = || Arc::clone(app);
    let (beating, timing, sweeping) = (of(), of(), of());
    drop(tasks.keep("beat", move || beat(row, Arc::clone(&beating))));
    drop(tasks.keep("clock", move || run_clock(Arc::clone(&timing))));
    drop(tasks.keep("sweep", move || sweep(Arc::clone(&sweeping))));
}

fn start_listening(
    args: &ChildArgs,
    app: &Arc<App>,
    tasks: &Tasks,
    tls: Option<tokio_rustls::TlsAcceptor>,
    listeners: Vec<OwnedFd>,
    connections: u32,
    kicker: &Arc<OwnedFd>,
) -> Result<(), String> {
    let (row, board, kicker) = (args.row, app.gate.board().clone(), Arc::clone(kicker));
    let acceptor = Arc::new(Acceptor {
        app: Arc::clone(app),
        tasks: tasks.clone(),
        tls,
        places: Arc::new(Semaphore::new(connections as usize)),
        unseen: AtomicU32::new(args.listeners),
        took_queue: Box::new(move || {
            if let Some(child) = board.child(row) {
                child.set_took_queue(true);
            }
            kick(&*kicker);
        }),
    });
    for fd in listeners {
        let listener = Listener::adopt(fd).map_err(|error| format!("an inherited listener cannot be used: {error}"))?;
        let (acceptor, listener) = (Arc::clone(&acceptor), Arc::new(listener));
        drop(tasks.keep("accept", move || Arc::clone(&acceptor).run(Arc::clone(&listener))));
    }
    Ok(())
}

/// The stages of a stop: drain, cancel, cleanup. 0, or 75 if one of the last two ran out, or 70 for a failed task.
async fn stop(
    args: &ChildArgs,
    board: &Board,
    gate: &Arc<Gate>,
    signals: &mut Signals,
    lifespan: &mut Lifespan,
    shutdown: &evergate_core::config::Shutdown,
    why: Why,
) -> u8 {
    let enter = |phase| {
        if let Some(child) = board.child(args.row) {
            child.set_accepting(false);
            child.set_phase(phase);
        }
    };
    enter(Phase::Draining);
    gate.enter(Stage::Draining);
    let mut notes: Vec<String> = Vec::new();
    if let Why::Failed(kind) = why {
        notes.push(format!("the task {kind} panicked again and again; the last {}", panics::last()));
    }
    let is_hastened = why == Why::Hastened || {
        tokio::select! {
            // Cancel-safe: each only waits.
            () = drained(gate) => false,
            () = tokio::time::sleep(shutdown.drain) => {
                if gate.live() > 0 {
                    let were = if gate.live() == 1 { "was" } else { "were" };
                    notes.push(format!("drain ran out: {} {were} ended", requests(gate.live())));
                }
                false
            }
            _ = signals.quit.recv() => true,
        }
    };
    let mut overrun: Vec<&str> = Vec::new();
    // Also when nothing is live: connections that still linger end in order.
    gate.cancel(match board.master().phase() {
        _ if !is_hastened => Cause::Draining,
        MasterPhase::Serving | MasterPhase::Settling => Cause::Superseded,
        _ => Cause::StoppedAtOnce,
    });
    if gate.live() > 0 {
        enter(Phase::Cancelling);
        if tokio::time::timeout(shutdown.cancel, gate.wait_empty()).await.is_err() {
            overrun.push("cancel");
        }
    }
    enter(Phase::Cleaning);
    // A client that keeps its end open holds up nobody, and is no overrun.
    let began = Instant::now();
    let _ = tokio::time::timeout(CLOSING.min(shutdown.cleanup / 2), closed(gate)).await;
    let mut left = lifespan.stop(shutdown.cleanup.saturating_sub(began.elapsed())).await;
    left.overrun.splice(0..0, overrun);
    if !left.is_nothing() {
        notes.push(format!("{left}; {} left", requests(gate.live())));
    }
    if let Some(child) = board.child(args.row)
        && !notes.is_empty()
    {
        let note = notes.join("; ");
        child.set_note(&note);
        talk::print(&format!("evergate worker: {note}"));
    }
    match why {
        Why::Failed(_) => code::INTERNAL,
        Why::Told | Why::Hastened if left.is_nothing() => code::OK,
        Why::Told | Why::Hastened => code::FORCED,
    }
}

fn requests(count: usize) -> String {
    if count == 1 { "1 request".into() } else { format!("{count} requests") }
}

/// Waits until nothing is live and connections had their moment to send a last request.
async fn drained(gate: &Arc<Gate>) {
    loop {
        gate.wait_empty().await;
        closed(gate).await;
        // Connections close by themselves after their linger; a request that comes before is served.
        if gate.live() == 0 {
            return;
        }
    }
}

/// Waits until no client connection is open.
async fn closed(gate: &Arc<Gate>) {
    let tick = Duration::from_millis(5);
    while gate.board().child(gate.row()).is_some_and(|child| child.connections() > 0) {
        tokio::time::sleep(tick).await;
    }
}

/// Shows that the runtime turns, how late it is, and what it weighs.
async fn beat(row: u32, app: Arc<App>) {
    let (load, board) = (app.gate.load(), app.gate.board());
    let (mut ticks, mut thrift, mut strays) = (0_u32, Thrift::default(), Strays::default());
    loop {
        let pause = if load.is_idle() { BEAT_IDLE } else { BEAT };
        let before = Instant::now();
        app.clock.sleep(pause).await;
        pass_by(Place::Beat);
        let Some(child) = board.child(row) else { return };
        let lag = before.elapsed().saturating_sub(pause);
        load.show_beat();
        child.set_loop_lag_us(u32::try_from(lag.as_micros()).unwrap_or(u32::MAX));
        if let Some(series) = board.series(row) {
            names::count_loop_lag(&series, lag);
            names::count_look_ups(&series, app.resolver.take_counts());
        }
        load.beat();
        app.limits.values().for_each(|limit| limit.settle_max());
        child.set_upstream_connections(app.upstream_connections());
        child.set_tasks(tasks::alive());
        thrift.look(&app);
        if ticks.is_multiple_of(RSS_BEATS) {
            child.set_rss_kib(rss_kib());
            strays.look(&app, child);
        }
        ticks = ticks.wrapping_add(1);
    }
}

async fn run_clock(app: Arc<App>) {
    let mut run = Box::pin(app.clock.clone().run());
    let run = std::future::poll_fn(|cx| {
        pass_by(Place::Clock);
        run.as_mut().poll(cx)
    });
    if let Err(error) = run.await {
        talk::print(&format!("evergate worker: the timers cannot be watched: {error}"));
    }
}

async fn sweep(app: Arc<App>) {
    loop {
        app.clock.sleep(SWEEP).await;
        pass_by(Place::Sweep);
        for client in app.clients.values() {
            client.sweep().await;
        }
    }
}
