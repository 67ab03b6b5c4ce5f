//! What a predecessor that died left behind: its own end is recorded, its children are ended.

use std::path::Path;
use std::time::SystemTime;

use evergate_core::exit::{ExitRecord, Initiator, Kind, Status};
use evergate_sys::{Pid, Signal, is_alive, kill_if_same, unix_ms};

use crate::exits::Exits;
use crate::runfile::Run;
use crate::talk;

/// Children of a master that is gone. Each is named by pid and start time, so that no other process is meant.
#[derive(Debug, Default)]
pub(crate) struct Orphans(Vec<(Pid, u64)>);

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
        let record = epitaph(&run, folder);
        if let Err(error) = exits.append(&record) {
            talk::say(&format!("cannot record the end of the last run: {error}"));
        }
        let orphans: Vec<_> = run
            .children
            .iter()
            .filter_map(|child| Pid::from_raw(child.pid).map(|pid| (pid, child.start_ticks)))
            .filter(|(pid, ticks)| is_alive(*pid, *ticks))
            .collect();
        talk::say(&format!(
            "the last run (pid {}) was not ended cleanly; {} of its processes are still there",
            run.pid,
            orphans.len()
        ));
        Self(orphans)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Signals those that are left. They are draining anyway; TERM is for one that did not notice.
    pub(crate) fn signal(&mut self, signal: Signal) {
        self.0.retain(|(pid, ticks)| match kill_if_same(*pid, *ticks, signal) {
            Ok(is_there) => is_there,
            Err(error) => {
                talk::say(&format!("cannot signal process {}: {error}", pid.as_raw_nonzero()));
                false
            }
        });
    }
}

/// The predecessor's exit record: nobody reaped it, so nothing is known but when it last showed that it was there.
fn epitaph(run: &Run, folder: &Path) -> ExitRecord {
    let at_ms = unix_ms();
    let beat_age = Run::last_beat(folder).and_then(|beat| SystemTime::now().duration_since(beat).ok());
    let beat_age_ms = beat_age.and_then(|age| u64::try_from(age.as_millis()).ok());
    ExitRecord {
        at_ms,
        kind: Kind::Master,
        pid: run.pid,
        slot: 0,
        epoch: 0,
        generation: run.generation,
        status: Status::Unknown,
        initiator: Initiator::Unknown,
        // To its last beat; it may have lived up to a second longer.
        age_ms: at_ms.saturating_sub(beat_age_ms.unwrap_or(0)).saturating_sub(run.started_unix_ms),
        last_beat_ms: beat_age_ms,
        phase: run.phase.clone(),
        rss_max_kib: 0,
        cpu_ms: 0,
        note: "found by the next start; nobody saw the end".into(),
        connections_idle: 0,
        lost: Vec::new(),
    }
}
