//! The rows of hosts: what a worker must know of a model's program before it connects, and how it asks for one.
//!
//! Each word has one writer. The master claims and clears a row and says what the host is to be taken for; the host that
//! serves it tells what it does, under its epoch, so that a dead one's words are nobody's; workers only ask. A worker
//! looks a row up by the fingerprint of its own configuration's section.

use std::sync::atomic::Ordering;

use crate::text::Text;
use crate::word::{Word, row};

/// Rows for hosts: those of the configuration, and those of generations that still drain.
pub const HOSTS_MAX: u32 = 256;

/// What workers are to take a host for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum HostState {
    /// No host has the row.
    #[default]
    Empty = 0,
    /// Nobody has asked for it.
    Cold = 1,
    /// Somebody has; it cannot start yet.
    Wanted = 2,
    /// Its program is being started.
    Starting = 3,
    /// It takes requests at its socket.
    Ready = 4,
    /// Its last start or life came to a bad end; the row says why and when it is tried again.
    Failed = 5,
    /// It finishes what it has. Who comes now asks for its successor.
    Stopping = 6,
    /// As ready, but that its program has ended and the next one is not there yet: requests wait in it. No row says this; it
    /// is what [`HostRow::shown`] makes of one.
    Restarting = 7,
}

impl HostState {
    /// The word in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Cold => "cold",
            Self::Wanted => "wanted",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Failed => "failed",
            Self::Stopping => "stopping",
            Self::Restarting => "restarting",
        }
    }
}

impl Word for HostState {
    fn to_word(self) -> u64 {
        self as u64
    }
    fn from_word(word: u64) -> Self {
        [Self::Cold, Self::Wanted, Self::Starting, Self::Ready, Self::Failed, Self::Stopping]
            .into_iter()
            .find(|state| *state as u64 == word)
            .unwrap_or(Self::Empty)
    }
}

row! {
    /// A host's row.
    HostRow {
        /// Tells its section of the configuration from every other; 0 while the row is empty. The master's.
        fingerprint set_fingerprint u64;
        /// How often it was emptied. The master's, like what follows.
        claims set_claims u64;
        /// What it is to be taken for.
        state set_state HostState;
        /// Since when it is that, monotonic nanoseconds.
        since_ns set_since_ns u64;
        /// The child that serves it; 0 for none.
        epoch set_epoch u32;
        /// That child's row.
        child set_child u32;
        /// How often a start or a life of it has come to a bad end.
        failures set_failures u64;
        /// When a failed one is tried again, monotonic nanoseconds.
        retry_ns set_retry_ns u64;
        /// Whether the configuration in force has another section of its name, or none.
        is_retired set_is_retired bool;
        /// The epoch of the host that takes requests. The host's own, like what follows.
        ready_epoch set_ready_epoch u32;
        /// The epoch of the host that has been idle for so long that it may go.
        idle_epoch set_idle_epoch u32;
        /// Process id of its program, the first if there are several; 0 for none.
        pid set_pid i32;
        /// Requests that its program works on.
        in_flight set_in_flight u32;
        /// Requests that wait in it.
        waiting set_waiting u32;
        /// Programs that it has started in place of others.
        restarts set_restarts u64;
        /// Whether it has no program just now that could take a request.
        is_down set_is_down bool;
        /// Why it could not serve: the fault's place in the table, from 1; 0 if it has said nothing.
        fault set_fault u32;
        /// Whether somebody asks for it. Set by workers and by the host, taken back by the master.
        is_wanted set_is_wanted bool;
    } with {
        name: Text,
        cause: Text,
        address: Text,
        told: Text,
    }
}

impl HostRow {
    /// Takes an empty row for a section of the configuration.
    pub fn claim(&self, fingerprint: u64, name: &str) {
        self.clear();
        self.name.set(name);
        self.set_state(HostState::Cold);
        // Last: who finds it finds the rest.
        self.set_fingerprint(fingerprint);
    }

    /// Empties the row.
    pub fn clear(&self) {
        // First: who sees the new claim finds the old fingerprint no more.
        self.set_fingerprint(0);
        self.set_claims(self.claims().wrapping_add(1));
        self.set_state(HostState::Empty);
        self.set_since_ns(0);
        self.set_failures(0);
        self.set_retry_ns(0);
        self.set_is_retired(false);
        self.set_is_wanted(false);
        self.bear(0, 0);
        self.name.set("");
        self.cause.set("");
    }

    /// Notes the child that is to serve it: nothing of the one before it counts any more.
    pub fn bear(&self, epoch: u32, child: u32) {
        self.set_ready_epoch(0);
        self.set_idle_epoch(0);
        self.set_pid(0);
        self.set_in_flight(0);
        self.set_waiting(0);
        self.set_restarts(0);
        self.set_is_down(false);
        self.address.set("");
        self.set_fault(0);
        self.told.set("");
        self.set_child(child);
        self.set_epoch(epoch);
    }

    /// What this section's host is to be taken for; none when the row is another's, or becomes so at this moment.
    #[must_use]
    pub fn look(&self, fingerprint: u64) -> Option<HostState> {
        let claim = self.claims();
        let is_ours = self.fingerprint() == fingerprint && fingerprint != 0;
        let state = is_ours.then(|| self.state())?;
        // A state that came after another claim shows that claim as well.
        (self.claims() == claim).then_some(state)
    }

    /// What people are shown.
    #[must_use]
    pub fn shown(&self, state: HostState) -> HostState {
        if state == HostState::Ready && self.is_down() { HostState::Restarting } else { state }
    }

    /// Takes the asking back; says whether anybody had asked.
    pub fn take_wanted(&self) -> bool {
        self.is_wanted() && bool::from_word(self.is_wanted.swap(0, Ordering::AcqRel))
    }

    /// The upstream's name in the configuration.
    #[must_use]
    pub fn name(&self) -> String {
        self.name.get()
    }

    /// Why its last start or life came to a bad end; empty when none did.
    #[must_use]
    pub fn cause(&self) -> String {
        self.cause.get()
    }

    /// Sets [`Self::cause`]; what is beyond 256 bytes is cut off. The master's.
    pub fn set_cause(&self, text: &str) {
        self.cause.set(text);
    }

    /// Where its program listens, if it does so by itself; empty otherwise.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.get()
    }

    /// Sets [`Self::address`]; what is beyond 256 bytes is cut off. The host's.
    pub fn set_address(&self, text: &str) {
        self.address.set(text);
    }

    /// What clients are told of why it could not serve; empty if it has said nothing.
    #[must_use]
    pub fn told(&self) -> String {
        self.told.get()
    }

    /// Sets [`Self::told`] and [`Self::fault`]; what is beyond 256 bytes is cut off. The host's own.
    pub fn tell(&self, fault: u32, text: &str) {
        self.told.set(text);
        // Last: who finds it finds the rest.
        self.set_fault(fault);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_mean_nothing_are_an_empty_row() {
        for word in [0, 7, u64::MAX] {
            assert_eq!(HostState::from_word(word), HostState::Empty);
        }
        for state in [HostState::Cold, HostState::Wanted, HostState::Starting, HostState::Ready, HostState::Failed] {
            assert_eq!(HostState::from_word(state.to_word()), state);
        }
    }
}
