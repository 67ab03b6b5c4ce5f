//! The stop, stage by stage: settle, workers, listeners, clerk, end.

use evergate_board::MasterPhase;
use evergate_core::exit::{Initiator, Kind};
use evergate_core::inherit::code;

use super::{Action, Child, MS, Ns, Order, Phase, Sig, State, planted};

/// How long the workers have to take what is in the accept queue before connects are refused.
const QUEUE_TIME: Ns = 500 * MS;
/// How often the accept queue is looked at meanwhile.
const QUEUE_LOOK: Ns = 10 * MS;

/// A stop under way.
#[derive(Debug)]
pub(super) struct Stop {
    stage: Stage,
    speed: Speed,
    code: u8,
    /// Whether this is the end of a start that failed: then nothing is started any more.
    is_abandoned: bool,
}

#[derive(Debug)]
enum Stage {
    /// Still serving; readiness says no.
    Settling { until: Ns },
    /// Workers finish; hosts and the clerk go on.
    Draining { close_at: Ns, is_open: bool },
    /// Hosts end their programs.
    Hosts,
    /// The clerk finishes.
    Clerk,
}

/// How much patience is left; it only shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Speed {
    Graceful,
    Quick,
    Kill,
}

impl Stop {
    /// Force was needed.
    pub(super) fn force(&mut self) {
        if self.code == code::OK {
            self.code = code::FORCED;
        }
    }

    /// Whether everything goes on as before.
    pub(super) fn is_settling(&self) -> bool {
        matches!(self.stage, Stage::Settling { .. })
    }

    /// While settling everything goes on as before; the clerk is needed until the last worker is gone.
    pub(super) fn fills(&self, kind: Kind) -> bool {
        match self.stage {
            _ if self.is_abandoned => false,
            Stage::Settling { .. } => true,
            Stage::Draining { .. } | Stage::Hosts => kind == Kind::Clerk,
            Stage::Clerk => false,
        }
    }

    /// Workers that finish may need a host.
    pub(super) fn starts_hosts(&self) -> bool {
        let has_workers = matches!(self.stage, Stage::Settling { .. } | Stage::Draining { .. });
        has_workers && self.speed == Speed::Graceful && !self.is_abandoned
    }

    pub(super) fn due(&self, last: Ns) -> Option<Ns> {
        match self.stage {
            Stage::Settling { until } => Some(until),
            Stage::Draining { close_at, is_open: true } => Some(close_at.min(last.saturating_add(QUEUE_LOOK))),
            Stage::Draining { is_open: false, .. } | Stage::Hosts | Stage::Clerk => None,
        }
    }
}

impl State {
    /// An operator wants the end, or wants it sooner.
    pub(super) fn stop(&mut self, order: Order, now: Ns, out: &mut Vec<Action>) {
        self.end_reloads(now, out);
        self.end_succession(now, out);
        let is_hasty = matches!(order, Order::Interrupt | Order::StopNow);
        match &self.phase {
            Phase::Starting | Phase::Serving if is_hasty => self.drain(Speed::Quick, code::OK, now, out),
            // Before anything serves there is nothing that a balancer should be told.
            Phase::Starting => self.drain(Speed::Graceful, code::OK, now, out),
            Phase::Serving => {
                let until = now.saturating_add(self.rules.settle);
                let stage = Stage::Settling { until };
                let stop = Stop { stage, speed: Speed::Graceful, code: code::OK, is_abandoned: false };
                self.phase = Phase::Stopping(stop);
                out.push(Action::SetPhase(MasterPhase::Settling));
            }
            Phase::Stopping(stop) => match (stop.speed, order) {
                (_, Order::Stop) | (Speed::Quick | Speed::Kill, Order::StopNow) => {}
                (Speed::Graceful, _) => self.hasten(Speed::Quick, now, out),
                (Speed::Quick | Speed::Kill, _) => self.hasten(Speed::Kill, now, out),
            },
            Phase::Ended => {}
        }
    }

    /// The start has failed: everything that did start ends, quickly and in order.
    pub(super) fn abandon(&mut self, code: u8, now: Ns, out: &mut Vec<Action>) {
        self.drain(Speed::Quick, code, now, out);
        if let Phase::Stopping(stop) = &mut self.phase {
            stop.is_abandoned = true;
        }
    }

    /// Takes the stop as far as it can go at this time.
    pub(super) fn go_on_stopping(&mut self, now: Ns, out: &mut Vec<Action>) {
        let Phase::Stopping(stop) = &self.phase else { return };
        let (speed, code) = (stop.speed, stop.code);
        if let Stage::Settling { until } = stop.stage
            && until <= now
        {
            self.drain(speed, code, now, out);
        }
        self.leave_ghosts(now, out);
        self.close_listeners(now, out);
        self.finish_workers(now, out);
        self.finish_hosts(now, out);
        self.finish(out);
    }

    /// Workers are told to end. Those that are waiting to be started never are.
    fn drain(&mut self, speed: Speed, code: u8, now: Ns, out: &mut Vec<Action>) {
        // A start that fails is a stop that nobody ordered.
        self.end_reloads(now, out);
        self.end_succession(now, out);
        let stage = Stage::Draining { close_at: now.saturating_add(QUEUE_TIME), is_open: true };
        self.phase = Phase::Stopping(Stop { stage, speed, code, is_abandoned: false });
        out.push(Action::SetPhase(MasterPhase::Draining));
        if planted!(HostsFirst) {
            self.stop_hosts(Sig::Term, now, out);
        }
        let (clerk, workers): (Vec<_>, Vec<_>) = std::mem::take(&mut self.slots)
            .into_iter()
            .partition(|slot| slot.kind == Kind::Clerk && !planted!(ClerkFirst));
        self.slots = clerk;
        self.leaving.extend(workers.into_iter().filter_map(|slot| slot.child));
        for child in &mut self.leaving {
            let (signal, patience) = match speed {
                Speed::Graceful => (Sig::Term, child.patience()),
                Speed::Quick | Speed::Kill => (Sig::Quit, child.rules.quick()),
            };
            child.tell(Initiator::Operator, signal, now.saturating_add(patience), out);
        }
    }

    fn hasten(&mut self, speed: Speed, now: Ns, out: &mut Vec<Action>) {
        let Phase::Stopping(stop) = &mut self.phase else { return };
        stop.speed = speed;
        if matches!(stop.stage, Stage::Settling { .. }) {
            let code = stop.code;
            self.drain(speed, code, now, out);
            return;
        }
        for child in &mut self.leaving {
            let patience = match speed {
                Speed::Graceful | Speed::Quick => child.rules.quick(),
                Speed::Kill => 0,
            };
            child.tell(Initiator::Operator, Sig::Quit, now.saturating_add(patience), out);
        }
        let Phase::Stopping(Stop { stage, .. }) = &self.phase else { return };
        match (speed, stage) {
            (Speed::Kill, _) => self.kill_hosts(now, out),
            (Speed::Quick, Stage::Hosts) => self.stop_hosts(Sig::Quit, now, out),
            (Speed::Graceful | Speed::Quick, _) => {}
        }
    }

    /// Connects are refused once the workers have taken what was queued, or the time for that is over.
    fn close_listeners(&mut self, now: Ns, out: &mut Vec<Action>) {
        let queue = self.queue;
        let has_taken = self.leaving.iter().all(|child| child.seen.took_queue);
        let is_empty = self.leaving.is_empty();
        let Phase::Stopping(Stop { stage: Stage::Draining { close_at, is_open }, .. }) = &mut self.phase else {
            return;
        };
        if *is_open && (is_empty || (has_taken && queue == 0) || *close_at <= now) {
            *is_open = planted!(ClosesTwice);
            out.push(Action::CloseListeners);
        }
    }

    /// When the last worker is gone it is the hosts' turn.
    fn finish_workers(&mut self, now: Ns, out: &mut Vec<Action>) {
        if !self.leaving.is_empty() {
            return;
        }
        let Phase::Stopping(stop) = &mut self.phase else { return };
        if !matches!(stop.stage, Stage::Draining { .. }) {
            return;
        }
        stop.stage = Stage::Hosts;
        let signal = if stop.speed == Speed::Graceful { Sig::Term } else { Sig::Quit };
        self.stop_hosts(signal, now, out);
    }

    /// When the last host is gone, with all its programs, it is the clerk's.
    fn finish_hosts(&mut self, now: Ns, out: &mut Vec<Action>) {
        if self.has_hosts() || !self.leaving.is_empty() {
            return;
        }
        let last = self.rules.last();
        let Phase::Stopping(stop) = &mut self.phase else { return };
        if !matches!(stop.stage, Stage::Hosts) {
            return;
        }
        stop.stage = Stage::Clerk;
        for mut child in std::mem::take(&mut self.slots).into_iter().filter_map(|slot| slot.child) {
            child.tell(Initiator::Operator, Sig::Term, now.saturating_add(last), out);
            self.leaving.push(child);
        }
    }

    fn finish(&mut self, out: &mut Vec<Action>) {
        let Phase::Stopping(Stop { stage: Stage::Clerk, code, .. }) = &self.phase else { return };
        if !self.leaving.is_empty() {
            return;
        }
        let code = *code;
        self.phase = Phase::Ended;
        if self.orphans_kill_at.take().is_some() {
            out.push(Action::KillOrphans);
        }
        out.push(Action::SetPhase(MasterPhase::Stopped));
        out.push(Action::Exit(code));
    }
}

impl Child {
    /// Tells it to end; never gives it more time than it had.
    pub(super) fn tell(&mut self, why: Initiator, signal: Sig, kill_at: Ns, out: &mut Vec<Action>) {
        self.ending.get_or_insert(why);
        self.is_hastened |= signal == Sig::Quit;
        self.kill_at = Some(self.kill_at.map_or(kill_at, |before| before.min(kill_at)));
        if self.killed_at.is_none() {
            out.push(Action::Send { epoch: self.epoch, signal });
        }
    }
}
