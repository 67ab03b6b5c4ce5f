//! One HTTP backend for every dialect: a bounded pool of HTTP/1.1 connections per upstream, a limit on each phase of a
//! call, and cancellation by dropping.
//!
//! A call owns its connection and drives it itself; no task stands behind it. So dropping the call, or the answer's
//! body, closes the socket at once and leaves nothing behind, which is what tells a model's server to stop working.
#![forbid(unsafe_code)]

mod answer;
mod certificate;
mod client;
pub mod clock;
mod connect;
mod dial;
mod h1;
mod io;
mod resolve;
mod stall;
pub mod standstill;
mod tls;

pub use answer::AnswerBody;
pub use client::{Answer, Call, Client, Failure, Phase, Settings};
pub use h1::{Fields, Kind};
pub use resolve::{LookUp, LookUps, Resolver, look_up};
pub use stall::Unsent;
pub use tls::Trust;
