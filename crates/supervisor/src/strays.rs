//! Children of a dead master that its run file does not name: a disk was full when they were started, or the file was
//! damaged. They carry the folder of the hosts' sockets, which is this state folder's own, in their environment.

use std::path::Path;

use evergate_core::exit::Kind;
use evergate_core::inherit::HOSTS_DIR_VARIABLE;
use evergate_sys::{Pid, start_ticks};

use crate::runfile::RunChild;

/// All that are there, those that the run file names among them. To be called while holding the lock.
pub(crate) fn find(hosts: &Path) -> Vec<RunChild> {
    let mut mark = std::ffi::OsString::from(format!("{HOSTS_DIR_VARIABLE}="));
    mark.push(hosts);
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(Pid::from_raw);
    let own = rustix::process::getpid();
    pids.filter(|pid| *pid != own).filter_map(|pid| child(pid, mark.as_encoded_bytes())).collect()
}

fn child(pid: Pid, mark: &[u8]) -> Option<RunChild> {
    let number = pid.as_raw_nonzero().get();
    // First, so that the rest is about this very process or about one that is not signalled.
    let start_ticks = start_ticks(pid)?;
    // Of other users it cannot be read.
    let environ = std::fs::read(format!("/proc/{number}/environ")).ok()?;
    if !environ.split(|byte| *byte == 0).any(|pair| pair == mark) {
        return None;
    }
    let line = std::fs::read(format!("/proc/{number}/cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line);
    Some(RunChild { pid: number, start_ticks, ..read(&line)? })
}

/// What a child of ours was started with (`Estate::exec`). A program may have been given our environment: it is none.
fn read(line: &str) -> Option<RunChild> {
    let words: Vec<&str> = line.split('\0').collect();
    let title = words.first()?.strip_prefix("evergate: ")?;
    let kind = Kind::from_name(words.get(1)?).filter(|kind| title.starts_with(kind.name()))?;
    let value = |flag: &str| words.iter().skip_while(|word| **word != flag).nth(1).copied().unwrap_or_default();
    let number = |text: &str| text.parse().unwrap_or(0);
    Some(RunChild {
        kind: kind.name().to_owned(),
        name: value("--name").to_owned(),
        slot: number(title.rsplit(' ').next().unwrap_or_default()),
        row: number(value("--row")),
        epoch: number(value("--epoch")),
        generation: number(value("--generation")),
        ..RunChild::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_told_by_how_it_was_started() {
        let rest = "--row\x003\x00--epoch\x007\x00--generation\x002\x00--listeners\x001\x00";
        let worker = read(&format!("evergate: worker 1\0worker\0{rest}")).unwrap();
        let named = |child: &RunChild| (child.kind.clone(), child.name.clone(), child.slot, child.row, child.epoch);
        assert_eq!(named(&worker), ("worker".into(), String::new(), 1, 3, 7));
        assert_eq!(worker.generation, 2);
        let host = read(&format!("evergate: host tiny\0host\0{rest}--name\0tiny\0")).unwrap();
        assert_eq!(named(&host), ("host".into(), "tiny".into(), 0, 3, 7));
        for other in ["", "sleep\x00600\0", "evergate: compile\0compile\0", "evergate: worker 1\0clerk\0", "evergate: "]
        {
            assert_eq!(read(other), None, "{other:?}");
        }
    }
}
