//! What a predecessor that died left behind: its own end is recorded, its children are ended.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use evergate_core::exit::{ExitRecord, Initiator, Kind, Status};
use evergate_sys::{Pid, Signal, age_ms, exit_of, is_alive, kill_if_same, unix_ms};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};

use crate::burial::status;
use crate::runfile::{Run, RunChild};
use crate::state_writer::StateWriter;
use crate::step::{Ns, SECOND};
use crate::{strays, talk};

/// How long an end whose status is not there yet is asked for: whoever inherited the process has not reaped it.
const STATUS_TIME: Ns = SECOND;
/// How long the last of them are waited for after a KILL at the end of a run.
const END_TIME: Duration = Duration::from_secs(1);

/// Children of a master that is gone. Each is named by pid and start time, so that no other process is meant. Each gets
/// an exit record when it has ended.
#[derive(Debug, Default)]
pub(crate) struct Orphans {
    left: Vec<Orphan>,
    /// Ends that are on record and not counted yet: the first are found before there is a board.
    ends: Vec<(Kind, Initiator)>,
}

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
    /// To be called while holding the lock: whoever wrote the run file is dead then. A file that is damaged is no reason
    /// not to start.
    ///
    /// # Errors
    /// What stands in the run file's place is no file.
    pub(crate) fn find(folder: &Path, hosts: &Path, writer: &mut StateWriter) -> io::Result<Self> {
        let (mut run, note) = match Run::read(folder) {
            Ok(Some(run)) => (run, "found by the next start; nobody saw the end"),
            Ok(None) => return Ok(Self::default()),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(error),
            Err(error) => {
                let path = Run::path(folder);
                talk::say(&format!("cannot read the run file of the last run, {}: {error}", path.display()));
                (Run::salvage(folder), "found by the next start, which could not read its run file")
            }
        };
        // On a full disk the file is older than its run.
        for stray in strays::find(hosts) {
            let is_named = |child: &RunChild| (child.pid, child.start_ticks) == (stray.pid, stray.start_ticks);
            if !run.children.iter().any(is_named) {
                run.children.push(stray);
            }
        }
        let mut orphans = Self::default();
        orphans.append(writer, &epitaph(&run, note, folder));
        for child in run.children {
            // What names no process or no kind of child is no line of ours.
            let (Some(pid), Some(kind)) = (Pid::from_raw(child.pid), Kind::from_name(&child.kind)) else { continue };
            let process = pidfd_open(pid, PidfdFlags::empty()).ok();
            let orphan = Orphan { pid, kind, child, process, gone_since: None };
            if is_alive(pid, orphan.child.start_ticks) {
                orphans.left.push(orphan);
            } else {
                orphans.append(
                    writer,
                    &record(&orphan, Status::Unknown, "ended between its master's end and the next start"),
                );
            }
        }
        let pid = if run.pid > 0 { format!(" (pid {})", run.pid) } else { String::new() };
        let count = orphans.left.len();
        let left = if count == 1 { "1 of its processes is".into() } else { format!("{count} of its processes are") };
        talk::say(&format!("the last run{pid} was not ended cleanly; {left} still there"));
        Ok(orphans)
    }

    /// The ends that were recorded since this was last asked, to be counted.
    pub(crate) fn take_ends(&mut self) -> Vec<(Kind, Initiator)> {
        std::mem::take(&mut self.ends)
    }

    fn append(&mut self, writer: &mut StateWriter, record: &ExitRecord) {
        self.ends.push((record.kind, record.initiator));
        writer.exit(record);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// Signals those that are left. They are draining anyway; TERM is for one that did not notice.
    pub(crate) fn signal(&mut self, signal: Signal) {
        for Orphan { pid, child, .. } in &self.left {
            if let Err(error) = kill_if_same(*pid, child.start_ticks, signal) {
                talk::say(&format!("cannot signal process {}: {error}", pid.as_raw_nonzero()));
            }
        }
    }

    /// Records those that have ended since the last look.
    pub(crate) fn collect(&mut self, writer: &mut StateWriter, now: Ns) {
        let mut records = Vec::new();
        self.left.retain_mut(|orphan| {
            if is_alive(orphan.pid, orphan.child.start_ticks) {
                return true;
            }
            let since = *orphan.gone_since.get_or_insert(now);
            let exit = orphan.process.as_ref().and_then(|process| exit_of(process).ok().flatten());
            if exit.is_none() && orphan.process.is_some() && now.saturating_sub(since) < STATUS_TIME {
                return true;
            }
            records.push(record(orphan, status(exit), "outlived its master; what it had in flight is not known"));
            false
        });
        records.iter().for_each(|record| self.append(writer, record));
    }

    /// Records the last of them, at the end of the run that has killed them.
    pub(crate) fn finish(&mut self, writer: &mut StateWriter) {
        let end = Instant::now() + END_TIME;
        while !self.is_empty() && Instant::now() < end {
            let pause = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            let processes = self.left.iter().filter(|orphan| orphan.gone_since.is_none());
            let mut fds: Vec<_> =
                processes.filter_map(|orphan| Some(PollFd::new(orphan.process.as_ref()?, PollFlags::IN))).collect();
            let _ = poll(&mut fds, Some(&pause));
            self.collect(writer, evergate_sys::monotonic_ns());
        }
        // Whoever is still without a status gets none.
        self.collect(writer, Ns::MAX);
    }
}

fn record(orphan: &Orphan, status: Status, note: &str) -> ExitRecord {
    let child = &orphan.child;
    ExitRecord {
        at_ms: unix_ms(),
        slot: child.slot,
        upstream: child.name.clone(),
        epoch: child.epoch,
        generation: child.generation,
        age_ms: age_ms(child.start_ticks),
        phase: "unknown".into(),
        note: note.into(),
        ..ExitRecord::new(orphan.kind, child.pid, status, Initiator::Orphan)
    }
}

/// The predecessor's exit record: nobody reaped it, so nothing is known but when it last showed that it was there.
fn epitaph(run: &Run, note: &str, folder: &Path) -> ExitRecord {
    let at_ms = unix_ms();
    let beat_age = Run::last_beat(folder).and_then(|beat| SystemTime::now().duration_since(beat).ok());
    let beat_age_ms = beat_age.and_then(|age| u64::try_from(age.as_millis()).ok());
    ExitRecord {
        at_ms,
        generation: run.generation,
        // To its last beat; it may have lived up to a second longer.
        age_ms: match run.started_unix_ms {
            0 => 0,
            started => at_ms.saturating_sub(beat_age_ms.unwrap_or(0)).saturating_sub(started),
        },
        last_beat_ms: beat_age_ms,
        phase: run.phase.clone(),
        note: note.into(),
        ..ExitRecord::new(Kind::Master, run.pid, Status::Unknown, Initiator::Unknown)
    }
}
