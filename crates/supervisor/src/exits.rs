//! The exit records: one JSON line each, appended by one write, two files of at most 4 MiB.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::plain;

/// The newest records, in the state folder.
pub const EXITS_FILE: &str = "exits.jsonl";
/// The records before those.
pub const EXITS_OLD_FILE: &str = "exits.jsonl.1";

/// Where one file ends and the next begins: some ten thousand ends without lost requests.
const BYTES_MAX: u64 = 4 << 20;

/// The open log.
#[derive(Debug)]
pub(crate) struct Exits {
    folder: PathBuf,
    file: File,
    bytes: u64,
    bytes_max: u64,
    /// The file's last line may have no end.
    is_torn: bool,
}

impl Exits {
    pub(crate) fn open(folder: &Path) -> io::Result<Self> {
        Self::with_limit(folder, BYTES_MAX)
    }

    fn with_limit(folder: &Path, bytes_max: u64) -> io::Result<Self> {
        let file = open(folder)?;
        let bytes = file.metadata()?.len();
        // Of a run that ended with a full disk or with the machine.
        let is_torn = bytes > 0 && !ends_a_line(folder);
        Ok(Self { folder: folder.to_owned(), file, bytes, bytes_max, is_torn })
    }

    /// Appends one record, of one line without its end. Not synced: what a crash of the machine takes is about a run that the
    /// crash has ended anyway.
    pub(crate) fn append(&mut self, line: &str) -> io::Result<()> {
        if self.bytes >= self.bytes_max {
            // A folder in which nothing can be renamed is no reason to lose a record: the file grows, that is all.
            let _ = self.rotate();
        }
        // A disk that is full takes half of a line. The next record must not be lost with that half.
        let begin = if self.is_torn { "\n" } else { "" };
        self.is_torn = true;
        self.file.write_all(format!("{begin}{line}\n").as_bytes())?;
        self.is_torn = false;
        self.bytes = self.bytes.saturating_add(u64::try_from(line.len()).unwrap_or(0).saturating_add(1));
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        std::fs::rename(self.folder.join(EXITS_FILE), self.folder.join(EXITS_OLD_FILE))?;
        self.file = open(&self.folder)?;
        self.bytes = 0;
        Ok(())
    }
}

fn open(folder: &Path) -> io::Result<File> {
    plain::open(OpenOptions::new().append(true).create(true).mode(0o600), &folder.join(EXITS_FILE))
}

fn ends_a_line(folder: &Path) -> bool {
    let mut last = [0];
    let read = File::open(folder.join(EXITS_FILE)).and_then(|mut file| {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)
    });
    read.is_ok() && last == *b"\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use evergate_core::exit::{ExitRecord, Initiator, Kind, Status};

    fn append(exits: &mut Exits, pid: i32) -> io::Result<()> {
        exits.append(&ExitRecord::new(Kind::Worker, pid, Status::Code(3), Initiator::Crash).to_json())
    }

    #[test]
    fn a_record_after_half_a_line_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(EXITS_FILE);
        std::fs::write(&path, "{\"at_ms\":1").unwrap();
        let mut exits = Exits::open(folder.path()).unwrap();
        append(&mut exits, 1).unwrap();
        // As a full disk: what cannot be written, and what is written when there is room again.
        let good = std::mem::replace(&mut exits.file, File::open(&path).unwrap());
        assert!(append(&mut exits, 2).is_err());
        exits.file = good;
        append(&mut exits, 3).unwrap();
        append(&mut exits, 4).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let whole = text.lines().filter(|line| line.starts_with('{') && line.ends_with('}'));
        assert_eq!(whole.count(), 3, "{text}");
        assert!(text.ends_with("}\n") && Exits::open(folder.path()).is_ok_and(|exits| !exits.is_torn));
    }

    #[test]
    fn where_nothing_can_be_renamed_records_are_still_written() {
        let folder = tempfile::tempdir().unwrap();
        // A folder in the place of the old file, which no file can replace.
        std::fs::create_dir_all(folder.path().join(EXITS_OLD_FILE).join("x")).unwrap();
        let mut exits = Exits::with_limit(folder.path(), 10).unwrap();
        for pid in 1..=5 {
            append(&mut exits, pid).unwrap();
        }
        assert_eq!(std::fs::read_to_string(folder.path().join(EXITS_FILE)).unwrap().lines().count(), 5);
    }

    #[test]
    fn retention_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let mut exits = Exits::with_limit(folder.path(), 1000).unwrap();
        for pid in 0..100 {
            append(&mut exits, pid).unwrap();
        }
        let text = |name| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let (new, old) = (text(EXITS_FILE), text(EXITS_OLD_FILE));
        assert!(new.len() < 1500 && old.len() < 1500, "{} {}", new.len(), old.len());
        assert!(new.contains("\"pid\":99,"));
        assert!(new.lines().chain(old.lines()).all(|line| line.starts_with('{') && line.ends_with('}')));
    }
}
