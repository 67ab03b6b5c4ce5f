//! Chance, and configurations made by it.

use crate::step::{Rules, SECOND};

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
