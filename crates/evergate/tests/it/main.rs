//! Evergate from the outside: the real binary, driven over the wire and by signals, with scripted upstreams behind it.
//!
//! Nothing here looks into the binary. Ids in comments such as F2 are rows of the failure catalogue.
// A test that meets something unexpected should stop there and say so; that is what a panic does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod admission;
mod auth;
mod balance;
mod canary;
mod cli;
mod client_deadline;
mod connecting;
mod connections;
mod control;
mod descriptors;
mod disconnects;
mod drain;
mod drain_http2;
mod drain_load;
mod drill;
mod echo;
mod exits;
mod floods;
mod framing;
mod fuzz_corpus;
mod h2_abuse;
mod h2_wire;
mod headers;
mod healing;
mod hostile;
mod hosts;
mod hosts_kept;
mod http2;
mod limits;
mod limits_named;
mod memory;
mod metrics;
mod models;
mod overload;
mod panics;
mod panics_many;
mod processes;
mod records;
mod recycling;
mod reload;
mod reload_master;
mod requests;
mod respawn;
mod scaling;
mod shutdown;
mod slow_clients;
mod soak;
mod stages;
mod streams;
mod streams_broken;
mod streams_odd;
mod streams_split;
mod support;
mod systemd;
mod targets;
mod targets_load;
mod targets_stops;
mod until;
mod upstream;
mod upstream_faults;
mod upstream_limit;
mod upstream_limit_load;
