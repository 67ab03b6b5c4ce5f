//! A program that serves, as requests see it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use evergate_core::{Error, Fault};
use evergate_sys::{Pid, Status};
use tokio::sync::{Notify, watch};
use tokio::time::sleep;

use super::address::{Address, Stream};
use super::owner::{self, Held, Listener};
use super::state::stopping;
use crate::ask::exited;
use crate::tasks::within;

/// How long the connections of a program that has exited may outlive it: whatever it had written is read by then, and who
/// else holds them is swept.
const LINGER: Duration = Duration::from_millis(500);
/// How long the exit of a program may be behind the end of its connections.
const FATE_WAIT: Duration = Duration::from_millis(500);

/// What ended a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It did, with this; none when it was lost to a defect of ours.
    Exited(Option<Status>),
    /// It lives, and does not answer (G23).
    Wedged,
    /// It was told to.
    Stopped,
}

/// One run of a program.
#[derive(Clone, Debug)]
pub(super) struct Running(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    number: u64,
    pid: Pid,
    address: Address,
    /// The socket that is proved to be its own; none for a path, which is ours.
    held: Mutex<Option<Held>>,
    fate: watch::Sender<Option<Fate>>,
    /// Pieces of answers so far: signs of life.
    heard: AtomicU64,
    /// Asks for a look at its health now.
    doubts: Notify,
}

impl Running {
    pub(super) fn new(number: u64, pid: Pid, address: Address) -> Self {
        let fate = watch::Sender::new(None);
        let (held, heard, doubts) = (Mutex::new(None), AtomicU64::new(0), Notify::new());
        Self(Arc::new(Shared { number, pid, address, held, fate, heard, doubts }))
    }

    pub(super) fn pid(&self) -> Pid {
        self.0.pid
    }

    pub(super) fn address(&self) -> &Address {
        &self.0.address
    }

    /// Connects to the program and to nobody else.
    ///
    /// # Errors
    /// `AddrInUse` if somebody else listens there (G22), or what connect(2) says.
    pub(super) async fn connect(&self) -> io::Result<Stream> {
        let stream = self.0.address.connect().await?;
        let Some(port) = self.0.address.port else { return Ok(stream) };
        let mut held = self.0.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.as_ref().is_some_and(Held::is_held) {
            return Ok(stream);
        }
        match owner::find(self.0.number, self.0.pid, port) {
            Listener::Program(found) => *held = Some(found),
            Listener::Stranger => return Err(io::ErrorKind::AddrInUse.into()),
            Listener::Nobody => return Err(io::ErrorKind::ConnectionRefused.into()),
        }
        Ok(stream)
    }

    /// Whether somebody else listens at its port.
    pub(super) fn has_stranger(&self) -> bool {
        let found = self.0.address.port.map(|port| owner::find(self.0.number, self.0.pid, port));
        found == Some(Listener::Stranger)
    }

    pub(super) fn fate(&self) -> Option<Fate> {
        *self.0.fate.borrow()
    }

    pub(super) fn decide(&self, fate: Fate) {
        self.0.fate.send_replace(Some(fate));
    }

    /// Counts a sign of life.
    pub(super) fn hear(&self) {
        self.0.heard.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn heard(&self) -> u64 {
        self.0.heard.load(Ordering::Relaxed)
    }

    pub(super) fn doubt(&self) {
        self.0.doubts.notify_one();
    }

    /// Waits for a doubt. Cancel-safe.
    pub(super) async fn doubted(&self) {
        self.0.doubts.notified().await;
    }

    /// Waits until nothing more can come of it, and says why. Cancel-safe.
    pub(super) async fn over(&self) -> Error {
        let fate = self.decided().await;
        if let Fate::Exited(_) = fate {
            sleep(LINGER).await;
        }
        told(fate)
    }

    /// Why it does not serve any more, as others before it.
    pub(super) fn over_again(&self) -> Error {
        let error = told(self.fate().unwrap_or(Fate::Stopped));
        Error::new(error.fault, format!("{}, as others shortly before it", error.message))
    }

    /// Why its connection has ended before its time.
    pub(super) async fn broken(&self, what: &'static str) -> Error {
        match within(FATE_WAIT, self.decided()).await {
            Some(fate) => told(fate),
            None => Error::new(Fault::AdapterProtocolError, what),
        }
    }

    /// Whether its own bad end, of which word may be a moment behind, is why its connection has ended.
    ///
    /// # Errors
    /// `AdapterExited` if so.
    pub(super) async fn fell(&self) -> Result<(), Error> {
        match within(FATE_WAIT, self.decided()).await {
            Some(Fate::Exited(Some(status))) if status != Status::Code(0) => Err(exited(status)),
            _ => Ok(()),
        }
    }

    /// Whether it has met its end, or does within a moment.
    pub(super) async fn is_doomed(&self) -> bool {
        within(FATE_WAIT, self.decided()).await.is_some()
    }

    async fn decided(&self) -> Fate {
        let mut fate = self.0.fate.subscribe();
        // The sender is beside us.
        let fate = fate.wait_for(Option::is_some).await.ok().and_then(|fate| *fate);
        fate.unwrap_or(Fate::Stopped)
    }
}

fn told(fate: Fate) -> Error {
    match fate {
        Fate::Exited(Some(status)) => exited(status),
        Fate::Exited(None) => Error::new(Fault::Internal, "the program of this model was lost"),
        Fate::Wedged => Error::new(Fault::AdapterTimeout, "the program of this model lives but does not answer"),
        Fate::Stopped => stopping(),
    }
}
