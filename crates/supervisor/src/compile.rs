//! The child that reads and judges a configuration: the master parses no TOML, and a file that takes long to read holds
//! nobody up.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use evergate_core::inherit::{self, code};
use evergate_core::plan::Plan;
use evergate_sys::{Exe, Pid, Spawn, Status};

use crate::notify;
use crate::step::Refusal;

/// Most of its words that are kept, bytes: some two hundred mistakes.
const WORDS_MAX: u64 = 16 << 10;
/// Most of a plan that is read, bytes: programs have up to two hundred each.
const PLAN_MAX: u64 = 256 << 10;

/// A validation under way.
#[derive(Debug)]
pub(crate) struct Compile {
    pub(crate) pid: Pid,
    plan: OwnedFd,
    config: OwnedFd,
    /// What it says on standard error, unless that is the operator's.
    words: Option<OwnedFd>,
}

/// Where the validation says what is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Words {
    /// To the operator: standard error is inherited.
    Inherited,
    /// To us: somebody waits for the reason.
    Kept,
}

impl Compile {
    /// Starts it; it fills two memfds.
    pub(crate) fn start(exe: BorrowedFd<'_>, args: &[OsString], words: Words) -> io::Result<Self> {
        let plan = evergate_sys::memfd(c"evergate-plan")?;
        let config = evergate_sys::memfd(c"evergate-config")?;
        let words = match words {
            Words::Inherited => None,
            Words::Kept => Some(evergate_sys::memfd(c"evergate-words")?),
        };
        let mut fds = vec![(plan.as_fd(), inherit::COMPILE_PLAN), (config.as_fd(), inherit::COMPILE_CONFIG)];
        fds.extend(words.as_ref().map(|words| (words.as_fd(), 2)));
        let is_for_children = |name: &OsString| !notify::VARIABLES.iter().any(|ours| name == ours);
        let env: Vec<(OsString, OsString)> = std::env::vars_os().filter(|(name, _)| is_for_children(name)).collect();
        let pid = evergate_sys::spawn(&Spawn {
            exe: Exe::Descriptor(exe),
            argv0: OsStr::new("evergate: compile"),
            args,
            env: &env,
            fds: &fds,
            ignored: &[],
            own_group: false,
            // A file that never ends, such as a pipe, would be read for ever when nobody waits for the outcome any more.
            dies_with_us: true,
            confine: None,
        })?;
        Ok(Self { pid, plan, config, words })
    }

    /// What it said, where that was kept.
    pub(crate) fn words(&self) -> String {
        self.words.as_ref().and_then(|words| read(words, WORDS_MAX).ok()).unwrap_or_default()
    }

    /// After its end: the plan, and the sealed configuration. A refusal without words is one that the operator has heard.
    pub(crate) fn finish(self, status: Status) -> Result<(Plan, OwnedFd), Refusal> {
        let internal = |why: String| Refusal { code: code::INTERNAL, why };
        match status {
            Status::Code(0) => {}
            Status::Code(code) => return Err(Refusal { code, why: self.words().trim_end().to_owned() }),
            Status::Signal { number, .. } => {
                return Err(internal(format!("the validation of the configuration was ended by signal {number}")));
            }
        }
        let text = evergate_sys::seal(&self.plan).and_then(|()| read(&self.plan, PLAN_MAX));
        let text = text.map_err(|error| internal(format!("cannot read the plan: {error}")))?;
        let plan = Plan::parse(&text).map_err(internal)?;
        match evergate_sys::seal(&self.config) {
            Ok(()) => Ok((plan, self.config)),
            Err(error) => Err(internal(format!("cannot seal the configuration: {error}"))),
        }
    }
}

fn read(fd: &OwnedFd, max: u64) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::from(evergate_sys::reopen_read_only(fd)?).take(max).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
