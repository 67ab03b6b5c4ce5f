//! Which idle client connections go when others need their place (A10, J1): the oldest, by and by. Pure but for what it
//! remembers.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Who has just had an answer keeps its connection: a client that does not look whether it has ended thinks for up to a second
/// or two, and would lose its next request.
const IDLE_LEAST: Duration = Duration::from_secs(2);
/// After so long without a word another shortage begins with the oldest again.
const OVER: Duration = Duration::from_secs(1);
/// Between two steps: the connections of the last one need a moment to be gone.
const STEP: Duration = Duration::from_millis(20);

/// What was asked for last.
#[derive(Debug, Default)]
pub(super) struct Idle(Mutex<Option<Shed>>);

#[derive(Clone, Copy, Debug)]
struct Shed {
    at: Instant,
    least: Duration,
}

impl Idle {
    /// Places are wanted: each time within a second half as long an idleness is enough. Says whether there is something new.
    pub(super) fn shed(&self, idle_max: Duration, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = last.filter(|shed| now.saturating_duration_since(shed.at) < OVER);
        if before.is_some_and(|shed| now.saturating_duration_since(shed.at) < STEP) {
            return false;
        }
        let least = before.map_or(idle_max, |shed| shed.least) / 2;
        *last = Some(Shed { at: now, least: least.max(IDLE_LEAST) });
        true
    }

    /// Who has been idle since then or before goes.
    pub(super) fn shed_before(&self) -> Option<Instant> {
        let shed = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shed.and_then(|shed| shed.at.checked_sub(shed.least))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a10_the_oldest_go_first_and_the_youngest_stay() {
        let (idle, start) = (Idle::default(), Instant::now() + Duration::from_secs(1000));
        assert_eq!(idle.shed_before(), None);
        let at = |ms| start + Duration::from_millis(ms);
        let least = |ms| {
            let is_new = idle.shed(Duration::from_secs(75), at(ms));
            (is_new, at(ms).duration_since(idle.shed_before().unwrap()).as_millis())
        };
        assert_eq!(least(0), (true, 37_500));
        assert_eq!(least(10), (false, 37_510), "not before the last ones can be gone");
        assert_eq!([20, 40, 60, 80, 100, 120].map(|ms| least(ms).1), [18_750, 9_375, 4_687, 2_343, 2_000, 2_000]);
        // Another time.
        assert_eq!(least(1_200), (true, 37_500));
    }
}
