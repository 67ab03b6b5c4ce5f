//! `evergate logs NAME`: what a model's programs have written.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use evergate_board::Board;
use evergate_core::inherit::code;
use evergate_supervisor::client;

use crate::lives::host::{FOLDER, LOG_SUFFIX, OLD_SUFFIX};
use crate::telemetry::programs::programs;

/// Between two looks for more.
const LOOK: Duration = Duration::from_millis(200);

/// Prints the log, and with `follows` whatever comes, until it is interrupted or nobody reads. 1 when there is none.
#[must_use]
pub fn run(state_dir: &Path, name: &str, follows: bool) -> u8 {
    let is_plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
    if name.is_empty() || !name.bytes().all(is_plain) {
        eprintln!("evergate: \"{name}\" is no upstream's name");
        return code::USAGE;
    }
    let path = state_dir.join(FOLDER).join(format!("{name}{LOG_SUFFIX}"));
    match show(&path, follows) {
        // Whoever read has heard enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => code::OK,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            eprintln!("evergate: {}", missing(state_dir, name));
            code::FAILED
        }
        Err(error) => {
            eprintln!("evergate: cannot read {}: {error}", path.display());
            code::FAILED
        }
        Ok(()) => code::OK,
    }
}

/// Why there is no log, as far as a running gateway can tell.
fn missing(state_dir: &Path, name: &str) -> String {
    let folder = state_dir.join(FOLDER);
    let reply = client::request(state_dir, "status").ok().and_then(|reply| reply.fd);
    match reply.and_then(|fd| Board::attach(fd).ok()) {
        None => format!("no program of \"{name}\" has written anything in {}", folder.display()),
        Some(board) if programs(&board).iter().any(|program| program.model == name) => {
            format!("the program of \"{name}\" has not written anything yet")
        }
        Some(_) => format!("no upstream of the name \"{name}\" has a program"),
    }
}

fn show(path: &Path, follows: bool) -> io::Result<()> {
    let mut out = Out { to: io::stdout().lock(), begun: Vec::new() };
    let mut file = File::open(path)?;
    if let Some(mut old) = older(path)? {
        copy(&mut old, &mut out)?;
    }
    loop {
        copy(&mut file, &mut out)?;
        out.to.flush()?;
        if !follows {
            return Ok(());
        }
        #[allow(
            clippy::disallowed_methods,
            reason = "a command's own pause: nobody tells of more, and it has one thread"
        )]
        std::thread::sleep(LOOK);
        // A full file gets another name, and another one its.
        let is_other = std::fs::metadata(path).is_ok_and(|now| file.metadata().is_ok_and(|own| own.ino() != now.ino()));
        if is_other {
            copy(&mut file, &mut out)?;
            let inode = file.metadata()?.ino();
            if let Some(mut old) = older(path)?.filter(|old| old.metadata().is_ok_and(|old| old.ino() != inode)) {
                eprintln!("evergate: the log was written faster than it was read: lines may be missing here");
                copy(&mut old, &mut out)?;
            }
            file = File::open(path)?;
        }
    }
}

/// The file that was full before this one, if there was one.
fn older(path: &Path) -> io::Result<Option<File>> {
    let mut name = path.to_owned().into_os_string();
    name.push(OLD_SUFFIX);
    match File::open(PathBuf::from(name)) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn copy(from: &mut File, out: &mut Out<impl Write>) -> io::Result<()> {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let count = from.read(&mut bytes)?;
        if count == 0 {
            return Ok(());
        }
        out.show(bytes.get(..count).unwrap_or_default())?;
    }
}

/// Shows lines. What a program says may be a client's words: nothing in them may move the cursor of whoever reads.
struct Out<W> {
    to: W,
    /// The beginning of a line whose end has not come.
    begun: Vec<u8>,
}

impl<W: Write> Out<W> {
    fn show(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.begun.extend_from_slice(bytes);
        let Some(end) = memchr::memrchr(b'\n', &self.begun) else { return Ok(()) };
        let rest = self.begun.split_off(end + 1);
        let lines = std::mem::replace(&mut self.begun, rest);
        let is_plain = |letter: &char| !letter.is_control() || matches!(letter, '\n' | '\t');
        let plain: String = String::from_utf8_lossy(&lines)
            .chars()
            .map(|letter| if is_plain(&letter) { letter } else { ' ' })
            .collect();
        self.to.write_all(plain.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_shown_whole_and_without_what_drives_a_terminal() {
        let text = "a\tb\u{1b}[2J\n\u{9b}31m\u{e4}\r\nhalf";
        for at in 0..=text.len() {
            let mut out = Out { to: Vec::new(), begun: Vec::new() };
            out.show(&text.as_bytes()[..at]).unwrap();
            out.show(&text.as_bytes()[at..]).unwrap();
            assert_eq!(String::from_utf8(out.to).unwrap(), "a\tb [2J\n 31m\u{e4} \n", "split at {at}");
        }
    }
}
