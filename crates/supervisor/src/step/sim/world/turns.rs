//! Time passes: what the processes do by themselves, what goes wrong, and what operators want.

use evergate_core::exit::{Kind, Status};

use super::{Process, World};
use crate::step::watch::ASK;
use crate::step::{Caller, Event, MS, Order, SECOND, Seen, TICK, name_hash};

impl World {
    /// Lets time pass up to the next turn of the master's loop, and shows it what happened.
    pub(in crate::step::sim) fn turn(&mut self) {
        let (due, before) = (self.state.due().max(self.now), self.now);
        let stall = if self.is_trouble() { self.dice.roll(20) * SECOND } else { 0 };
        let sooner = self.dice.roll(TICK / MS) * MS;
        self.now = if stall > 0 { due + stall } else { due.min(self.now + sooner) };
        self.stalled += stall;
        if stall > 0 {
            self.stalled_at = self.now;
            self.patience.values_mut().for_each(|kill_at| *kill_at += stall + TICK);
        }
        let (now, frozen_by_stall) = (self.now, stall > 0);
        let requests = self.dice.roll(20);
        for process in self.living.values_mut() {
            let waits = now.min(process.starves_until).saturating_sub(before);
            process.starved += waits / 10 * 9;
            // When the whole machine stands still, nobody beats (H7).
            if !process.is_frozen && !frozen_by_stall && now >= process.starves_until {
                process.beat = now;
                process.requests += requests;
                process.rss_kib += requests * 10;
            }
        }
        self.show_dead();
        self.show_swept();
        if self.compile.as_ref().is_some_and(|(at, _)| *at <= now)
            && let Some((_, outcome)) = self.compile.take()
        {
            self.compiled = outcome.as_ref().ok().cloned();
            self.tell(&Event::Compiled(outcome));
        }
        if self.state.is_quiet() && self.queue > 0 {
            self.tell(&Event::Knock);
        }
        self.show();
    }

    fn show_dead(&mut self) {
        let ended = |(epoch, process): (&u32, &Process)| {
            let (_, status) = process.end.filter(|(at, _)| *at <= self.now)?;
            Some((*epoch, status))
        };
        let dead: Vec<(u32, Status)> = self.living.iter().filter_map(ended).collect();
        for (epoch, status) in dead {
            self.tell(&Event::Exited { epoch, status, note: String::new() });
        }
    }

    fn show(&mut self) {
        let now = self.now;
        let (load, lag) = (self.load, self.lag);
        let rules_of = &self.rules_of;
        let mut children = Vec::new();
        for process in self.living.values_mut() {
            let is_ready = process.ready_at <= now && process.born < now;
            if is_ready {
                process.shown_ready.get_or_insert(now);
                if process.is_going {
                    process.shown_going.get_or_insert(now);
                }
            }
            let slots = u64::from(rules_of[&process.birth.generation].slots);
            children.push(Seen {
                epoch: process.birth.epoch,
                is_ready,
                beat: process.beat,
                starved: if now > process.beat + ASK { process.starved } else { 0 },
                is_going: is_ready && (process.is_going || process.told.is_some()),
                took_queue: process.took_queue,
                load: u32::try_from(slots * load / 100).unwrap(),
                waiting: u32::from(load > 100),
                lag,
                requests: process.requests,
                rss_kib: process.rss_kib,
                is_leaking: false,
            });
        }
        self.tell(&Event::Seen { children, queue: self.queue });
        self.show_hosts();
    }

    /// Something goes wrong, or somebody wants something.
    pub(in crate::step::sim) fn disturb(&mut self) {
        let epochs: Vec<u32> = self.living.keys().copied().collect();
        let count = u64::try_from(epochs.len()).unwrap();
        let chosen = (count > 0).then(|| epochs[usize::try_from(self.dice.roll(count)).unwrap()]);
        let now = self.now;
        let number = u8::try_from(1 + self.dice.roll(31)).unwrap();
        let is_gentle = self.trouble == 0;
        self.starve(chosen);
        self.go(chosen);
        match self.dice.roll(22) {
            0 | 1 if !is_gentle => {
                // Whoever hangs in the kernel ends when that lets go.
                let chosen = chosen.and_then(|epoch| self.living.get_mut(&epoch));
                if let Some(process) = chosen.filter(|process| process.killed.is_none()) {
                    process.end = Some((now, Status::Signal { number, core: false }));
                }
            }
            kind @ (2 | 15 | 21) if self.gathers_ghosts() || (kind == 2 && !is_gentle) => {
                if let Some(process) = chosen.and_then(|epoch| self.living.get_mut(&epoch)).filter(|p| !p.is_frozen) {
                    (process.is_frozen, process.frozen_at, process.starves_until) = (true, now, 0);
                }
            }
            3 => self.order(Order::More),
            4 => self.order(Order::Fewer),
            5 => self.order(Order::Reload(None)),
            6 => {
                let caller = self.call();
                self.order(Order::Reload(Some(caller)));
            }
            7 => {
                let (caller, workers) = (self.call(), self.dice.small(9));
                self.order(Order::Scale { workers, caller });
            }
            8 => self.order(Order::ReopenLogs),
            9 => self.queue = [0, 0, 1, 20][usize::try_from(self.dice.roll(4)).unwrap()],
            10 => self.load = [0, 0, 10, 50, 90, 150][usize::try_from(self.dice.roll(6)).unwrap()],
            11 => self.lag = self.dice.roll(2) * 50 * MS,
            12 => self.show(),
            // A stranger's end, or a child's that was buried: never any effect. As little has an old validation's.
            13 => self.tell(&Event::Exited { epoch: 1_000_000, status: Status::Code(3), note: String::new() }),
            16 | 17 => self.want(),
            18 => self.work(),
            19 => {
                let (caller, name) = (self.call(), self.dice.name());
                let order = Order::Load { name: name_hash(&name), caller };
                self.note_load(&name);
                self.order(order);
            }
            20 => {
                let (caller, name) = (self.call(), self.dice.name());
                self.note_load(&name);
                self.order(Order::Unload { name: name_hash(&name), caller });
            }
            14 if self.compile.is_none() => self.tell(&Event::Compiled(Ok(self.rules.into()))),
            _ => {}
        }
    }

    /// The machine may have no processor for somebody for a while: one that has just beaten, since what is granted has an end.
    fn starve(&mut self, chosen: Option<u32>) {
        let now = self.now;
        let process = chosen.and_then(|epoch| self.living.get_mut(&epoch)).filter(|process| process.beat == now);
        if let Some(process) = process
            && self.hunger.roll(20) == 0
        {
            let limit = self.rules_of[&process.birth.generation].hang_timeout;
            let time = self.hunger.roll(3 * limit / MS) * MS;
            process.starves_until = now + time;
            self.sum.starved += u32::from(time > limit);
        }
    }

    /// A worker may go by itself: somebody has told it so, or it cannot go on. A slow one overruns its time.
    fn go(&mut self, chosen: Option<u32>) {
        let now = self.now;
        let is_well = |process: &&mut Process| {
            let is_well = process.shown_ready.is_some() && process.told.is_none() && process.end.is_none();
            is_well && !process.is_frozen && !process.is_going && process.birth.kind == Kind::Worker
        };
        if let Some(process) = chosen.and_then(|epoch| self.living.get_mut(&epoch)).filter(is_well)
            && self.wander.roll(25) == 0
        {
            let drain = self.rules_of[&process.birth.generation].drain;
            let late = if self.trouble > 0 && self.wander.roll(10) == 0 { 3600 * SECOND } else { 0 };
            process.is_going = true;
            process.end = Some((now + self.wander.roll(drain / MS + 1) * MS + late, Status::Code(0)));
            self.sum.goers += 1;
        }
    }

    fn call(&mut self) -> Caller {
        self.last_caller += 1;
        self.callers.insert(self.last_caller, self.now);
        self.last_caller
    }

    fn order(&mut self, order: Order) {
        let is_stop = matches!(order, Order::Term | Order::Interrupt | Order::Stop | Order::StopNow);
        self.is_ordered |= is_stop;
        if is_stop && self.stop_began.is_none() {
            self.stop_began = Some(self.now);
        }
        self.tell(&Event::Order(order));
    }

    pub(in crate::step::sim) fn stop_at_random(&mut self) {
        let all = [Order::Term, Order::Interrupt, Order::Stop, Order::StopNow];
        let order = all[usize::try_from(self.dice.roll(4)).unwrap()];
        self.order(order);
    }
}
