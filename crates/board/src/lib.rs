//! The board: a memfd of fixed, versioned, sealed size, mapped by every process of the tree.
//!
//! One row for the master, one per child, one per admitted request, counters, labels and records on
//! their way to the clerk. Every word is an atomic; rows
//! that must be read whole carry a word that changes with their content. Whoever reads treats every value as untrusted:
//! a child that runs wild can write nonsense here, and must not take a reader down with it. What a dead process knew, the
//! others can still read.
// The room for it: see the workspace's lints. Only `map` uses it.
#![deny(unsafe_code)]

mod atomic;
mod board;
mod hosts;
mod inflight;
mod labels;
mod layout;
mod map;
#[cfg(test)]
mod models;
mod permits;
mod records;
mod rows;
mod series;
mod text;
mod word;

pub use board::{Board, Error};
pub use evergate_sys::monotonic_ns;
pub use hosts::{HOSTS_MAX, HostRow, HostState};
pub use inflight::{Inflight, InflightPhase, InflightPlace, InflightRows, InflightStart, MODEL_BYTES_MAX, Ticket};
pub use labels::{LABEL_BYTES_MAX, OTHER};
pub use layout::Shape;
pub use permits::{PERMITS_MAX, Permits, PermitsSeen, Slot};
pub use records::{RING_BYTES, RecordWriter, Records};
pub use rows::{ChildRow, Claim, MasterPhase, MasterRow, Phase};
pub use series::{Series, SeriesKey};
pub use text::TEXT_BYTES_MAX;
