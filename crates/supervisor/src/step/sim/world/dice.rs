//! Chance, and configurations made by it.

use crate::step::{HostRules, MS, Rules, SECOND, name_hash};

/// xorshift64*, enough for choosing troubles.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides
    }

    pub(super) fn small(&mut self, sides: u64) -> u32 {
        u32::try_from(self.roll(sides)).unwrap()
    }

    /// The name of a program, mostly of one that some configurations have.
    pub(super) fn name(&mut self) -> String {
        ["a", "b", "c", "d", "e"][usize::try_from(self.roll(5)).unwrap()].to_owned()
    }

    /// The programs of a configuration: two that exclude each other, and two that do not.
    pub(super) fn hosts(&mut self) -> Vec<HostRules> {
        let mut all = Vec::new();
        for (name, group) in [("a", Some("g")), ("b", Some("g")), ("c", None), ("d", None)] {
            let choice = self.roll(8);
            if choice < 3 {
                continue;
            }
            let mut rules = HostRules {
                name: name.into(),
                fingerprint: 0,
                group: group.map(str::to_owned),
                is_preloaded: choice == 3,
                overlaps: choice == 4 || choice == 5,
                start: 3 * SECOND,
                grace: self.roll(2) * 500 * MS,
            };
            rules.fingerprint = name_hash(&format!("{rules:?}"));
            all.push(rules);
        }
        all
    }

    pub(super) fn rules(&mut self) -> Rules {
        let min = 1 + self.small(3);
        Rules {
            workers_min: min,
            workers_max: min + self.small(4),
            slots: 1 + self.small(10),
            backlog_high: 1 + self.small(10),
            idle_after: (1 + self.roll(10)) * SECOND,
            requests_max: [0, 0, 100, 1000][usize::try_from(self.roll(4)).unwrap()],
            lifetime_max: [0, 0, 12, 40][usize::try_from(self.roll(4)).unwrap()] * SECOND,
            rss_max_kib: [0, 0, 60_000][usize::try_from(self.roll(3)).unwrap()],
            rss_total_max_kib: [0, 0, 150_000][usize::try_from(self.roll(3)).unwrap()],
            boot_timeout: (1 + self.roll(30)) * SECOND,
            hang_timeout: (2 + self.roll(10)) * SECOND,
            settle: self.roll(3) * SECOND,
            drain: self.roll(20) * SECOND,
            cancel: self.roll(3) * SECOND,
            cleanup: self.roll(3) * SECOND,
        }
    }
}
