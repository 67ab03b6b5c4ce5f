//! The model that a host serves, whatever its mode, and how it is made from its section.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Instant;

use evergate_core::Error;
use evergate_core::config::Sealed;
use evergate_core::config::process::{self, Process};
use evergate_host::ask::{Answer, Ask, Mode, Refusal};
use evergate_host::command::{self, Command};
use evergate_host::gate::Gate;
use evergate_host::prepare::{Level, Surroundings, prepare};
use evergate_host::server::{Server, Setup};
use evergate_host::stdio::{self, Stdio};
use evergate_host::{Cause, Plan, Programs, Report};

use super::folders::Folders;
use crate::telemetry::talk;

/// So many ends of a server count where a host before has failed: the next one that comes at once ends this host too, and the
/// pauses, which are the master's then, grow.
const FAILURES: u32 = 2;

/// A way of serving requests with programs.
#[derive(Clone)]
pub(super) enum Model {
    Command(Arc<Command>),
    Stdio(Arc<Stdio>),
    Server(Arc<Server>),
}

/// What it is made from.
pub(super) struct Parts<'a> {
    pub(super) name: &'a str,
    pub(super) process: &'a Process,
    pub(super) sealed: &'a Sealed,
    pub(super) folders: &'a Folders,
    pub(super) programs: &'a Programs,
    pub(super) report: Arc<dyn Report>,
    /// Whether the host before this one has come to a bad end lately.
    pub(super) has_failed: bool,
}

impl Model {
    /// Makes it; a program that is kept is being started from now on. To be called within the runtime.
    ///
    /// # Errors
    /// What its section names that cannot be used.
    pub(super) fn new(parts: Parts<'_>) -> Result<Self, String> {
        let plan = plan(&parts)?;
        let Parts { process, folders, programs, report, has_failed, .. } = parts;
        let programs = programs.clone();
        let (start_timeout, output_bytes_max) = (process.start_timeout, process.output_bytes_max);
        let gate = || Gate::new(process.in_flight_max, process.queue, Arc::clone(&report));
        Ok(match &process.mode {
            process::Mode::Command(config) => {
                let bounds = command::Bounds { start_timeout, output_bytes_max };
                Self::Command(Arc::new(Command::new(programs, plan, config.clone(), bounds, gate())))
            }
            process::Mode::Stdio(config) => {
                let (in_flight_max, queue) = (process.in_flight_max, process.queue);
                let bounds = stdio::Bounds { start_timeout, output_bytes_max, in_flight_max, queue };
                Self::Stdio(Arc::new(Stdio::new(programs, plan, config, bounds, report)))
            }
            process::Mode::Server(config) => {
                let folder = folders.socket.clone().unwrap_or_default();
                // A host is started because its program is wanted.
                let failures = if has_failed { FAILURES } else { 0 };
                let setup = Setup { start_timeout, output_bytes_max, preload: true, failures, folder };
                Self::Server(Arc::new(Server::new(programs, plan, config.clone(), setup, gate())))
            }
        })
    }

    /// Waits until requests can be served. Cancel-safe.
    ///
    /// # Errors
    /// Why they cannot.
    pub(super) async fn ready(&self) -> Result<(), Cause> {
        match self {
            // There is nothing to be kept ready; each request has a start of its own.
            Self::Command(_) => Ok(()),
            Self::Stdio(stdio) => stdio.ready().await,
            Self::Server(server) => server.ready().await,
        }
    }

    /// Waits until requests cannot be served any more, and says why. Cancel-safe.
    pub(super) async fn failed(&self) -> Cause {
        match self {
            Self::Command(_) => std::future::pending().await,
            Self::Stdio(stdio) => stdio.failed().await,
            Self::Server(server) => server.failed().await,
        }
    }

    /// Tells kept programs to end, in their own way, and waits until they have or `until` has come; what is left then is
    /// [`Programs::end_all`]'s.
    pub(super) async fn stop(&self, until: Instant) {
        match self {
            Self::Command(_) => {}
            Self::Stdio(stdio) => drop(stdio.stop(until).await),
            Self::Server(server) => drop(server.stop(until).await),
        }
    }
}

impl Mode for Model {
    async fn call(self: Arc<Self>, ask: Ask) -> Result<Answer, Refusal> {
        match &*self {
            Self::Command(command) => Arc::clone(command).call(ask).await,
            Self::Stdio(stdio) => Arc::clone(stdio).call(ask).await,
            Self::Server(server) => Arc::clone(server).call(ask).await,
        }
    }
}

/// How the program is started, from its section.
fn plan(parts: &Parts<'_>) -> Result<Plan, String> {
    let Parts { name, process, sealed, folders, .. } = parts;
    let around = Surroundings {
        variable: &|name| sealed.variables.get(name).map(OsString::from),
        secret: &|reference| sealed.secret(reference).map(str::to_owned),
        folder: &folders.work,
        socket_folder: folders.socket.as_deref(),
    };
    let prepared = prepare(process, around).map_err(|error| explained(&error))?;
    if prepared.level != Level::Open {
        talk::print(&format!("evergate host {name}: sandbox: {}", prepared.level));
    }
    if let Some(cgroup) = &prepared.cgroup {
        talk::print(&format!("evergate host {name}: cgroup: {cgroup}"));
    }
    Ok(prepared.plan)
}

fn explained(error: &Error) -> String {
    match &error.detail {
        Some(detail) => format!("{}: {detail}", error.message),
        None => error.message.clone().into_owned(),
    }
}
