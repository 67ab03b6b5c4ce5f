//! Programs of this machine as models: starts them, feeds them, reads them, and buries them with everything they left.
//!
//! `program` is one program's life, the same for every mode; `report` is what a host tells of it.
#![forbid(unsafe_code)]

pub mod program;
pub mod report;
mod tasks;

pub use program::{Plan, Program, Programs, StartError, Wiring};
pub use report::Report;
