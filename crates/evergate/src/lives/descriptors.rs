//! How many client connections a worker takes, for the descriptors that it may have (J2).

use evergate_core::config::Config;
use rustix::process::{Resource, getrlimit};

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

#[cfg(test)]
mod tests {
    use super::*;

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
