//! Following a file of JSON lines as it grows, also past its rotation.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde_json::Value;

/// A reader that gives each line once. Whoever writes the file rotates it by renaming it and beginning another; a reader
/// that comes at least once between two rotations misses nothing.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    file: Option<File>,
    /// The beginning of a line whose end is not written yet.
    begun: Vec<u8>,
}

impl Tail {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, file: None, begun: Vec::new() }
    }

    /// What has come since the last call.
    ///
    /// # Panics
    /// When a line is no JSON, or the file cannot be read.
    pub fn read(&mut self) -> Vec<Value> {
        let mut values = Vec::new();
        loop {
            // Before the reading: what is renamed after this look is read to its end by the next call.
            let newest = std::fs::metadata(&self.path).ok().map(|metadata| metadata.ino());
            if let Some(file) = &mut self.file {
                file.read_to_end(&mut self.begun).expect("read a file of lines");
            }
            while let Some(end) = self.begun.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.begun.drain(..=end).collect();
                let text = String::from_utf8_lossy(&line);
                values.push(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text:?}")));
            }
            let own = self.file.as_ref().map(|file| file.metadata().expect("an open file").ino());
            if newest.is_none() || newest == own {
                return values;
            }
            self.file = File::open(&self.path).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn each_line_is_given_once_also_past_a_rotation() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        let mut tail = Tail::new(path.clone());
        assert!(tail.read().is_empty());
        let open = || File::options().create(true).append(true).open(&path).unwrap();
        let mut file = open();
        file.write_all(b"1\n2").unwrap();
        assert_eq!(tail.read(), [1]);
        file.write_all(b"0\n3\n").unwrap();
        std::fs::rename(&path, folder.path().join("lines.1")).unwrap();
        open().write_all(b"4\n").unwrap();
        assert_eq!(tail.read(), [20, 3, 4]);
        assert!(tail.read().is_empty());
    }
}
