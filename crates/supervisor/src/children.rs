//! Starting children: what each inherits, and who is running.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use evergate_board::{Board, Claim, Phase, monotonic_ns};
use evergate_core::exit::Kind;
use evergate_core::inherit;
use evergate_sys::{Exe, Exit, Pid, Signal, Spawn, Status, start_ticks};

use crate::hosts::Hosts;
use crate::listen::Listener;
use crate::oom::Finding;
use crate::step::{Birth, name};

/// Everything that is open for children to inherit; all of it close-on-exec.
#[derive(Debug)]
pub(crate) struct Estate {
    /// Our own program, of the build that this master is.
    pub(crate) exe: OwnedFd,
    pub(crate) board: Board,
    /// The sealed configuration of each generation of which children may still be born.
    pub(crate) configs: BTreeMap<u32, OwnedFd>,
    /// Both ends, so that the pipe breaks when this process ends and not before.
    pub(crate) life: (OwnedFd, OwnedFd),
    pub(crate) kick: OwnedFd,
    /// Both ends: by the other one the clerk knows whether anybody is left who writes records, and the master does.
    pub(crate) writers: (OwnedFd, OwnedFd),
    pub(crate) nothing: OwnedFd,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) admin: Option<Listener>,
    pub(crate) hosts: Hosts,
    pub(crate) env: Vec<(OsString, OsString)>,
}

/// A child that runs, or has ended and is not buried yet.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) birth: Birth,
    pub(crate) pid: Pid,
    pub(crate) ticks: u64,
    pub(crate) spawned_ns: u64,
    /// Once it was reaped: its number is not its own any more.
    pub(crate) exit: Option<Exit>,
    /// The signals that we sent it, each once.
    pub(crate) sent: Vec<&'static str>,
    /// What tells who sent the KILL that ended it.
    pub(crate) finding: Option<Finding>,
    /// What it was doing when it was given up, killed and not to be buried yet.
    pub(crate) given_up: Option<Phase>,
}

impl Running {
    /// Whether it was ended by a KILL that we did not send.
    pub(crate) fn was_killed_by_others(&self) -> bool {
        let is_killed = |exit: Exit| matches!(exit.status, Status::Signal { number: 9, .. });
        self.exit.is_some_and(is_killed) && !self.sent.contains(&"KILL")
    }

    /// Whether it is about to be that: it has not been reaped, and a KILL that is not ours has reached it.
    pub(crate) fn is_being_killed(&self) -> bool {
        self.exit.is_none() && !self.sent.contains(&"KILL") && evergate_sys::is_being_killed(self.pid)
    }
}

/// By epoch.
pub(crate) type Children = BTreeMap<u32, Running>;

impl Estate {
    /// Claims the child's row and starts it.
    pub(crate) fn start(&self, birth: Birth) -> io::Result<Running> {
        let row = self.board.child(birth.row).ok_or_else(|| io::Error::other("the board has no such row"))?;
        let Birth { kind, slot, epoch, generation, .. } = birth;
        let spawned_ns = monotonic_ns();
        row.claim(&Claim { kind, slot, epoch, generation, spawned_ns });
        if let Some(host) = self.board.host(slot).filter(|_| kind == Kind::Host) {
            host.bear(epoch, birth.row);
        }
        let outcome = self.exec(birth);
        if outcome.is_err() {
            self.board.bury(birth.row);
        }
        let pid = outcome?;
        // Not reaped yet, so there is a start time even if it has ended.
        let ticks = start_ticks(pid).unwrap_or(0);
        row.set_pid(pid.as_raw_nonzero().get());
        row.set_start_ticks(ticks);
        Ok(Running { birth, pid, ticks, spawned_ns, exit: None, sent: Vec::new(), finding: None, given_up: None })
    }

    /// A host's upstream; empty for others.
    pub(crate) fn upstream(&self, birth: Birth) -> &str {
        if birth.kind == Kind::Host { self.hosts.name(birth.slot) } else { "" }
    }

    /// What a child is called: a host by its upstream.
    pub(crate) fn name(&self, birth: Birth) -> String {
        match birth.kind {
            Kind::Host => format!("host {}", self.upstream(birth)),
            _ => name(birth.kind, birth.slot),
        }
    }

    fn exec(&self, birth: Birth) -> io::Result<Pid> {
        // A description of its own, because children read the file and must not share a position.
        let config = self.configs.get(&birth.generation);
        let config = config.ok_or_else(|| io::Error::other("its generation's configuration is gone"))?;
        let config = evergate_sys::reopen_read_only(config)?;
        let (writers, listeners): (_, Vec<BorrowedFd<'_>>) = match birth.kind {
            Kind::Clerk => (&self.writers.0, self.admin.iter().map(AsFd::as_fd).collect()),
            Kind::Host => (&self.writers.1, vec![self.hosts.listener(birth.slot)?]),
            Kind::Master | Kind::Worker | Kind::Runner => {
                (&self.writers.1, self.listeners.iter().map(AsFd::as_fd).collect())
            }
        };
        let mut fds = vec![
            (self.nothing.as_fd(), 0),
            (self.board.fd(), inherit::BOARD),
            (config.as_fd(), inherit::CONFIG),
            (self.life.0.as_fd(), inherit::LIFE),
            (self.kick.as_fd(), inherit::KICK),
            (writers.as_fd(), inherit::WRITERS),
        ];
        fds.extend(listeners.iter().copied().zip(inherit::LISTENERS..));
        let mut args = vec![OsString::from(birth.kind.name())];
        let count = u32::try_from(listeners.len()).unwrap_or(u32::MAX);
        for (flag, value) in
            [("--row", birth.row), ("--epoch", birth.epoch), ("--generation", birth.generation), ("--listeners", count)]
        {
            args.extend([flag.into(), value.to_string().into()]);
        }
        if birth.kind == Kind::Host {
            args.extend(["--name".into(), self.hosts.name(birth.slot).into()]);
        }
        evergate_sys::spawn(&Spawn {
            exe: Exe::Descriptor(self.exe.as_fd()),
            argv0: OsStr::new(&format!("evergate: {}", self.name(birth))),
            args: &args,
            env: &self.env,
            fds: &fds,
            ignored: IGNORED,
            own_group: false,
            // It drains when its master is gone.
            dies_with_us: false,
            confine: None,
        })
    }
}

/// Signals that must not end a child, whoever sends them: a Ctrl-C or a closed terminal reaches every process of
/// it, and who tells us to reopen logs (USR1) by the name of the processes, or tries USR2, means the master. The clerk hears USR1
/// once it can; one that boots opens its files anyway.
const IGNORED: &[Signal] = &[Signal::INT, Signal::HUP, Signal::USR1, Signal::USR2];
