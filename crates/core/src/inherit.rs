//! What a child finds at which descriptor and in which argument: the contract between the master and its children.
//!
//! A child is started as `evergate KIND --row R --epoch E --generation G --listeners N`, with the descriptors below.
//! A host finds its socket there, and `--name UPSTREAM` in its arguments. Nothing else is inherited: every descriptor of the master is close-on-exec.

/// The board's memfd.
pub const BOARD: i32 = 3;
/// The generation's configuration: a sealed memfd with `config::Sealed` as JSON.
pub const CONFIG: i32 = 4;
/// Read end of a pipe whose only write end the master holds: end of file means that the master is gone.
pub const LIFE: i32 = 5;
/// The master's eventfd: a child adds 1 after it changed something on the board that the master waits for.
pub const KICK: i32 = 6;
/// A pipe into which nothing is written: its write end for whoever writes access records, its read end for the clerk, to which end
/// of file means that they are all gone.
pub const WRITERS: i32 = 7;
/// The first of `N` listening sockets, in the order of the configuration; the clerk gets the admin listeners.
pub const LISTENERS: i32 = 8;

/// Names the folder of the hosts' sockets to workers and hosts: `FOLDER/FINGERPRINT.sock`, the fingerprint in 16 digits.
pub const HOSTS_DIR_VARIABLE: &str = "EVERGATE_HOSTS_DIR";
/// A program's socket in its folder: of the 107 bytes that a path may have the folder needs most.
pub const PROGRAM_SOCKET: &str = "p";
/// The variable that marks a host's programs, and whatever they start, with [`host_mark`].
pub const HOST_MARK: &str = "EVERGATE_HOST";

/// By what the programs of one host are known: the master ends whoever carries it when the host is dead.
#[must_use]
pub fn host_mark(run_id: u64, epoch: u32) -> String {
    format!("{run_id:016x}.{epoch}")
}

/// The name of a host's socket in the folder.
#[must_use]
pub fn host_socket(fingerprint: u64) -> String {
    format!("{fingerprint:016x}.sock")
}

/// The name of a folder there, in which a host's program has its own socket; with that no longer than the host's.
#[must_use]
pub fn host_folder(fingerprint: u64) -> String {
    format!("{fingerprint:016x}")
}

/// For `evergate compile` (validates a configuration in a child, so that the master parses no TOML): an empty memfd
/// that receives `plan::Plan::to_text`.
pub const COMPILE_PLAN: i32 = 3;
/// For `evergate compile`: an empty memfd that receives the `config::Sealed` JSON.
pub const COMPILE_CONFIG: i32 = 4;

/// Exit codes of every life, as the command line documents them.
pub mod code {
    /// Done.
    pub const OK: u8 = 0;
    /// Failed.
    pub const FAILED: u8 = 1;
    /// The command line is wrong.
    pub const USAGE: u8 = 64;
    /// A defect of Evergate.
    pub const INTERNAL: u8 = 70;
    /// The system refused: port or lock taken.
    pub const SYSTEM: u8 = 71;
    /// Force was needed: `cancel` or `cleanup` ran out.
    pub const FORCED: u8 = 75;
    /// The configuration is wrong.
    pub const CONFIG: u8 = 78;
}
