//! The ladder of memory: what is given up, rung by rung, the nearer a limit comes, so that the kernel does not have to choose
//! for us. Pure. (J3)

/// What is given up; each rung keeps what is given up below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Rung {
    /// Nothing.
    Calm = 0,
    /// Kept connections: answers close theirs, idle ones to upstreams go.
    Close = 1,
    /// Large request bodies.
    Large = 2,
    /// New requests.
    New = 3,
    /// Requests under way, the one that holds the most first.
    Most = 4,
}

impl Rung {
    /// All of them, from the ground up.
    pub const ALL: [Self; 5] = [Self::Calm, Self::Close, Self::Large, Self::New, Self::Most];

    /// The percentage of the limit from which on it is reached. The steps are Envoy's: what is cheap to give up comes long before
    /// the end, which a burst of large bodies reaches in less than a second.
    #[must_use]
    pub const fn from_percent(self) -> u64 {
        match self {
            Self::Calm => 0,
            Self::Close => 85,
            Self::Large => 92,
            Self::New => 95,
            Self::Most => 98,
        }
    }

    /// What is given up, in words.
    #[must_use]
    pub const fn says(self) -> &'static str {
        match self {
            Self::Calm => "nothing is given up",
            Self::Close => "connections are not kept",
            Self::Large => "large request bodies are refused",
            Self::New => "new requests are refused",
            Self::Most => "the requests that hold the most are ended",
        }
    }

    /// The one with that number; the ground for any other.
    #[must_use]
    pub fn from_number(number: u8) -> Self {
        Self::ALL.into_iter().find(|rung| *rung as u8 == number).unwrap_or(Self::Calm)
    }
}

/// Bytes used, of a limit; a limit of 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that cannot be taken back without somebody's loss.
    pub used: u64,
    /// Bytes that there may be.
    pub limit: u64,
}

impl Usage {
    /// How full it is, in percent; 0 without a limit.
    #[must_use]
    pub fn percent(self) -> u64 {
        let percent = (u128::from(self.used) * 100).checked_div(self.limit.into()).unwrap_or(0);
        u64::try_from(percent).unwrap_or(u64::MAX)
    }

    /// The rung that this is.
    #[must_use]
    pub fn rung(self) -> Rung {
        let is_reached = |rung: &Rung| self.percent() >= rung.from_percent();
        Rung::ALL.into_iter().rev().find(is_reached).unwrap_or(Rung::Calm)
    }

    /// With so many bytes more.
    #[must_use]
    pub fn with(self, bytes: u64) -> Self {
        Self { used: self.used.saturating_add(bytes), ..self }
    }

    /// The fuller of the two.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        if other.percent() > self.percent() { other } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn j3_rungs_come_in_their_order_and_not_before() {
        let of = |percent| Usage { used: percent, limit: 100 }.rung();
        let reached = [0, 84, 85, 91, 92, 94, 95, 97, 98, 100, 130].map(of);
        use Rung::{Calm, Close, Large, Most, New};
        assert_eq!(reached, [Calm, Calm, Close, Close, Large, Large, New, New, Most, Most, Most]);
        assert!(Rung::ALL.windows(2).all(|two| two[0] < two[1]));
        assert_eq!(Rung::ALL.map(|rung| Rung::from_number(rung as u8)), Rung::ALL);
    }

    #[test]
    fn without_a_limit_nothing_is_given_up() {
        let none = Usage { used: u64::MAX, limit: 0 };
        assert_eq!((none.rung(), none.percent(), none.with(1).rung()), (Rung::Calm, 0, Rung::Calm));
        assert_eq!(none.max(Usage { used: 9, limit: 10 }).percent(), 90);
        assert_eq!(Usage { used: u64::MAX, limit: u64::MAX }.with(9).rung(), Rung::Most);
    }
}
