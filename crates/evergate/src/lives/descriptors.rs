//! Descriptors: how many client connections a worker takes for those that it may have (J2), and whether it loses some (H9).

use evergate_board::ChildRow;
use evergate_core::config::Config;
use rustix::process::{Resource, getrlimit};

use crate::http::app::App;

/// Descriptors that a worker has besides connections: what it inherits, its runtime, name look-ups, files that it reads.
const OWN: u64 = 64;

/// What a worker would have if it could: client connections, and requests of which each may need one to an upstream.
#[derive(Clone, Copy)]
struct Wanted {
    connections: u32,
    slots: u32,
}

impl Wanted {
    fn of(config: &Config) -> Self {
        Self { connections: config.limits.connections, slots: config.workers.slots }
    }

    fn descriptors(self) -> u64 {
        u64::from(self.connections) + u64::from(self.slots) + OWN
    }

    /// The connections that a worker takes at a time with so many descriptors; more wait in the accept queue.
    fn fitting(self, limit: u64) -> u32 {
        let room = limit.saturating_sub(OWN);
        // Half at least is for clients: whoever is not accepted is not even told so.
        let room = room - u64::from(self.slots).min(room / 2);
        self.connections.min(u32::try_from(room).unwrap_or(u32::MAX)).max(1)
    }

    fn warning(self, limit: u64) -> Option<String> {
        let (need, fitting) = (self.descriptors(), self.fitting(limit));
        (need > limit).then(|| {
            format!(
                "a process may have {limit} open files here, and a worker may need {need} (limits.connections, \
                 workers.slots): it takes {fitting} connections at a time, more wait; raise the limit (LimitNOFILE= in \
                 systemd, ulimit -n)"
            )
        })
    }
}

/// What this process may have once its limit is raised as far as it goes, which the master does.
fn limit() -> u64 {
    getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX)
}

/// The connections that a worker takes at a time.
#[must_use]
pub fn connections(config: &Config) -> u32 {
    Wanted::of(config).fitting(limit())
}

/// What an operator should know of the limit, if it is too low.
#[must_use]
pub fn warning(config: &Config) -> Option<String> {
    Wanted::of(config).warning(limit())
}

/// What of a worker's descriptors nothing accounts for (H9).
#[derive(Debug, Default)]
pub(super) struct Strays {
    /// What it had at the first look, connections aside.
    own: Option<u32>,
}

/// Descriptors that a request may have under way that are not counted as connections yet: two addresses that are tried.
const PER_REQUEST: u32 = 2;

impl Strays {
    /// Shows how many descriptors are open, and asks for a successor when too many of them are nobody's.
    pub(super) fn look(&mut self, app: &App, child: &ChildRow) {
        let Some(open) = open() else { return };
        child.set_descriptors(open);
        let live = u32::try_from(app.gate.live()).unwrap_or(u32::MAX);
        let known = child.connections().saturating_add(app.upstream_connections());
        let known = known.saturating_add(live.saturating_mul(PER_REQUEST));
        let own = *self.own.get_or_insert(open.saturating_sub(known));
        child.set_leaking(is_leaking(open.saturating_sub(known.saturating_add(own)), limit()));
    }
}

/// Whether so many strays are a leak, of so many descriptors that there may be: a fifth of them, so that the rest lasts until a
/// successor is there; 4,096 where there may be a million.
fn is_leaking(strays: u32, limit: u64) -> bool {
    u64::from(strays) >= (limit / 5).clamp(OWN, 4096)
}

/// Descriptors that are open in this process; none where procfs does not say.
fn open() -> Option<u32> {
    // Since Linux 6.2 the folder's size is their number; before, they are counted.
    let said = std::fs::metadata("/proc/self/fd").ok()?.len();
    let open = if said > 0 { said } else { std::fs::read_dir("/proc/self/fd").ok()?.count() as u64 };
    u32::try_from(open).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h9_a_fifth_of_what_there_may_be_is_a_leak() {
        assert_eq!([203, 204].map(|strays| is_leaking(strays, 1024)), [false, true]);
        // What it has by itself is none, however low the limit.
        assert_eq!([63, 64].map(|strays| is_leaking(strays, 100)), [false, true]);
        assert_eq!([4095, 4096].map(|strays| is_leaking(strays, 1 << 20)), [false, true]);
        assert!(open().is_some_and(|open| open > 2));
    }

    #[test]
    fn j2_connections_fit_what_there_is() {
        let wanted = Wanted { connections: 1000, slots: 100 };
        let fitting = |limit| wanted.fitting(limit);
        assert_eq!((fitting(1 << 20), fitting(1164), fitting(1163)), (1000, 1000, 999));
        // Half of what is left beside its own.
        assert_eq!((fitting(164), fitting(64), fitting(0)), (50, 1, 1));
        assert_eq!(wanted.warning(1164), None);
        let said = wanted.warning(264).unwrap();
        assert!(said.contains("264 open files") && said.contains("need 1164") && said.contains("takes 100 "), "{said}");
    }
}
