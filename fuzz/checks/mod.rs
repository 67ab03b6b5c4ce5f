//! What must hold for any bytes, shared by the fuzz targets and by the ordinary test that feeds them their corpora.
#![allow(dead_code, reason = "each fuzz target uses one of them")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub mod config;
pub mod head;
pub mod record;
pub mod request;
pub mod sse;
