//! The office, off the request path: writes the access log and answers on the admin listener.
//!
//! One thread runs everything but the writing of the log, which a disk may hold up and which has its own.

use std::io;
use std::net::TcpListener as StdTcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;
use std::time::Duration;

use evergate_board::{Board, MasterPhase, Phase, Records, monotonic_ns};
use evergate_core::config::Shutdown;
use evergate_core::inherit::code;
use rustix::net::AddressFamily;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, timeout_at};

use super::{ChildArgs, Inherited, boot_fault, kick, master_gone, rss_kib, state_dir_from_env};
use crate::panics;
use crate::tasks::{Caught, Tasks};
use crate::telemetry::talk;

mod access_log;
mod admin;
mod repeats;
mod rings;

use access_log::AccessLog;
use rings::Rings;

/// Between two beats; the master gets nervous after `hang_timeout`, a second at least.
const BEAT: Duration = Duration::from_millis(250);
/// How long admin connections have to be answered once no more are accepted. With `cleanup` it stays below what the master
/// gives, which is a second more than that.
const DRAIN: Duration = Duration::from_secs(1);
/// The least that the log has to be closed, when answers have taken the time.
const CLOSE_TIME_MIN: Duration = Duration::from_millis(200);
/// Beats between two looks at the resident set, which costs a read of procfs.
const BEATS_PER_RSS: u32 = 8;

/// Runs the clerk until the master stops it or is gone; returns the exit code.
#[must_use]
pub fn run(args: &ChildArgs) -> u8 {
    let inherited = match Inherited::adopt(args) {
        Ok(inherited) => inherited,
        Err(why) => {
            talk::print(&format!("evergate: clerk: {why}"));
            return code::INTERNAL;
        }
    };
    let board = inherited.board.clone();
    panics::note("clerk", &board, (args.row, args.epoch));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(4).build();
    let outcome = runtime.map(|runtime| runtime.block_on(Caught::of(Box::pin(live(inherited, args.row)))));
    let (why, code) = match outcome {
        Ok(Ok(Ok(code))) => return code,
        Ok(Ok(Err(error))) | Err(error) => (format!("the start failed: {error}"), code::SYSTEM),
        // What workers write meanwhile waits in their rings.
        Ok(Err(_)) => ("its main task panicked".to_owned(), code::INTERNAL),
    };
    if let Some(row) = board.child(args.row) {
        row.set_note(&why);
    }
    talk::print(&format!("evergate: clerk: {why}"));
    code
}

/// How the clerk's time came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The master said so, after the workers are buried.
    Told,
    /// The master is gone; workers may still be draining.
    Orphaned,
    /// This kept task does nothing but panic.
    Failed(&'static str),
}

async fn live(inherited: Inherited, row: u32) -> io::Result<u8> {
    // First of all, so that a stop does not find the default action.
    let mut signals = Signals::take()?;
    let Inherited { board, sealed, life, kick: kick_fd, writers, listeners } = inherited;
    let shutdown = sealed.config.shutdown.clone();
    let folder = state_dir_from_env().ok_or_else(|| io::Error::other("no state folder in the environment"))?;
    // Secrets are for workers.
    drop(sealed);
    let log = AccessLog::start(&folder, board.clone(), row)?;
    let mut carrier = Carrier { rings: Rings::new(board.clone(), writers), log, under_way: None };
    let tasks = Tasks::new("clerk");
    let doors = Doors::open(listeners, &board, &tasks)?;
    let beating = board.clone();
    let beat = tasks.keep("beat", move || beat(beating.clone(), row));
    ready(&board, row);
    kick(&kick_fd);

    let end = serve(&mut carrier, &mut signals, (life, &tasks)).await?;
    if let Some(child) = board.child(row) {
        child.set_phase(Phase::Draining);
    }
    // First, because a successor waits for the port.
    doors.close();
    let began = Instant::now();
    doors.drain(&mut carrier, began + DRAIN.min(shutdown.cleanup + DRAIN / 2)).await;
    let is_whole = finish(carrier, (&shutdown, &board), (end, began)).await;
    beat.abort();
    if let (End::Failed(kind), Some(child)) = (end, board.child(row)) {
        child.set_note(&format!("the task {kind} panicked again and again; the last {}", panics::last()));
        return Ok(code::INTERNAL);
    }
    Ok(if is_whole { code::OK } else { code::FORCED })
}

/// The signals that mean something here.
struct Signals {
    term: Signal,
    quit: Signal,
    reopen: Signal,
}

impl Signals {
    fn take() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            quit: signal(SignalKind::quit())?,
            reopen: signal(SignalKind::user_defined1())?,
        })
    }
}

/// Brings records from the rings to the log. They leave the rings when they are in the file, so that a clerk's death loses
/// none (`repeats` tells the next one what was written already).
struct Carrier {
    rings: Rings,
    log: AccessLog,
    /// What the log's thread has at this moment, and its word that it is done.
    under_way: Option<(Records, oneshot::Receiver<()>)>,
}

impl Carrier {
    /// Carries one batch; none when nobody can write any more. May be dropped at any await.
    async fn carry(&mut self) -> Option<()> {
        if self.under_way.is_none() {
            let batch = self.rings.next().await?;
            boot_fault::carry("before-write");
            self.hand_over(batch);
        }
        let (_, done) = self.under_way.as_mut()?;
        // An error is the thread's end, after which nobody writes it.
        let _ = done.await;
        boot_fault::carry("after-write");
        let (batch, _) = self.under_way.take()?;
        self.rings.take(&batch);
        Some(())
    }

    fn hand_over(&mut self, mut batch: Records) {
        if batch.broken > 0 {
            self.log.count(u64::from(batch.broken));
            say("a process has left something in its ring that is no record; what the ring held is dropped");
        }
        let done = self.log.write(std::mem::take(&mut batch.bytes));
        self.under_way = Some((batch, done));
    }

    /// Carries what is there at this moment.
    async fn carry_rest(&mut self) {
        if self.under_way.is_some() {
            let _ = self.carry().await;
        }
        if let Some(batch) = self.rings.look() {
            self.hand_over(batch);
            let _ = self.carry().await;
        }
    }

    /// The time is up. What is still in the rings is the next clerk's, or lost: then it is counted, and said.
    fn give_up(&mut self, is_lost: bool) {
        let late = "the access log could not be written in time;";
        if !is_lost {
            return say(&format!("{late} the next clerk goes on with it"));
        }
        let count = self.rings.look().map_or(0, |rest| {
            self.rings.take(&rest);
            self.log.give_up(&rest.bytes)
        });
        say(&format!("{late} {} lost", if count == 1 { "1 record is".into() } else { format!("{count} records are") }));
    }
}

fn say(words: &str) {
    talk::print(&format!("evergate: clerk: {words}"));
}

/// Takes records until the end.
async fn serve(carrier: &mut Carrier, signals: &mut Signals, (life, tasks): (OwnedFd, &Tasks)) -> io::Result<End> {
    let mut gone = std::pin::pin!(master_gone(life));
    loop {
        // All of these may be dropped at their await: signals stay pending, the life pipe stays closed, a failed task
        // stays failed, and the carrier goes on where it was.
        tokio::select! {
            _ = signals.term.recv() => return Ok(End::Told),
            _ = signals.quit.recv() => return Ok(End::Told),
            kind = tasks.failed() => return Ok(End::Failed(kind)),
            outcome = &mut gone => return outcome.map(|()| End::Orphaned),
            _ = signals.reopen.recv() => carrier.log.reopen(),
            carried = carrier.carry() => if carried.is_none() {
                // No writer, so no master.
                return Ok(End::Orphaned);
            },
        }
    }
}

/// Writes what is still to come, within the time that a stop may take. Says whether that was enough.
async fn finish(mut carrier: Carrier, (shutdown, board): (&Shutdown, &Board), (end, began): (End, Instant)) -> bool {
    if end == End::Orphaned {
        // Each worker writes a record for each request that it still finishes; the last one's end is seen.
        let last = Instant::now() + shutdown.drain + shutdown.cancel + shutdown.cleanup;
        while let Ok(Some(_)) = timeout_at(last, carrier.carry()).await {}
    }
    let last = match end {
        End::Told | End::Failed(_) => (began + shutdown.cleanup).max(Instant::now() + CLOSE_TIME_MIN),
        End::Orphaned => Instant::now() + shutdown.cleanup,
    };
    let mut is_whole = timeout_at(last, carrier.carry_rest()).await.is_ok();
    if !is_whole {
        carrier.give_up(end == End::Orphaned || is_last(board));
    }
    is_whole = is_whole && timeout_at(last, carrier.log.close()).await.is_ok();
    is_whole
}

/// Whether no other clerk follows.
fn is_last(board: &Board) -> bool {
    !matches!(board.master().phase(), MasterPhase::Starting | MasterPhase::Serving | MasterPhase::Settling)
}

/// The open admin listeners.
struct Doors(Vec<(tokio::task::JoinHandle<()>, Arc<admin::Desk>)>);

impl Doors {
    fn open(listeners: Vec<OwnedFd>, board: &Board, tasks: &Tasks) -> io::Result<Self> {
        let mut doors = Vec::new();
        for fd in listeners {
            let desk = Arc::new(admin::Desk::new(board.clone(), local_ip(&fd)));
            let family = rustix::net::getsockname(&fd)?.address_family();
            let (own, kept) = (tasks.clone(), Arc::clone(&desk));
            let task = if family == AddressFamily::UNIX {
                let listener = Arc::new(UnixListener::from_std(StdUnixListener::from(fd))?);
                tasks.keep("admin", move || admin::serve_unix(Arc::clone(&listener), Arc::clone(&desk), own.clone()))
            } else {
                let listener = Arc::new(TcpListener::from_std(StdTcpListener::from(fd))?);
                tasks.keep("admin", move || admin::serve_tcp(Arc::clone(&listener), Arc::clone(&desk), own.clone()))
            };
            doors.push((task, kept));
        }
        Ok(Self(doors))
    }

    /// No more connections; those that are there may finish.
    fn close(&self) {
        self.0.iter().for_each(|(task, _)| task.abort());
    }

    /// Waits until everybody who was let in has an answer, and goes on taking records meanwhile: workers do not wait for
    /// rings that are full. Who connects now waits for the next clerk.
    async fn drain(&self, carrier: &mut Carrier, until: Instant) {
        let mut answered = std::pin::pin!(async {
            for (_, desk) in &self.0 {
                desk.is_empty().await;
            }
        });
        loop {
            // The carrier goes on where it was; the other two are kept outside the loop.
            tokio::select! {
                () = &mut answered => return,
                () = tokio::time::sleep_until(until) => return,
                carried = carrier.carry() => if carried.is_none() {
                    return;
                },
            }
        }
    }
}

/// The listener's own address, where it has one.
fn local_ip(fd: &OwnedFd) -> Option<std::net::IpAddr> {
    let address = std::net::SocketAddr::try_from(rustix::net::getsockname(fd).ok()?).ok()?;
    Some(address.ip())
}

fn ready(board: &Board, row: u32) {
    let Some(child) = board.child(row) else { return };
    child.set_beat_ns(monotonic_ns());
    child.set_rss_kib(rss_kib());
    child.set_ready_ns(monotonic_ns());
    child.set_phase(Phase::Ready);
}

/// Shows that the loop turns.
async fn beat(board: Board, row: u32) {
    let mut ticks = tokio::time::interval(BEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for count in 0_u32.. {
        let planned = ticks.tick().await;
        let Some(child) = board.child(row) else { return };
        let lag = Instant::now().saturating_duration_since(planned).as_micros();
        child.set_loop_lag_us(u32::try_from(lag).unwrap_or(u32::MAX));
        child.set_beat_ns(monotonic_ns());
        if count.is_multiple_of(BEATS_PER_RSS) {
            child.set_rss_kib(rss_kib());
        }
    }
}
