//! The life of a program with a server of its own: started when it is wanted, looked after while it serves, ended, and
//! started again with a pause.

use std::ffi::OsString;
use std::future::pending;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_core::config::process::Server as Config;
use evergate_core::{Error, Fault};
use evergate_sys::Status;
use http::header::{CONNECTION, HOST};
use http::{Request, StatusCode};
use http_body_util::Full;
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until, timeout, timeout_at};

use super::address::Address;
use super::exchange::Exchange;
use super::running::{Fate, Running};
use super::state::{Phase, State, WAITED_FOR};
use crate::ask::exited;
use crate::cause::Cause;
use crate::command::not_started;
use crate::program::{Plan, Program, Programs, Wiring};

/// Between two looks at a program that starts: at first, and at most.
const LOOK_MIN: Duration = Duration::from_millis(50);
const LOOK_MAX: Duration = Duration::from_millis(500);
/// Ports that are tried when strangers take them (G22).
const PORTS: usize = 4;
/// Looks in a row that fail before a program is given up (G23).
const LOOKS: u32 = 2;

/// Sees to one program.
pub(super) struct Keeper {
    pub(super) programs: Programs,
    pub(super) plan: Plan,
    pub(super) config: Config,
    pub(super) start_timeout: Duration,
    /// For its socket.
    pub(super) folder: PathBuf,
    pub(super) state: Arc<watch::Sender<State>>,
}

/// How a start came to nothing.
enum Lost {
    /// Somebody else has its port.
    Stranger,
    /// The host ends.
    Stopped,
    Cause(Cause),
}

/// What ends a run.
enum End {
    Exited(Option<Status>),
    Wedged,
    /// The host ends.
    Ordered,
}

impl Keeper {
    /// Until the host ends; then nothing is left of the program.
    pub(super) async fn keep(self) {
        while self.wanted().await {
            self.enter(Phase::Starting);
            match self.start().await {
                Ok((program, running)) => self.serve(program, &running).await,
                Err(Lost::Stopped) => return,
                Err(lost) => self.failed(lost),
            }
        }
    }

    /// Waits until the program is to be started; false when the host ends.
    async fn wanted(&self) -> bool {
        let mut states = self.state.subscribe();
        loop {
            let next = {
                let state = states.borrow_and_update();
                match &state.phase {
                    Phase::Stopped => return false,
                    Phase::Failed(_, next) | Phase::Pausing(next) => Some(*next),
                    _ if state.is_wanted() => return true,
                    _ => None,
                }
            };
            tokio::select! {
                // Both are cancel-safe: a state is looked at anew, and a moment is a value.
                _ = states.changed() => {}
                () = until(next) => self.enter(Phase::Down),
            }
        }
    }

    /// Tells how far it is; a host that ends stays at its end.
    fn enter(&self, phase: Phase) {
        self.state.send_if_modified(|state| {
            let may = !state.is_stopped();
            if may {
                state.phase = phase;
            }
            may
        });
    }

    fn failed(&self, lost: Lost) {
        let cause = match lost {
            Lost::Cause(cause) => cause,
            _ => {
                let message = "the program of this model finds its port taken by another each time";
                Cause::new(&Error::new(Fault::AdapterSpawnFailed, message), b"")
            }
        };
        let mut next = Instant::now();
        self.state.send_modify(|state| next = state.count_failure(Instant::now(), Duration::ZERO));
        self.enter(Phase::Failed(cause, next));
    }

    /// Starts it, with another port when a stranger has the one it was given.
    async fn start(&self) -> Result<(Program, Running), Lost> {
        let end = Instant::now() + self.start_timeout;
        for _ in 0..PORTS {
            match self.start_once(end).await {
                Err(Lost::Stranger) => {}
                outcome => return outcome,
            }
        }
        Err(Lost::Stranger)
    }

    async fn start_once(&self, end: Instant) -> Result<(Program, Running), Lost> {
        let given = self.plan.argv.iter().chain(self.plan.env.iter().map(|(_, value)| value)).map(AsRef::as_ref);
        let address = Address::reserve(&self.folder, given).map_err(|error| {
            let message = "the program of this model has no address to listen at";
            lost(&Error::new(Fault::AdapterSpawnFailed, message).detail(error))
        })?;
        let plan = self.plan_at(&address, self.plan.argv.clone(), None);
        let started = tokio::select! {
            // A start that is dropped leaves nothing.
            started = self.programs.start(&plan, Wiring::default(), end) => started,
            () = self.stopped() => return Err(Lost::Stopped),
        };
        let mut program = started.map_err(|error| lost(&not_started(&error)))?;
        let running = Running::new(program.number(), program.pid(), address);
        let outcome = tokio::select! {
            // None of them keeps anything that is missed.
            outcome = self.answers(&running, end) => outcome,
            status = program.exited() => Err(self.left(&running, status)),
            () = self.stopped() => Err(Lost::Stopped),
        };
        let Err(lost) = outcome else { return Ok((program, running)) };
        if let Lost::Cause(cause) = &lost {
            program.blame(cause.error());
        }
        // Before another is started there must be nothing left of this one.
        program.end();
        let tail = program.ended().await.map(|ended| ended.tail).unwrap_or_default();
        Err(match lost {
            Lost::Cause(cause) => Lost::Cause(Cause::new(&cause.error(), &tail)),
            lost => lost,
        })
    }

    /// The plan with its address, for the program or for the command that stops it.
    fn plan_at(&self, address: &Address, argv: Vec<OsString>, pid: Option<i32>) -> Plan {
        let mut plan = Plan { argv, ..self.plan.clone() };
        let values = plan.env.iter_mut().map(|(_, value)| value);
        plan.argv.iter_mut().chain(values).for_each(|text| *text = address.fill(text, pid));
        plan
    }

    /// Waits until it answers.
    async fn answers(&self, running: &Running, end: Instant) -> Result<(), Lost> {
        let mut pause = LOOK_MIN;
        while Instant::now() < end {
            let patience = self.config.health_timeout.min(end.saturating_duration_since(Instant::now()));
            match timeout(patience, self.look(running)).await {
                Ok(Look::Well) => return Ok(()),
                Ok(Look::Stranger) => return Err(Lost::Stranger),
                Ok(Look::Ill) | Err(_) => {}
            }
            sleep(pause.min(end.saturating_duration_since(Instant::now()))).await;
            pause = (pause * 3 / 2).min(LOOK_MAX);
        }
        let message = format!(
            "the program of this model was not ready within {} ms (process.start_timeout)",
            self.start_timeout.as_millis()
        );
        Err(lost(&Error::new(Fault::ModelLoading, message)))
    }

    /// It has exited before it served. With a stranger at its port that is no wonder.
    fn left(&self, running: &Running, status: Option<Status>) -> Lost {
        if running.has_stranger() {
            return Lost::Stranger;
        }
        let message =
            status.map_or_else(|| "the program of this model was lost".into(), |status| exited(status).message);
        lost(&Error::new(Fault::AdapterExited, format!("{message}, before it was ready")))
    }

    /// Looks once at its health.
    async fn look(&self, running: &Running) -> Look {
        let stream = match running.connect().await {
            Ok(stream) => stream,
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => return Look::Stranger,
            Err(_) => return Look::Ill,
        };
        let request = Request::get(&self.config.health).header(HOST, "localhost").header(CONNECTION, "close");
        let Ok(request) = request.body(Full::<Bytes>::default()) else { return Look::Ill };
        match Exchange::begin(stream, request).await {
            Ok((_, response)) if response.status() == StatusCode::OK => Look::Well,
            _ => Look::Ill,
        }
    }

    /// Looks after a program that serves, and sees it to its end.
    async fn serve(&self, mut program: Program, running: &Running) {
        let since = Instant::now();
        let report = self.programs.report();
        report.listens(Some(&running.address().to_string()));
        self.enter(Phase::Ready(running.clone()));
        let end = tokio::select! {
            // None of them keeps anything that is missed.
            status = program.exited() => End::Exited(status),
            () = self.wedged(running) => End::Wedged,
            () = self.stopped() => End::Ordered,
        };
        // New requests must not be sent there, and those under way must hear the truth.
        self.enter(Phase::Ending);
        report.listens(None);
        match end {
            End::Exited(status) => running.decide(Fate::Exited(status)),
            End::Wedged => {
                running.decide(Fate::Wedged);
                program.blame(running.over().await);
                program.end();
            }
            End::Ordered => {
                running.decide(Fate::Stopped);
                self.bring_to_end(&mut program, running).await;
            }
        }
        let tail = program.ended().await.map(|ended| ended.tail).unwrap_or_default();
        if let End::Ordered = end {
            return self.enter(Phase::Down);
        }
        let (mut next, now) = (Instant::now(), Instant::now());
        self.state.send_modify(|state| next = state.count_failure(now, since.elapsed()));
        // One that has answered anything did come up: its successor is worth the wait.
        if next <= now + WAITED_FOR || running.heard() > 0 {
            return self.enter(Phase::Pausing(next));
        }
        let error = running.over_again();
        self.enter(Phase::Failed(Cause::new(&error, &tail), next));
    }

    /// Its own command first, then the ladder.
    async fn bring_to_end(&self, program: &mut Program, running: &Running) {
        if !self.config.stop.is_empty() {
            let end = Instant::now() + self.plan.grace;
            let pid = Some(program.pid().as_raw_nonzero().get());
            let argv = self.config.stop.iter().map(OsString::from).collect();
            let plan = self.plan_at(running.address(), argv, pid);
            // A command that fails, or hangs, is ended too: what it was to do, TERM does.
            if let Ok(mut command) = self.programs.start(&plan, Wiring::default(), end).await {
                let _ = timeout_at(end.into(), command.exited()).await;
                let _ = timeout_at(end.into(), program.exited()).await;
            }
        }
        program.end();
    }

    /// Waits until it is clear that it lives and does not answer.
    async fn wedged(&self, running: &Running) {
        if self.config.health_interval.is_zero() {
            return pending().await;
        }
        let mut failed = 0;
        while failed < LOOKS {
            if failed == 0 {
                // A doubt is kept for whoever waits next; a moment is a value.
                let _ = timeout(self.config.health_interval, running.doubted()).await;
            }
            let heard = running.heard();
            let look = timeout(self.config.health_timeout, self.look(running)).await;
            // One that answers requests is busy, not wedged.
            let is_well = matches!(look, Ok(Look::Well)) || running.heard() != heard;
            failed = if is_well { 0 } else { failed + 1 };
            if look.is_ok() && (1..LOOKS).contains(&failed) {
                // A refusal takes no time, and a program may be about to listen again.
                sleep(LOOK_MAX.min(self.config.health_interval)).await;
            }
        }
    }

    async fn stopped(&self) {
        // The sender is ours.
        let _ = self.state.subscribe().wait_for(State::is_stopped).await;
    }
}

/// What a look at its health shows.
enum Look {
    Well,
    Ill,
    Stranger,
}

fn lost(error: &Error) -> Lost {
    Lost::Cause(Cause::new(error, b""))
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment.into()).await,
        None => pending().await,
    }
}
