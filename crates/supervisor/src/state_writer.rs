//! The thread that writes the files of the state folder. A disk that takes nothing and says nothing (a frozen file system,
//! a file server that is gone) holds up this thread and not the master (docs/decisions/0027-a-thread-writes-the-state-folder.md).
//!
//! While the disk answers, the master waits for each write, so that what it does comes in the same order as if it wrote by
//! itself: the end of a child is on record before its successor starts. When a write takes longer than [`PATIENCE`], what is to
//! be written waits in memory until the disk goes on, and the master waits for nothing.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use evergate_core::exit::ExitRecord;

use crate::exits::Exits;
use crate::runfile::Run;
use crate::talk;

/// How long the master waits for a write, once; not again before the disk has taken all that waits.
const PATIENCE: Duration = Duration::from_millis(100);
/// How many times as long it waits for all the writes of one turn of its loop: many may have ended at once, and the disk be slow.
const TURN: u32 = 5;
/// How late a disk must be for the operator to be told.
const WORTH_A_WORD: Duration = Duration::from_secs(2);
/// Most bytes of exit records that wait in memory: as many as a file holds. Those after them are lost, since the first ones
/// tell more.
const BYTES_MAX: usize = 4 << 20;

/// The master's end of it.
#[derive(Debug)]
pub(crate) struct StateWriter {
    desk: Arc<Desk>,
    patience: Duration,
    /// How long this turn has waited.
    waited: Duration,
    /// A write that was waited for took too long, and not all that waits has been written since.
    is_late: bool,
    /// Since when the disk has hung of which the operator was told.
    told: Option<Instant>,
}

/// Between the two threads.
#[derive(Debug, Default)]
struct Desk {
    state: Mutex<State>,
    /// There is work, or there is no more of it.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    work: Work,
    /// Bytes of the exit records in `work`.
    bytes: usize,
    /// Since when the thread is at work.
    busy_since: Option<Instant>,
    /// What went wrong. The thread itself says nothing: standard error has one owner.
    troubles: Vec<String>,
}

/// What is to be written, in this order: a run file never lacks a child whose end is not on record yet.
#[derive(Debug, Default)]
struct Work {
    /// With the pid of each.
    exits: VecDeque<(i32, String)>,
    /// The newest.
    run: Option<Run>,
    is_touch: bool,
    is_end: bool,
}

impl Work {
    fn is_empty(&self) -> bool {
        self.exits.is_empty() && self.run.is_none() && !self.is_touch && !self.is_end
    }
}

impl StateWriter {
    /// Starts the thread. Signals must be blocked by now: they are the master's.
    pub(crate) fn start(folder: PathBuf, mut exits: Exits) -> io::Result<Self> {
        Self::with(PATIENCE, move |work| write(&folder, &mut exits, work))
    }

    fn with(patience: Duration, write: impl FnMut(Work) -> Vec<String> + Send + 'static) -> io::Result<Self> {
        let desk = Arc::new(Desk::default());
        let theirs = desk.clone();
        Builder::new().name("state-writer".into()).stack_size(128 << 10).spawn(move || serve(&theirs, write))?;
        Ok(Self { desk, patience, waited: Duration::ZERO, is_late: false, told: None })
    }

    /// Appends an exit record.
    pub(crate) fn exit(&mut self, record: &ExitRecord) {
        let line = record.to_json();
        let mut state = self.desk.lock();
        if state.bytes.saturating_add(line.len()) > BYTES_MAX {
            state.troubles.push(format!("cannot record the end of process {}: too many wait for the disk", record.pid));
        } else {
            state.bytes = state.bytes.saturating_add(line.len());
            state.work.exits.push_back((record.pid, line));
        }
        drop(state);
        self.settle();
    }

    /// Replaces the run file.
    pub(crate) fn run(&mut self, run: Run) {
        self.desk.lock().work.run = Some(run);
        self.settle();
    }

    /// Shows by the run file's time that the run is still there; waits for nothing.
    pub(crate) fn touch(&mut self) {
        self.desk.lock().work.is_touch = true;
        self.desk.changed.notify_all();
    }

    /// To be called in every turn of the loop: says what has gone wrong meanwhile.
    pub(crate) fn turn(&mut self) {
        self.waited = Duration::ZERO;
        self.look();
    }

    fn look(&mut self) {
        let mut state = self.desk.lock();
        let troubles = std::mem::take(&mut state.troubles);
        let (since, is_idle) = (state.busy_since, state.is_idle());
        drop(state);
        troubles.iter().for_each(|trouble| talk::say(trouble));
        self.is_late &= !is_idle;
        if let Some(before) = self.told.take_if(|before| since != Some(*before)) {
            talk::say(&format!("the disk of the state folder goes on after {} ms", before.elapsed().as_millis()));
        }
        if let Some(since) = since.filter(|since| self.told.is_none() && since.elapsed() >= WORTH_A_WORD) {
            self.told = Some(since);
            let age = since.elapsed().as_millis();
            talk::say(&format!(
                "the disk of the state folder has taken nothing for {age} ms; what is for it waits in memory"
            ));
        }
    }

    /// The end of the run: all is written, and the run file removed, within this time. Otherwise the operator is told
    /// so; the thread goes on for as long as this process is there.
    pub(crate) fn close(&mut self, limit: Duration) {
        self.desk.lock().work.is_end = true;
        self.desk.changed.notify_all();
        let is_done = self.await_idle(limit);
        let lost = self.desk.lock().work.exits.len();
        self.look();
        if !is_done {
            talk::say(&format!(
                "the disk of the state folder takes nothing; the end does not wait for it: exit records ({lost}, and those under way) may be \
                 lost, and the next start may find a run that was not ended cleanly"
            ));
        }
    }

    /// Has the thread work, and waits for it if it was not late before.
    fn settle(&mut self) {
        self.desk.changed.notify_all();
        let (began, left) = (Instant::now(), (TURN * self.patience).saturating_sub(self.waited));
        self.is_late = self.is_late || !self.await_idle(left.min(self.patience));
        self.waited = self.waited.saturating_add(began.elapsed());
        self.look();
    }

    /// Whether all is done in time.
    fn await_idle(&self, limit: Duration) -> bool {
        let waited = self.desk.changed.wait_timeout_while(self.desk.lock(), limit, |state| !state.is_idle());
        waited.unwrap_or_else(PoisonError::into_inner).0.is_idle()
    }
}

impl Desk {
    /// What is under the lock is whole at any time: nobody fails while holding it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_idle(&self) -> bool {
        self.work.is_empty() && self.busy_since.is_none()
    }
}

/// The thread: it ends with the run.
fn serve(desk: &Desk, mut write: impl FnMut(Work) -> Vec<String>) {
    let mut is_end = false;
    while !is_end {
        let waited = desk.changed.wait_while(desk.lock(), |state| state.work.is_empty());
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let work = std::mem::take(&mut state.work);
        (state.bytes, state.busy_since) = (0, Some(Instant::now()));
        drop(state);
        is_end = work.is_end;
        let troubles = write(work);
        let mut state = desk.lock();
        state.troubles.extend(troubles);
        state.busy_since = None;
        drop(state);
        desk.changed.notify_all();
    }
}

fn write(folder: &Path, exits: &mut Exits, work: Work) -> Vec<String> {
    let mut troubles = Vec::new();
    for (pid, line) in &work.exits {
        if let Err(error) = exits.append(line) {
            troubles.push(format!("cannot record the end of process {pid}: {error}"));
        }
    }
    if let Some(Err(error)) = work.run.map(|run| run.write(folder)) {
        troubles.push(format!("cannot write the run file: {error}"));
    }
    if work.is_touch {
        Run::touch(folder);
    }
    if work.is_end {
        Run::remove(folder);
    }
    troubles
}

#[cfg(test)]
mod tests {
    use super::*;
    use evergate_core::exit::{Initiator, Kind, Status};
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    /// What the thread was given, and what lets it go on.
    struct Disk {
        written: Receiver<Work>,
        room: SyncSender<()>,
    }

    /// A disk that takes one piece of work for each `()` in `room`.
    fn disk(patience: Duration) -> (StateWriter, Disk) {
        let ((tell, written), (room, rooms)) = (sync_channel(1000), sync_channel(1000));
        let writer = StateWriter::with(patience, move |work| {
            // The disk goes with its test.
            if rooms.recv().is_ok() {
                let _ = tell.send(work);
            }
            Vec::new()
        });
        (writer.unwrap(), Disk { written, room })
    }

    impl Disk {
        /// Takes whatever waits and comes; gives what it has taken so far.
        fn goes_on(&self, writer: &StateWriter) -> Vec<Work> {
            for _ in 0..100 {
                self.room.send(()).unwrap();
            }
            assert!(writer.await_idle(Duration::from_secs(30)));
            self.written.try_iter().collect()
        }
    }

    fn pids(works: &[Work]) -> Vec<i32> {
        works.iter().flat_map(|work| &work.exits).map(|(pid, _)| *pid).collect()
    }

    fn record(pid: i32) -> ExitRecord {
        ExitRecord::new(Kind::Worker, pid, Status::Code(3), Initiator::Crash)
    }

    fn run(pid: i32) -> Run {
        Run { pid, ..Run::default() }
    }

    #[test]
    fn while_the_disk_answers_each_call_is_done_when_it_returns() {
        let (mut writer, disk) = disk(Duration::from_secs(30));
        for pid in 1..=3 {
            writer.turn();
            disk.room.send(()).unwrap();
            writer.exit(&record(pid));
            let work = disk.written.try_recv().unwrap();
            assert!(work.run.is_none() && work.exits.len() == 1 && work.exits[0].0 == pid, "{work:?}");
            disk.room.send(()).unwrap();
            writer.run(run(pid));
            assert_eq!(disk.written.try_recv().unwrap().run, Some(run(pid)));
        }
        disk.room.send(()).unwrap();
        writer.close(Duration::from_secs(10));
        assert!(disk.written.try_recv().unwrap().is_end);
    }

    #[test]
    fn a_disk_that_hangs_is_waited_for_once_and_gets_all_of_it_later() {
        let (mut writer, disk) = disk(PATIENCE);
        let begin = Instant::now();
        for pid in 1..=100 {
            writer.exit(&record(pid));
            writer.run(run(pid));
            writer.touch();
        }
        assert!(begin.elapsed() < 100 * PATIENCE, "{:?}", begin.elapsed());
        assert!(disk.written.try_recv().is_err());
        writer.turn();
        assert!(writer.is_late);
        let works = disk.goes_on(&writer);
        assert_eq!(pids(&works), (1..=100).collect::<Vec<_>>());
        let last = works.last().unwrap();
        assert!(last.run == Some(run(100)) && last.is_touch, "{last:?}");
        // And is waited for again.
        writer.turn();
        assert!(!writer.is_late);
        writer.exit(&record(101));
        assert_eq!(disk.written.try_recv().unwrap().exits[0].0, 101);
    }

    /// A disk that takes each piece in time, and many of them in one turn of the loop.
    #[test]
    fn a_turn_waits_for_slow_writes_so_many_times_and_no_more() {
        let patience = Duration::from_millis(200);
        let (_silent, rooms) = sync_channel::<()>(1);
        let mut writer = StateWriter::with(patience, move |_| {
            let _ = rooms.recv_timeout(patience / 2);
            Vec::new()
        })
        .unwrap();
        let begin = Instant::now();
        (0..60).for_each(|pid| writer.exit(&record(pid)));
        assert!(writer.is_late && begin.elapsed() < 20 * patience, "{:?}", begin.elapsed());
        assert!(writer.await_idle(Duration::from_secs(60)));
        writer.turn();
        assert!(!writer.is_late);
    }

    #[test]
    fn what_waits_has_a_bound_and_the_first_ones_stay() {
        let (mut writer, disk) = disk(PATIENCE);
        let long = ExitRecord { note: "x".repeat(1 << 20), ..record(0) };
        for pid in 0..6 {
            writer.exit(&ExitRecord { pid, ..long.clone() });
        }
        // Three, and the first one if the thread had taken it before.
        let pids = pids(&disk.goes_on(&writer));
        assert!(pids == [0, 1, 2] || pids == [0, 1, 2, 3], "{pids:?}");
    }

    #[test]
    fn an_end_does_not_wait_for_ever() {
        let (mut writer, _disk) = disk(PATIENCE);
        writer.exit(&record(1));
        let begin = Instant::now();
        writer.close(Duration::from_millis(10));
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_panic_of_the_thread_costs_records_and_not_the_master() {
        let mut writer = StateWriter::with(PATIENCE, |_| panic!("a planted panic")).unwrap();
        for pid in 0..3 {
            writer.exit(&record(pid));
        }
        writer.close(Duration::from_millis(10));
    }
}
