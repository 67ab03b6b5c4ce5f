//! What Evergate knows without touching the world: errors and their one table, deadlines, causes of an end, the SSE
//! codec, the judge of HTTP/1 heads, the JSON scanner, configuration, the router and the text of records.
//!
//! Nothing here opens a socket or a file, starts a thread or reads the machine's clock; time is always passed in.
#![forbid(unsafe_code)]

pub mod attempts;
pub mod cancel;
pub mod cgroup;
pub mod chat;
pub mod chunked;
pub mod config;
mod count;
pub mod deadline;
pub mod digits;
pub mod error;
pub mod exit;
pub mod head;
pub mod ids;
pub mod inherit;
pub mod json;
pub mod memory;
pub mod plan;
pub mod record;
pub mod redact;
pub mod request_timeout;
pub mod router;
pub mod sse;
pub mod traceparent;

pub use cancel::Cause;
pub use count::count;
pub use deadline::Deadline;
pub use error::{Error, Fault};
