//! The access log: a file of JSON lines, written by a thread of its own, so that a slow disk holds up nothing else.
//!
//! A record is not worth a request: when the disk is full or too slow, lines are dropped and counted. The same when the file
//! is a pipe that nobody reads.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use evergate_board::Board;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use tokio::sync::oneshot;

use super::repeats::without_repeats;
use crate::lives::{ACCESS_FILE as FILE, ACCESS_OLD_FILE as OLD_FILE, boot_fault};
use crate::tasks::caught;
use crate::telemetry::{names, talk};

/// Where one file ends and the next begins: some hundred thousand requests.
const BYTES_MAX: u64 = 64 << 20;
/// Orders that wait: one batch at a time, and words about the file.
const ORDERS_MAX: usize = 16;

/// How long the reader of a pipe may take to make room; a file on a disk always has it.
const ROOM_TIME: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// What the thread is told.
enum Order {
    /// Lines, and who is told when they are written, or dropped and counted.
    Write(Vec<u8>, oneshot::Sender<()>),
    Reopen,
}

/// The log as the clerk has it.
#[derive(Debug)]
pub(super) struct AccessLog {
    orders: SyncSender<Order>,
    done: oneshot::Receiver<()>,
    drops: Drops,
}

impl AccessLog {
    /// Starts the thread. A file that cannot be opened is no failure: it is tried again with every batch.
    pub(super) fn start(folder: &Path, board: Board, row: u32) -> io::Result<Self> {
        let (orders, inbox) = sync_channel(ORDERS_MAX);
        let (tell, done) = oneshot::channel();
        let drops = Drops { board, row };
        let mut writer = Writer::new(folder, BYTES_MAX, drops.clone());
        std::thread::Builder::new().name("access-log".into()).stack_size(128 << 10).spawn(move || {
            writer.run(&inbox);
            // Nobody waits if the time was up.
            let _ = tell.send(());
        })?;
        Ok(Self { orders, done, drops })
    }

    /// Hands over whole lines; what is given back ends when they are written, or dropped and counted.
    pub(super) fn write(&self, lines: Vec<u8>) -> oneshot::Receiver<()> {
        let (tell, done) = oneshot::channel();
        if let Err(TrySendError::Full(Order::Write(lines, _)) | TrySendError::Disconnected(Order::Write(lines, _))) =
            self.orders.try_send(Order::Write(lines, tell))
        {
            self.drops.count(&lines);
        }
        done
    }

    /// Closes the file and opens it by its name again, for whoever renamed it.
    pub(super) fn reopen(&self) {
        // With a full queue the file is opened again at the latest when it is too large.
        let _ = self.orders.try_send(Order::Reopen);
    }

    /// Counts records that were lost on their way here.
    pub(super) fn count(&self, records: u64) {
        self.drops.add(records);
    }

    /// Counts lines that nobody will write any more, and says how many.
    pub(super) fn give_up(&self, lines: &[u8]) -> u64 {
        self.drops.count(lines)
    }

    /// Ends when everything is written.
    pub(super) async fn close(self) {
        drop(self.orders);
        // An error means that the thread is gone, which is an end too.
        let _ = self.done.await;
    }
}

/// Where lost lines are counted.
#[derive(Clone, Debug)]
struct Drops {
    board: Board,
    row: u32,
}

impl Drops {
    fn count(&self, bytes: &[u8]) -> u64 {
        let lines = count(bytes);
        self.add(lines);
        lines
    }

    fn add(&self, records: u64) {
        if let Some(series) = self.board.series(self.row) {
            series.add(names::key(names::ACCESS_DROPPED, 0, 0, 0), records);
        }
    }
}

fn count(lines: &[u8]) -> u64 {
    u64::try_from(memchr::memchr_iter(b'\n', lines).count()).unwrap_or(0)
}

/// The thread's side.
struct Writer {
    folder: PathBuf,
    bytes_max: u64,
    drops: Drops,
    file: Option<Open>,
    /// Whether the next batch is the first.
    is_first: bool,
    /// Whether the last batch failed: only the first failure is talked about.
    is_failing: bool,
}

struct Open {
    file: File,
    /// Whether it has a length: a pipe or a terminal has none, and is never full.
    is_regular: bool,
    bytes: u64,
    /// Whether the file ends within a line, because a write stopped there.
    is_torn: bool,
}

impl Writer {
    fn new(folder: &Path, bytes_max: u64, drops: Drops) -> Self {
        Self { folder: folder.to_owned(), bytes_max, drops, file: None, is_first: true, is_failing: false }
    }

    fn run(&mut self, inbox: &Receiver<Order>) {
        while let Ok(order) = inbox.recv() {
            let (lines, tell) = match order {
                Order::Reopen => {
                    self.file = None;
                    continue;
                }
                Order::Write(lines, tell) => (lines, tell),
            };
            // A panic ends neither the thread nor the log: the batch counts as lost, and the file is opened anew.
            let count = count(&lines);
            if !caught(|| self.write(lines)) {
                self.file = None;
                self.drops.add(count);
            }
            // Nobody waits if the time was up.
            let _ = tell.send(());
        }
    }

    fn write(&mut self, mut lines: Vec<u8>) {
        boot_fault::write_log();
        if std::mem::take(&mut self.is_first) {
            lines = without_repeats(&lines, [&self.folder.join(OLD_FILE), &self.folder.join(FILE)]);
        }
        let mut rest = lines.as_slice();
        let outcome = self.ready().and_then(|open| open.append(&mut rest));
        if outcome.is_err() {
            self.drops.count(rest);
        }
        if let Err(error) = outcome {
            if !self.is_failing {
                self.talk(&format!("cannot be written, records are dropped: {error}"));
            }
            self.is_failing = true;
        } else if std::mem::take(&mut self.is_failing) {
            self.talk("is written again");
        }
    }

    fn talk(&self, what: &str) {
        talk::print(&format!("evergate: clerk: {} {what}", self.folder.join(FILE).display()));
    }

    /// The file, opened if need be and not too large.
    fn ready(&mut self) -> io::Result<&mut Open> {
        if self.file.as_ref().is_some_and(|open| open.bytes >= self.bytes_max) {
            self.rotate();
        }
        let open = match self.file.take() {
            Some(open) => open,
            None => Open::new(&self.folder)?,
        };
        Ok(self.file.insert(open))
    }

    /// A predecessor's clerk may still write here and have rotated already: then there is nothing left to do but to open
    /// the new file.
    fn rotate(&mut self) {
        let path = self.folder.join(FILE);
        let Some(open) = &mut self.file else { return };
        let key = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let is_ours = open.file.metadata().ok().map(key) == std::fs::metadata(&path).ok().map(key);
        if is_ours && let Err(error) = std::fs::rename(&path, self.folder.join(OLD_FILE)) {
            // Too large is better than not written. It is tried again when as much has come.
            open.bytes = 0;
            return self.talk(&format!("cannot make room for a new one, and grows: {error}"));
        }
        self.file = None;
    }
}

impl Open {
    fn new(folder: &Path) -> io::Result<Self> {
        let path = folder.join(FILE);
        // The open of a pipe that nobody reads would wait for ever, and a write to one that is full as well.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
        let file = OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(flags).open(&path);
        let file = file.map_err(|error| unread(&path, error))?;
        let metadata = file.metadata()?;
        let (is_regular, bytes) = (metadata.is_file(), metadata.len());
        // What a crash of the machine left of a line is not to be continued; an empty line harms no reader.
        let is_torn = bytes > 0 && !ends_with_line(folder).unwrap_or(true);
        Ok(Self { file, is_regular, bytes, is_torn })
    }

    /// Appends and moves `rest` on over what is in the file.
    fn append(&mut self, rest: &mut &[u8]) -> io::Result<()> {
        if self.is_torn {
            self.file.write_all(b"\n")?;
            self.is_torn = false;
        }
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    let (written, after) = rest.split_at_checked(count).unwrap_or((rest, &[]));
                    if self.is_regular {
                        self.bytes = self.bytes.saturating_add(u64::try_from(written.len()).unwrap_or(0));
                    }
                    self.is_torn = !written.ends_with(b"\n");
                    *rest = after;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.await_room()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits for the reader of a pipe, but not for one that stands still.
    fn await_room(&self) -> io::Result<()> {
        match poll(&mut [PollFd::new(&self.file, PollFlags::OUT)], Some(&ROOM_TIME)) {
            Ok(0) => Err(io::Error::other("its reader has taken nothing for a second")),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// What ENXIO means here (open(2)).
fn unread(path: &Path, error: io::Error) -> io::Error {
    let is_pipe = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo());
    let is_unread = is_pipe && Errno::from_io_error(&error) == Some(Errno::NXIO);
    if is_unread { io::Error::other("it is a pipe and nobody reads it") } else { error }
}

fn ends_with_line(folder: &Path) -> io::Result<bool> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = File::open(folder.join(FILE))?;
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0_u8];
    file.read_exact(&mut last)?;
    Ok(last == [b'\n'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use evergate_board::Shape;
    use std::os::unix::fs::PermissionsExt;

    fn board() -> Board {
        Board::create(Shape { children: 1, slots: 1, series: 8, labels: 2 }, 1).unwrap()
    }

    fn writer(folder: &Path, bytes_max: u64) -> (Writer, Board) {
        let board = board();
        (Writer::new(folder, bytes_max, Drops { board: board.clone(), row: 0 }), board)
    }

    fn dropped(board: &Board) -> u64 {
        board.series(0).unwrap().get(names::key(names::ACCESS_DROPPED, 0, 0, 0))
    }

    fn text(folder: &Path, name: &str) -> String {
        std::fs::read_to_string(folder.join(name)).unwrap()
    }

    #[test]
    fn everything_handed_over_is_in_the_file_after_the_close() {
        let folder = tempfile::tempdir().unwrap();
        let log = AccessLog::start(folder.path(), board(), 0).unwrap();
        let first = log.write(b"{\"a\":1}\n".to_vec());
        let second = log.write(b"{\"b\":2}\n{\"c\":3}\n".to_vec());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            first.await.unwrap();
            second.await.unwrap();
            log.close().await;
        });
        assert_eq!(text(folder.path(), FILE), "{\"a\":1}\n{\"b\":2}\n{\"c\":3}\n");
        let mode = std::fs::metadata(folder.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn retention_is_bounded_and_nothing_is_lost_at_the_turn() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, board) = writer(folder.path(), 20);
        for number in 0..4 {
            writer.write(format!("line number {number}\n").into_bytes());
        }
        assert_eq!(text(folder.path(), OLD_FILE), "line number 0\nline number 1\n");
        assert_eq!(text(folder.path(), FILE), "line number 2\nline number 3\n");
        assert_eq!(dropped(&board), 0);
    }

    #[test]
    fn a_file_that_cannot_be_renamed_grows_and_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(OLD_FILE)).unwrap();
        let (mut writer, board) = writer(folder.path(), 20);
        let lines: Vec<String> = (0..8).map(|number| format!("line number {number}\n")).collect();
        lines.iter().for_each(|line| writer.write(line.clone().into_bytes()));
        assert_eq!((text(folder.path(), FILE), dropped(&board)), (lines.concat(), 0));
        // Somebody mends it.
        std::fs::remove_dir(folder.path().join(OLD_FILE)).unwrap();
        while !folder.path().join(OLD_FILE).exists() {
            writer.write(b"another line\n".to_vec());
        }
        assert!(text(folder.path(), OLD_FILE).starts_with(&lines.concat()) && dropped(&board) == 0);
    }

    #[test]
    fn a_file_renamed_by_others_is_left_and_a_new_one_made() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, _board) = writer(folder.path(), 1 << 20);
        writer.write(b"one\n".to_vec());
        std::fs::rename(folder.path().join(FILE), folder.path().join("kept")).unwrap();
        writer.write(b"two\n".to_vec());
        writer.file = None;
        writer.write(b"three\n".to_vec());
        assert_eq!(
            (text(folder.path(), "kept").as_str(), text(folder.path(), FILE).as_str()),
            ("one\ntwo\n", "three\n")
        );
    }

    #[test]
    fn a_folder_that_is_gone_costs_the_records_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("inner");
        let (mut writer, board) = writer(&inner, 1 << 20);
        writer.write(b"one\ntwo\n".to_vec());
        assert_eq!(dropped(&board), 2);
        std::fs::create_dir(&inner).unwrap();
        writer.write(b"three\n".to_vec());
        assert_eq!((dropped(&board), text(&inner, FILE)), (2, "three\n".to_owned()));
    }

    #[test]
    fn a_full_disk_costs_the_records_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        // Every write to it fails with ENOSPC (full(4)).
        std::os::unix::fs::symlink("/dev/full", folder.path().join(FILE)).unwrap();
        let (mut writer, board) = writer(folder.path(), 1 << 20);
        writer.write(b"one\ntwo\n".to_vec());
        writer.write(b"three\n".to_vec());
        assert_eq!(dropped(&board), 3);
    }

    #[test]
    fn half_a_line_is_not_continued() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), "{\"half").unwrap();
        let (mut writer, _board) = writer(folder.path(), 1 << 20);
        writer.write(b"{}\n".to_vec());
        assert_eq!(text(folder.path(), FILE), "{\"half\n{}\n");
    }
}
