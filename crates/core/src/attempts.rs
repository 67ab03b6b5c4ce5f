//! What follows when an attempt has failed: the next target, or an answer, and which of several failures the client
//! hears of. Pure.
//!
//! The catalogue's classes of retry: R1, nothing reached the upstream; R2, it failed before a byte went to the client; R0,
//! another target would say the same, or the work may have been paid for; R3, the client has something already. There is
//! at most one attempt per target and request, and no pause between two targets: the second has done nothing to be spared.

use std::fmt::Write as _;

use crate::cancel::Cause;
use crate::error::{Error, Fault};

/// How far an attempt came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// Nothing reached the upstream.
    Nothing,
    /// The request was written, or may have been; no byte came back.
    Request,
    /// An answer had begun.
    Answer,
}

/// How an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The upstream has as many calls under way as it may: it was not called (L1).
    Full,
    /// No connection came about (D1 to D9).
    NotReached,
    /// Its program was not ready for the call, or had no place for it (G20).
    NotReady,
    /// The connection ended after the request was written, without a byte of an answer (D10).
    Unanswered,
    /// It does not accept our credential (E2).
    NotAccepted,
    /// An answer with this status, which is no success (E1, E3, E4, E10).
    Status(u16),
    /// An answer larger than our limits (E8, F10).
    TooLarge,
    /// A limit of time within the request's: connect, attempt, first token, idle (D5, E9, F6).
    Slow,
    /// The request's own time was over.
    OutOfTime,
    /// What came is not an answer: nonsense, cut off, an error under status 200 (E5 to E7, E12, E14, F17, F18).
    Broken,
    /// A defect of ours.
    Ours,
}

impl How {
    /// How an attempt failed that came so far and made this fault, where that alone tells it.
    #[must_use]
    pub fn of(reached: Reached, fault: Fault) -> Self {
        match (reached, fault) {
            (_, Fault::Internal) => Self::Ours,
            (_, Fault::DeadlineExceeded) => Self::OutOfTime,
            (Reached::Nothing, Fault::ModelLoading | Fault::Overloaded) => Self::NotReady,
            (Reached::Nothing, _) => Self::NotReached,
            (Reached::Request, Fault::UpstreamDisconnected) => Self::Unanswered,
            (_, Fault::UpstreamTimeout | Fault::FirstTokenTimeout) => Self::Slow,
            (Reached::Request | Reached::Answer, _) => Self::Broken,
        }
    }

    /// Whether another target may do better and nothing forbids to ask it.
    fn may_go_on(self, retry_unknown: bool) -> bool {
        match self {
            Self::Full | Self::NotReached | Self::NotReady | Self::Slow | Self::Broken => true,
            // The upstream may have worked, and sent its bill.
            Self::Unanswered => retry_unknown,
            // Our credential (whatever its status was), its limit (429): no other target has the same.
            Self::NotAccepted | Self::Status(429) => true,
            // The client's to mend, or a redirect, which is a mistake in the configuration that should be seen.
            Self::Status(300..500) => false,
            Self::Status(_) => true,
            // Another one would make as long an answer, for the same price.
            Self::TooLarge => false,
            Self::OutOfTime | Self::Ours => false,
        }
    }
}

/// A failed attempt and the request's state after it.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// How it failed.
    pub how: How,
    /// Whether anything of an answer, its head too, went to the client.
    pub is_visible: bool,
    /// Whether no target is left.
    pub is_last: bool,
    /// Why the request was cancelled, if it was.
    pub cancelled: Option<Cause>,
    /// Whether the request's one deadline is still ahead.
    pub has_time: bool,
    /// The model's `retry_unknown`.
    pub retry_unknown: bool,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The next target is called.
    Target,
    /// The client is told of this failure.
    This,
    /// Every target has failed: the client is told what [`Verdict`] chose.
    Best,
    /// The time was over before the next target could be called.
    OutOfTime,
    /// The request was cancelled; nobody else is called for it.
    Cancelled(Cause),
}

/// Decides what follows a failed attempt.
#[must_use]
pub fn next(ended: &Ended) -> Next {
    if let Some(cause) = ended.cancelled {
        return Next::Cancelled(cause);
    }
    if ended.is_visible || !ended.how.may_go_on(ended.retry_unknown) {
        return Next::This;
    }
    if ended.is_last {
        return Next::Best;
    }
    match ended.how {
        _ if ended.has_time => Next::Target,
        // All the time went there, and it says more than that it is over.
        How::NotReady => Next::This,
        _ => Next::OutOfTime,
    }
}

/// Chooses, of the failures of all targets, the one that the client is told of: the last of those that may pass by
/// themselves; if there is none, of those that asked to wait (429) the one with the shortest wait; else the last.
#[derive(Debug, Default)]
pub struct Verdict(Option<Error>);

impl Verdict {
    /// One more target has failed.
    pub fn add(&mut self, error: Error) {
        let is_better = self.0.as_ref().is_none_or(|told| match (hope(&error), hope(told)) {
            (Hope::Wait(new), Hope::Wait(old)) => new < old,
            (new, old) => new.rank() >= old.rank(),
        });
        if is_better {
            self.0 = Some(error);
        }
    }

    /// The choice.
    #[must_use]
    pub fn into_error(self) -> Error {
        self.0.unwrap_or_else(|| Error::new(Fault::Internal, "no target was called"))
    }
}

/// What a repetition of the whole request may hope for after a failure.
enum Hope {
    None,
    /// After that many seconds.
    Wait(u32),
    Now,
}

impl Hope {
    fn rank(&self) -> u8 {
        match self {
            Self::None => 0,
            Self::Wait(_) => 1,
            Self::Now => 2,
        }
    }
}

fn hope(error: &Error) -> Hope {
    let row = error.fault.row();
    match error.fault {
        Fault::RateLimitExceeded => Hope::Wait(error.retry_after_s.or(row.retry_after_s).unwrap_or(0)),
        _ if row.should_retry => Hope::Now,
        _ => Hope::None,
    }
}

/// Adds to the client's error which upstreams were tried and how each ended, so that a total outage explains itself. A
/// refusal that is the client's to mend keeps the upstream's own words.
pub fn name_tried<'a>(error: &mut Error, tried: impl Iterator<Item = (&'a str, &'a str)>) {
    if error.fault == Fault::UpstreamRefused {
        return;
    }
    let message = error.message.to_mut();
    for (index, (upstream, cause)) in tried.enumerate() {
        // Writing to a String cannot fail.
        let _ = write!(message, "{} {upstream} ({cause})", if index == 0 { "; tried:" } else { "," });
    }
}

#[cfg(test)]
mod tests;
