//! The few system calls that no safe crate wraps, each small and with its safety reason.
//!
//! What `rustix` has is used from there by the callers; here is only what it lacks, and the pieces of procfs that go
//! with it. Nothing here holds a rule.

// The room for it: see the workspace's lints.
#![allow(unsafe_code)]

mod fd;
mod frames;
mod landlock;
mod malloc;
mod overflow;
mod reap;
mod signal;
mod spawn;
mod tcp;
mod time;

pub use fd::{adopt, memfd, reopen_read_only, seal, seal_size};
pub use frames::call_offsets;
pub use landlock::Landlock;
pub use malloc::MALLOC_CONF;
pub use overflow::tcp_overflows;
pub use reap::{Exit, Status, exit_of, peek_exit, peek_status, reap};
pub use signal::{Signals, Taken, is_alive, is_being_killed, kill_if_same, start_ticks};
pub use spawn::{
    Confine, Exe, ExecReport, Failed, Limit, Spawn, Starting, Step, become_subreaper, own_executable, spawn, start,
};
pub use tcp::{tcp_queue, unsent_bytes};
pub use time::{age_ms, monotonic_ns, unix_ms};

pub use rustix::process::{Pid, Signal};
