//! The exit records: one JSON line each, appended by one write, two files of at most 4 MiB.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use evergate_core::exit::ExitRecord;

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
}

impl Exits {
    pub(crate) fn open(folder: &Path) -> io::Result<Self> {
        Self::with_limit(folder, BYTES_MAX)
    }

    fn with_limit(folder: &Path, bytes_max: u64) -> io::Result<Self> {
        let file = open(folder)?;
        let bytes = file.metadata()?.len();
        Ok(Self { folder: folder.to_owned(), file, bytes, bytes_max })
    }

    /// Appends one record. Not synced: the master does not wait for a disk, and what a crash of the machine takes is
    /// about a run that the crash has ended anyway.
    pub(crate) fn append(&mut self, record: &ExitRecord) -> io::Result<()> {
        if self.bytes >= self.bytes_max {
            std::fs::rename(self.folder.join(EXITS_FILE), self.folder.join(EXITS_OLD_FILE))?;
            self.file = open(&self.folder)?;
            self.bytes = 0;
        }
        let mut line = record.to_json();
        line.push('\n');
        self.file.write_all(line.as_bytes())?;
        self.bytes = self.bytes.saturating_add(u64::try_from(line.len()).unwrap_or(0));
        Ok(())
    }
}

fn open(folder: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(folder.join(EXITS_FILE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use evergate_core::exit::{Initiator, Kind, Status};

    #[test]
    fn retention_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let mut exits = Exits::with_limit(folder.path(), 1000).unwrap();
        for pid in 0..100 {
            let record = ExitRecord::new(Kind::Worker, pid, Status::Code(3), Initiator::Crash);
            exits.append(&record).unwrap();
        }
        let text = |name| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let (new, old) = (text(EXITS_FILE), text(EXITS_OLD_FILE));
        assert!(new.len() < 1500 && old.len() < 1500, "{} {}", new.len(), old.len());
        assert!(new.contains("\"pid\":99,"));
        assert!(new.lines().chain(old.lines()).all(|line| line.starts_with('{') && line.ends_with('}')));
    }
}
