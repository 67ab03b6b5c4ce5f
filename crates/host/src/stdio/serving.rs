//! A process at work: requests and cancels go in, pieces of answers come out, and nothing waits for ever.

use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, pending};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_core::{Error, Fault};
use evergate_sys::Pid;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;

use super::frames::{self, Decoder};
use super::pool::{Place, Shared};
use super::process::{Heard, Lost, Order, Over, Work, lost};
use super::rule::Number;
use super::said::{self, Said};
use crate::ask::{Ask, Refusal};
use crate::mark::Mark;
use crate::program::{Fed, Input, Output};

type Feed = Pin<Box<dyn Future<Output = (Input, io::Result<Fed>)> + Send>>;

/// A process that was ready.
pub(crate) struct Serving<'a> {
    shared: &'a Arc<Shared>,
    number: Number,
    pid: Pid,
    /// None while it is being fed, and when it has closed it.
    input: Option<Input>,
    feed: Option<Feed>,
    /// The request that is being written: a part of a frame is none.
    feeding: Option<u64>,
    /// Frames to be written, with the request that one is.
    outbox: VecDeque<(Option<u64>, Bytes)>,
    active: BTreeMap<u64, Active>,
    /// What a client has no room for yet. Until it has, nothing is read (G13), and nobody can be late.
    held: Option<(u64, Heard)>,
    drain_until: Option<Instant>,
}

/// A request that has a place.
struct Active {
    place: Place,
    /// Whom to tell; none when nobody waits any more.
    client: Option<(mpsc::Sender<Heard>, oneshot::Sender<Lost>)>,
    deadline: Option<Instant>,
    mark: Mark,
    /// When its frame began to be written: from then on the program may have seen it.
    sent: Option<Instant>,
    heard: Option<Instant>,
    cancelled: Option<Instant>,
}

enum Event {
    Order(Option<Order>),
    Fed(Input, io::Result<Fed>),
    Late,
    Room,
    Chunk(io::Result<Option<Bytes>>),
}

impl<'a> Serving<'a> {
    pub(crate) fn new(shared: &'a Arc<Shared>, number: Number, pid: Pid, input: Option<Input>) -> Self {
        let (outbox, active) = (VecDeque::new(), BTreeMap::new());
        Self { shared, number, pid, input, feed: None, feeding: None, outbox, active, held: None, drain_until: None }
    }

    /// Serves until the process ends, is drained, or has to be ended.
    pub(crate) async fn run(
        &mut self,
        mut output: Output,
        mut decoder: Decoder,
        orders: &mut mpsc::Receiver<Order>,
    ) -> Over {
        loop {
            if let Err(over) = self.read(&mut decoder) {
                return over;
            }
            self.write();
            let wake = self.wake();
            let event = tokio::select! {
                // In this order, so that a flood of output holds up neither requests nor limits.
                biased;
                // All are cancel-safe: channels keep what is not taken, the feed is kept in its box, a moment is a value,
                // room is only looked for, reading keeps nothing.
                order = orders.recv() => Event::Order(order),
                (input, fed) = fed(&mut self.feed) => Event::Fed(input, fed),
                () = at(wake) => Event::Late,
                () = room(self.held.as_ref(), &self.active) => Event::Room,
                chunk = output.chunk(), if self.held.is_none() => Event::Chunk(chunk),
            };
            match self.on(event, &mut decoder) {
                Ok(()) => {}
                Err(over) => return over,
            }
            tokio::task::yield_now().await;
        }
    }

    fn on(&mut self, event: Event, decoder: &mut Decoder) -> Result<(), Over> {
        match event {
            Event::Order(Some(Order::Request(work))) => self.take(*work),
            Event::Order(Some(Order::Cancel(id))) => self.cancel(id),
            Event::Order(Some(Order::Drain) | None) => self.drain()?,
            Event::Fed(input, fed) => self.fed(input, fed)?,
            Event::Late => self.late(Instant::now())?,
            Event::Room => self.unblock(),
            Event::Chunk(Ok(Some(chunk))) => decoder.push(&chunk),
            Event::Chunk(Ok(None)) => return Err(self.drain_until.map_or(Over::Ended, Over::Drained)),
            Event::Chunk(Err(error)) => return Err(Over::Failed(lost("read from", error))),
        }
        Ok(())
    }

    /// Looks at the frames that are whole.
    fn read(&mut self, decoder: &mut Decoder) -> Result<(), Over> {
        while self.held.is_none() {
            let Some(frame) = decoder.next().map_err(Over::Failed)? else { return Ok(()) };
            self.hear(said::parse(&frame).map_err(Over::Failed)?)?;
        }
        Ok(())
    }

    fn hear(&mut self, said: Said) -> Result<(), Over> {
        match said {
            Said::Ready { .. } => return Err(Over::Failed(said::broken("said twice that it is ready"))),
            Said::Drained => {
                let until =
                    self.drain_until.ok_or_else(|| Over::Failed(said::broken("was drained without being asked")));
                return Err(Over::Drained(until?));
            }
            Said::Delta { id, piece } => {
                self.active(id)?.heard = Some(Instant::now());
                self.deliver(id, Heard::Piece(piece));
            }
            Said::Result { id, last } => {
                self.active(id)?;
                self.deliver(id, Heard::Last(last));
            }
            Said::Error { id, error } => {
                if let Some((_, end)) = self.active(id)?.client.take() {
                    // Who has gone hears nothing, here and below.
                    let _ = end.send(Lost::Refused(Refusal::after(error)));
                }
                self.over(id);
            }
        }
        Ok(())
    }

    /// A request that the program was given and has not ended; another is out of turn (G18).
    fn active(&mut self, id: u64) -> Result<&mut Active, Over> {
        let active = self.active.get_mut(&id).filter(|active| active.sent.is_some());
        active.ok_or_else(|| Over::Failed(said::broken("answered a request that it does not have")))
    }

    /// Passes on what was heard, or holds it until there is room.
    fn deliver(&mut self, id: u64, heard: Heard) {
        let is_last = matches!(heard, Heard::Last(_));
        let client = self.active.get(&id).and_then(|active| active.client.as_ref());
        if let Some((to, _)) = client
            && let Err(mpsc::error::TrySendError::Full(heard)) = to.try_send(heard)
        {
            self.held = Some((id, heard));
            return;
        }
        if is_last {
            self.shared.tell(super::rule::Rule::answered);
            self.over(id);
        }
    }

    /// Somebody has room again. What was not read meanwhile was not late.
    fn unblock(&mut self) {
        let now = Some(Instant::now());
        for active in self.active.values_mut() {
            for moment in [&mut active.heard, &mut active.sent, &mut active.cancelled] {
                *moment = moment.and(now);
            }
        }
        if let Some((id, heard)) = self.held.take() {
            self.deliver(id, heard);
        }
    }

    /// The program has ended a request: its place is free.
    fn over(&mut self, id: u64) {
        if let Some(mut active) = self.active.remove(&id)
            && self.shared.rss_max > 0
        {
            active.place.rss = rss(self.pid);
        }
    }

    fn take(&mut self, work: Work) {
        let Work { id, ask, place, to, end } = work;
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now()).as_millis();
        let deadline_ms = ask.deadline.map(|deadline| u64::try_from(left(deadline)).unwrap_or(u64::MAX));
        let frame = frames::encode(self.shared.frames, &said::request(id, &ask, deadline_ms));
        let Some(frame) = frame.filter(|_| self.input.is_some() || self.feed.is_some()) else {
            let _ = end.send(Lost::Unseen);
            return;
        };
        self.outbox.push_back((Some(id), frame));
        let client = Some((to, end));
        let Ask { deadline, mark, .. } = ask;
        self.active.insert(id, Active { place, client, deadline, mark, sent: None, heard: None, cancelled: None });
    }

    /// Nobody waits for a request any more.
    fn cancel(&mut self, id: u64) {
        let held = self.held.take_if(|(of, _)| *of == id);
        if matches!(held, Some((_, Heard::Last(_)))) {
            return self.over(id);
        }
        let Some(active) = self.active.get_mut(&id) else { return };
        active.client = None;
        if active.sent.is_none() {
            self.outbox.retain(|(of, _)| *of != Some(id));
            self.active.remove(&id);
        } else if active.cancelled.is_none() {
            active.cancelled = Some(Instant::now());
            self.outbox.extend(frames::encode(self.shared.frames, &said::cancel(id)).map(|frame| (None, frame)));
        }
    }

    fn drain(&mut self) -> Result<(), Over> {
        let grace = self.shared.plan.grace;
        let until = *self.drain_until.get_or_insert_with(|| Instant::now() + grace);
        if self.input.is_none() && self.feed.is_none() {
            return Err(Over::Drained(until));
        }
        let frame = frames::encode(self.shared.frames, &said::drain(grace.as_millis()));
        self.outbox.extend(frame.map(|frame| (None, frame)));
        Ok(())
    }

    /// Begins to write the next frame, if nothing is being written.
    fn write(&mut self) {
        if self.input.is_none() {
            return;
        }
        let Some((id, frame)) = self.outbox.pop_front() else { return };
        if let Some(active) = id.and_then(|id| self.active.get_mut(&id)) {
            active.sent = Some(Instant::now());
            active.mark.set();
        }
        self.feeding = id;
        let stall = self.shared.idle;
        self.feed = self.input.take().map(|mut input| {
            let feed = async move {
                let fed = input.feed(&frame, stall).await;
                (input, fed)
            };
            Box::pin(feed) as Feed
        });
    }

    fn fed(&mut self, input: Input, fed: io::Result<Fed>) -> Result<(), Over> {
        self.feed = None;
        let feeding = self.feeding.take();
        match fed {
            Ok(Fed::All) => self.input = Some(input),
            // It may answer what it has (G15), and gets nothing more.
            Ok(Fed::Closed) => {
                self.shared.retire(self.number);
                let unwritten: Vec<u64> = self.outbox.drain(..).filter_map(|(id, _)| id).chain(feeding).collect();
                for id in unwritten {
                    if let Some((_, end)) = self.active.remove(&id).and_then(|active| active.client) {
                        let _ = end.send(Lost::Unseen);
                    }
                }
                if let Some(until) = self.drain_until {
                    return Err(Over::Drained(until));
                }
            }
            Ok(Fed::Stalled) => {
                return Err(Over::Failed(too_slow("read nothing of its input for", self.shared.idle, "idle")));
            }
            Err(error) => return Err(Over::Failed(lost("write to", error))),
        }
        Ok(())
    }

    /// When a request's limit ends, and which.
    fn patience(&self, active: &Active) -> Option<(Instant, Limit)> {
        let deadline = active.deadline.filter(|_| active.client.is_some()).map(|until| (until, Limit::Deadline));
        let silence = match (active.cancelled, active.heard, active.sent) {
            _ if self.held.is_some() => None,
            (Some(cancelled), _, _) => Some((cancelled + self.shared.plan.grace, Limit::Cancel)),
            (None, Some(heard), _) => Some((heard + self.shared.idle, Limit::Idle)),
            (None, None, Some(sent)) => Some((sent + self.shared.first_output, Limit::FirstOutput)),
            (None, None, None) => None,
        };
        deadline.into_iter().chain(silence).min_by_key(|(until, _)| *until)
    }

    fn wake(&self) -> Option<Instant> {
        let limits = self.active.values().filter_map(|active| self.patience(active)).map(|(until, _)| until);
        limits.chain(self.drain_until).min()
    }

    fn late(&mut self, now: Instant) -> Result<(), Over> {
        if let Some(until) = self.drain_until.filter(|until| now >= *until) {
            return Err(Over::Drained(until));
        }
        let late = self.active.iter().filter_map(|(id, active)| Some((*id, self.patience(active)?)));
        let late: Vec<(u64, Limit)> =
            late.filter(|(_, (until, _))| now >= *until).map(|(id, (_, limit))| (id, limit)).collect();
        for (id, limit) in late {
            let error = self.overdue(limit);
            if limit == Limit::Cancel {
                return Err(Over::Failed(error));
            }
            if limit != Limit::Deadline {
                self.shared.retire(self.number);
            }
            let active = self.active.get_mut(&id);
            if let Some((is_sent, (_, end))) =
                active.and_then(|active| Some((active.sent.is_some(), active.client.take()?)))
            {
                let refusal = if is_sent { Refusal::after(error) } else { Refusal::before(error) };
                let _ = end.send(Lost::Refused(refusal));
            }
            self.cancel(id);
        }
        Ok(())
    }

    fn overdue(&self, limit: Limit) -> Error {
        let Shared { first_output, idle, plan, .. } = &**self.shared;
        match limit {
            Limit::Cancel => too_slow("did not end a cancelled request within", plan.grace, "grace"),
            Limit::Idle => too_slow("was silent for longer than", *idle, "idle"),
            Limit::FirstOutput => too_slow("wrote nothing within", *first_output, "first_output"),
            Limit::Deadline => {
                Error::new(Fault::DeadlineExceeded, "the program of this model did not answer in the request's time")
            }
        }
    }

    /// Tells those who still wait.
    pub(crate) fn finish(&mut self, error: &Error) {
        for (id, active) in std::mem::take(&mut self.active) {
            let Some((_, end)) = active.client else { continue };
            let is_seen = active.sent.is_some() && self.feeding != Some(id);
            let _ = end.send(if is_seen { Lost::Refused(Refusal::after(again(error))) } else { Lost::Unseen });
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    Deadline,
    FirstOutput,
    Idle,
    Cancel,
}

/// The same for one more.
fn again(error: &Error) -> Error {
    let copy = Error::new(error.fault, error.message.clone());
    match &error.detail {
        Some(detail) => copy.detail(detail),
        None => copy,
    }
}

/// Waits for the feed, for ever if there is none.
async fn fed(feed: &mut Option<Feed>) -> (Input, io::Result<Fed>) {
    match feed {
        Some(feed) => feed.await,
        None => pending().await,
    }
}

/// Waits until a client has room for what is held, or has gone.
async fn room(held: Option<&(u64, Heard)>, active: &BTreeMap<u64, Active>) {
    let Some((id, _)) = held else { return pending().await };
    if let Some((to, _)) = active.get(id).and_then(|active| active.client.as_ref()) {
        let _ = to.reserve().await;
    }
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment.into()).await,
        None => pending().await,
    }
}

fn too_slow(what: &str, limit: Duration, key: &str) -> Error {
    let message = format!("the program of this model {what} {} ms (process.{key})", limit.as_millis());
    Error::new(Fault::AdapterTimeout, message)
}

/// The resident set of a process, in bytes; zero if it has none any more.
fn rss(pid: Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
    kib.unwrap_or(0_u64).saturating_mul(1024)
}
