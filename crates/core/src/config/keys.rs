//! Every section and key of the file, in one place: the reader refuses what is not here, and the reference in
//! `docs/configuration.md` is checked against it.

/// The keys of one kind of section.
#[derive(Debug)]
pub struct Shape {
    /// The section's name as written in the file, `NAME` standing for a chosen one; empty for the file itself.
    pub section: &'static str,
    /// Keys and subsections that this version reads.
    pub keys: &'static [&'static str],
    /// Keys and subsections that the design has and this version does not: refused, never ignored.
    pub later: &'static [&'static str],
}

pub(super) static ROOT: Shape = Shape {
    section: "",
    keys: &["server", "admin", "keys", "workers", "limits", "timeouts", "shutdown", "presets", "upstreams", "models"],
    later: &["cache", "budgets", "batch", "store", "mcp", "dashboard", "hosts", "guardrails", "runners"],
};
pub(super) static SERVER: Shape =
    Shape { section: "server", keys: &["listen", "auth", "hosts", "cors", "tls"], later: &[] };
pub(super) static TLS: Shape = Shape { section: "server.tls", keys: &["cert", "key"], later: &["client_ca"] };
pub(super) static ADMIN: Shape = Shape { section: "admin", keys: &["listen"], later: &["auth", "tls"] };
pub(super) static KEY: Shape = Shape {
    section: "keys.NAME",
    keys: &["secret"],
    later: &["budget", "budgets", "models", "limits", "rpm", "tpm", "expires", "tenant"],
};
pub(super) static WORKERS: Shape = Shape {
    section: "workers",
    keys: &[
        "min",
        "max",
        "slots",
        "backlog_high",
        "idle_after",
        "boot_timeout",
        "hang_timeout",
        "requests_max",
        "lifetime_max",
        "rss_max",
        "rss_total_max",
    ],
    later: &[],
};
pub(super) static LIMITS: Shape = Shape {
    section: "limits",
    keys: &[
        "body",
        "header",
        "headers",
        "uri",
        "json_depth",
        "choices",
        "connections",
        "h2_streams",
        "answer",
        "event",
        "upstream_idle",
        "queue",
        "memory_guard",
    ],
    later: &[],
};
pub(super) static TIMEOUTS: Shape = Shape {
    section: "timeouts",
    keys: &[
        "total",
        "stream_total",
        "connect",
        "dns",
        "write",
        "first_token",
        "idle",
        "head_hold",
        "keepalive",
        "header",
        "client_idle",
        "client_stall",
        "body_idle",
        "body",
        "upstream_idle",
    ],
    later: &[],
};
pub(super) static SHUTDOWN: Shape =
    Shape { section: "shutdown", keys: &["settle", "drain", "cancel", "cleanup"], later: &[] };
pub(super) static PRESETS: Shape = Shape { section: "presets", keys: &["enabled"], later: &[] };
pub(super) static UPSTREAM: Shape = Shape {
    section: "upstreams.NAME",
    keys: &["dialect", "base_url", "api_key", "roots", "any_model", "in_flight_max", "queue", "process"],
    later: &["replace", "headers", "health", "timeouts", "limits"],
};
/// `{ mode = ..., argv = [...] }`.
pub(super) static PROCESS: Shape = Shape {
    section: "upstreams.NAME.process",
    keys: &[
        "mode",
        "argv",
        "dir",
        "env",
        "pass_env",
        "grace",
        "start_timeout",
        "in_flight_max",
        "queue",
        "output_max",
        "limits",
        "sandbox",
        "cgroup",
        "user",
        "input",
        "output",
        "template",
        "prompt_arg",
        "timeout",
        "first_output",
        "idle",
        "min",
        "max",
        "frames",
        "requests_max",
        "lifetime_max",
        "rss_max",
        "preload",
        "idle_stop",
        "group",
        "replace",
        "health",
        "health_interval",
        "health_timeout",
        "base_path",
        "stop",
        "strip",
        "set",
    ],
    later: &["seccomp"],
};
pub(super) static PROCESS_LIMITS: Shape = Shape {
    section: "upstreams.NAME.process.limits",
    keys: &["memory", "open_files", "processes", "cpu", "file_size"],
    later: &[],
};
pub(super) static SANDBOX: Shape =
    Shape { section: "upstreams.NAME.process.sandbox", keys: &["read", "write"], later: &[] };
pub(super) static USER: Shape = Shape { section: "upstreams.NAME.process.user", keys: &["uid", "gid"], later: &[] };
pub(super) static MODEL: Shape = Shape {
    section: "models.NAME",
    keys: &["targets", "retry_unknown", "attempt", "on_disconnect"],
    later: &["fallbacks", "aliases", "cache", "guardrails", "timeouts", "limits"],
};
pub(super) static TARGET: Shape =
    Shape { section: "models.NAME.targets", keys: &["upstream", "model"], later: &["weight", "timeouts"] };
/// `{ drain = "10s" }`.
pub(super) static ON_DISCONNECT: Shape = Shape { section: "models.NAME.on_disconnect", keys: &["drain"], later: &[] };
/// `{ env = "NAME" }` or `{ file = "PATH" }`.
pub(super) static SECRET: Shape = Shape { section: "keys.NAME.secret", keys: &["env", "file"], later: &["exec"] };
/// `{ file = "PATH" }`.
pub(super) static ROOTS: Shape = Shape { section: "upstreams.NAME.roots", keys: &["file"], later: &[] };

/// Every kind of section, in the order of the reference.
pub static SHAPES: [&Shape; 20] = [
    &ROOT,
    &SERVER,
    &TLS,
    &ADMIN,
    &KEY,
    &SECRET,
    &WORKERS,
    &LIMITS,
    &TIMEOUTS,
    &SHUTDOWN,
    &PRESETS,
    &UPSTREAM,
    &ROOTS,
    &PROCESS,
    &PROCESS_LIMITS,
    &SANDBOX,
    &USER,
    &MODEL,
    &TARGET,
    &ON_DISCONNECT,
];
