//! What a host hears of its programs: shown on the board, and written to files by a thread of their own, which a disk may
//! hold up.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use evergate_board::{Board, ChildRow, HostRow, Phase};
use evergate_core::redact::Redactor;
use evergate_host::Report;
use evergate_host::program::{Ended, Failed, Ladder};
use evergate_host::report::{Line, Stream};
use evergate_sys::{Pid, Status, unix_ms};
use serde_json::json;

use super::super::ChildArgs;
use crate::telemetry::names::{self, ProgramEnd};

/// In the state folder: the programs' logs, ends and working folders.
pub(crate) const FOLDER: &str = "models";
/// Of a file with what programs have written.
pub(crate) const LOG_SUFFIX: &str = ".log";
/// Of a file with programs' ends.
pub(crate) const EXITS_SUFFIX: &str = ".exits.jsonl";

/// Behind the name of a file that was full; there is one of each.
pub(crate) const OLD_SUFFIX: &str = ".1";

/// A file larger than this is renamed, in place of the one before.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Lines that wait for the disk; more are counted and left out.
const LINES: usize = 1024;
/// Records of ends that may wait beyond them: no flood of lines costs one.
const ENDS: usize = 4096;
/// Bytes of a program's last words in a record of its end.
const TAIL_SHOWN: usize = 4096;

/// Whose ear it is.
pub(crate) struct Place {
    pub(crate) board: Board,
    /// Its row among the hosts'.
    pub(crate) host: u32,
    pub(crate) child: ChildArgs,
    pub(crate) name: String,
    /// Whether its programs live longer than a request.
    pub(crate) is_kept: bool,
}

/// Hears it.
pub(crate) struct Ear {
    place: Place,
    redactor: Arc<Redactor>,
    shown: Mutex<Shown>,
    lines: Mutex<Option<SyncSender<Entry>>>,
    /// Entries that wait for the disk, and those that were left out since the last line.
    queued: Arc<AtomicUsize>,
    dropped: AtomicUsize,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What the board's words are made of.
struct Shown {
    /// Programs that live, the oldest first.
    pids: Vec<Pid>,
    /// Those that have ended and have no successor yet.
    vacant: u64,
    restarts: u64,
    /// Of one that is kept: whether nothing there can take a request, though it may run.
    is_deaf: bool,
    is_busy: bool,
    /// Since when it is not.
    idle_since: Instant,
}

enum Entry {
    Log(String),
    Exit(String),
}

impl Ear {
    /// Opens the files, and begins to write.
    pub(crate) fn start(folder: &Path, place: Place, redactor: Arc<Redactor>) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let open = |suffix| Output::open(folder.join(format!("{}{suffix}", place.name)));
        let (log, exits) = (open(LOG_SUFFIX)?, open(EXITS_SUFFIX)?);
        let (lines, from) = sync_channel(LINES + ENDS);
        let queued = Arc::new(AtomicUsize::new(0));
        let written = Arc::clone(&queued);
        let writer =
            std::thread::Builder::new().name("models".into()).spawn(move || write(&from, &written, (log, exits)))?;
        let (lines, writer) = (Mutex::new(Some(lines)), Mutex::new(Some(writer)));
        let shown = Shown {
            pids: Vec::new(),
            vacant: 0,
            restarts: 0,
            is_deaf: false,
            is_busy: false,
            idle_since: Instant::now(),
        };
        Ok(Self { place, redactor, shown: Mutex::new(shown), lines, queued, dropped: AtomicUsize::new(0), writer })
    }

    /// Its programs can be used: from now on it can be idle.
    pub(crate) fn ready(&self) {
        lock(&self.shown).idle_since = Instant::now();
    }

    /// Says on the board that it may go, if nobody has needed it for so long. A request that comes takes that back.
    pub(crate) fn offer_to_go(&self, after: Duration) -> bool {
        let Some(row) = self.row() else { return false };
        let shown = lock(&self.shown);
        let is_ready = row.ready_epoch() == self.place.child.epoch;
        let may_go = is_ready && !shown.is_busy && shown.idle_since.elapsed() >= after;
        if may_go {
            row.set_idle_epoch(self.place.child.epoch);
        }
        may_go
    }

    fn row(&self) -> Option<&HostRow> {
        self.place.board.host(self.place.host)
    }

    fn show(&self, change: impl FnOnce(&mut Shown)) {
        let mut shown = lock(&self.shown);
        change(&mut shown);
        if let Some(row) = self.row() {
            row.set_pid(shown.pids.first().map_or(0, |pid| pid.as_raw_nonzero().get()));
            row.set_restarts(shown.restarts);
            row.set_is_down(self.place.is_kept && (shown.is_deaf || shown.pids.is_empty()));
        }
    }

    /// Waits until everything is written, so long at most.
    pub(crate) async fn close(&self, time: Duration) {
        drop(lock(&self.lines).take());
        let writer = lock(&self.writer).take();
        let end = tokio::time::Instant::now() + time;
        while writer.as_ref().is_some_and(|writer| !writer.is_finished()) && tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn send(&self, entry: Entry) {
        // Before it is sent: the writer takes it off again.
        let before = self.queued.fetch_add(1, Ordering::Relaxed);
        let is_full = matches!(entry, Entry::Log(_)) && before >= LINES;
        let is_sent = !is_full && lock(&self.lines).as_ref().is_some_and(|lines| lines.try_send(entry).is_ok());
        if !is_sent {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts on the host's own row of the board.
    fn count(&self, metric: u8, end: Option<ProgramEnd>) {
        if let Some(series) = self.place.board.series(self.place.child.row) {
            let label = self.place.board.label(&self.place.name);
            series.add(names::key(metric, label, end.map_or(0, |end| end as u16), 0), 1);
        }
    }

    fn end(&self, ended: &Ended) -> ProgramEnd {
        let phase = self.place.board.child(self.place.child.row).map(ChildRow::phase);
        let is_stopping = matches!(phase, Some(Phase::Draining | Phase::Cancelling | Phase::Cleaning));
        match (ended.ladder, ended.exit.status) {
            (Ladder::Term | Ladder::Kill, _) if is_stopping => ProgramEnd::Stopped,
            (Ladder::Term | Ladder::Kill, _) => ProgramEnd::Host,
            (Ladder::Untouched, Status::Code(0)) => ProgramEnd::Done,
            (Ladder::Untouched, Status::Code(_)) => ProgramEnd::Crash,
            // Those that a process raises by its own mistake, and those of its limits (XCPU, XFSZ).
            (Ladder::Untouched, Status::Signal { number: 4..=8 | 11 | 24 | 25 | 31, .. }) => ProgramEnd::Crash,
            // The counter is its own group's: nobody else's memory can have been meant.
            (Ladder::Untouched, Status::Signal { number: 9, .. }) if ended.oom_kills > Some(0) => {
                ProgramEnd::OutOfMemory
            }
            (Ladder::Untouched, Status::Signal { .. }) => ProgramEnd::Unknown,
        }
    }

    fn log(&self, pid: Pid, what: &str, text: &str) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let lost = if dropped > 0 { format!(" [{dropped} lines before this one were lost]") } else { String::new() };
        let text = self.redactor.redact(text);
        self.send(Entry::Log(format!("{} {} {what}:{lost} {text}\n", unix_ms(), pid.as_raw_nonzero())));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Report for Ear {
    fn started(&self, program: Pid) {
        self.count(names::PROGRAM_STARTS, None);
        self.show(|shown| {
            shown.pids.push(program);
            if self.place.is_kept && shown.vacant > 0 {
                shown.vacant -= 1;
                shown.restarts += 1;
            }
        });
    }

    fn failed(&self, failed: &Failed) {
        self.count(names::PROGRAM_EXITS, Some(ProgramEnd::Boot));
        let record = json!({
            "at_ms": unix_ms(), "kind": "program", "upstream": self.place.name, "pid": null, "slot": 0,
            "epoch": self.place.child.epoch, "generation": self.place.child.generation, "code": null, "signal": null,
            "core": false, "initiator": ProgramEnd::Boot.name(), "note": self.redactor.redact(&failed.to_string()),
        });
        self.send(Entry::Exit(format!("{record}\n")));
    }

    fn ended(&self, ended: &Ended) {
        let end = self.end(ended);
        self.count(names::PROGRAM_EXITS, Some(end));
        self.show(|shown| {
            shown.pids.retain(|pid| *pid != ended.pid);
            shown.vacant += 1;
        });
        // That one which ended as it should is no news.
        let has_obeyed = end == ProgramEnd::Stopped && ended.ladder == Ladder::Term;
        if (has_obeyed || ended.exit.status == Status::Code(0)) && ended.strays == 0 && ended.left == 0 {
            return;
        }
        let (code, signal, core) = match ended.exit.status {
            Status::Code(code) => (Some(code), None, false),
            Status::Signal { number, core } => (None, Some(number), core),
        };
        let sent: &[&str] = match ended.ladder {
            Ladder::Untouched => &[],
            Ladder::Term => &["TERM"],
            Ladder::Kill => &["TERM", "KILL"],
        };
        let tail = String::from_utf8_lossy(&ended.tail);
        let tail = self.redactor.redact(&tail);
        let start = (tail.len().saturating_sub(TAIL_SHOWN)..tail.len()).find(|at| tail.is_char_boundary(*at));
        let tail = start.and_then(|start| tail.get(start..)).unwrap_or_default();
        let last = tail.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        let record = json!({
            "at_ms": unix_ms(), "kind": "program", "upstream": self.place.name,
            "pid": ended.pid.as_raw_nonzero().get(), "slot": 0, "epoch": self.place.child.epoch,
            "generation": self.place.child.generation, "code": code, "signal": signal,
            "core": core, "initiator": end.name(), "sent": sent,
            "age_ms": u64::try_from(ended.age.as_millis()).unwrap_or(u64::MAX), "rss_max_kib": ended.exit.rss_max_kib,
            "cpu_ms": ended.exit.cpu_ms, "strays": ended.strays, "left": ended.left, "oom_kills": ended.oom_kills,
            "request_id": ended.request, "why": ended.why.as_deref().map(|why| self.redactor.redact(why)),
            "note": last.trim(), "stderr": tail,
        });
        self.send(Entry::Exit(format!("{record}\n")));
    }

    fn listens(&self, address: Option<&str>) {
        if let Some(row) = self.row() {
            row.set_address(address.unwrap_or_default());
        }
        self.show(|shown| shown.is_deaf = address.is_none());
    }

    fn serves(&self, is_any_ready: bool) {
        self.show(|shown| shown.is_deaf = !is_any_ready);
    }

    fn load(&self, in_flight: u32, waiting: u32) {
        let is_busy = in_flight > 0 || waiting > 0;
        let mut shown = lock(&self.shown);
        if is_busy || shown.is_busy {
            shown.idle_since = Instant::now();
        }
        shown.is_busy = is_busy;
        let Some(row) = self.row() else { return };
        row.set_in_flight(in_flight);
        row.set_waiting(waiting);
        if is_busy {
            row.set_idle_epoch(0);
        }
    }

    fn line(&self, line: Line<'_>) {
        let what = match line.stream {
            Stream::Output => "out",
            Stream::Error => "err",
        };
        let text = String::from_utf8_lossy(line.text);
        let cut = if line.is_cut { " [cut]" } else { "" };
        let before = if line.dropped > 0 { format!("[{} lines left out] ", line.dropped) } else { String::new() };
        self.log(line.program, what, &format!("{before}{text}{cut}"));
    }
}

/// A file that is bounded.
struct Output {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Output {
    fn open(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path, file, bytes })
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        let length = u64::try_from(text.len()).unwrap_or(u64::MAX);
        if self.bytes > 0 && self.bytes.saturating_add(length) > FILE_BYTES_MAX {
            let mut old = self.path.clone().into_os_string();
            old.push(OLD_SUFFIX);
            std::fs::rename(&self.path, old)?;
            *self = Self::open(self.path.clone())?;
        }
        self.file.write_all(text.as_bytes())?;
        self.bytes = self.bytes.saturating_add(length);
        Ok(())
    }
}

fn write(from: &Receiver<Entry>, queued: &AtomicUsize, (mut log, mut exits): (Output, Output)) {
    let mut has_failed = false;
    for entry in from {
        queued.fetch_sub(1, Ordering::Relaxed);
        let written = match &entry {
            Entry::Log(text) => log.write(text),
            Entry::Exit(text) => exits.write(text),
        };
        if let Err(error) = &written
            && !has_failed
        {
            let _ = writeln!(io::stderr(), "evergate host: what programs say cannot be written: {error}");
        }
        has_failed = written.is_err();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_flood_of_lines_costs_the_record_of_an_end() {
        let (lines, from) = sync_channel(LINES + ENDS);
        let shape = evergate_board::Shape { children: 1, slots: 1, series: 8, labels: 8 };
        let child = ChildArgs { row: 0, epoch: 1, generation: 1, listeners: 1 };
        let board = Board::create(shape, 1).unwrap();
        let ear = Ear {
            place: Place { board, host: 0, child, name: "m".into(), is_kept: false },
            redactor: Arc::new(Redactor::new(std::iter::empty::<&str>())),
            shown: Mutex::new(Shown {
                pids: vec![],
                vacant: 0,
                restarts: 0,
                is_deaf: false,
                is_busy: false,
                idle_since: Instant::now(),
            }),
            lines: Mutex::new(Some(lines)),
            queued: Arc::new(AtomicUsize::new(0)),
            dropped: AtomicUsize::new(0),
            writer: Mutex::new(None),
        };
        for _ in 0..LINES + 7 {
            ear.send(Entry::Log("line".into()));
        }
        ear.send(Entry::Exit("end".into()));
        assert_eq!((ear.dropped.load(Ordering::Relaxed), ear.queued.load(Ordering::Relaxed)), (7, LINES + 1));
        assert!(matches!(from.try_iter().last(), Some(Entry::Exit(_))));
    }

    #[test]
    fn files_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.log");
        let mut output = Output::open(path.clone()).unwrap();
        let line = "x".repeat(1 << 20);
        for _ in 0..11 {
            output.write(&line).unwrap();
        }
        let size = |path: &Path| std::fs::metadata(path).unwrap().len();
        assert!(size(&path) <= FILE_BYTES_MAX && size(&folder.path().join("m.log.1")) <= FILE_BYTES_MAX);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
