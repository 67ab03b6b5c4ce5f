//! `[upstreams.NAME] process = { ... }`, as checked: a program on this machine that serves a model.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::SecretRef;

/// A program that serves a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// How requests get to it and answers come back.
    pub mode: Mode,
    /// Program and arguments, 1 to 256, without NUL; never a shell's line. A program without a slash is looked up in the
    /// gateway's `PATH` at each start, one with a slash is resolved against `dir`.
    pub argv: Vec<String>,
    /// Its working folder, absolute; none for one of its own in the state folder.
    pub dir: Option<String>,
    /// Variables it gets. Nothing else of the gateway's environment but [`Self::pass_env`].
    pub env: BTreeMap<String, EnvValue>,
    /// Names of the gateway's variables that it gets, where they are set.
    pub pass_env: Vec<String>,
    /// From TERM to KILL; default 5 s.
    pub grace: Duration,
    /// From its start until it can take a request; default 10 s for `command`'s exec, 60 s for the others.
    pub start_timeout: Duration,
    /// Requests it works on at once; default 4 for `command`, 8 for `server`, for `stdio` what its processes take; at most
    /// 1,024.
    pub in_flight_max: u32,
    /// Requests that wait for a place, at most as long as each one's own deadline; default 64.
    pub queue: u32,
    /// Bytes of one answer; default 32 MiB.
    pub output_bytes_max: u64,
    /// Started with the gateway and never stopped for being idle.
    pub preload: bool,
    /// Without a request for this long it is stopped; zero is never. Default 10 min for `server`, never for `stdio`.
    pub idle_stop: Duration,
    /// Programs of one group exclude each other: one is started when the others are gone.
    pub group: Option<String>,
    /// What happens to it when a reload has changed its section.
    pub replace: Replace,
    /// What the kernel lets it use.
    pub limits: ProcessLimits,
    /// Where it may read and write; none leaves the file system as its user finds it.
    pub sandbox: Option<Sandbox>,
    /// Whether it has a cgroup of its own.
    pub cgroup: Cgroup,
    /// User and group it runs as; only for a gateway that runs as root.
    pub user: Option<Ids>,
}

/// How requests get to a program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// One process per request.
    Command(Command),
    /// A pool of processes that speak frames on their standard input and output.
    Stdio(Stdio),
    /// A program with an OpenAI-compatible HTTP server of its own.
    Server(Server),
}

/// `mode = "command"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// What it finds on its standard input.
    pub input: Input,
    /// What its standard output is.
    pub output: Output,
    /// Whether the text is its last argument instead, after `--`: at most 128 KiB, refused with a NUL in it.
    pub prompt_arg: bool,
    /// A whole run; default 60 s.
    pub timeout: Duration,
    /// Until its first byte of output; default: `timeout`.
    pub first_output: Duration,
    /// Between two pieces of output; default: `timeout`.
    pub idle: Duration,
}

/// A command's standard input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// Text: the last user message, or this template with `{last}`, `{system}` and `{messages}` filled in (once; what is
    /// filled in is not looked through again). `{{` and `}}` stand for brackets.
    Text(Option<String>),
    /// The request's JSON, as the client sent it but for the model's name, and a line end.
    Json,
}

/// A command's standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    /// The answer's text; one last line end is cut off.
    Text,
    /// A chat completion, which is passed on; or its content: a string, or an object with `content`.
    Json,
    /// Each line is a piece of the answer's text, line ends included, sent on as it comes.
    Lines,
}

/// `mode = "stdio"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stdio {
    /// Fewest processes while the model is loaded; default 1.
    pub min: u32,
    /// Most processes; default `min`, at most 64.
    pub max: u32,
    /// How frames are told apart.
    pub frames: Frames,
    /// Until a request's first frame; default 60 s.
    pub first_output: Duration,
    /// Between two frames; default 60 s.
    pub idle: Duration,
    /// Requests after which a process is replaced, jittered by 10 %; 0 is never.
    pub requests_max: u32,
    /// Age at which it is replaced; zero is never.
    pub lifetime_max: Duration,
    /// Resident set at which it is replaced, bytes; 0 is never.
    pub rss_max: u64,
}

/// How frames on a pipe are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Frames {
    /// One JSON object per line.
    Lines,
    /// A length of four bytes, the highest first, then that many bytes of JSON.
    Length,
}

/// `mode = "server"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Server {
    /// Path that answers 200 once it can serve, and while it does; default `/health`.
    pub health: String,
    /// Between two looks at `health` while it serves; zero is never. Default 10 s.
    pub health_interval: Duration,
    /// How long one look may take, and two in a row that fail end it (G23); default 5 s.
    pub health_timeout: Duration,
    /// In front of the endpoints at the program's own address; default `/v1`.
    pub base_path: String,
    /// A command that ends it, with `{pid}` filled in, run before TERM; empty for none.
    pub stop: Vec<String>,
    /// Top-level fields that are taken out of requests.
    pub strip: Vec<String>,
    /// Top-level fields that are set in requests, as JSON, over what the client sent.
    pub set: BTreeMap<String, String>,
}

/// A variable's value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EnvValue {
    /// As written.
    Text(String),
    /// A secret's.
    Secret(SecretRef),
}

/// What happens to a running program when a reload has changed its section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Replace {
    /// The old one ends before the new one starts: there may be memory for one only. The default.
    Drain,
    /// The new one starts beside it.
    Overlap,
}

/// Whether a program has a cgroup of its own (cgroups(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cgroup {
    /// One that is kept does where the machine allows it. The default.
    Auto,
    /// None does.
    Off,
    /// It does, in every mode, or is not started.
    Required,
}

/// Limits of setrlimit(2); none leaves the gateway's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLimits {
    /// Memory of its cgroup, bytes, where that bounds it; otherwise address space (`RLIMIT_AS`).
    pub memory: Option<u64>,
    /// Open files (`RLIMIT_NOFILE`).
    pub open_files: Option<u32>,
    /// Processes of its user (`RLIMIT_NPROC`).
    pub processes: Option<u32>,
    /// CPU time, seconds (`RLIMIT_CPU`).
    pub cpu_s: Option<u32>,
    /// Largest file it may write, bytes (`RLIMIT_FSIZE`).
    pub file_size: Option<u64>,
}

/// What a program may reach in the file system, by Landlock (Linux 5.13), as far as the kernel knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Folders and files to read and execute, besides the system's own (`/usr`, `/lib`, `/etc`, `/dev/null` and the like).
    pub read: Vec<String>,
    /// Folders and files to read and write, besides its own working folder.
    pub write: Vec<String>,
}

/// A user and a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ids {
    /// User id, not 0.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Variables of the gateway's that a program gets unless `pass_env` says otherwise.
pub const PASSED: [&str; 8] = ["PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH"];

impl Process {
    /// The longest it may take to end: from the first word of it to the KILL.
    #[must_use]
    pub fn end_time(&self) -> Duration {
        let has_word = match &self.mode {
            Mode::Command(_) => false,
            // A drain notice, or a command of its own, has as much time as TERM after it.
            Mode::Stdio(_) => true,
            Mode::Server(server) => !server.stop.is_empty(),
        };
        if has_word { self.grace.saturating_mul(2) } else { self.grace }
    }

    /// Tells one section from another of the same name: two programs are the same only if nothing of it has changed. Stable
    /// within a build, which is as long as a master lives.
    #[must_use]
    pub fn fingerprint(&self, name: &str) -> u64 {
        // FNV-1a, 64 bits, over the form for debugging, which has every field.
        format!("{name}\0{self:?}")
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
    }
}
