//! One program's life, with real processes: names that begin with g1 to g26 are rows of the failure catalogue.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod confined;
mod ends;
mod prepared;
mod starts;
mod streams;
mod support;
