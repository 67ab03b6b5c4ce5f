//! The stdio mode over its socket, with real processes: names that begin with g3 to g19 are rows of the failure catalogue.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
// The same house serves three test programs, each with a part of it.
#![allow(dead_code)]

mod answers;
mod ends;
mod faults;
mod host;
mod storm;
#[path = "../life/support.rs"]
mod support;
#[path = "../command/wire.rs"]
mod wire;
