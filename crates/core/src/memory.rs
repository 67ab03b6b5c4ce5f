//! The ladder of memory: what is given up, rung by rung, the nearer a limit comes, so that the kernel does not have to choose
//! for us. Pure. (J3)

use crate::cgroup::value;

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

/// Of a machine's memory, the rungs are shares of this much at most: 8 % of a terabyte are plenty, and what is left at a rung
/// has to do for the same burst on every machine. At 92 % these are 164 MiB, at 98 % 41.
const MACHINE_BYTES_MAX: u64 = 2 << 30;

/// What a machine has left. Bytes; all of them 0 if that is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// Until the kernel has nothing to give: available by its own reckoning, and swap that is free.
    pub left: u64,
    /// All of its memory, without swap.
    pub total: u64,
}

impl Machine {
    /// Of the text of `/proc/meminfo` (proc_meminfo(5)).
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let kib = |key| value(&text.replace(" kB", ""), key);
        let left = kib("MemAvailable:")?.saturating_add(kib("SwapFree:").unwrap_or(0));
        Some(Self { left: left.saturating_mul(1024), total: kib("MemTotal:")?.saturating_mul(1024) })
    }

    /// With so many bytes less.
    #[must_use]
    pub fn without(self, bytes: u64) -> Self {
        Self { left: self.left.saturating_sub(bytes), ..self }
    }

    /// As of a limit.
    #[must_use]
    pub fn usage(self) -> Usage {
        let limit = self.total.min(MACHINE_BYTES_MAX);
        Usage { used: limit.saturating_sub(self.left), limit }
    }
}

/// The percentage of the last ten seconds in which all stood still for want of memory, of the text of a `memory.pressure` or
/// `/proc/pressure/memory` (the kernel's accounting/psi).
#[must_use]
pub fn stalled_percent(text: &str) -> Option<u64> {
    let full = text.lines().find_map(|line| line.strip_prefix("full avg10="))?;
    full.split(['.', ' ']).next()?.parse().ok()
}

/// The rung that such a percentage asks for: what systemd-oomd would kill for, at 60 %, is met by what costs little, and goes
/// no further, since a stall does not say how far the end is.
#[must_use]
pub const fn stalled_rung(percent: u64) -> Rung {
    match percent {
        0..20 => Rung::Calm,
        20..40 => Rung::Close,
        _ => Rung::Large,
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
    fn j3_a_machine_is_full_when_little_is_left_however_large_it_is() {
        let text = "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:     400000 kB\nSwapFree:   100000 kB\n";
        let machine = Machine::parse(text).unwrap();
        assert_eq!(machine, Machine { left: 500_000 << 10, total: 16 << 30 });
        assert_eq!(Machine::parse("MemTotal: 5 kB\nMemFree: 5 kB\n"), None, "a kernel that does not say");
        let of = |total: u64, left: u64| Machine { left: left << 20, total: total << 20 }.usage().rung();
        use Rung::{Calm, Close, Large, Most, New};
        for total in [2_048, 16_384, 1 << 20] {
            let reached = [2_000, 308, 307, 163, 102, 40, 0].map(|left| of(total, left));
            assert_eq!(reached, [Calm, Calm, Close, Large, New, Most, Most], "{total} MiB");
        }
        // A small one by its own share.
        assert_eq!([160, 150, 80, 50, 20].map(|left| of(1_024, left)), [Calm, Close, Large, New, Most]);
        // What comes counts against all that is left.
        let all = Machine { left: 8 << 30, total: 16 << 30 };
        assert_eq!(all.without(7 << 30).usage().rung(), Calm);
        assert_eq!(all.without((8 << 30) - 1).usage().rung(), Most);
        assert_eq!(Machine::default().without(5).usage().rung(), Calm, "not known");
    }

    #[test]
    fn j3_stalls_are_read_and_give_up_little() {
        let text = "some avg10=99.00 avg60=1.00 avg300=0.00 total=5\nfull avg10=41.93 avg60=0.10 avg300=0.02 total=3\n";
        assert_eq!(
            (stalled_percent(text), stalled_percent("some avg10=1.00\n"), stalled_percent("")),
            (Some(41), None, None)
        );
        use Rung::{Calm, Close, Large};
        assert_eq!([0, 19, 20, 39, 40, 100].map(stalled_rung), [Calm, Calm, Close, Close, Large, Large]);
    }

    #[test]
    fn without_a_limit_nothing_is_given_up() {
        let none = Usage { used: u64::MAX, limit: 0 };
        assert_eq!((none.rung(), none.percent(), none.with(1).rung()), (Rung::Calm, 0, Rung::Calm));
        assert_eq!(none.max(Usage { used: 9, limit: 10 }).percent(), 90);
        assert_eq!(Usage { used: u64::MAX, limit: u64::MAX }.with(9).rung(), Rung::Most);
    }
}
