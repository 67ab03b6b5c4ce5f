//! Why a request was cancelled, kept in a cell that takes the first cause and no other.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::Fault;

/// Why work was stopped before its own end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cause {
    /// The client closed or reset its connection.
    ClientGone = 1,
    /// The request's deadline passed.
    DeadlinePassed = 2,
    /// The process is stopping and `drain` ran out.
    Draining = 3,
    /// Another attempt of the same request answered first.
    LostRace = 4,
    /// An operator ended it.
    Operator = 5,
    /// The client has read nothing for `client_stall`.
    ClientStalled = 6,
    /// Memory is short, and it held more of it than any other.
    Memory = 7,
    /// The gateway was told to stop at once, be it from the first or while it drained.
    StoppedAtOnce = 8,
    /// Its worker was still finishing when too many reloads had followed.
    Superseded = 9,
}

impl Cause {
    /// The name in records and labels.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClientGone => "client_gone",
            Self::DeadlinePassed => "deadline_exceeded",
            Self::Draining => "drain",
            Self::LostRace => "lost_race",
            Self::Operator => "operator",
            Self::ClientStalled => "client_stalled",
            Self::Memory => "memory",
            Self::StoppedAtOnce => "stopped_at_once",
            Self::Superseded => "superseded",
        }
    }

    /// What a client that is still there is told.
    #[must_use]
    pub const fn fault(self) -> Fault {
        match self {
            Self::DeadlinePassed => Fault::DeadlineExceeded,
            Self::Draining | Self::StoppedAtOnce | Self::Superseded => Fault::ServerShuttingDown,
            Self::Memory => Fault::Overloaded,
            Self::ClientGone | Self::ClientStalled | Self::LostRace | Self::Operator => Fault::OperatorCancelled,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        use Cause::{ClientGone, ClientStalled, DeadlinePassed, Draining, LostRace};
        use Cause::{Memory, Operator, StoppedAtOnce, Superseded};
        let first = [ClientGone, DeadlinePassed, Draining, LostRace, Operator, ClientStalled];
        first.into_iter().chain([Memory, StoppedAtOnce, Superseded]).find(|cause| *cause as u8 == byte)
    }
}

/// Holds the first cause that was set.
#[derive(Debug, Default)]
pub struct CauseCell(AtomicU8);

impl CauseCell {
    /// Sets the cause unless one is set; says whether this call set it.
    pub fn set(&self, cause: Cause) -> bool {
        self.0.compare_exchange(0, cause as u8, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The cause, once there is one.
    #[must_use]
    pub fn get(&self) -> Option<Cause> {
        Cause::from_byte(self.0.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_is_read_back() {
        for byte in 1..=9 {
            let cause = Cause::from_byte(byte).unwrap();
            let cell = CauseCell::default();
            assert!(cause as u8 == byte && cell.set(cause));
            assert_eq!(cell.get(), Some(cause));
        }
        assert_eq!((Cause::from_byte(0), Cause::from_byte(10)), (None, None));
    }

    #[test]
    fn first_cause_stays() {
        let cell = CauseCell::default();
        assert_eq!(cell.get(), None);
        assert!(cell.set(Cause::Draining));
        assert!(!cell.set(Cause::ClientGone));
        assert_eq!(cell.get(), Some(Cause::Draining));
    }
}
