//! The Prometheus text of the whole gateway, summed over all rows of the board.
//!
//! Format: "Exposition formats", prometheus.io, text version 0.0.4. Counters live in rows that outlast their processes,
//! so that no death takes a sum back; only gauges are read from what is alive.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};

use evergate_board::{Board, PermitsSeen, SeriesKey, monotonic_ns};
use evergate_core::exit::Kind;

use super::names::{self, FIRST_BYTE_BUCKETS_MS, FIRST_TOKEN_BUCKETS_MS, LOOP_LAG_BUCKETS_MS, Shed};
use super::status::{Inflights, oldest_wait_ns};

mod hosts;

/// All metrics of `names`, and the gauges.
#[must_use]
pub fn prometheus(board: &Board) -> String {
    let sums = Sums::read(board);
    let mut page = Page { board, out: String::with_capacity(8 << 10) };
    page.requests(&sums);
    page.attempts(&sums);
    page.first_token(&sums);
    page.tokens(&sums);
    page.times(&sums);
    page.limits(&sums);
    page.hosts(&sums);
    page.exits(&sums);
    page.plain_counters(&sums);
    page.supervision();
    page.gauges();
    page.out
}

/// Every counter's sum, in a fixed order.
struct Sums {
    counters: BTreeMap<SeriesKey, u64>,
    /// Counts that found no place on the board.
    dropped: u64,
}

impl Sums {
    fn read(board: &Board) -> Self {
        let mut sums = Self { counters: BTreeMap::new(), dropped: 0 };
        let rows = board.children().filter_map(|(row, _)| board.series(row));
        for series in rows.chain(board.master_series()) {
            sums.dropped = sums.dropped.saturating_add(series.dropped());
            for (key, value) in series.iter() {
                let sum = sums.counters.entry(key).or_default();
                *sum = sum.saturating_add(value);
            }
        }
        sums
    }

    fn of(&self, metric: u8) -> impl Iterator<Item = (SeriesKey, u64)> {
        let found = self.counters.iter().filter(move |(key, _)| key.metric == metric);
        found.map(|(key, value)| (*key, *value))
    }

    /// A counter without labels.
    fn total(&self, metric: u8) -> u64 {
        self.of(metric).fold(0, |sum, (_, value)| sum.saturating_add(value))
    }
}

struct Page<'a> {
    board: &'a Board,
    out: String,
}

impl Page<'_> {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.out.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            self.out.push(if index == 0 { '{' } else { ',' });
            let _ = write!(self.out, "{label}=\"");
            escape(&mut self.out, text);
            self.out.push('"');
        }
        let _ = writeln!(self.out, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.head(name, kind, help);
        self.sample(name, &[], value);
    }

    fn requests(&mut self, sums: &Sums) {
        const NAME: &str = "evergate_requests_total";
        self.head(NAME, "counter", "Requests by model, upstream, status and cause of their end.");
        for (key, value) in sums.of(names::REQUESTS) {
            // A value that nobody packs is a child's nonsense.
            let Some((status, end)) = names::split_status_and_end(key.c) else { continue };
            let (model, upstream) = (self.board.label_text(key.a), self.board.label_text(key.b));
            let status = status.to_string();
            let labels = [("model", &*model), ("upstream", &*upstream), ("status", &*status), ("cause", end.name())];
            self.sample(NAME, &labels, value);
        }
    }

    /// Every call: those that another one followed have a counter of their own, a request's last one ended as it did.
    fn attempts(&mut self, sums: &Sums) {
        const NAME: &str = "evergate_attempts_total";
        self.head(NAME, "counter", "Calls to upstreams by upstream and cause of their end.");
        let mut calls: BTreeMap<(u16, &str), u64> = BTreeMap::new();
        for (key, value) in sums.of(names::REQUESTS).chain(sums.of(names::ATTEMPTS)) {
            if let Some((_, end)) = names::split_status_and_end(key.c) {
                let sum = calls.entry((key.b, end.name())).or_default();
                *sum = sum.saturating_add(value);
            }
        }
        for ((label, cause), value) in calls {
            let upstream = self.board.label_text(label);
            // Requests that nobody was called for (a full upstream was not either), and those that are answered within
            // the process.
            if !upstream.is_empty() && *upstream != *"echo" {
                self.sample(NAME, &[("upstream", &upstream), ("cause", cause)], value);
            }
        }
    }

    /// Upstreams with a limit of calls under way.
    fn limits(&mut self, sums: &Sums) {
        const SHED: &str = "evergate_shed_total";
        self.head(SHED, "counter", "Requests that an upstream's in_flight_max has kept from it.");
        for (key, value) in sums.of(names::SHED) {
            let Some(reason) = Shed::ALL.get(usize::from(key.a)) else { continue };
            let upstream = self.board.label_text(key.b);
            self.sample(SHED, &[("upstream", &upstream), ("reason", reason.name())], value);
        }
        let limits: Vec<PermitsSeen> = self.board.permits_seen().collect();
        let mut gauge = |name: &str, help: &str, value: fn(&PermitsSeen) -> u64| {
            self.head(name, "gauge", help);
            for limit in &limits {
                self.sample(name, &[("upstream", &limit.upstream)], value(limit));
            }
        };
        let help = "Calls under way, of upstreams with in_flight_max.";
        gauge("evergate_upstream_in_flight", help, |limit| limit.held.into());
        gauge("evergate_upstream_in_flight_max", "The most of these that there may be.", |limit| limit.max.into());
        let help = "Requests that wait for one of these calls to end.";
        gauge("evergate_upstream_waiting", help, |limit| limit.waiting);
    }

    fn first_token(&mut self, sums: &Sums) {
        self.head("evergate_first_token_seconds", "histogram", "Time from admission to the first token.");
        let mut models: BTreeMap<u16, BTreeMap<u16, u64>> = BTreeMap::new();
        for (key, value) in sums.of(names::FIRST_TOKEN_BUCKET) {
            models.entry(key.a).or_default().insert(key.b, value);
        }
        for (label, buckets) in models {
            let model = self.board.label_text(label);
            let sum_us = sums.counters.get(&names::key(names::FIRST_TOKEN_SUM_US, label, 0, 0)).copied().unwrap_or(0);
            let labels = [("model", &*model)];
            self.buckets("evergate_first_token_seconds", &labels, (&buckets, sum_us), &FIRST_TOKEN_BUCKETS_MS);
        }
    }

    /// Those without labels.
    fn times(&mut self, sums: &Sums) {
        let help = "Time from a request's head to the first byte of its answer.";
        let counts = (names::FIRST_BYTE_BUCKET, names::FIRST_BYTE_SUM_US);
        self.histogram(sums, ("evergate_first_byte_seconds", help), counts, &FIRST_BYTE_BUCKETS_MS);
        let help = "How late workers' event loops were at their beats.";
        let counts = (names::LOOP_LAG_BUCKET, names::LOOP_LAG_SUM_US);
        self.histogram(sums, ("evergate_loop_lag_seconds", help), counts, &LOOP_LAG_BUCKETS_MS);
    }

    fn histogram(&mut self, sums: &Sums, (name, help): (&str, &str), (bucket, sum_us): (u8, u8), bounds_ms: &[u64]) {
        self.head(name, "histogram", help);
        let counts: BTreeMap<u16, u64> = sums.of(bucket).map(|(key, value)| (key.a, value)).collect();
        self.buckets(name, &[], (&counts, sums.total(sum_us)), bounds_ms);
    }

    /// The samples of one histogram, from the count of each bucket.
    fn buckets(
        &mut self,
        name: &str,
        labels: &[(&str, &str)],
        (counts, sum_us): (&BTreeMap<u16, u64>, u64),
        bounds_ms: &[u64],
    ) {
        let buckets = format!("{name}_bucket");
        let mut count = 0_u64;
        for (index, bound_ms) in (0_u16..).zip(bounds_ms) {
            count = count.saturating_add(counts.get(&index).copied().unwrap_or(0));
            self.sample(&buckets, &[labels, &[("le", &decimal(*bound_ms, 3))]].concat(), count);
        }
        let all = counts.values().fold(0_u64, |all, value| all.saturating_add(*value));
        self.sample(&buckets, &[labels, &[("le", "+Inf")]].concat(), all);
        self.sample(&format!("{name}_sum"), labels, decimal(sum_us, 6));
        self.sample(&format!("{name}_count"), labels, all);
    }

    fn tokens(&mut self, sums: &Sums) {
        for (metric, name, help) in [
            (names::TOKENS_IN, "evergate_tokens_in_total", "Prompt tokens as upstreams report them."),
            (names::TOKENS_OUT, "evergate_tokens_out_total", "Completion tokens as upstreams report them."),
        ] {
            self.head(name, "counter", help);
            for (label, value) in sums.of(metric) {
                let (model, key) = (self.board.label_text(label.a), self.board.label_text(label.b));
                self.sample(name, &[("model", &model), ("key", &key)], value);
            }
        }
        let (name, help) = ("evergate_usage_suspect_total", "Answers whose token counts cannot be right.");
        self.head(name, "counter", help);
        for (label, value) in sums.of(names::USAGE_SUSPECT) {
            self.sample(name, &[("model", &self.board.label_text(label.a))], value);
        }
    }

    fn exits(&mut self, sums: &Sums) {
        for (metric, name, label, help) in [
            (names::EXITS, "evergate_exits_total", "initiator", "Ends of processes by kind and initiator."),
            (names::RESPAWNS, "evergate_respawns_total", "cause", "Processes that took another's place, by its end."),
        ] {
            self.head(name, "counter", help);
            for (key, value) in sums.of(metric) {
                let kind = u8::try_from(key.a).ok().and_then(Kind::from_byte).map_or("unknown", Kind::name);
                let word = names::INITIATORS.get(usize::from(key.b)).map_or("unknown", |initiator| initiator.name());
                self.sample(name, &[("kind", kind), (label, word)], value);
            }
        }
    }

    fn plain_counters(&mut self, sums: &Sums) {
        let panics = sums.total(names::PANICS);
        self.single("evergate_panics_total", "counter", "Panics; each ended one request or task.", panics);
        let records = sums.total(names::ACCESS_DROPPED).saturating_add(self.board.master().access_dropped());
        let help = "Access records that were not written.";
        self.single("evergate_access_records_dropped_total", "counter", help, records);
        let connections = sums.total(names::CONNECTIONS);
        let help = "Client connections accepted.";
        self.single("evergate_client_connections_total", "counter", help, connections);
        let failures = sums.total(names::ACCEPT_FAILURES);
        let help = "Accepts that failed for want of descriptors or memory; the connection waited.";
        self.single("evergate_accept_failures_total", "counter", help, failures);
        let shed = sums.total(names::IDLE_SHED);
        let help = "Idle client connections that ended since others waited for a place or a descriptor.";
        self.single("evergate_client_connections_shed_total", "counter", help, shed);
        self.look_ups(sums);
        self.spared(sums);
        let overflows = self.board.master().queue_overflows();
        let help = "Connects that a full accept queue turned away; their clients tried again a second later.";
        self.single("evergate_listen_overflows_total", "counter", help, overflows);
        let help = "Counts that found no place on the board, so that other counters are too low.";
        self.single("evergate_series_dropped_total", "counter", help, sums.dropped);
    }

    fn look_ups(&mut self, sums: &Sums) {
        let name = "evergate_dns_lookups_total";
        self.head(name, "counter", "Look-ups of upstreams' names; one that is late counts again when it ends.");
        for (index, result) in (0_u16..).zip(names::LOOK_UPS) {
            let found = sums.of(names::DNS_LOOK_UPS).find(|(key, _)| key.a == index);
            self.sample(name, &[("result", result)], found.map_or(0, |(_, value)| value));
        }
    }

    fn spared(&mut self, sums: &Sums) {
        let name = "evergate_memory_spared_total";
        self.head(name, "counter", "Requests refused or ended because memory was short.");
        for what in names::Spared::ALL {
            let found = sums.of(names::SPARED).find(|(key, _)| key.a == what as u16);
            self.sample(name, &[("what", what.name())], found.map_or(0, |(_, value)| value));
        }
    }

    /// What the master counts.
    fn supervision(&mut self) {
        let master = self.board.master();
        let (ups, downs) = (master.scale_ups(), master.scale_downs());
        self.head("evergate_scale_events_total", "counter", "Workers added and taken away after the start.");
        self.sample("evergate_scale_events_total", &[("direction", "up")], ups);
        self.sample("evergate_scale_events_total", &[("direction", "down")], downs);
        let (done, failed) = (master.reloads(), master.reloads_failed());
        self.head("evergate_reloads_total", "counter", "Reloads by their outcome.");
        self.sample("evergate_reloads_total", &[("outcome", "ok")], done);
        self.sample("evergate_reloads_total", &[("outcome", "failed")], failed);
        let help = "Workers wanted at this moment.";
        self.single("evergate_workers_wanted", "gauge", help, master.workers_target().into());
        let help = "Requests that wait for a slot, and connections that wait to be accepted.";
        self.single("evergate_backlog", "gauge", help, master.backlog());
    }

    fn gauges(&mut self) {
        let alive = Alive::read(self.board);
        let inflight = "evergate_inflight_requests";
        self.head(inflight, "gauge", "Requests in flight.");
        self.sample(inflight, &[("kind", "unary")], alive.inflight.unary);
        self.sample(inflight, &[("kind", "stream")], alive.inflight.stream);
        let loads = "evergate_worker_load";
        self.head(loads, "gauge", "Requests of each worker, waiting ones too; a stream counts twice.");
        for (slot, (load, _)) in &alive.by_slot {
            self.sample(loads, &[("worker", &slot.to_string())], load);
        }
        let each = "evergate_worker_inflight_requests";
        self.head(each, "gauge", "Requests of each worker that have a place.");
        for (slot, (_, inflight)) in &alive.by_slot {
            for (kind, count) in [("unary", inflight.unary), ("stream", inflight.stream)] {
                self.sample(each, &[("worker", &slot.to_string()), ("kind", kind)], count);
            }
        }
        let rungs = "evergate_memory_rung";
        self.head(rungs, "gauge", "How much is given up for want of memory: 0 nothing to 4, requests under way.");
        self.sample(rungs, &[], alive.memory_rung);
        let help = "Descriptors that workers have open.";
        self.single("evergate_worker_descriptors", "gauge", help, alive.descriptors);
        let help = "Requests that wait for a slot of their worker.";
        self.single("evergate_waiting_requests", "gauge", help, alive.waiting);
        let oldest = "evergate_waiting_oldest_seconds";
        self.head(oldest, "gauge", "How long the oldest of them has waited.");
        self.sample(oldest, &[], decimal(alive.oldest_wait_ns / 1_000_000, 3));
        let help = "Upstream connections open, idle ones included.";
        self.single("evergate_upstream_connections", "gauge", help, alive.upstream_connections);
        self.single("evergate_client_connections", "gauge", "Client connections open.", alive.connections);
        self.single(
            "evergate_tasks",
            "gauge",
            "Tasks of all workers: connections, streams, and a few of their own.",
            alive.tasks,
        );
        self.head("evergate_workers", "gauge", "Workers by phase.");
        for (phase, count) in alive.workers {
            self.sample("evergate_workers", &[("phase", phase)], count);
        }
        let (generation, queue) = (self.board.master().generation(), self.board.master().queue());
        self.single("evergate_generation", "gauge", "Generation of the configuration.", generation.into());
        self.single("evergate_accept_queue", "gauge", "Connections that wait to be accepted.", queue.into());
        self.head("evergate_build_info", "gauge", "Always 1; the version is its label.");
        self.sample("evergate_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    }
}

/// What is read from living children.
struct Alive {
    inflight: Inflights,
    connections: u64,
    upstream_connections: u64,
    tasks: u64,
    descriptors: u64,
    /// The highest.
    memory_rung: u32,
    waiting: u64,
    oldest_wait_ns: u64,
    /// Load and requests of workers by slot: while one drains, its successor may have the same.
    by_slot: BTreeMap<u32, (u64, Inflights)>,
    workers: BTreeMap<&'static str, u64>,
}

impl Alive {
    fn read(board: &Board) -> Self {
        // Phases that workers can be in are there with 0 too: a series that comes and goes cannot be alerted on.
        let phases = ["booting", "ready", "draining", "cancelling", "cleaning", "ghost"];
        let mut alive = Self {
            inflight: Inflights::default(),
            connections: 0,
            upstream_connections: 0,
            tasks: 0,
            descriptors: 0,
            memory_rung: 0,
            waiting: 0,
            oldest_wait_ns: 0,
            by_slot: BTreeMap::new(),
            workers: phases.into_iter().map(|phase| (phase, 0)).collect(),
        };
        for (row, child) in board.children() {
            let Some(kind) = child.kind() else { continue };
            board.inflight(row).for_each(|request| alive.inflight.add(&request));
            alive.connections = alive.connections.saturating_add(child.connections().into());
            alive.upstream_connections = alive.upstream_connections.saturating_add(child.upstream_connections().into());
            alive.tasks = alive.tasks.saturating_add(child.tasks().into());
            alive.descriptors = alive.descriptors.saturating_add(child.descriptors().into());
            alive.memory_rung = alive.memory_rung.max(child.memory_rung().min(4));
            alive.waiting = alive.waiting.saturating_add(child.waiting().into());
            alive.oldest_wait_ns = alive.oldest_wait_ns.max(oldest_wait_ns(child, monotonic_ns()));
            if kind == Kind::Worker {
                let (load, inflight) = alive.by_slot.entry(child.slot()).or_default();
                *load = load.saturating_add(child.load().into());
                board.inflight(row).for_each(|request| inflight.add(&request));
            }
            if let Some(count) = alive.workers.get_mut(child.phase().name()).filter(|_| kind == Kind::Worker) {
                *count = count.saturating_add(1);
            }
        }
        alive
    }
}

/// A label's value: backslash, quote and line end are escaped, everything else stands as it is.
fn escape(out: &mut String, text: &str) {
    for letter in text.chars() {
        match letter {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
}

/// `value` divided by a power of ten, exactly and without trailing zeros: 2,500 and 3 give `2.5`.
fn decimal(value: u64, places: u32) -> String {
    let scale = 10_u64.saturating_pow(places).max(1);
    let width = usize::try_from(places).unwrap_or(0);
    let text = format!("{}.{:0width$}", value / scale, value % scale);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use evergate_board::{Claim, InflightStart, Phase, Shape};
    use evergate_core::Fault;
    use evergate_core::exit::Initiator;

    fn board() -> Board {
        Board::create(Shape { children: 4, slots: 4, series: 64, labels: 32 }, 7).unwrap()
    }

    fn has(text: &str, line: &str) {
        assert!(text.lines().any(|found| found == line), "no line {line} in\n{text}");
    }

    #[test]
    fn requests_are_summed_over_rows_and_outlive_their_worker() {
        let board = board();
        let (model, upstream) = (board.label("say \"a\\b\""), board.label("tiny"));
        let ok = names::key(names::REQUESTS, model, upstream, names::status_and_end(200, names::End::Ok));
        board.series(1).unwrap().add(ok, 2);
        board.series(2).unwrap().add(ok, 3);
        board.bury(1);
        let end = names::status_and_end(504, names::End::Fault(Fault::DeadlineExceeded));
        board.series(2).unwrap().add(names::key(names::REQUESTS, model, upstream, end), 1);
        let text = prometheus(&board);
        let labels = r#"model="say \"a\\b\"",upstream="tiny""#;
        has(&text, &format!(r#"evergate_requests_total{{{labels},status="200",cause="ok"}} 5"#));
        has(&text, &format!(r#"evergate_requests_total{{{labels},status="504",cause="deadline_exceeded"}} 1"#));
    }

    #[test]
    fn attempts_are_those_that_others_followed_and_the_last_of_each_request() {
        let board = board();
        let (model, series) = (board.label("m"), board.series(1).unwrap());
        let [first, second, echo] = ["first", "second", "echo"].map(|name| board.label(name));
        let failed = names::End::Fault(Fault::UpstreamFailed);
        let count = |metric, upstream, status, end, count| {
            let a = if metric == names::REQUESTS { model } else { 0 };
            series.add(names::key(metric, a, upstream, names::status_and_end(status, end)), count);
        };
        count(names::ATTEMPTS, first, 0, failed, 3);
        count(names::REQUESTS, first, 502, failed, 2);
        count(names::REQUESTS, second, 200, names::End::Ok, 4);
        count(names::REQUESTS, echo, 200, names::End::Ok, 9);
        count(names::REQUESTS, 0, 404, names::End::Fault(Fault::ModelNotFound), 9);
        let text = prometheus(&board);
        let mut lines: Vec<&str> = text.lines().filter(|line| line.starts_with("evergate_attempts_total")).collect();
        // They come in the order of their labels' numbers, which is that of a hash.
        lines.sort_unstable();
        assert_eq!(
            lines,
            [
                r#"evergate_attempts_total{upstream="first",cause="upstream_failed"} 5"#,
                r#"evergate_attempts_total{upstream="second",cause="ok"} 4"#,
            ]
        );
    }

    #[test]
    fn limits_of_upstreams_show_what_is_held_and_what_waits() {
        let board = board();
        board.child(1).unwrap().claim(&Claim { kind: Kind::Worker, slot: 0, epoch: 1, generation: 1, spawned_ns: 1 });
        let permits = board.permits("gpu", (1, 1)).unwrap();
        permits.set_max(3);
        let _taken = [permits.take().unwrap(), permits.take().unwrap()];
        permits.show_waiting(7, 1);
        let label = board.label("gpu");
        board.series(1).unwrap().add(names::key(names::SHED, Shed::TooLate as u16, label, 0), 4);
        board.series(1).unwrap().add(names::key(names::SHED, 99, label, 0), 4);
        let text = prometheus(&board);
        has(&text, r#"evergate_upstream_in_flight{upstream="gpu"} 2"#);
        has(&text, r#"evergate_upstream_in_flight_max{upstream="gpu"} 3"#);
        has(&text, r#"evergate_upstream_waiting{upstream="gpu"} 7"#);
        has(&text, r#"evergate_shed_total{upstream="gpu",reason="too_late"} 4"#);
        assert_eq!(text.lines().filter(|line| line.starts_with("evergate_shed_total")).count(), 1);
        assert!(Shed::ALL.iter().enumerate().all(|(at, shed)| *shed as usize == at));
    }

    #[test]
    fn histogram_is_cumulative_and_its_count_is_the_last_bucket() {
        let board = board();
        let (model, series) = (board.label("m"), board.series(0).unwrap());
        for ms in [3.0, 4.0, 70.0, 1e9] {
            series.add(names::key(names::FIRST_TOKEN_BUCKET, model, names::first_token_bucket(ms), 0), 1);
        }
        series.add(names::key(names::FIRST_TOKEN_SUM_US, model, 0, 0), 1_500_000);
        let text = prometheus(&board);
        for (le, count) in [("0.005", 2), ("0.05", 2), ("0.1", 3), ("120", 3), ("+Inf", 4)] {
            has(&text, &format!(r#"evergate_first_token_seconds_bucket{{model="m",le="{le}"}} {count}"#));
        }
        has(&text, r#"evergate_first_token_seconds_sum{model="m"} 1.5"#);
        has(&text, r#"evergate_first_token_seconds_count{model="m"} 4"#);
    }

    #[test]
    fn the_living_are_gauges() {
        let board = board();
        let child = board.child(1).unwrap();
        child.claim(&Claim { kind: Kind::Worker, slot: 0, epoch: 1, generation: 1, spawned_ns: 1 });
        child.set_phase(Phase::Ready);
        child.set_connections(5);
        child.set_load(3);
        child.set_waiting(2);
        child.set_waiting_since_ns(monotonic_ns() - 1_500_000_000);
        let rows = board.inflight_rows(1);
        let start = InflightStart { seq: 1, epoch: 1, client_id: "", route: 0, key: 0, method: 0, started_ns: 1 };
        let ticket = rows.admit(start).unwrap();
        ticket.set_stream(true);
        let text = prometheus(&board);
        has(&text, r#"evergate_inflight_requests{kind="stream"} 1"#);
        has(&text, r#"evergate_inflight_requests{kind="unary"} 0"#);
        has(&text, r#"evergate_workers{phase="ready"} 1"#);
        has(&text, r#"evergate_workers{phase="booting"} 0"#);
        has(&text, "evergate_client_connections 5");
        has(&text, r#"evergate_worker_load{worker="0"} 3"#);
        has(&text, r#"evergate_worker_inflight_requests{worker="0",kind="unary"} 0"#);
        has(&text, r#"evergate_worker_inflight_requests{worker="0",kind="stream"} 1"#);
        has(&text, "evergate_waiting_requests 2");
        let oldest = text.lines().find_map(|line| line.strip_prefix("evergate_waiting_oldest_seconds ")).unwrap();
        assert!((1.5..60.0).contains(&oldest.parse::<f64>().unwrap()), "{oldest}");
    }

    #[test]
    fn lateness_is_a_histogram_over_all_workers() {
        let board = board();
        for (row, ms) in [(1, 0), (1, 2), (2, 3), (2, 60_000)] {
            names::count_loop_lag(&board.series(row).unwrap(), std::time::Duration::from_millis(ms));
        }
        let text = prometheus(&board);
        for (le, count) in [("0.002", 2), ("0.005", 3), ("5", 3), ("+Inf", 4)] {
            has(&text, &format!(r#"evergate_loop_lag_seconds_bucket{{le="{le}"}} {count}"#));
        }
        has(&text, "evergate_loop_lag_seconds_sum 60.005");
        has(&text, "evergate_loop_lag_seconds_count 4");
    }

    #[test]
    fn the_masters_counters_are_in() {
        let board = board();
        names::count_exit(&board, Kind::Worker, Initiator::Crash);
        board.master().set_access_dropped(2);
        board.master().set_queue_overflows(9);
        board.series(3).unwrap().add(names::key(names::ACCESS_DROPPED, 0, 0, 0), 3);
        let text = prometheus(&board);
        has(&text, r#"evergate_exits_total{kind="worker",initiator="crash"} 1"#);
        has(&text, "evergate_access_records_dropped_total 5");
        has(&text, "evergate_listen_overflows_total 9");
    }

    #[test]
    fn every_sample_belongs_to_a_described_metric_and_nonsense_is_left_out() {
        let board = board();
        let series = board.series(0).unwrap();
        series.add(names::key(names::REQUESTS, 9, 9, u16::MAX), 1);
        series.add(names::key(names::EXITS, 999, 999, 0), 1);
        series.add(names::key(200, 1, 1, 1), 1);
        let text = prometheus(&board);
        let mut described = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let name = rest.split(' ').next().unwrap().to_owned();
                assert!(!described.contains(&name), "{name} is described twice");
                described.push(name);
            } else if !line.starts_with('#') {
                let name = line.split(['{', ' ']).next().unwrap();
                assert!(described.last().is_some_and(|last| name.starts_with(last.as_str())), "{line}");
                assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
            }
        }
        has(&text, r#"evergate_exits_total{kind="unknown",initiator="unknown"} 1"#);
    }

    #[test]
    fn decimals_are_exact() {
        let texts = [(5, 3), (2_500, 3), (120_000, 3), (0, 6), (1_000_001, 6)].map(|(value, at)| decimal(value, at));
        assert_eq!(texts, ["0.005", "2.5", "120", "0", "1.000001"]);
    }
}
