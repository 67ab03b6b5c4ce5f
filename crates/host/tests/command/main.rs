//! The command mode over its socket, with real processes: names that begin with g1 to g26 are rows of the failure
//! catalogue.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
// The same house serves two test programs, each with a part of it.
#![allow(dead_code)]

mod answers;
mod faults;
mod limits;
mod service;
#[path = "../life/support.rs"]
mod support;
mod wire;
