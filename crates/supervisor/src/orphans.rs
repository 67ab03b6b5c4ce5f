//! What a predecessor that died left behind: its own end is recorded, its children are ended.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use evergate_core::exit::{ExitRecord, Initiator, Kind, Status};
use evergate_sys::{Pid, Signal, age_ms, exit_of, is_alive, kill_if_same, unix_ms};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};

use crate::burial::status;
use crate::exits::Exits;
use crate::runfile::{Run, RunChild};
use crate::step::{Ns, SECOND};
use crate::talk;

/// How long an end whose status is not there yet is asked for: whoever inherited the process has not reaped it.
const STATUS_TIME: Ns = SECOND;
/// How long the last of them are waited for after a KILL at the end of a run.
const END_TIME: Duration = Duration::from_secs(1);

/// Children of a master that is gone. Each is named by pid and start time, so that no other process is meant. Each gets
/// an exit record when it has ended.
#[derive(Debug, Default)]
pub(crate) struct Orphans(Vec<Orphan>);

#[derive(Debug)]
struct Orphan {
    pid: Pid,
    kind: Kind,
    child: RunChild,
    /// Since Linux 6.15 it tells the status of a process that somebody else has reaped.
    process: Option<OwnedFd>,
    gone_since: Option<Ns>,
}

impl Orphans {
    /// To be called while holding the lock: whoever wrote the run file is dead then.
    pub(crate) fn find(folder: &Path, exits: &mut Exits) -> Self {
        let run = match Run::read(folder) {
            Ok(Some(run)) => run,
            Ok(None) => return Self::default(),
            Err(error) => {
                talk::say(&format!("cannot read the run file of the last run: {error}"));
                return Self::default();
            }
        };
        append(exits, &epitaph(&run, folder));
        let mut orphans = Vec::new();
        for child in run.children {
            // What names no process or no kind of child is no line of ours.
            let (Some(pid), Some(kind)) = (Pid::from_raw(child.pid), Kind::from_name(&child.kind)) else { continue };
            let process = pidfd_open(pid, PidfdFlags::empty()).ok();
            let orphan = Orphan { pid, kind, child, process, gone_since: None };
            if is_alive(pid, orphan.child.start_ticks) {
                orphans.push(orphan);
            } else {
                append(exits, &record(&orphan, Status::Unknown, "ended between its master's end and the next start"));
            }
        }
        talk::say(&format!(
            "the last run (pid {}) was not ended cleanly; {} still there",
            run.pid,
            if orphans.len() == 1 {
                "1 of its processes is".into()
            } else {
                format!("{} of its processes are", orphans.len())
            }
        ));
        Self(orphans)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Signals those that are left. They are draining anyway; TERM is for one that did not notice.
    pub(crate) fn signal(&mut self, signal: Signal) {
        for Orphan { pid, child, .. } in &self.0 {
            if let Err(error) = kill_if_same(*pid, child.start_ticks, signal) {
                talk::say(&format!("cannot signal process {}: {error}", pid.as_raw_nonzero()));
            }
        }
    }

    /// Records those that have ended since the last look.
    pub(crate) fn collect(&mut self, exits: &mut Exits, now: Ns) {
        self.0.retain_mut(|orphan| {
            if is_alive(orphan.pid, orphan.child.start_ticks) {
                return true;
            }
            let since = *orphan.gone_since.get_or_insert(now);
            let exit = orphan.process.as_ref().and_then(|process| exit_of(process).ok().flatten());
            if exit.is_none() && orphan.process.is_some() && now.saturating_sub(since) < STATUS_TIME {
                return true;
            }
            append(exits, &record(orphan, status(exit), "outlived its master; what it had in flight is not known"));
            false
        });
    }

    /// Records the last of them, at the end of the run that has killed them.
    pub(crate) fn finish(&mut self, exits: &mut Exits) {
        let end = Instant::now() + END_TIME;
        while !self.is_empty() && Instant::now() < end {
            let pause = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            let processes = self.0.iter().filter(|orphan| orphan.gone_since.is_none());
            let mut fds: Vec<_> =
                processes.filter_map(|orphan| Some(PollFd::new(orphan.process.as_ref()?, PollFlags::IN))).collect();
            let _ = poll(&mut fds, Some(&pause));
            self.collect(exits, evergate_sys::monotonic_ns());
        }
        // Whoever is still without a status gets none.
        self.collect(exits, Ns::MAX);
    }
}

fn append(exits: &mut Exits, record: &ExitRecord) {
    if let Err(error) = exits.append(record) {
        talk::say(&format!("cannot record the end of process {}: {error}", record.pid));
    }
}

fn record(orphan: &Orphan, status: Status, note: &str) -> ExitRecord {
    let child = &orphan.child;
    ExitRecord {
        at_ms: unix_ms(),
        slot: child.slot,
        epoch: child.epoch,
        generation: child.generation,
        age_ms: age_ms(child.start_ticks),
        phase: "unknown".into(),
        note: note.into(),
        ..ExitRecord::new(orphan.kind, child.pid, status, Initiator::Orphan)
    }
}

/// The predecessor's exit record: nobody reaped it, so nothing is known but when it last showed that it was there.
fn epitaph(run: &Run, folder: &Path) -> ExitRecord {
    let at_ms = unix_ms();
    let beat_age = Run::last_beat(folder).and_then(|beat| SystemTime::now().duration_since(beat).ok());
    let beat_age_ms = beat_age.and_then(|age| u64::try_from(age.as_millis()).ok());
    ExitRecord {
        at_ms,
        generation: run.generation,
        // To its last beat; it may have lived up to a second longer.
        age_ms: at_ms.saturating_sub(beat_age_ms.unwrap_or(0)).saturating_sub(run.started_unix_ms),
        last_beat_ms: beat_age_ms,
        phase: run.phase.clone(),
        note: "found by the next start; nobody saw the end".into(),
        ..ExitRecord::new(Kind::Master, run.pid, Status::Unknown, Initiator::Unknown)
    }
}
