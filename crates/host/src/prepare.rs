//! From a program's checked section to the plan by which it is started.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use evergate_core::config::SecretRef;
use evergate_core::config::process::{Cgroup, EnvValue, Mode, PASSED, Process, ProcessLimits, Sandbox};
use evergate_core::{Error, Fault};
use evergate_sys::{Landlock, Limit};

use crate::cgroup::Cgroups;
use crate::program::Plan;

/// What every program needs to read to run at all; what is not there is left out. `/proc` does not show it other
/// processes' environments: Landlock keeps it from those too.
const SYSTEM_READ: [&str; 13] = [
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc",
    "/proc",
    "/sys",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
];
/// What every program may write to.
const SYSTEM_WRITE: [&str; 1] = ["/dev/null"];

/// What a section refers to.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// The gateway's variable of that name.
    pub variable: &'a dyn Fn(&str) -> Option<OsString>,
    /// A secret's value.
    pub secret: &'a dyn Fn(&SecretRef) -> Option<String>,
    /// The working folder of a program whose section names none.
    pub folder: &'a Path,
    /// The folder of its socket, if it is to make one.
    pub socket_folder: Option<&'a Path>,
}

/// A plan, and how far its program is confined, for the log.
#[derive(Debug)]
pub struct Prepared {
    /// How it is started.
    pub plan: Plan,
    /// What the kernel makes of `sandbox`.
    pub level: Level,
    /// What it makes of `cgroup`, in words; none where that is off.
    pub cgroup: Option<String>,
}

/// How far a program's view of the file system is confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// It was not asked for.
    Open,
    /// This kernel cannot, or may not.
    Unsupported,
    /// By this version of Landlock; what each lacks is told at [`Landlock::abi`].
    Landlock(u32),
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("not asked for"),
            Self::Unsupported => f.write_str("not possible: this kernel has no Landlock"),
            Self::Landlock(abi @ 3..) => write!(f, "Landlock {abi}"),
            Self::Landlock(abi) => write!(f, "Landlock {abi}, which does not keep it from truncating files"),
        }
    }
}

/// Makes the plan of a section. To be done once, at the host's start: it opens the places of the sandbox, which may take
/// as long as their file systems do.
///
/// # Errors
/// `AdapterSpawnFailed` with the variable or the place that is missing.
pub fn prepare(process: &Process, around: Surroundings<'_>) -> Result<Prepared, Error> {
    let dir = process.dir.as_ref().map_or_else(|| around.folder.to_owned(), PathBuf::from);
    let sandbox = process.sandbox.as_ref().map(|sandbox| confine(sandbox, &dir, around.socket_folder)).transpose()?;
    let level = match &sandbox {
        None => Level::Open,
        Some(None) => Level::Unsupported,
        Some(Some(landlock)) => Level::Landlock(landlock.abi()),
    };
    let cgroups = cgroups(process)?;
    let has_memory = cgroups.as_ref().is_some_and(Cgroups::has_memory);
    let plan = Plan {
        argv: process.argv.iter().map(OsString::from).collect(),
        env: environment(process, around)?,
        dir: Some(dir),
        limits: limits(&process.limits, has_memory),
        ids: process.user.map(|ids| (ids.uid, ids.gid)),
        landlock: sandbox.flatten().map(Arc::new),
        memory: process.limits.memory.filter(|_| has_memory),
        cgroups: None,
        grace: process.grace,
    };
    let cgroup = cgroups.as_ref().map(ToString::to_string);
    let cgroups = cgroups.filter(|cgroups| cgroups.check().is_ok()).map(Arc::new);
    Ok(Prepared { plan: Plan { cgroups, ..plan }, level, cgroup })
}

/// Where it gets a cgroup, as far as its section wants one and the machine allows it. A program that lives for one request
/// gets one only where the section insists: to enter a cgroup can take longer than it lives.
fn cgroups(process: &Process) -> Result<Option<Cgroups>, Error> {
    let is_kept = !matches!(process.mode, Mode::Command(_));
    let required = match process.cgroup {
        Cgroup::Off => return Ok(None),
        Cgroup::Auto if !is_kept => return Ok(None),
        Cgroup::Auto => false,
        Cgroup::Required => true,
    };
    let cgroups = Cgroups::make();
    if required {
        cgroups.check().map_err(|why| failed(format!("it must have a cgroup, and can have none: {why}")))?;
        if process.limits.memory.is_some() && !cgroups.has_memory() {
            return Err(failed(format!("its cgroup must bound its memory, and cannot: {cgroups}")));
        }
    }
    Ok(Some(cgroups))
}

/// The variables that are passed on where they are set, and the section's own over them.
fn environment(process: &Process, around: Surroundings<'_>) -> Result<Vec<(OsString, OsString)>, Error> {
    let passed = PASSED.iter().copied().chain(process.pass_env.iter().map(String::as_str));
    let mut env: Vec<(OsString, OsString)> = Vec::new();
    for name in passed.filter(|name| !process.env.contains_key(*name)) {
        if let Some(value) = (around.variable)(name).filter(|_| !env.iter().any(|(known, _)| known == name)) {
            env.push((name.into(), value));
        }
    }
    for (name, value) in &process.env {
        let value = match value {
            EnvValue::Text(text) => text.clone(),
            EnvValue::Secret(reference) => (around.secret)(reference)
                .ok_or_else(|| failed(format!("the secret of its variable {name} is missing")))?,
        };
        env.push((name.into(), value.into()));
    }
    Ok(env)
}

/// Those of setrlimit(2); `memory` is among them where no cgroup bounds it.
fn limits(limits: &ProcessLimits, has_memory: bool) -> Vec<(Limit, u64)> {
    let all = [
        // A core of ours or of a model is too large to be of use to anybody.
        (Limit::Core, Some(0)),
        (Limit::Memory, limits.memory.filter(|_| !has_memory)),
        (Limit::OpenFiles, limits.open_files.map(u64::from)),
        (Limit::Processes, limits.processes.map(u64::from)),
        (Limit::Cpu, limits.cpu_s.map(u64::from)),
        (Limit::FileSize, limits.file_size),
    ];
    all.into_iter().filter_map(|(limit, value)| Some((limit, value?))).collect()
}

/// The rules of a sandbox; none where the kernel has none.
fn confine(sandbox: &Sandbox, dir: &Path, socket_folder: Option<&Path>) -> Result<Option<Landlock>, Error> {
    let place =
        |path: &Path, error: &io::Error| failed(format!("its sandbox's {} cannot be opened: {error}", path.display()));
    let Some(landlock) = Landlock::new().map_err(|error| failed(format!("its sandbox cannot be made: {error}")))?
    else {
        return Ok(None);
    };
    for path in SYSTEM_READ.iter().map(Path::new).filter(|path| path.exists()) {
        landlock.read(path).map_err(|error| place(path, &error))?;
    }
    for path in sandbox.read.iter().map(Path::new) {
        landlock.read(path).map_err(|error| place(path, &error))?;
    }
    let own = [Some(dir), socket_folder].into_iter().flatten();
    for path in SYSTEM_WRITE.iter().map(Path::new).chain(own).chain(sandbox.write.iter().map(Path::new)) {
        landlock.write(path).map_err(|error| place(path, &error))?;
    }
    Ok(Some(landlock))
}

fn failed(detail: String) -> Error {
    Error::new(Fault::AdapterSpawnFailed, "the program of this model cannot be started").detail(detail)
}
