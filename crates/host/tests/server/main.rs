//! The server mode over its socket, with real processes: names that begin with g20 to g24 are rows of the failure catalogue.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
// The same house serves several test programs, each with a part of it.
#![allow(dead_code)]

mod ends;
mod faults;
mod model;
mod passes;
mod starts;
#[path = "../life/support.rs"]
mod support;
#[path = "../command/wire.rs"]
mod wire;
