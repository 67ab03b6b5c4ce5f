//! The run file: who this run is and which processes belong to it, for the commands and for a successor.
//!
//! It is JSON for whoever reads it with a JSON parser. We do not have one here; the file is written with the run on its
//! first line and one child on each line after it, and read back by looking for our own keys. A file that somebody else
//! wrote yields nothing or nonsense, and nonsense is caught by the start time that must fit a pid.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use evergate_core::json::write_string;

use crate::plain;

const FILE: &str = "run.json";
const NEW_FILE: &str = "run.json.new";

/// A run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// The master's process id.
    pub pid: i32,
    /// Its start, in clock ticks since boot.
    pub start_ticks: u64,
    /// Part of every request's id.
    pub run_id: u64,
    /// When it started, Unix milliseconds.
    pub started_unix_ms: u64,
    /// Addresses it listens on, as they really are.
    pub listen: Vec<String>,
    /// The admin address; empty without.
    pub admin: String,
    /// The control socket's path.
    pub control: String,
    /// Generation of the configuration.
    pub generation: u32,
    /// The master's phase, as a word.
    pub phase: String,
    /// Its children.
    pub children: Vec<RunChild>,
}

/// A child of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunChild {
    /// Its kind, as a word.
    pub kind: String,
    /// Process id.
    pub pid: i32,
    /// Its start, in clock ticks since boot.
    pub start_ticks: u64,
    /// A host's upstream; empty for others.
    pub name: String,
    /// Slot among its kind.
    pub slot: u32,
    /// Row on the board.
    pub row: u32,
    /// Number within the run.
    pub epoch: u32,
    /// Generation of its configuration.
    pub generation: u32,
}

impl Run {
    /// The run whose file is in this state folder, whether it is still there or died; none after a clean end.
    ///
    /// # Errors
    /// What reading says, except that there is no file; [`io::ErrorKind::InvalidData`] for one that is not whole,
    /// [`io::ErrorKind::InvalidInput`] for what is no file.
    pub fn read(folder: &Path) -> io::Result<Option<Self>> {
        let bytes = match plain::read(&folder.join(FILE)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let run = Self::parse(&String::from_utf8_lossy(&bytes));
        run.map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is damaged"))
    }

    /// What can still be read of a damaged file. Whatever is wrong in it, the start time must fit a pid.
    pub(crate) fn salvage(folder: &Path) -> Self {
        let bytes = plain::read(&folder.join(FILE)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let head = text.lines().find(|line| !is_child(line)).unwrap_or_default();
        Self {
            pid: number(head, "pid").unwrap_or_default(),
            start_ticks: number(head, "start_ticks").unwrap_or_default(),
            started_unix_ms: number(head, "started_unix_ms").unwrap_or_default(),
            generation: number(head, "generation").unwrap_or_default(),
            phase: string(head, "phase").unwrap_or_default(),
            children: text.lines().filter(|line| is_child(line)).filter_map(child).collect(),
            ..Self::default()
        }
    }

    /// Where it stands, for messages.
    #[must_use]
    pub fn path(folder: &Path) -> PathBuf {
        folder.join(FILE)
    }

    /// When the run last showed that it was there: the file is touched about once a second.
    pub(crate) fn last_beat(folder: &Path) -> Option<SystemTime> {
        std::fs::metadata(folder.join(FILE)).ok()?.modified().ok()
    }

    /// Replaces the file in one step: nobody reads half of it.
    pub(crate) fn write(&self, folder: &Path) -> io::Result<()> {
        let options = &mut File::options();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = plain::open(options, &folder.join(NEW_FILE))?;
        file.write_all(self.to_json().as_bytes())?;
        std::fs::rename(folder.join(NEW_FILE), folder.join(FILE))
    }

    /// Shows that the run is still there.
    pub(crate) fn touch(folder: &Path) {
        // A file that cannot be touched ages; that is all.
        let _ = plain::open(File::options().append(true), &folder.join(FILE))
            .and_then(|file| file.set_modified(SystemTime::now()));
    }

    /// A clean end.
    pub(crate) fn remove(folder: &Path) {
        let _ = std::fs::remove_file(folder.join(FILE));
    }

    fn to_json(&self) -> String {
        let mut out = String::with_capacity(512);
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "{{\"pid\":{},\"start_ticks\":{},\"run_id\":\"{:016x}\",\"started_unix_ms\":{},\"generation\":{},\"phase\":",
            self.pid, self.start_ticks, self.run_id, self.started_unix_ms, self.generation
        );
        write_string(&mut out, &self.phase);
        out.push_str(",\"control\":");
        write_string(&mut out, &self.control);
        out.push_str(",\"admin\":");
        write_string(&mut out, &self.admin);
        out.push_str(",\"listen\":[");
        for (index, address) in self.listen.iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            write_string(&mut out, address);
        }
        out.push_str("],\"children\":[");
        for (index, child) in self.children.iter().enumerate() {
            out.push_str(if index > 0 { ",\n{\"kind\":" } else { "\n{\"kind\":" });
            write_string(&mut out, &child.kind);
            out.push_str(",\"name\":");
            write_string(&mut out, &child.name);
            let _ = write!(
                out,
                ",\"pid\":{},\"start_ticks\":{},\"slot\":{},\"row\":{},\"epoch\":{},\"generation\":{}}}",
                child.pid, child.start_ticks, child.slot, child.row, child.epoch, child.generation
            );
        }
        out.push_str("\n]}\n");
        out
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let head = lines.next()?;
        let (_, listen) = head.split_once("\"listen\":[")?;
        let mut run = Self {
            pid: number(head, "pid")?,
            start_ticks: number(head, "start_ticks")?,
            run_id: u64::from_str_radix(&string(head, "run_id")?, 16).ok()?,
            started_unix_ms: number(head, "started_unix_ms")?,
            listen: Vec::new(),
            admin: string(head, "admin")?,
            control: string(head, "control")?,
            generation: number(head, "generation")?,
            phase: string(head, "phase")?,
            children: Vec::new(),
        };
        let mut rest = listen;
        while let Some((address, after)) = quoted(rest) {
            run.listen.push(address);
            let Some(next) = after.strip_prefix(',') else { break };
            rest = next;
        }
        for line in lines.by_ref().take_while(|line| is_child(line)) {
            run.children.push(child(line)?);
        }
        // The last line is written last.
        text.ends_with("\n]}\n").then_some(run)
    }
}

fn is_child(line: &str) -> bool {
    line.starts_with("{\"kind\":")
}

fn child(line: &str) -> Option<RunChild> {
    Some(RunChild {
        kind: string(line, "kind")?,
        // One of a version before has none.
        name: string(line, "name").unwrap_or_default(),
        pid: number(line, "pid")?,
        start_ticks: number(line, "start_ticks")?,
        slot: number(line, "slot")?,
        row: number(line, "row")?,
        epoch: number(line, "epoch")?,
        generation: number(line, "generation")?,
    })
}

/// What follows a key of ours. No value of ours can hold the pattern: quotes within strings are escaped.
fn after<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let pattern = format!("\"{key}\":");
    let at = line.find(&pattern)?;
    line.get(at.checked_add(pattern.len())?..)
}

fn number<T: std::str::FromStr>(line: &str, key: &str) -> Option<T> {
    let rest = after(line, key)?;
    let end = rest.find(|character: char| !character.is_ascii_digit()).unwrap_or(rest.len());
    rest.get(..end)?.parse().ok()
}

fn string(line: &str, key: &str) -> Option<String> {
    quoted(after(line, key)?).map(|(text, _)| text)
}

/// A JSON string as `write_string` makes it, and what comes after it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let text = text.strip_prefix('"')?;
    let mut out = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((out, text.get(at.checked_add(1)?..)?)),
            '\\' => match characters.next()?.1 {
                'n' => out.push('\n'),
                'r' => out.push('\r'),
                't' => out.push('\t'),
                'u' => {
                    let hex: String = characters.by_ref().take(4).map(|(_, digit)| digit).collect();
                    out.push(char::from_u32(u32::from_str_radix(&hex, 16).ok()?)?);
                }
                other => out.push(other),
            },
            other => out.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn child(kind: &str, name: &str, pid: i32) -> RunChild {
        let (kind, name) = (kind.into(), name.into());
        RunChild { kind, name, pid, start_ticks: 11, slot: 1, row: 2, epoch: 3, generation: 1 }
    }

    fn run() -> Run {
        Run {
            pid: 7,
            start_ticks: 8,
            run_id: u64::MAX - 1,
            started_unix_ms: 9,
            listen: vec!["127.0.0.1:4700".into(), "unix:/a \"b\"\\\n\u{1}".into()],
            admin: String::new(),
            control: "/x/control.sock".into(),
            generation: 1,
            phase: "serving".into(),
            children: vec![child("clerk", "", 10), child("worker", "", 12), child("host", "a \"pid\":1", 14)],
        }
    }

    #[test]
    fn a_run_is_read_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Run::read(folder.path()).unwrap(), None);
        for run in [run(), Run { listen: Vec::new(), children: Vec::new(), ..run() }] {
            run.write(folder.path()).unwrap();
            assert_eq!(Run::read(folder.path()).unwrap(), Some(run));
        }
        Run::touch(folder.path());
        assert!(Run::last_beat(folder.path()).is_some());
        Run::remove(folder.path());
        assert_eq!(Run::read(folder.path()).unwrap(), None);
    }

    #[test]
    fn what_is_cut_off_is_not_taken_for_whole_and_its_whole_lines_are_salvaged() {
        let folder = tempfile::tempdir().unwrap();
        let whole = run().to_json();
        for end in 0..whole.len() {
            std::fs::write(folder.path().join(FILE), &whole[..end]).unwrap();
            assert_eq!(Run::read(folder.path()).unwrap_err().kind(), io::ErrorKind::InvalidData, "{end}");
            let salvaged = Run::salvage(folder.path());
            assert!(run().children.starts_with(&salvaged.children), "{end}");
        }
        let salvaged = Run::salvage(folder.path());
        assert_eq!((salvaged.pid, salvaged.children.len(), salvaged.phase.as_str()), (7, 3, "serving"));
    }

    #[test]
    fn nonsense_yields_nothing() {
        assert_eq!(Run::parse(""), None);
        assert_eq!(Run::parse("{\"pid\":99999999999}"), None);
    }
}
