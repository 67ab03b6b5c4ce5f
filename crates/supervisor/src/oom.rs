//! Whether a KILL was the kernel's out-of-memory killer: its counter in our own memory cgroup.
//!
//! The wait status is the same for both (measured: SUPERVISION.md E13), but the kernel raises the counter of the
//! victim's cgroup before it sends the signal (mm/oom_kill.c, `__oom_kill_process`), so that a victim which was reaped
//! was counted before. The counter names nobody: whom it meant is a conclusion, and one that is drawn only when nobody
//! else can have been meant.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use evergate_core::exit::Initiator;
use evergate_core::{cgroup, count};

use crate::step::{Ns, SECOND};

/// A victim may need this long from the signal to its end: its memory is given back first.
const DYING: Ns = 10 * SECOND;

/// The counter.
#[derive(Debug)]
pub(crate) struct Oom {
    counter: Result<Counter, String>,
    ledger: Ledger,
}

#[derive(Debug)]
struct Counter {
    file: File,
    name: &'static str,
    /// Who else lives in the cgroup.
    processes: PathBuf,
    last: u64,
}

/// What the counter says about one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// Kills that no earlier end accounts for; none without a counter.
    pub(crate) kills: Option<u64>,
    /// In words.
    pub(crate) evidence: String,
    /// What follows, if anything does.
    pub(crate) initiator: Option<Initiator>,
}

impl Oom {
    /// Finds the counter of the cgroup that this process is in, which its children are in as well.
    pub(crate) fn open() -> Self {
        Self { counter: Counter::find(), ledger: Ledger::default() }
    }

    /// Reads the counter; to be called in every turn, so that a kill's time is known.
    pub(crate) fn sample(&mut self, now: Ns) {
        if let Ok(counter) = &mut self.counter
            && let Some(count) = counter.read()
        {
            self.ledger.note(count.saturating_sub(counter.last), now);
            counter.last = count;
        }
    }

    /// Judges an end by a KILL that nobody of ours sent. `suspects` counts the processes of ours that ended like that in
    /// this turn or are about to, this one included; `is_ours` tells our processes from others in the cgroup.
    pub(crate) fn judge(&mut self, suspects: u64, is_ours: impl Fn(i32) -> bool, now: Ns) -> Finding {
        self.sample(now);
        let counter = match &self.counter {
            Ok(counter) => counter,
            Err(why) => {
                return Finding {
                    kills: None,
                    evidence: format!("{why}, so that an out-of-memory kill cannot be told from any other"),
                    initiator: None,
                };
            }
        };
        let strangers = counter.processes().into_iter().filter(|pid| !is_ours(*pid)).count();
        let strangers = u64::try_from(strangers).unwrap_or(u64::MAX);
        let (kills, initiator) = self.ledger.judge(suspects, strangers, now);
        let name = counter.name;
        let evidence = match kills {
            0 => format!("{name} of our cgroup counted no out-of-memory kill"),
            _ => format!(
                "{name} of our cgroup counted {} more than earlier ends account for; {} could have been meant",
                count(kills, "out-of-memory kill"),
                count(suspects.saturating_add(strangers), "process"),
            ),
        };
        Finding { kills: Some(kills), evidence, initiator }
    }
}

/// Kills that were counted and not yet found among the dead.
#[derive(Debug, Default)]
struct Ledger {
    open: Vec<Open>,
}

#[derive(Debug)]
struct Open {
    at: Ns,
    /// More ends than kills claim it, so that it proves nothing for one of them.
    is_shared: bool,
}

impl Ledger {
    fn note(&mut self, kills: u64, now: Ns) {
        self.open.retain(|open| now.saturating_sub(open.at) < DYING);
        // A counter that jumps by more than the board has rows is nonsense; the memory for it is not taken.
        let kills = usize::try_from(kills).unwrap_or(usize::MAX).min(1024);
        self.open.extend((0..kills).map(|_| Open { at: now, is_shared: false }));
    }

    /// How many kills are open, and what follows for one of the suspects.
    fn judge(&mut self, suspects: u64, strangers: u64, now: Ns) -> (u64, Option<Initiator>) {
        self.note(0, now);
        let kills = u64::try_from(self.open.len()).unwrap_or(u64::MAX);
        if kills == 0 {
            return (0, None);
        }
        if strangers == 0 && kills == suspects && self.open.iter().all(|open| !open.is_shared) {
            self.open.pop();
            return (kills, Some(Initiator::OutOfMemory));
        }
        self.open.iter_mut().for_each(|open| open.is_shared = true);
        (kills, Some(Initiator::OutOfMemorySuspected))
    }
}

impl Counter {
    fn find() -> Result<Self, String> {
        let read =
            |path: &str| std::fs::read_to_string(path).map_err(|error| format!("{path} cannot be read ({error})"));
        let (own, mounts) = (read("/proc/self/cgroup")?, read("/proc/self/mountinfo")?);
        for folder in cgroup::folders(&own, &mounts) {
            // The first is this cgroup's own, the second sums up those below it, the third is cgroup v1's.
            for name in ["memory.events.local", "memory.events", "memory.oom_control"] {
                if let Ok(counter) = Self::open(&folder, name) {
                    return Ok(counter);
                }
            }
        }
        Err("no memory cgroup counts kills here".into())
    }

    fn open(folder: &Path, name: &'static str) -> io::Result<Self> {
        let file = File::open(folder.join(name))?;
        let mut counter = Self { file, name, processes: folder.join("cgroup.procs"), last: 0 };
        counter.last = counter.read().ok_or_else(|| io::Error::other("it has no oom_kill"))?;
        Ok(counter)
    }

    fn read(&self) -> Option<u64> {
        let mut bytes = [0; 512];
        let count = self.file.read_at(&mut bytes, 0).ok()?;
        kills(std::str::from_utf8(bytes.get(..count)?).ok()?)
    }

    fn processes(&self) -> Vec<i32> {
        let text = std::fs::read_to_string(&self.processes).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }
}

/// The value of `oom_kill` among lines of a key and a value.
fn kills(text: &str) -> Option<u64> {
    cgroup::value(text, "oom_kill")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_kill_and_one_end_are_each_others() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.judge(1, 0, 1), (0, None));
        ledger.note(1, 2);
        assert_eq!(ledger.judge(1, 0, 3), (1, Some(Initiator::OutOfMemory)));
        // Accounted for: the next KILL is somebody else's.
        assert_eq!(ledger.judge(1, 0, 4), (0, None));
    }

    #[test]
    fn what_is_ambiguous_is_only_suspected() {
        // A stranger in the cgroup may have been the victim.
        let mut ledger = Ledger::default();
        ledger.note(1, 1);
        assert_eq!(ledger.judge(1, 1, 2).1, Some(Initiator::OutOfMemorySuspected));
        // One kill, two ends: neither is sure, not even when the second is found later.
        let mut ledger = Ledger::default();
        ledger.note(1, 1);
        assert_eq!(ledger.judge(2, 0, 2).1, Some(Initiator::OutOfMemorySuspected));
        assert_eq!(ledger.judge(1, 0, 3).1, Some(Initiator::OutOfMemorySuspected));
        // Two kills, two ends: both.
        let mut ledger = Ledger::default();
        ledger.note(2, 1);
        assert_eq!(ledger.judge(2, 0, 2).1, Some(Initiator::OutOfMemory));
        assert_eq!(ledger.judge(1, 0, 2).1, Some(Initiator::OutOfMemory));
        // A kill of long ago had another victim.
        let mut ledger = Ledger::default();
        ledger.note(1, 1);
        assert_eq!(ledger.judge(1, 0, 1 + DYING), (0, None));
    }

    #[test]
    fn counters_of_both_versions_are_read() {
        assert_eq!(kills("low 0\nhigh 0\nmax 4\noom 2\noom_kill 3\noom_group_kill 0\n"), Some(3));
        assert_eq!(kills("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"), Some(7));
        assert_eq!(kills("oom 2\n"), None);
    }
}
