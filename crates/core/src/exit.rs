//! The record of one process's end: facts as the kernel gave them, and conclusions in fields of their own.

use std::fmt::Write as _;

use crate::json::write_string;

/// What kind of child a process was. The numbers stand on the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// The master itself; written by its successor.
    Master = 1,
    /// The office.
    Clerk = 2,
    /// The HTTP front.
    Worker = 3,
    /// Runs durable jobs.
    Runner = 4,
    /// Runs a model's program.
    Host = 5,
}

impl Kind {
    /// The word used everywhere.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Master => "master",
            Self::Clerk => "clerk",
            Self::Worker => "worker",
            Self::Runner => "runner",
            Self::Host => "host",
        }
    }

    /// From the number on the board.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Master, Self::Clerk, Self::Worker, Self::Runner, Self::Host].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// How the kernel says a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// `exit(code)`.
    Code(u8),
    /// Ended by a signal.
    Signal {
        /// 1 to 64.
        number: u8,
        /// Whether a core was dumped.
        core: bool,
    },
    /// Nobody could reap it: a master that died, as its successor finds it.
    Unknown,
}

/// Who ended the process, as far as the master knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initiator {
    /// An operator's stop.
    Operator,
    /// A reload replaced its generation.
    Reload,
    /// One worker fewer was needed.
    ScaleDown,
    /// Recycled after its number of requests.
    Requests,
    /// Recycled after its lifetime.
    Lifetime,
    /// Recycled for its memory.
    Rss,
    /// Killed because its beat had stopped.
    Hang,
    /// Killed because it was not ready in time, or ended before it was ready.
    Boot,
    /// It ended by itself and should not have.
    Crash,
    /// The kernel's out-of-memory killer.
    OutOfMemory,
    /// Its master was gone.
    Orphan,
    /// A signal from outside, sender unknown.
    Unknown,
}

impl Initiator {
    /// The word in records and labels.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Reload => "reload",
            Self::ScaleDown => "scale_down",
            Self::Requests => "requests",
            Self::Lifetime => "lifetime",
            Self::Rss => "rss",
            Self::Hang => "hang",
            Self::Boot => "boot",
            Self::Crash => "crash",
            Self::OutOfMemory => "out_of_memory",
            Self::Orphan => "orphan",
            Self::Unknown => "unknown",
        }
    }
}

/// A request that was in flight when its process died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Our id.
    pub request_id: String,
    /// The client's id, empty if it gave none.
    pub client_id: String,
    /// Path, such as `/v1/chat/completions`.
    pub route: String,
    /// Model as labelled, empty before routing.
    pub model: String,
    /// Phase name, such as `stream`.
    pub phase: String,
    /// Milliseconds since admission.
    pub age_ms: u64,
}

/// One line of `exits.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitRecord {
    /// Wall clock, Unix milliseconds.
    pub at_ms: u64,
    /// What it was.
    pub kind: Kind,
    /// Process id.
    pub pid: i32,
    /// Its slot among its kind.
    pub slot: u32,
    /// Number of the child within the run.
    pub epoch: u32,
    /// Configuration generation.
    pub generation: u32,
    /// How it ended.
    pub status: Status,
    /// Conclusion: who ended it.
    pub initiator: Initiator,
    /// Milliseconds from spawn to death.
    pub age_ms: u64,
    /// Age of its last beat at death; none if it never beat.
    pub last_beat_ms: Option<u64>,
    /// Its phase on the board.
    pub phase: String,
    /// Largest resident set, KiB.
    pub rss_max_kib: u64,
    /// User plus system CPU, milliseconds.
    pub cpu_ms: u64,
    /// What it said about its own end, such as the reason of a failed start.
    pub note: String,
    /// Client connections that it held beyond those of `lost`: between two requests, or with one that lay unread in its
    /// socket and that nobody can name.
    pub connections_idle: u32,
    /// Requests that died with it.
    pub lost: Vec<Lost>,
}

impl ExitRecord {
    /// One JSON object without a line end.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut out = String::with_capacity(256);
        let (code, signal, core) = match self.status {
            Status::Code(code) => (Some(code), None, false),
            Status::Signal { number, core } => (None, Some(number), core),
            Status::Unknown => (None, None, false),
        };
        let number = |value: Option<u64>| value.map_or_else(|| "null".to_owned(), |value| value.to_string());
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "{{\"at_ms\":{},\"kind\":\"{}\",\"pid\":{},\"slot\":{},\"epoch\":{},\"generation\":{},\"code\":{},\"signal\":{},\"core\":{core},\"initiator\":\"{}\",\"age_ms\":{},\"last_beat_ms\":{},\"phase\":",
            self.at_ms,
            self.kind.name(),
            self.pid,
            self.slot,
            self.epoch,
            self.generation,
            number(code.map(u64::from)),
            number(signal.map(u64::from)),
            self.initiator.name(),
            self.age_ms,
            number(self.last_beat_ms),
        );
        write_string(&mut out, &self.phase);
        let _ = write!(
            out,
            ",\"rss_max_kib\":{},\"cpu_ms\":{},\"connections_idle\":{},\"note\":",
            self.rss_max_kib, self.cpu_ms, self.connections_idle
        );
        write_string(&mut out, &self.note);
        out.push_str(",\"lost\":[");
        for (index, lost) in self.lost.iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            for (key, value) in [
                ("{\"request_id\":", &lost.request_id),
                (",\"client_id\":", &lost.client_id),
                (",\"route\":", &lost.route),
                (",\"model\":", &lost.model),
                (",\"phase\":", &lost.phase),
            ] {
                out.push_str(key);
                write_string(&mut out, value);
            }
            let _ = write!(out, ",\"age_ms\":{}}}", lost.age_ms);
        }
        out.push_str("]}");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_is_one_json_object() {
        let record = ExitRecord {
            at_ms: 1,
            kind: Kind::Worker,
            pid: 42,
            slot: 1,
            epoch: 3,
            generation: 1,
            status: Status::Signal { number: 9, core: false },
            initiator: Initiator::Unknown,
            age_ms: 12,
            last_beat_ms: Some(4),
            phase: "ready".into(),
            rss_max_kib: 9000,
            cpu_ms: 7,
            note: "a \"note\"\n".into(),
            connections_idle: 2,
            lost: vec![Lost {
                request_id: "req_1".into(),
                client_id: String::new(),
                route: "/v1/chat/completions".into(),
                model: "echo".into(),
                phase: "stream".into(),
                age_ms: 5,
            }],
        };
        let value: serde_json::Value = serde_json::from_str(&record.to_json()).unwrap();
        assert_eq!(value["signal"], 9);
        assert!(value["code"].is_null());
        assert_eq!(value["note"], "a \"note\"\n");
        assert_eq!(value["connections_idle"], 2);
        assert_eq!(value["lost"][0]["request_id"], "req_1");
        assert!(!record.to_json().contains('\n'));
    }
}
