//! The checked configuration: no `Option` that has a default, no value that still has to be judged.
//!
//! Three stages: TOML's tree with spans -> `read` and the sections (every mistake at once, with its place) -> `Config`.
//! This file holds the last one; [`load`] makes it, [`effective`] writes it back.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

mod banner;
mod effective;
mod keys;
mod load;
mod mistake;
mod models;
mod nearest;
mod presets;
pub mod process;
mod programs;
mod read;
mod secrets;
mod sections;
mod units;
mod upstreams;
mod url;

pub use effective::effective;
pub use keys::{SHAPES, Shape};
pub use load::{Facts, KEY_VARIABLE, Loaded, Overrides, Source, load, parse_workers};
pub use mistake::Mistake;
pub use nearest::nearest;
pub use presets::{Preset, presets};
pub use units::{duration_text, parse_duration, parse_size, size_text};

/// Everything a child needs to serve, as checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// `[server]`.
    pub server: Server,
    /// `[admin] listen`; `None` when it is `""`.
    pub admin_listen: Option<String>,
    /// `[keys.NAME]`: clients' keys, by name. Empty unless `server.auth` is `Keys`.
    pub keys: BTreeMap<String, SecretRef>,
    /// `[workers]`.
    pub workers: Workers,
    /// `[limits]`.
    pub limits: Limits,
    /// `[timeouts]`.
    pub timeouts: Timeouts,
    /// `[shutdown]`.
    pub shutdown: Shutdown,
    /// `[upstreams.NAME]`, and the presets whose key stands in the environment.
    pub upstreams: BTreeMap<String, Upstream>,
    /// `[models."NAME"]`.
    pub models: BTreeMap<String, Model>,
    /// Whether the built-in `echo` model is served (only without a configuration file, or when a model targets `echo`).
    pub echo: bool,
}

/// `[server]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Server {
    /// Addresses as `plan::Address` text; at least one.
    pub listen: Vec<String>,
    /// Who may call.
    pub auth: Auth,
    /// Host names, besides loopback ones and the listen addresses, that a `Host` header may carry while auth is off.
    pub hosts: Vec<String>,
    /// Origins of web pages that may call from a browser, as browsers write them; `*` alone is every one.
    pub cors: Vec<String>,
    /// TLS on every TCP listener.
    pub tls: Option<Tls>,
}

/// Who may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Auth {
    /// Anybody who reaches the listener, which is loopback or a Unix socket.
    None,
    /// `Authorization: Bearer KEY` with one of `keys`.
    Keys,
}

/// Certificate files, PEM, resolved against the configuration file's folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tls {
    /// Certificate chain, leaf first.
    pub cert: String,
    /// Private key.
    pub key: String,
}

/// Where a secret comes from; never the value itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SecretRef {
    /// An environment variable's name.
    Env(String),
    /// A file's path, resolved against the configuration file's folder; one trailing line end is cut off.
    File(String),
}

impl std::fmt::Display for SecretRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Env(name) => write!(f, "env:{name}"),
            Self::File(path) => write!(f, "file:{path}"),
        }
    }
}

/// `[workers]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workers {
    /// Default 2.
    pub min: u32,
    /// Default: number of CPUs, at least `min`; at most 60.
    pub max: u32,
    /// Requests admitted at once per worker; default 256, at most 65,536.
    pub slots: u32,
    /// Requests and connections waiting, over all workers, that call one worker more at once; default 10.
    pub backlog_high: u32,
    /// How long below a quarter of capacity before one worker goes; default 30 s.
    pub idle_after: Duration,
    /// Requests after which a worker is replaced; 0, the default, is never.
    pub requests_max: u32,
    /// Age at which a worker is replaced; 0, the default, is never.
    pub lifetime_max: Duration,
    /// Resident set at which a worker is replaced, bytes; 0, the default, is never.
    pub rss_max: u64,
    /// Resident set of all workers from which on none is added, bytes; 0, the default, is none.
    pub rss_total_max: u64,
    /// Default 30 s.
    pub boot_timeout: Duration,
    /// Default 10 s.
    pub hang_timeout: Duration,
}

/// `[limits]`; defaults from SECURITY.md 4.7.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Request body, bytes; default 20 MiB.
    pub body_bytes: u64,
    /// Request head, bytes; default 32 KiB.
    pub header_bytes: u64,
    /// Header fields; default 100.
    pub headers: u32,
    /// Request target, bytes; default 8 KiB.
    pub uri_bytes: u64,
    /// JSON nesting of a request; default 128.
    pub json_depth: u32,
    /// Answers to one request (`n`, `best_of`); default 128.
    pub choices: u32,
    /// Open client connections per worker; default 4,096.
    pub connections: u32,
    /// HTTP/2 streams per connection; default 100.
    pub h2_streams: u32,
    /// Whole upstream answer, bytes; default 32 MiB.
    pub answer_bytes: u64,
    /// One event of an upstream stream, bytes; default 4 MiB.
    pub event_bytes: u64,
    /// Idle connections kept per upstream and worker; default 64.
    pub upstream_idle: u32,
    /// Requests per worker that wait for a slot; default 256, 0 for none.
    pub queue: u32,
    /// Whether things are given up when memory is short; default true.
    pub memory_guard: bool,
}

/// `[timeouts]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timeouts {
    /// A unary request, and a stream until its first token; default 300 s.
    pub total: Duration,
    /// A whole stream; default 1 h.
    pub stream_total: Duration,
    /// Name, TCP and TLS of an upstream connection; default 5 s.
    pub connect: Duration,
    /// The addresses of an upstream's name, within `connect`; default 2 s.
    pub dns: Duration,
    /// An upstream that takes no byte of a request; default 30 s.
    pub write: Duration,
    /// From the request's last byte to the answer's first token; default 60 s.
    pub first_token: Duration,
    /// Between two pieces of an answer; default 120 s.
    pub idle: Duration,
    /// How long a stream's response head may wait for the first event; default 10 s.
    pub head_hold: Duration,
    /// Between two comments while a committed stream is silent; default 15 s.
    pub keepalive: Duration,
    /// A request head from its first byte; default 10 s.
    pub header: Duration,
    /// An idle client connection; default 75 s.
    pub client_idle: Duration,
    /// A client that takes no byte of what is written to it.
    pub client_stall: Duration,
    /// Between two pieces of a request body; default 15 s.
    pub body_idle: Duration,
    /// A whole request body; default 120 s.
    pub body: Duration,
    /// How long an idle upstream connection is kept; default 60 s.
    pub upstream_idle: Duration,
}

/// `[shutdown]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shutdown {
    /// Default 0 s.
    pub settle: Duration,
    /// Default 20 s.
    pub drain: Duration,
    /// Default 1 s.
    pub cancel: Duration,
    /// Default 3 s.
    pub cleanup: Duration,
}

/// `[upstreams.NAME]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Upstream {
    /// Where it is; requests go to this with the endpoint's path appended.
    pub base_url: BaseUrl,
    /// Its credential, sent as `Authorization: Bearer`.
    pub api_key: Option<SecretRef>,
    /// Roots for https: `Bundled` or `System`.
    pub roots: Roots,
    /// Whether `NAME/<model>` reaches any model of it without a `[models]` entry.
    pub any_model: bool,
    /// Most calls under way at once, over all workers; 0 is no limit.
    pub in_flight_max: u32,
    /// Requests per worker that wait for one of them; 0 without a limit.
    pub queue: u32,
    /// Whether it comes from the presets file.
    pub is_preset: bool,
    /// The program of this machine that it is; then `base_url` is a Unix socket without a path, which is the processes' to
    /// know.
    pub process: Option<process::Process>,
}

/// Which certificate authorities an https upstream is checked against.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Roots {
    /// Mozilla's list, inside the binary. The default.
    Bundled,
    /// The system's store (`SSL_CERT_FILE` and `SSL_CERT_DIR` are honoured).
    System,
    /// One PEM file, resolved against the configuration file's folder.
    File(String),
}

/// A parsed base URL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseUrl {
    /// How to reach it.
    pub transport: Transport,
    /// Value of the `Host` header, port included when it is not the scheme's own.
    pub authority: String,
    /// Path prefix without a trailing slash, such as `/v1`.
    pub path: String,
}

/// How an upstream is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Plain HTTP/1.1.
    Http {
        /// Name or literal address, without brackets.
        host: String,
        /// TCP port.
        port: u16,
    },
    /// HTTP/1.1 over TLS.
    Https {
        /// Name or literal address, without brackets.
        host: String,
        /// TCP port.
        port: u16,
    },
    /// HTTP/1.1 over a Unix socket; written `unix:/path/to.sock` or `unix:/path/to.sock:/v1`.
    Unix {
        /// The socket's path.
        path: String,
    },
}

/// `[models."NAME"]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Tried in order; at least one, at most eight, none twice.
    pub targets: Vec<Target>,
    /// Whether the next target is tried when an upstream closed the connection after the request was written and before
    /// a byte of an answer: it may have worked, and sent its bill.
    pub retry_unknown: bool,
    /// The longest that an attempt may take until its first byte while another target is left; none leaves it to the
    /// other limits.
    pub attempt: Option<Duration>,
    /// What becomes of a call whose client leaves.
    pub on_disconnect: OnDisconnect,
}

/// What becomes of a call whose client leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnDisconnect {
    /// It is stopped.
    #[default]
    Cancel,
    /// It is read on for that long at most.
    Drain(Duration),
    /// It is read to its end, under the limits that it has anyway.
    Finish,
}

/// One place where a model is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Name of an upstream, or `echo`.
    pub upstream: String,
    /// The model's name there.
    pub model: String,
}

/// What the sealed memfd of a generation holds: the configuration and the secrets it refers to, already read, so that
/// a respawn cannot find another value. The descriptor is inherited by our own children only.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Sealed {
    /// The configuration.
    pub config: Config,
    /// Values by `SecretRef` text (`env:NAME`, `file:PATH`).
    pub secrets: BTreeMap<String, String>,
    /// Contents of the files that `Tls` and `Roots::File` name, by path.
    pub files: BTreeMap<String, String>,
    /// The gateway's variables that programs get ([`process::PASSED`] and `pass_env`), where they are set.
    pub variables: BTreeMap<String, String>,
}

impl std::fmt::Debug for Sealed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Secrets have no Debug form.
        f.debug_struct("Sealed").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Sealed {
    /// The value a reference stands for.
    #[must_use]
    pub fn secret(&self, reference: &SecretRef) -> Option<&str> {
        self.secrets.get(&reference.to_string()).map(String::as_str)
    }
}
