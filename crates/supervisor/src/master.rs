//! The loop: wait, look, ask the rules, do what they say.

use std::collections::VecDeque;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use evergate_board::{Board, ChildRow, MasterPhase, Phase, Shape, monotonic_ns};
use evergate_core::count;
use evergate_core::exit::Kind;
use evergate_core::inherit::code;
use evergate_core::plan::{Address, Plan};
use evergate_sys::{Exit, Pid, Signal, Signals, peek_exit, reap};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::kill_process;

use crate::burial::{bury, status};
use crate::children::{Children, Estate, Running};
use crate::compile::{Compile, Words};
use crate::control::Control;
use crate::diagnosis::{diagnose, starved};
use crate::notify::Notify;
use crate::oom::Oom;
use crate::orphans::Orphans;
use crate::runfile::{Run, RunChild};
use crate::state_writer::StateWriter;
use crate::step::watch::ASK;
use crate::step::{Action, Event, HostSeen, Ns, Order, Refusal, SECOND, Seen, Shown, Sig, State, Tally, step};
use crate::succeed::{Bound, succeed};
use crate::turned_away::TurnedAway;
use crate::{Failure, Options, talk};

/// How long the disk is waited for at the end of a run.
const CLOSE_TIME: Duration = Duration::from_secs(2);

/// The shell around the rules.
#[derive(Debug)]
pub(crate) struct Master {
    options: Options,
    /// Given back by the kernel with the process, not before: its other thread may have something to write still.
    _lock: ManuallyDrop<File>,
    signals: Signals,
    estate: Estate,
    writer: StateWriter,
    orphans: Orphans,
    control: Control,
    state: State,
    /// Of the start: what the listeners and the board were made for.
    plan: Plan,
    children: Children,
    oom: Oom,
    notify: Notify,
    turned_away: TurnedAway,
    /// A validation under way.
    compile: Option<Compile>,
    /// What it has made, until the rules say which generation that is.
    compiled: Option<OwnedFd>,
    /// Validations that were given up and have not ended yet.
    given_up: Vec<Pid>,
    touched: Ns,
    exit: Option<u8>,
}

impl Master {
    #[allow(clippy::too_many_arguments, reason = "called once, by the boot that has made each of them")]
    pub(crate) fn new(
        options: Options,
        lock: File,
        signals: Signals,
        estate: Estate,
        writer: StateWriter,
        orphans: Orphans,
        control: Control,
        state: State,
        plan: Plan,
    ) -> Self {
        let turned_away = TurnedAway::new(estate.board.run_id(), plan.is_tls);
        Self {
            options,
            _lock: ManuallyDrop::new(lock),
            signals,
            estate,
            writer,
            orphans,
            control,
            state,
            plan,
            children: Children::new(),
            oom: Oom::open(),
            notify: Notify::from_env(),
            turned_away,
            compile: None,
            compiled: None,
            given_up: Vec::new(),
            touched: 0,
            exit: None,
        }
    }

    /// Runs until the rules say that it is over.
    pub(crate) fn run(&mut self) -> Result<u8, Failure> {
        self.apply(Event::Start);
        loop {
            if let Some(code) = self.exit {
                self.orphans.finish(&mut self.writer);
                self.writer.close(CLOSE_TIME);
                self.control.farewell(code);
                return Ok(code);
            }
            if self.wait() {
                self.apply(Event::Knock);
            }
            self.turn();
        }
    }

    /// Until a signal, a kick, a client or the next time at which the rules have something to do. While it is quiet a
    /// connection wakes us as well, so that a queue is noticed at once; says whether one did.
    fn wait(&self) -> bool {
        let now = monotonic_ns();
        let others = [self.control.due(), self.notify.due(), self.turned_away.due(), self.estate.hosts.due()];
        let due = others.into_iter().flatten().fold(self.state.due(), Ns::min);
        let left = Duration::from_nanos(due.saturating_sub(now));
        let limit = Timespec::try_from(left).ok();
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.estate.kick, PollFlags::IN)];
        let more = self.control.fds().chain(self.turned_away.fds(&self.estate.listeners));
        fds.extend(more.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        fds.extend(self.control.callers().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::empty())));
        let listeners = fds.len();
        if self.state.is_quiet() {
            fds.extend(self.estate.listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
        }
        // Whatever it says, everything is looked at afterwards; nothing here can fail for longer than a tick.
        let _ = poll(&mut fds, limit.as_ref());
        fds.iter().skip(listeners).any(|listener| !listener.revents().is_empty())
    }

    fn turn(&mut self) {
        let now = monotonic_ns();
        let master = self.estate.board.master();
        master.set_beat_ns(now);
        master.set_talk_dropped(talk::dropped());
        if now.saturating_sub(self.touched) >= SECOND {
            self.touched = now;
            self.writer.touch();
        }
        self.writer.turn();
        // The count is of no interest, and empty is as good.
        let _ = rustix::io::read(&self.estate.kick, &mut [0_u8; 8]);
        self.oom.sample(now);
        self.orphans.collect(&mut self.writer, now);
        for (kind, initiator) in self.orphans.take_ends() {
            (self.options.on_exit)(&self.estate.board, kind, initiator);
        }
        self.turned_away.turn(&self.estate.listeners, now);
        // Before the reaping: the CHLD of who ends after that is still there, and wakes the next turn.
        let taken = std::iter::from_fn(|| self.signals.take().ok().flatten());
        let orders: Vec<Order> = taken.filter_map(|taken| order_of(taken.number)).collect();
        // The board before the burials: a child that became ready and died at once did become ready.
        self.look();
        self.reap_all();
        for order in orders {
            self.apply(Event::Order(order));
        }
        let run_id = self.estate.board.run_id();
        for epoch in self.estate.hosts.swept(run_id, now) {
            self.apply(Event::Swept { epoch });
        }
        for order in self.control.turn(&self.estate.board, now) {
            self.apply(Event::Order(order));
        }
        self.tell_manager(now);
    }

    /// The service manager's sign of life and line of status.
    fn tell_manager(&mut self, now: Ns) {
        let is_worker = |row: &&ChildRow| row.kind() == Some(Kind::Worker) && row.phase() == Phase::Ready;
        let ready = self.estate.board.children().filter(|(_, row)| is_worker(row)).count();
        self.notify.watchdog(u32::try_from(ready).unwrap_or(u32::MAX), now);
        let phase = self.estate.board.master().phase().name();
        self.notify.status(format!("{phase}; {} ready", count(ready, "worker")));
    }

    fn look(&mut self) {
        let now = monotonic_ns();
        let seen = |(epoch, running): (&u32, &Running)| {
            let row = self.estate.board.child(running.birth.row)?;
            let is_ready = !matches!(row.phase(), Phase::Empty | Phase::Booting | Phase::Ghost);
            Some(Seen {
                epoch: *epoch,
                is_ready,
                beat: row.beat_ns(),
                starved: if now > row.beat_ns().saturating_add(ASK) { starved(running.pid) } else { 0 },
                is_going: matches!(row.phase(), Phase::Draining | Phase::Cancelling | Phase::Cleaning),
                took_queue: row.took_queue(),
                load: row.load().saturating_sub(row.parked()),
                waiting: row.waiting(),
                lag: u64::from(row.loop_lag_us()).saturating_mul(1_000),
                requests: row.requests(),
                rss_kib: row.rss_kib(),
                is_leaking: row.is_leaking(),
            })
        };
        let children: Vec<Seen> = self.children.iter().filter_map(seen).collect();
        let queue = self.estate.listeners.iter().fold(0_u32, |sum, listener| sum.saturating_add(listener.queue()));
        let overflows = self.estate.listeners.iter().map(|listener| u64::from(listener.overflows())).sum();
        self.estate.board.master().set_queue(queue);
        self.estate.board.master().set_queue_overflows(overflows);
        let waiting = children.iter().fold(0_u64, |sum, seen| sum.saturating_add(seen.waiting.into()));
        self.estate.board.master().set_backlog(waiting.saturating_add(queue.into()));
        self.apply(Event::Seen { children, queue });
        self.look_at_hosts();
    }

    fn look_at_hosts(&mut self) {
        let board = &self.estate.board;
        let seen = |host: u32| {
            let row = board.host(host)?;
            Some(HostSeen {
                host,
                is_wanted: row.take_wanted(),
                ready_epoch: row.ready_epoch(),
                idle_epoch: row.idle_epoch(),
                is_busy: row.in_flight() > 0 || row.waiting() > 0,
                is_down: row.is_down(),
            })
        };
        let hosts: Vec<HostSeen> = self.estate.hosts.rows().filter_map(seen).collect();
        if !hosts.is_empty() {
            self.apply(Event::Hosts(hosts));
        }
    }

    /// Everybody who has ended: ours are an event, strangers (we are a subreaper, or process 1) have no effect.
    fn reap_all(&mut self) {
        let (mut ours, mut killed) = (Vec::new(), 0_u64);
        while let Ok(Some(pid)) = peek_exit() {
            let Ok(exit) = reap(pid) else { break };
            if self.compile.as_ref().is_some_and(|compile| compile.pid == pid) {
                self.take_compiled(exit.status);
                continue;
            }
            if let Some(at) = self.given_up.iter().position(|given_up| *given_up == pid) {
                self.given_up.remove(at);
                continue;
            }
            let found = self.children.iter_mut().find(|(_, running)| running.pid == pid && running.exit.is_none());
            if let Some((epoch, running)) = found {
                running.exit = Some(exit);
                ours.push((*epoch, exit));
            } else {
                killed += u64::from(matches!(exit.status, evergate_sys::Status::Signal { number: 9, .. }));
                let master = self.estate.board.master();
                master.set_strangers(master.strangers().saturating_add(1));
            }
        }
        if !ours.is_empty() {
            // A child can have become ready and died since the last look; now its row says its last word.
            self.look();
        }
        self.find_killers(&ours, killed);
        for (epoch, exit) in ours {
            let row = self.children.get(&epoch).and_then(|running| self.estate.board.child(running.birth.row));
            let note = row.map(ChildRow::note).unwrap_or_default();
            self.apply(Event::Exited { epoch, status: status(Some(exit)), note });
        }
    }

    /// Asks the out-of-memory counter about every KILL that is not ours; `killed` strangers ended by one as well.
    fn find_killers(&mut self, ended: &[(u32, Exit)], killed: u64) {
        let is_victim = |epoch: &u32| self.children.get(epoch).is_some_and(Running::was_killed_by_others);
        let victims: Vec<u32> = ended.iter().map(|(epoch, _)| *epoch).filter(is_victim).collect();
        if victims.is_empty() {
            return;
        }
        let dying = self.children.values().filter(|running| running.is_being_killed()).count();
        let mut suspects =
            u64::try_from(victims.len().saturating_add(dying)).unwrap_or(u64::MAX).saturating_add(killed);
        let own = self.estate.board.master().pid();
        let ours: Vec<i32> = self.children.values().map(|running| pid_number(running.pid)).chain([own]).collect();
        for epoch in victims {
            let finding = self.oom.judge(suspects, |pid| ours.contains(&pid), monotonic_ns());
            suspects = suspects.saturating_sub(1);
            if let Some(running) = self.children.get_mut(&epoch) {
                running.finding = Some(finding);
            }
        }
    }

    /// Asks the rules and does what they say; what comes of it at once is asked about in turn.
    fn apply(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in step(&mut self.state, event, monotonic_ns()) {
                events.extend(self.carry_out(action));
            }
        }
    }

    fn carry_out(&mut self, action: Action) -> Option<Event> {
        let board = self.estate.board.clone();
        match action {
            Action::Spawn(birth) => match self.estate.start(birth) {
                Ok(running) => {
                    self.children.insert(birth.epoch, running);
                }
                Err(error) => return Some(Event::SpawnFailed { epoch: birth.epoch, why: error.to_string() }),
            },
            Action::Send { epoch, signal } => self.send(epoch, signal),
            Action::Bury { epoch, initiator } => {
                if let Some(dead) = self.children.remove(&epoch) {
                    if dead.exit.is_none() {
                        self.given_up.push(dead.pid);
                    }
                    bury(&self.estate, &mut self.writer, &self.options, &dead, initiator);
                }
            }
            Action::AddHost { host, name, fingerprint } => self.estate.hosts.add(&board, host, name, fingerprint),
            Action::ShowHost { host, shown } => show_host(&board, host, &shown),
            Action::DropHost { host } => self.estate.hosts.drop_host(&board, host),
            Action::Sweep { epoch } => {
                let is_clean = self.estate.hosts.sweep(board.run_id(), epoch, monotonic_ns());
                return is_clean.then_some(Event::Swept { epoch });
            }
            Action::ShowGhost { epoch } => self.show_ghost(epoch),
            Action::Compile => return self.start_compile(),
            Action::StopCompile => self.stop_compile(),
            Action::Keep { generation } => {
                if let Some(config) = self.compiled.take() {
                    self.estate.configs.insert(generation, config);
                }
            }
            Action::Adopt { generation, rules } => {
                // Workers of a generation before may ask for a host that only theirs has.
                let of_worker =
                    |running: &Running| (running.birth.kind == Kind::Worker).then_some(running.birth.generation);
                let living: Vec<u32> = self.children.values().filter_map(of_worker).collect();
                self.estate.configs.retain(|kept, _| *kept >= generation || living.contains(kept));
                board.master().set_generation(generation);
                board.master().set_workers_min(rules.workers_min);
                board.master().set_workers_max(rules.workers_max);
            }
            Action::Forget { generation } => {
                self.estate.configs.remove(&generation);
            }
            Action::Answer { caller, outcome } => self.control.answer(caller, &outcome),
            Action::Diagnose { epoch } => {
                if let Some(running) = self.children.get(&epoch) {
                    talk::say(&diagnose(&board, running, &self.estate.name(running.birth)));
                }
            }
            Action::Count(Tally::Respawn { kind, cause }) => (self.options.on_respawn)(&board, kind, cause),
            Action::Count(Tally::HostStart { host, outcome, took }) => {
                let name = self.estate.hosts.name(host);
                (self.options.on_host_start)(&board, name, outcome, Duration::from_nanos(took));
            }
            Action::Count(tally) => tally_up(&board, tally),
            Action::SetReloading(is_reloading) => {
                board.master().set_reloading(is_reloading);
                if is_reloading { self.notify.reloading(monotonic_ns()) } else { self.notify.ready() }
            }
            Action::SetPhase(phase) => {
                board.master().set_phase(phase);
                self.notify.enter(phase);
                self.save();
            }
            Action::SetTarget(target) => board.master().set_workers_target(target),
            Action::SetDegraded(count) => board.master().set_degraded(count),
            Action::Announce => {
                self.announce();
                self.notify.ready();
            }
            Action::SaveRun => self.save(),
            Action::CloseListeners => {
                self.estate.listeners.iter_mut().for_each(crate::listen::Listener::close);
                board.master().set_is_closed(true);
                self.turned_away.begin();
            }
            Action::KillOrphans => self.orphans.signal(Signal::KILL),
            Action::Say(text) => talk::say(&text),
            Action::Exit(code) => self.exit = Some(code),
        }
        None
    }

    fn start_compile(&mut self) -> Option<Event> {
        match Compile::start(self.estate.exe.as_fd(), &self.options.compile_args, Words::Kept) {
            Ok(compile) => self.compile = Some(compile),
            Err(error) => {
                let why = format!("cannot start the validation of the configuration: {error}");
                return Some(Event::Compiled(Err(Refusal { code: code::SYSTEM, why })));
            }
        }
        None
    }

    fn stop_compile(&mut self) {
        if let Some(compile) = self.compile.take() {
            // It is reaped when it has ended.
            let _ = kill_process(compile.pid, Signal::KILL);
            self.given_up.push(compile.pid);
        }
    }

    /// The validation has ended: what it said is the operator's to read, what it made is judged.
    fn take_compiled(&mut self, status: evergate_sys::Status) {
        let Some(compile) = self.compile.take() else { return };
        compile.words().lines().for_each(talk::print);
        let outcome = compile.finish(status).and_then(|(plan, config)| {
            let rules = succeed(&self.plan, &self.bound(), &plan)?;
            self.compiled = Some(config);
            Ok(rules)
        });
        self.apply(Event::Compiled(outcome));
    }

    fn bound(&self) -> Bound {
        let listeners = &self.estate.listeners;
        Bound {
            listen: listeners.iter().map(|listener| listener.address.clone()).collect(),
            are_passed: listeners.iter().all(|listener| listener.is_passed),
            admin: self.estate.admin.as_ref().map(|admin| admin.address.clone()),
            rows: self.estate.board.shape().children.saturating_sub(Shape::host_rows(&self.plan)),
            host_rows: Shape::host_rows(&self.plan),
        }
    }

    /// Only to a child that was not reaped: until then its number is its own.
    fn send(&mut self, epoch: u32, signal: Sig) {
        let Some(running) = self.children.get_mut(&epoch).filter(|running| running.exit.is_none()) else { return };
        let (signal, name) = match signal {
            Sig::Term => (Signal::TERM, "TERM"),
            Sig::Quit => (Signal::QUIT, "QUIT"),
            Sig::Abort => (Signal::ABORT, "ABRT"),
            Sig::Kill => (Signal::KILL, "KILL"),
            Sig::Usr1 => (Signal::USR1, "USR1"),
        };
        if !running.sent.contains(&name) {
            running.sent.push(name);
        }
        // It may have ended a moment ago; then its end is on the way.
        let _ = kill_process(running.pid, signal);
    }

    /// It was killed and does not write any more; its peers and the tables must not take it for one that works.
    fn show_ghost(&mut self, epoch: u32) {
        let Some(running) = self.children.get_mut(&epoch) else { return };
        let Some(row) = self.estate.board.child(running.birth.row) else { return };
        running.given_up = Some(row.phase());
        row.set_phase(Phase::Ghost);
        row.set_accepting(false);
    }

    fn announce(&self) {
        let url = |address: &Address, scheme| match address {
            Address::Tcp(address) => format!("{scheme}://{address}"),
            Address::Unix(path) => format!("unix:{path}"),
        };
        let scheme = if self.plan.is_tls { "https" } else { "http" };
        let listen = self.estate.listeners.first().map(|listener| url(&listener.address, scheme)).unwrap_or_default();
        let admin = self.estate.admin.as_ref().map(|listener| url(&listener.address, "http"));
        for line in &self.plan.banner {
            // Without an admin listener there is nothing to say about it.
            if admin.is_none() && line.contains("{admin}") {
                continue;
            }
            talk::print(&line.replace("{listen}", &listen).replace("{admin}", admin.as_deref().unwrap_or_default()));
        }
    }

    fn save(&mut self) {
        let row = self.estate.board.master();
        // Nothing left to be found by a successor: the file goes in a moment.
        if row.phase() == MasterPhase::Stopped {
            return;
        }
        let alive = self.children.values().filter(|running| running.exit.is_none());
        let run = Run {
            pid: row.pid(),
            start_ticks: row.start_ticks(),
            run_id: self.estate.board.run_id(),
            started_unix_ms: row.started_unix_ms(),
            listen: self.estate.listeners.iter().map(|listener| listener.address.to_string()).collect(),
            admin: self.estate.admin.as_ref().map(|admin| admin.address.to_string()).unwrap_or_default(),
            control: self.control.path().to_string_lossy().into_owned(),
            generation: self.state.generation(),
            phase: row.phase().name().to_owned(),
            children: alive
                .map(|running| RunChild {
                    kind: running.birth.kind.name().to_owned(),
                    name: self.estate.upstream(running.birth).to_owned(),
                    pid: pid_number(running.pid),
                    start_ticks: running.ticks,
                    slot: running.birth.slot,
                    row: running.birth.row,
                    epoch: running.birth.epoch,
                    generation: running.birth.generation,
                })
                .collect(),
        };
        self.writer.run(run);
    }
}

fn show_host(board: &Board, host: u32, shown: &Shown) {
    let Some(row) = board.host(host) else { return };
    row.set_cause(&shown.cause);
    row.set_retry_ns(shown.retry_at);
    row.set_is_retired(shown.is_retired);
    if row.state() != shown.state {
        row.set_since_ns(monotonic_ns());
    }
    // After what a waiting worker reads when it finds these changed.
    row.set_failures(shown.failures);
    row.set_state(shown.state);
}

fn tally_up(board: &Board, tally: Tally) {
    let master = board.master();
    match tally {
        Tally::ScaleUp => master.set_scale_ups(master.scale_ups().saturating_add(1)),
        Tally::ScaleDown => master.set_scale_downs(master.scale_downs().saturating_add(1)),
        Tally::Reload => master.set_reloads(master.reloads().saturating_add(1)),
        Tally::ReloadFailed => master.set_reloads_failed(master.reloads_failed().saturating_add(1)),
        // Counted by whoever knows the labels.
        Tally::Respawn { .. } | Tally::HostStart { .. } => {}
    }
}

fn pid_number(pid: Pid) -> i32 {
    pid.as_raw_nonzero().get()
}

/// What a signal means; CHLD has done its work by waking us.
fn order_of(number: i32) -> Option<Order> {
    let orders = [
        (Signal::TERM, Order::Term),
        (Signal::INT, Order::Interrupt),
        (Signal::QUIT, Order::Interrupt),
        (Signal::HUP, Order::Reload(None)),
        (Signal::TTIN, Order::More),
        (Signal::TTOU, Order::Fewer),
        (Signal::USR1, Order::ReopenLogs),
    ];
    orders.into_iter().find(|(signal, _)| signal.as_raw() == number).map(|(_, order)| order)
}
