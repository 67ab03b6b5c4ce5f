//! One instant by which a request must have ended, and which limit put it there.

use std::time::{Duration, Instant};

use crate::{Error, Fault, request_timeout};

/// The limit that a deadline came from, named in the error when it passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `timeouts.total`.
    Total,
    /// `timeouts.stream_total`.
    StreamTotal,
    /// The client's own, by its header.
    Client,
    /// `timeouts.connect`.
    Connect,
    /// `timeouts.write`.
    Write,
    /// A model's `attempt`.
    Attempt,
    /// `timeouts.dns`.
    Dns,
    /// `timeouts.first_token`.
    FirstToken,
    /// `timeouts.idle`.
    Idle,
}

impl Limit {
    /// The configuration key.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Self::Total => "timeouts.total",
            Self::StreamTotal => "timeouts.stream_total",
            Self::Client => request_timeout::NAME,
            Self::Connect => "timeouts.connect",
            Self::Attempt => "the model's attempt",
            Self::Write => "timeouts.write",
            Self::Dns => "timeouts.dns",
            Self::FirstToken => "timeouts.first_token",
            Self::Idle => "timeouts.idle",
        }
    }

    /// What its passing is to the client.
    #[must_use]
    pub const fn fault(self) -> Fault {
        match self {
            Self::Total | Self::StreamTotal | Self::Client => Fault::DeadlineExceeded,
            Self::FirstToken => Fault::FirstTokenTimeout,
            Self::Connect | Self::Dns | Self::Write | Self::Attempt | Self::Idle => Fault::UpstreamTimeout,
        }
    }
}

impl Limit {
    /// The error of an upstream that overran it; `what` says what the upstream did not do, up to "within".
    #[must_use]
    pub fn overrun(self, upstream: &str, what: &str) -> Error {
        let message = format!("the upstream \"{upstream}\" {what} {}", self.key());
        Error::new(self.fault(), message).detail(self.key())
    }
}

/// An instant and the limit it came from; tightened, never widened.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    limit: Limit,
}

impl Deadline {
    /// The deadline `after` from `now`.
    #[must_use]
    pub fn new(now: Instant, after: Duration, limit: Limit) -> Self {
        // A configured time so long that the clock cannot hold it is as good as a century.
        let century = Duration::from_secs(100 * 365 * 86_400);
        Self { at: now + after.min(century), limit }
    }

    /// The earlier of the two.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        if other.at < self.at { other } else { self }
    }

    /// When.
    #[must_use]
    pub fn at(self) -> Instant {
        self.at
    }

    /// Which limit.
    #[must_use]
    pub fn limit(self) -> Limit {
        self.limit
    }

    /// Whether it has passed.
    #[must_use]
    pub fn is_past(self, now: Instant) -> bool {
        now >= self.at
    }

    /// What is left; zero once it has passed.
    #[must_use]
    pub fn left(self, now: Instant) -> Duration {
        self.at.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tighter_limit_wins() {
        let now = Instant::now();
        let total = Deadline::new(now, Duration::from_secs(9), Limit::Total);
        let idle = Deadline::new(now, Duration::from_secs(3), Limit::Idle);
        assert_eq!(total.min(idle).limit(), Limit::Idle);
        assert_eq!(idle.min(total).limit(), Limit::Idle);
        assert!(!idle.is_past(now + Duration::from_secs(2)));
        assert!(idle.is_past(now + Duration::from_secs(3)));
    }

    #[test]
    fn an_absurd_limit_does_not_overflow() {
        let deadline = Deadline::new(Instant::now(), Duration::MAX, Limit::Total);
        assert!(!deadline.is_past(Instant::now()));
    }
}
