//! What is said on a client connection: dispatch, checks, the model endpoints and the bodies of answers.

pub mod app;
mod attempts;
pub mod auth;
pub mod body;
mod call;
pub mod cors;
pub mod fault;
pub mod h2;
pub mod incoming;
pub mod intake;
pub mod left;
pub mod local;
pub mod model_call;
pub mod refusal;
pub mod relay;
pub mod respond;
pub mod scan;
pub mod service;
mod streaming;
pub mod unread;
