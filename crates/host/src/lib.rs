//! Programs of this machine as models: starts them, feeds them, reads them, and buries them with everything they left.
//!
//! `prepare` makes of a section how a program is started; `program` is one program's life, the same for every mode;
//! `cgroup` the group that it has where the machine allows one; `command` is the mode of one process per request, and `gate` lets requests in there; `stdio` the mode of a pool of
//! processes that are kept; `server` the mode of a program with an HTTP server of its own; `service` is the HTTP/1.1 that
//! workers see, `ask` the border between it and the modes; `report` is what a host tells of itself.
#![forbid(unsafe_code)]

pub mod ask;
mod cause;
pub mod cgroup;
pub mod command;
pub mod gate;
mod mark;
pub mod prepare;
pub mod program;
pub mod report;
pub mod server;
pub mod service;
pub mod stdio;
mod tasks;
mod tell;

pub use cause::Cause;
pub use mark::Mark;
pub use program::{Plan, Program, Programs, StartError, Wiring};
pub use report::Report;
