//! Hosts and their programs: what they are doing, from their rows, and what they have counted.

use std::collections::BTreeMap;

use evergate_board::HostState;
use evergate_supervisor::HostStart;

use super::{Page, Sums};
use crate::telemetry::names::{self, HOST_BUCKETS_MS, ProgramEnd};
use crate::telemetry::programs::{Program, programs};

/// States that are shown, all of them always: a series that comes and goes cannot be alerted on.
const STATES: [HostState; 7] = [
    HostState::Cold,
    HostState::Wanted,
    HostState::Starting,
    HostState::Ready,
    HostState::Restarting,
    HostState::Failed,
    HostState::Stopping,
];

impl Page<'_> {
    pub(super) fn hosts(&mut self, sums: &Sums) {
        self.host_gauges();
        let name = "evergate_host_starts_total";
        self.head(name, "counter", "Starts of hosts that are over, by how they came out.");
        for (key, value) in sums.of(names::HOST_STARTS) {
            let upstream = self.board.label_text(key.a);
            let result = HostStart::ALL.get(usize::from(key.b)).map_or("unknown", |outcome| outcome.name());
            self.sample(name, &[("upstream", &upstream), ("result", result)], value);
        }
        let help = "Time from the start of a host until it took requests.";
        let metrics = (names::HOST_START_BUCKET, names::HOST_START_SUM_US);
        self.by_upstream(sums, ("evergate_host_start_seconds", help), metrics);
        let help = "Time that requests waited for the start of a host.";
        let metrics = (names::HOST_WAIT_BUCKET, names::HOST_WAIT_SUM_US);
        self.by_upstream(sums, ("evergate_host_wait_seconds", help), metrics);
        let name = "evergate_program_starts_total";
        self.head(name, "counter", "Programs started; in mode command one for each request.");
        for (key, value) in sums.of(names::PROGRAM_STARTS) {
            let upstream = self.board.label_text(key.a);
            self.sample(name, &[("upstream", &upstream)], value);
        }
        let name = "evergate_program_exits_total";
        self.head(name, "counter", "Ends of programs by cause.");
        for (key, value) in sums.of(names::PROGRAM_EXITS) {
            let upstream = self.board.label_text(key.a);
            let cause = ProgramEnd::ALL.get(usize::from(key.b)).map_or("unknown", |end| end.name());
            self.sample(name, &[("upstream", &upstream), ("cause", cause)], value);
        }
    }

    /// What the rows say. After a reload two may have one name: the old one's requests are counted too.
    fn host_gauges(&mut self) {
        let mut all: BTreeMap<String, Vec<Program>> = BTreeMap::new();
        for program in programs(self.board) {
            all.entry(program.model.clone()).or_default().push(program);
        }
        let name = "evergate_host_state";
        self.head(name, "gauge", "1 for the state that an upstream's host is in, 0 for every other.");
        for (upstream, rows) in &all {
            let Some(row) = rows.iter().min_by_key(|row| row.is_retired) else { continue };
            for state in STATES {
                self.sample(name, &[("upstream", upstream), ("state", state.name())], u8::from(state == row.state));
            }
        }
        let mut gauge = |name: &str, help: &str, value: fn(&Program) -> u64| {
            self.head(name, "gauge", help);
            for (upstream, rows) in &all {
                let sum = rows.iter().fold(0_u64, |sum, row| sum.saturating_add(value(row)));
                self.sample(name, &[("upstream", upstream)], sum);
            }
        };
        gauge("evergate_host_in_flight", "Requests that programs work on.", |row| row.in_flight.into());
        let help = "Requests that wait for a program: for its start, or for a place.";
        gauge("evergate_host_waiting", help, |row| row.waiting);
        let help = "Programs that the host which is there has started in place of others.";
        gauge("evergate_host_restarts", help, |row| row.restarts);
    }

    fn by_upstream(&mut self, sums: &Sums, (name, help): (&str, &str), (bucket, sum_us): (u8, u8)) {
        self.head(name, "histogram", help);
        let mut upstreams: BTreeMap<u16, BTreeMap<u16, u64>> = BTreeMap::new();
        for (key, value) in sums.of(bucket) {
            upstreams.entry(key.b).or_default().insert(key.a, value);
        }
        for (label, counts) in upstreams {
            let upstream = self.board.label_text(label);
            let sum_us = sums.counters.get(&names::key(sum_us, 0, label, 0)).copied().unwrap_or(0);
            self.buckets(name, &[("upstream", &upstream)], (&counts, sum_us), &HOST_BUCKETS_MS);
        }
    }
}
