//! What can be seen from outside: counters on the board, access records, metrics and status.

pub mod access;
pub(crate) mod ended;
pub mod names;
pub mod programs;
pub mod render;
pub mod status;
pub mod talk;
