//! What is known of names, and which look-ups run. Pure: the time is passed in.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// How long addresses are used before the name is asked for again. getaddrinfo(3) does not tell the records' own time; this
/// is below that of the load balancers of the large clouds (60 s), and pooled connections need no name at all.
const FRESH: Duration = Duration::from_secs(10);
/// How long a failure is believed.
const FAILED: Duration = Duration::from_secs(1);
/// How long who has old addresses waits for new ones: ten times what a resolver nearby needs.
const REFRESH: Duration = Duration::from_millis(250);
/// Look-ups at once. Each is a thread.
const LOOKUPS_MAX: usize = 8;
/// A look-up as old as this may never end: its name may be asked for once more.
const STUCK: Duration = Duration::from_secs(30);
/// Look-ups of one name at once: one, and one that is stuck.
const LOOKUPS_OF_A_NAME_MAX: usize = 2;

type Addresses = Arc<[IpAddr]>;

/// All names.
#[derive(Debug, Default)]
pub(super) struct Book {
    names: HashMap<String, Name>,
    /// Look-ups that run.
    running: usize,
    /// Look-ups that wait for a thread; at most one for each name.
    queue: VecDeque<Job>,
    next: u64,
}

#[derive(Debug, Default)]
struct Name {
    good: Option<(Addresses, Instant)>,
    failed: Option<(Arc<str>, Instant)>,
    flight: Option<Flight>,
    /// Look-ups of it that run, stuck ones too.
    running: usize,
}

/// The look-up that is waited for.
#[derive(Debug)]
struct Flight {
    number: u64,
    began: Instant,
    is_late: bool,
    /// Dropped at its end, which is what wakes those who wait.
    ended: watch::Sender<()>,
}

/// A look-up to be carried out.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) host: String,
    number: u64,
}

/// What is said to who asks.
#[derive(Debug)]
pub(super) enum Answer {
    Known(Addresses),
    Failed(Arc<str>),
    /// Ask again when `ended` closes, or be content with what is known at `patience`.
    Wait {
        ended: watch::Receiver<()>,
        patience: Option<Instant>,
    },
}

/// What is left to who has waited long enough.
#[derive(Debug)]
pub(super) struct Overrun {
    pub(super) known: Option<Addresses>,
    /// Whether nobody else gave up on this look-up before.
    pub(super) is_first: bool,
}

impl Name {
    fn known(&self) -> Option<Addresses> {
        self.good.as_ref().map(|(addresses, _)| Arc::clone(addresses))
    }

    /// What can be said without waiting.
    fn answer(&self, now: Instant) -> Option<Answer> {
        let is_within = |since: Instant, time| now.saturating_duration_since(since) < time;
        if let Some((addresses, since)) = &self.good
            && is_within(*since, FRESH)
        {
            return Some(Answer::Known(Arc::clone(addresses)));
        }
        let known = self.known().map(Answer::Known);
        if let Some((why, since)) = &self.failed
            && is_within(*since, FAILED)
        {
            return Some(known.unwrap_or_else(|| Answer::Failed(Arc::clone(why))));
        }
        // The others have waited for this look-up already.
        let is_overrun = self.flight.as_ref().is_some_and(|flight| !is_within(flight.began, REFRESH));
        known.filter(|_| is_overrun && !self.may_ask_again(now))
    }

    /// Whether the look-up that runs is given up.
    fn may_ask_again(&self, now: Instant) -> bool {
        let is_stuck = self.flight.as_ref().is_some_and(|flight| now.saturating_duration_since(flight.began) >= STUCK);
        is_stuck && self.running < LOOKUPS_OF_A_NAME_MAX
    }

    fn wait(&self) -> Option<Answer> {
        let flight = self.flight.as_ref()?;
        let patience = self.good.as_ref().map(|_| flight.began + REFRESH);
        Some(Answer::Wait { ended: flight.ended.subscribe(), patience })
    }
}

impl Book {
    /// What is known of `host`, and the look-up to start now, if one is needed and a thread is free.
    pub(super) fn ask(&mut self, host: &str, now: Instant) -> (Answer, Option<Job>) {
        let name = match self.names.get_mut(host) {
            Some(name) => name,
            None => self.names.entry(host.to_owned()).or_default(),
        };
        if let Some(answer) = name.answer(now) {
            return (answer, None);
        }
        let may_start = name.flight.is_none() || name.may_ask_again(now);
        if let Some(waiting) = name.wait().filter(|_| !may_start) {
            return (waiting, None);
        }
        self.next += 1;
        let (number, ended) = (self.next, watch::Sender::new(()));
        let answer = Answer::Wait { ended: ended.subscribe(), patience: name.good.as_ref().map(|_| now + REFRESH) };
        name.flight = Some(Flight { number, began: now, is_late: false, ended });
        let job = Job { host: host.to_owned(), number };
        if self.running >= LOOKUPS_MAX {
            self.queue.retain(|waiting| waiting.host != host);
            self.queue.push_back(job);
            return (answer, None);
        }
        self.running += 1;
        name.running += 1;
        (answer, Some(job))
    }

    /// Somebody gives up waiting.
    pub(super) fn overrun(&mut self, host: &str) -> Overrun {
        let Some(name) = self.names.get_mut(host) else { return Overrun { known: None, is_first: false } };
        let first = name.flight.as_mut().is_some_and(|flight| !std::mem::replace(&mut flight.is_late, true));
        Overrun { known: name.known(), is_first: first }
    }

    /// A look-up has ended; gives the next one for its thread, which is one that somebody still waits for.
    pub(super) fn end(&mut self, job: &Job, found: Result<Vec<IpAddr>, String>, now: Instant) -> Option<Job> {
        self.running = self.running.saturating_sub(1);
        if let Some(name) = self.names.get_mut(&job.host) {
            name.running = name.running.saturating_sub(1);
            match found {
                Ok(addresses) => {
                    name.good = Some((addresses.into(), now));
                    name.failed = None;
                }
                Err(why) => name.failed = Some((why.into(), now)),
            }
            // One that was given up may end when another is waited for.
            name.flight.take_if(|flight| flight.number == job.number);
        }
        while let Some(next) = self.queue.pop_front() {
            let Some(name) = self.names.get_mut(&next.host) else { continue };
            let is_wanted = |flight: &Flight| flight.number == next.number && flight.ended.receiver_count() > 0;
            if name.flight.as_ref().is_some_and(is_wanted) {
                self.running += 1;
                name.running += 1;
                return Some(next);
            }
            name.flight.take_if(|flight| flight.number == next.number);
        }
        None
    }
}

#[cfg(test)]
mod tests;
