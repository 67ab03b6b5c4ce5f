//! The client's side of the wire: listeners, connections, the I/O type under them, TLS.

pub mod accept;
pub mod client_io;
pub mod connection;
mod frames;
mod frames_io;
pub mod h1;
pub mod shared;
pub mod stream;
pub mod streams;
pub mod tls;
