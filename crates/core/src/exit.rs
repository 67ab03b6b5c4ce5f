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

    const ALL: [Self; 5] = [Self::Master, Self::Clerk, Self::Worker, Self::Runner, Self::Host];

    /// From the number on the board.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// From its word.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
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
    /// Recycled because it lost descriptors.
    Descriptors,
    /// A host that nobody has asked anything for long enough.
    Idle,
    /// A host that had to go for another one of its group.
    Group,
    /// Killed because its beat had stopped.
    Hang,
    /// Killed because it was not ready in time, or ended before it was ready.
    Boot,
    /// It ended by itself and should not have.
    Crash,
    /// The kernel's out-of-memory killer: its counter rose, and no other process can have been meant.
    OutOfMemory,
    /// Perhaps the out-of-memory killer: its counter rose, but another process can have been meant as well.
    OutOfMemorySuspected,
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
            Self::Descriptors => "descriptors",
            Self::Idle => "idle",
            Self::Group => "group",
            Self::Hang => "hang",
            Self::Boot => "boot",
            Self::Crash => "crash",
            Self::OutOfMemory => "out_of_memory",
            Self::OutOfMemorySuspected => "oom_suspected",
            Self::Orphan => "orphan",
            Self::Unknown => "unknown",
        }
    }
}

/// A request that was in flight when its process died.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Our id.
    pub request_id: String,
    /// The client's id, empty if it gave none.
    pub client_id: String,
    /// Method, such as `POST`.
    pub method: String,
    /// Path, such as `/v1/chat/completions`.
    pub route: String,
    /// Model as the client named it, cut to 64 bytes; empty before it was read.
    pub model: String,
    /// Upstream that was called last; empty before that.
    pub backend: String,
    /// Phase name, such as `stream`.
    pub phase: String,
    /// Milliseconds since admission.
    pub age_ms: u64,
}

/// The last panic of a process, caught or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panicked {
    /// `FILE:LINE:COLUMN`.
    pub place: String,
    /// The calls that led there, innermost first, as hexadecimal offsets into the program.
    pub offsets: String,
    /// Milliseconds from it to the end: a caught one of long ago is not the cause of an end.
    pub age_ms: u64,
}

/// One line of `exits.jsonl`. All of it is fact but `initiator`, which is the conclusion from the rest.
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
    /// Of a host, the upstream whose program it runs; else empty.
    pub upstream: String,
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
    /// Signals that the master had sent it, in order, such as `TERM`.
    pub sent: Vec<&'static str>,
    /// Our id of the request that its event loop was working on at that instant; none when it was between two.
    pub running: Option<String>,
    /// Its last panic.
    pub panic: Option<Panicked>,
    /// For an end by a KILL that is not ours: out-of-memory kills in the cgroup that no earlier end accounts for; none
    /// where nothing counts them.
    pub oom_kills: Option<u64>,
    /// In words, what tells such a KILL's sender, or why nothing does; else empty.
    pub evidence: String,
    /// Client connections that it held beyond those of `lost`: between two requests, or with one that lay unread in its
    /// socket and that nobody can name.
    pub connections_idle: u32,
    /// Requests that died with it.
    pub lost: Vec<Lost>,
    /// Requests whose last bytes were the kernel's, or on their way there at that instant: their clients have the answer, or
    /// not all of it.
    pub ending: Vec<Lost>,
}

impl ExitRecord {
    /// A record that knows no more than this; the rest is to be filled in.
    #[must_use]
    pub const fn new(kind: Kind, pid: i32, status: Status, initiator: Initiator) -> Self {
        Self {
            at_ms: 0,
            kind,
            pid,
            slot: 0,
            upstream: String::new(),
            epoch: 0,
            generation: 0,
            status,
            initiator,
            age_ms: 0,
            last_beat_ms: None,
            phase: String::new(),
            rss_max_kib: 0,
            cpu_ms: 0,
            note: String::new(),
            sent: Vec::new(),
            running: None,
            panic: None,
            oom_kills: None,
            evidence: String::new(),
            connections_idle: 0,
            lost: Vec::new(),
            ending: Vec::new(),
        }
    }

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
        if !self.upstream.is_empty() {
            out.push_str(",\"upstream\":");
            write_string(&mut out, &self.upstream);
        }
        self.write_circumstances(&mut out);
        write_requests(&mut out, ",\"lost\":[", &self.lost);
        write_requests(&mut out, ",\"ending\":[", &self.ending);
        out.push('}');
        out
    }

    /// What is said of it in a line: one JSON object of at most 250 bytes. The name of a host's upstream is left out where it is
    /// too long.
    #[must_use]
    pub fn to_brief_json(&self) -> String {
        const BYTES_MAX: usize = 250;
        let (code, signal, core) = match self.status {
            Status::Code(code) => (Some(code), None, false),
            Status::Signal { number, core } => (None, Some(number), core),
            Status::Unknown => (None, None, false),
        };
        let number = |value: Option<u8>| value.map_or_else(|| "null".to_owned(), |value| value.to_string());
        let mut out = format!(
            "{{\"at_ms\":{},\"kind\":\"{}\",\"slot\":{},\"pid\":{},\"code\":{},\"signal\":{},\"core\":{core},\"initiator\":\"{}\"",
            self.at_ms,
            self.kind.name(),
            self.slot,
            self.pid,
            number(code),
            number(signal),
            self.initiator.name(),
        );
        let mut upstream = String::from(",\"upstream\":");
        write_string(&mut upstream, &self.upstream);
        if !self.upstream.is_empty() && out.len() + upstream.len() < BYTES_MAX {
            out.push_str(&upstream);
        }
        out.push('}');
        out
    }

    fn write_circumstances(&self, out: &mut String) {
        out.push_str(",\"sent\":[");
        for (index, signal) in self.sent.iter().enumerate() {
            out.push_str(if index > 0 { "," } else { "" });
            write_string(out, signal);
        }
        out.push_str("],\"running\":");
        match &self.running {
            Some(request_id) => write_string(out, request_id),
            None => out.push_str("null"),
        }
        match &self.panic {
            Some(panic) => {
                out.push_str(",\"panic\":{\"place\":");
                write_string(out, &panic.place);
                out.push_str(",\"offsets\":");
                write_string(out, &panic.offsets);
                let _ = write!(out, ",\"age_ms\":{}}}", panic.age_ms);
            }
            None => out.push_str(",\"panic\":null"),
        }
        let kills = self.oom_kills.map_or_else(|| "null".to_owned(), |kills| kills.to_string());
        let _ = write!(out, ",\"oom_kills\":{kills},\"evidence\":");
        write_string(out, &self.evidence);
    }
}

fn write_requests(out: &mut String, key: &str, requests: &[Lost]) {
    out.push_str(key);
    for (index, lost) in requests.iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        for (key, value) in [
            ("{\"request_id\":", &lost.request_id),
            (",\"client_id\":", &lost.client_id),
            (",\"method\":", &lost.method),
            (",\"route\":", &lost.route),
            (",\"model\":", &lost.model),
            (",\"backend\":", &lost.backend),
            (",\"phase\":", &lost.phase),
        ] {
            out.push_str(key);
            write_string(out, value);
        }
        let _ = write!(out, ",\"age_ms\":{}}}", lost.age_ms);
    }
    out.push(']');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_is_one_json_object() {
        let status = Status::Signal { number: 9, core: false };
        let record = ExitRecord {
            last_beat_ms: Some(4),
            note: "a \"note\"\n".into(),
            connections_idle: 2,
            sent: vec!["TERM", "KILL"],
            running: Some("req_1".into()),
            panic: Some(Panicked { place: "src/a.rs:1:2".into(), offsets: "1f 2e".into(), age_ms: 3 }),
            oom_kills: Some(1),
            evidence: "its \"cgroup\"".into(),
            lost: vec![Lost { request_id: "req_1".into(), method: "POST".into(), ..Lost::default() }],
            ending: vec![Lost { request_id: "req_2".into(), ..Lost::default() }],
            ..ExitRecord::new(Kind::Worker, 42, status, Initiator::Unknown)
        };
        let value: serde_json::Value = serde_json::from_str(&record.to_json()).unwrap();
        assert_eq!(value["signal"], 9);
        assert!(value["code"].is_null());
        assert_eq!(value["note"], "a \"note\"\n");
        assert_eq!(value["connections_idle"], 2);
        assert_eq!((&value["sent"][1], &value["running"]), (&"KILL".into(), &"req_1".into()));
        assert_eq!((&value["panic"]["place"], &value["panic"]["age_ms"]), (&"src/a.rs:1:2".into(), &3.into()));
        assert_eq!((&value["oom_kills"], &value["evidence"]), (&1.into(), &"its \"cgroup\"".into()));
        assert_eq!((&value["lost"][0]["request_id"], &value["lost"][0]["method"]), (&"req_1".into(), &"POST".into()));
        assert_eq!(
            (value["ending"].as_array().unwrap().len(), &value["ending"][0]["request_id"]),
            (1, &"req_2".into())
        );
        assert!(!record.to_json().contains('\n'));
        let bare = ExitRecord::new(Kind::Clerk, 1, Status::Code(0), Initiator::Operator);
        let value: serde_json::Value = serde_json::from_str(&bare.to_json()).unwrap();
        assert!(value["upstream"].is_null());
        let host = ExitRecord { upstream: "tiny".into(), ..ExitRecord::new(Kind::Host, 1, status, Initiator::Idle) };
        let host: serde_json::Value = serde_json::from_str(&host.to_json()).unwrap();
        assert_eq!((&host["upstream"], &host["initiator"]), (&"tiny".into(), &"idle".into()));
        assert!(value["panic"].is_null() && value["running"].is_null() && value["oom_kills"].is_null());
    }

    #[test]
    fn a_brief_record_fits_whatever_the_names() {
        let status = Status::Signal { number: 64, core: true };
        let longest = ExitRecord {
            at_ms: u64::MAX,
            slot: u32::MAX,
            upstream: "\"".repeat(30),
            ..ExitRecord::new(Kind::Worker, i32::MIN, status, Initiator::OutOfMemorySuspected)
        };
        let value: serde_json::Value = serde_json::from_str(&longest.to_brief_json()).unwrap();
        assert!(longest.to_brief_json().len() <= 250);
        assert_eq!(
            (&value["signal"], &value["code"], &value["core"]),
            (&64.into(), &serde_json::Value::Null, &true.into())
        );
        assert_eq!((&value["kind"], &value["initiator"]), (&"worker".into(), &"oom_suspected".into()));
        assert_eq!(value["upstream"], longest.upstream);
        let longer = ExitRecord { upstream: "x".repeat(200), ..longest };
        let value: serde_json::Value = serde_json::from_str(&longer.to_brief_json()).unwrap();
        assert!(longer.to_brief_json().len() <= 250 && value["upstream"].is_null());
    }

    #[test]
    fn kinds_are_found_by_name_and_number() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_name(kind.name()), Some(kind));
            assert_eq!(Kind::from_byte(kind as u8), Some(kind));
        }
        assert_eq!(Kind::from_name("nobody"), None);
    }
}
