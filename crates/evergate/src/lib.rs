//! Evergate: the command line and the lives of its processes.
//!
//! `cli` reads the command line; `commands` are what an operator calls; `lives` are what the processes of a running
//! gateway do; `server` is the client's side of the wire, `http` what is said on it; `gate` and `context` hold a
//! request together from admission to its last byte; `telemetry` is what can be seen from outside.
#![forbid(unsafe_code)]

pub mod cli;
pub mod commands;
pub mod context;
pub mod gate;
pub mod http;
pub mod lifespan;
pub mod lives;
pub mod panics;
pub mod server;
pub mod tasks;
pub mod telemetry;
