//! `evergate access`: the last access records of this state folder, a line for people each, and those to come if wanted.
//! Works without a running gateway.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use evergate_core::inherit::code;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::Value;

use super::exits::utc;
use crate::cli::Form;
use crate::lives::{ACCESS_FILE, ACCESS_OLD_FILE};

/// Read at a time: some thousand records.
const CHUNK_BYTES: u64 = 1 << 20;
/// Between two looks for new records: a person does not notice it, and an idle look costs three system calls.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What is shown.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// How many of the records that are there.
    pub last: usize,
    /// Whether to go on with those to come.
    pub is_followed: bool,
    /// JSON lines are shown as they are.
    pub form: Form,
}

/// Prints records; returns the exit code, 1 when they cannot be read.
#[must_use]
pub fn run(state_dir: &Path, wanted: Wanted) -> u8 {
    match show(state_dir, wanted) {
        // A reader that has seen enough is no failure.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("evergate: cannot show the access records in {}: {error}", state_dir.display());
            code::FAILED
        }
        _ => code::OK,
    }
}

fn show(state_dir: &Path, wanted: Wanted) -> io::Result<()> {
    let path = state_dir.join(ACCESS_FILE);
    // The new one first: if it becomes the old one meanwhile, it is read once.
    let mut log = Log::open(path.clone())?;
    let old = Log::open(state_dir.join(ACCESS_OLD_FILE))?;
    let mut last = VecDeque::new();
    if let Some(mut old) = old.filter(|old| log.as_ref().is_none_or(|log| log.key != old.key)) {
        old.last(wanted.last, &mut last)?;
    }
    if let Some(log) = &mut log {
        log.last(wanted.last, &mut last)?;
    }
    if last.is_empty() && wanted.last > 0 && !wanted.is_followed {
        eprintln!("evergate: no access records in {}", state_dir.display());
    }
    print(last.iter().map(Vec::as_slice), wanted.form)?;
    if wanted.is_followed { follow(log, &path, wanted.form) } else { Ok(()) }
}

/// Prints what comes until the process is interrupted or nobody reads it.
fn follow(mut log: Option<Log>, path: &Path, form: Form) -> io::Result<()> {
    loop {
        while let Some(lines) = log.as_mut().map_or(Ok(None), Log::more)? {
            print(lines.split_inclusive(|byte| *byte == b'\n'), form)?;
        }
        let named = Log::open(path.to_owned())?.filter(|named| log.as_ref().is_none_or(|log| log.key != named.key));
        let Some(named) = named else {
            pause()?;
            continue;
        };
        // The clerk writes to the new one; what it wrote to the other since our look is all there was.
        while let Some(lines) = log.as_mut().map_or(Ok(None), Log::more)? {
            print(lines.split_inclusive(|byte| *byte == b'\n'), form)?;
        }
        log = Some(named);
    }
}

/// Waits for the time of the next look; a broken pipe when nobody reads standard output any more.
fn pause() -> io::Result<()> {
    let out = io::stdout();
    // Nothing is asked for, and so only an end is told (poll(2)).
    match poll(&mut [PollFd::new(&out, PollFlags::empty())], Some(&LOOK)) {
        Ok(0) | Err(Errno::INTR) => Ok(()),
        Ok(_) => Err(io::ErrorKind::BrokenPipe.into()),
        Err(errno) => Err(errno.into()),
    }
}

/// A log file that is read from its begin on.
struct Log {
    file: File,
    /// Device and inode: which file it is, whatever its name has become.
    key: (u64, u64),
    /// A line that has not ended yet.
    rest: Vec<u8>,
}

impl Log {
    /// Opens it; none if there is none.
    fn open(path: PathBuf) -> io::Result<Option<Self>> {
        let metadata = match std::fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // The open of a pipe could wait for ever.
        if !metadata.is_file() {
            return Err(io::Error::other(format!("{} is no file", path.display())));
        }
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let metadata = file.metadata()?;
        Ok(Some(Self { file, key: (metadata.dev(), metadata.ino()), rest: Vec::new() }))
    }

    /// The next whole lines, perhaps none yet; nothing at the end of what is there.
    fn more(&mut self) -> io::Result<Option<Vec<u8>>> {
        let before = self.rest.len();
        (&self.file).take(CHUNK_BYTES).read_to_end(&mut self.rest)?;
        if self.rest.len() == before {
            return Ok(None);
        }
        let end = memchr::memrchr(b'\n', &self.rest).map_or(0, |at| at + 1);
        let rest = self.rest.split_off(end);
        Ok(Some(std::mem::replace(&mut self.rest, rest)))
    }

    /// Adds its lines to `last`, which keeps the newest `count`.
    fn last(&mut self, count: usize, last: &mut VecDeque<Vec<u8>>) -> io::Result<()> {
        while let Some(lines) = self.more()? {
            for line in lines.split_inclusive(|byte| *byte == b'\n').filter(|line| *line != b"\n") {
                last.push_back(line.to_owned());
                if last.len() > count {
                    last.pop_front();
                }
            }
        }
        Ok(())
    }
}

fn print<'a>(lines: impl Iterator<Item = &'a [u8]>, form: Form) -> io::Result<()> {
    let mut text = Vec::new();
    for line in lines.filter(|line| *line != b"\n") {
        match (serde_json::from_slice::<Value>(line), form) {
            (Ok(record), Form::Text) if record.is_object() => text.extend(console(&record).into_bytes()),
            (Ok(record), Form::Json) if record.is_object() => text.extend_from_slice(line),
            // A machine that lost its power leaves half of one.
            _ => eprintln!("evergate: a line is not a whole record, left out"),
        }
    }
    let mut out = io::stdout().lock();
    out.write_all(&text)?;
    out.flush()
}

/// Shown where they are known, named as in the record.
const FACTS: [&str; 11] = [
    "model",
    "backend",
    "duration_ms",
    "first_byte_ms",
    "tokens_in",
    "tokens_out",
    "usage",
    "request_id",
    "client_id",
    "tenant",
    "detail",
];

/// A record as a line, with its end: time, status, cause, method and route, then facts. A client's words are quoted
/// unless they are plain, so that none can pass for a fact or drive the terminal.
fn console(record: &Value) -> String {
    let known = |key: &str| record.get(key).and_then(word);
    let is = |key: &str| record.get(key).and_then(Value::as_bool).unwrap_or(false);
    let mut line = record.get("at_ms").and_then(Value::as_u64).map_or_else(|| "-".to_owned(), utc);
    for key in ["status", "cause", "method", "route"] {
        line.push(' ');
        line.push_str(known(key).as_deref().unwrap_or("-"));
    }
    for (key, value) in FACTS.iter().filter_map(|key| Some((key, known(key)?))) {
        // Writing to a String does not fail.
        let _ = write!(line, " {key}={value}");
    }
    if let Some(path) = record.get("path").and_then(Value::as_array) {
        let _ = write!(line, " path={}", path.iter().map(step).collect::<Vec<_>>().join(">"));
    }
    for flag in ["stream", "by_master"].into_iter().filter(|flag| is(flag)) {
        line.push(' ');
        line.push_str(flag);
    }
    line.push('\n');
    line
}

/// One attempt: `upstream:cause`.
fn step(step: &Value) -> String {
    let text = |key: &str| step.get(key).and_then(word).unwrap_or_else(|| "-".to_owned());
    format!("{}:{}", text("upstream"), text("cause"))
}

fn word(value: &Value) -> Option<String> {
    let text = match value {
        Value::String(text) => text.as_str(),
        Value::Number(number) => return Some(number.to_string()),
        _ => return None,
    };
    let is_plain = text.chars().all(|letter| letter.is_ascii_graphic() && !matches!(letter, '"' | '=' | '\\'));
    (!text.is_empty()).then(|| if is_plain { text.to_owned() } else { format!("{text:?}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use evergate_core::record::{Access, Step};

    fn line(access: &Access<'_>) -> String {
        let mut json = String::new();
        access.write_line(&mut json);
        console(&serde_json::from_str(&json).unwrap())
    }

    #[test]
    fn a_line_has_what_the_record_has() {
        let path = [
            Step { upstream: "a".into(), cause: "upstream_connect_failed", ms: 1.0 },
            Step { upstream: "b".into(), cause: "ok", ms: 2.0 },
        ];
        let access = Access {
            at_ms: 1_795_241_145_123,
            request_id: "req_1",
            client_id: "mine-1",
            tenant: "alice",
            method: "POST",
            route: "/v1/chat/completions",
            model: "gpt-4o",
            backend: "b",
            attempts: 2,
            path: &path,
            status: 200,
            cause: "ok",
            is_stream: true,
            first_byte_ms: Some(3.5),
            duration_ms: 12.345,
            tokens_in: Some(5),
            tokens_out: Some(7),
            ..Access::default()
        };
        assert_eq!(
            line(&access),
            "2026-11-21T06:05:45.123Z 200 ok POST /v1/chat/completions model=gpt-4o backend=b duration_ms=12.345 \
             first_byte_ms=3.5 tokens_in=5 tokens_out=7 request_id=req_1 client_id=mine-1 tenant=alice \
             path=a:upstream_connect_failed>b:ok stream\n"
        );
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let access = Access { cause: "worker_lost", is_by_master: true, ..Access::default() };
        assert_eq!(line(&access), "1970-01-01T00:00:00.000Z 0 worker_lost - - duration_ms=0.0 by_master\n");
        assert_eq!(console(&serde_json::json!({})), "- - - - -\n");
    }

    #[test]
    fn a_clients_words_stay_words() {
        for (hostile, shown) in [
            ("m backend=evil", "model=\"m backend=evil\""),
            ("m\n1970 200 ok", "model=\"m\\n1970 200 ok\""),
            ("\u{1b}[2J\u{7f}", "model=\"\\u{1b}[2J\\u{7f}\""),
            // Turns the rest of the line around on a terminal.
            ("m\u{202e}x\u{2028}", "model=\"m\\u{202e}x\\u{2028}\""),
            ("a\"b\\", "model=\"a\\\"b\\\\\""),
        ] {
            let line = line(&Access { model: hostile, ..Access::default() });
            assert!(line.contains(shown) && line.matches('\n').count() == 1, "{line:?}");
            assert!(!line.trim_end().chars().any(char::is_control), "{line:?}");
        }
    }

    #[test]
    fn the_newest_are_kept_and_half_a_line_waits_for_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        assert!(Log::open(path.clone()).unwrap().is_none());
        std::fs::write(&path, "1\n2\n\n3\nhal").unwrap();
        let (mut log, mut last) = (Log::open(path.clone()).unwrap().unwrap(), VecDeque::new());
        log.last(2, &mut last).unwrap();
        assert_eq!(last, [b"2\n", b"3\n"]);
        assert_eq!(log.more().unwrap(), None);
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"f\n4").unwrap();
        assert_eq!(log.more().unwrap().unwrap(), b"half\n");
        assert!(Log::open(folder.path().to_owned()).is_err());
    }
}
