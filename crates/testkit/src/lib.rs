//! What tests use to drive Evergate from the outside: the real binary, a byte-exact client and upstreams that play
//! faults.
//!
//! Developer-only. Nothing here shares code with what it tests: the HTTP client and server are written by hand over
//! plain sockets, so that a defect of the gateway's libraries cannot hide itself, and so that every byte and every
//! moment is the test's own choice.
#![forbid(unsafe_code)]
// A test that meets something unexpected should stop there and say so; that is what a panic does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub mod cases;
pub mod corpus;
pub mod driver;
pub mod fake;
pub mod link;
pub mod model;
pub mod raw;
mod sim;
pub mod sse;
pub mod tls;
pub mod traces;
pub mod wait;

pub use driver::{Child, Ended, Evergate, gateway_config};
pub use fake::{FakeUpstream, Script};
pub use raw::{Raw, Response, chat_request, get, post_chat};
pub use sim::adaptersim;
pub use tls::Identity;
pub use wait::{wait_for, wait_until};
