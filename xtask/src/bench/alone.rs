//! One worker without a master, under another program such as callgrind: valgrind follows neither the master's
//! `pidfd_open` nor its `execveat`. The bench does here what the master does for a worker at its start.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use evergate_board::{Board, Claim, Phase, Shape};
use evergate_core::exit::Kind;
use evergate_core::inherit;
use evergate_core::plan::Plan;
use evergate_sys::{Exe, Pid, Signal, Spawn, Status};
use rustix::pipe::{PipeFlags, pipe_with};

use super::subject::{Place, find_program};

/// The worker's row on the board; the clerk's, which is not there, comes before.
const ROW: u32 = 1;
/// Under valgrind everything is fifty times slower; nothing else comes near.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running worker; ended when dropped.
#[derive(Debug)]
pub struct Alone {
    pid: Option<Pid>,
    /// Where it takes requests.
    pub address: SocketAddr,
    /// The master's end of the pipe that says that it lives.
    _life: OwnedFd,
}

impl Alone {
    /// Starts a worker under `under`, a program's path and its arguments, and waits until it is ready.
    pub fn start(place: &Place, under: &[OsString]) -> Result<Self, String> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(words("bind"))?;
        let address = listener.local_addr().map_err(words("bind"))?;
        let config = super::subject::configuration(place, address, 1, "")?;
        let (plan, sealed) = compile(&place.evergate, &config)?;
        let board = Board::create(Shape::for_plan(&plan), 1).map_err(|error| format!("board: {error}"))?;
        let row = board.child(ROW).ok_or("the board has no row for a worker")?;
        let spawned_ns = evergate_sys::monotonic_ns();
        row.claim(&Claim { kind: Kind::Worker, slot: 0, epoch: 1, generation: 1, spawned_ns });
        let (read, life) = pipe_with(PipeFlags::CLOEXEC).map_err(words("pipe"))?;
        let nothing = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(words("/dev/null"))?;
        let fds = [
            (nothing.as_fd(), 0),
            (board.fd(), inherit::BOARD),
            (sealed.as_fd(), inherit::CONFIG),
            (read.as_fd(), inherit::LIFE),
            (nothing.as_fd(), inherit::KICK),
            (nothing.as_fd(), inherit::WRITERS),
            (listener.as_fd(), inherit::LISTENERS),
        ];
        let mut args: Vec<OsString> = under.to_vec();
        args.push(place.evergate.clone().into());
        args.extend("worker --row 1 --epoch 1 --generation 1 --listeners 1".split(' ').map(OsString::from));
        // Not the program itself: it may be a script, and a script cannot be executed by a descriptor that closes.
        let env = find_program("env").ok_or("there is no env(1) here")?;
        let pid = spawn(&env, &args, &fds)?;
        let mut alone = Self { pid: Some(pid), address, _life: life };
        let start = Instant::now();
        while row.phase() != Phase::Ready {
            if let Ok(Some(_)) = evergate_sys::peek_exit() {
                return Err(format!("the worker ended before it was ready: {:?}", alone.take_end()));
            }
            if start.elapsed() > PATIENCE {
                return Err(format!("the worker was not ready within {PATIENCE:?}"));
            }
            super::subject::pause(Duration::from_millis(10));
        }
        Ok(alone)
    }

    /// Tells it to end, waits for that, and gives its process id.
    pub fn end(mut self) -> Result<i32, String> {
        let Some(pid) = self.pid else { return Err("the worker has ended".into()) };
        rustix::process::kill_process(pid, Signal::TERM).map_err(|error| format!("TERM: {error}"))?;
        match self.take_end() {
            Some(Status::Code(0)) => Ok(pid.as_raw_nonzero().get()),
            other => Err(format!("the worker ended with {other:?}")),
        }
    }

    fn take_end(&mut self) -> Option<Status> {
        wait(self.pid.take()?)
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        if let Some(pid) = self.pid {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            self.take_end();
        }
    }
}

fn words<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> String {
    move |error| format!("{what}: {error}")
}

/// Waits for a child's end; none if it does not come.
fn wait(pid: Pid) -> Option<Status> {
    let start = Instant::now();
    loop {
        match evergate_sys::reap(pid) {
            Ok(exit) => return Some(exit.status),
            Err(_) if start.elapsed() > PATIENCE => return None,
            Err(_) => super::subject::pause(Duration::from_millis(10)),
        }
    }
}

fn spawn(program: &Path, args: &[OsString], fds: &[(BorrowedFd<'_>, i32)]) -> Result<Pid, String> {
    let exe = File::open(program).map_err(words("the program"))?;
    let spec = Spawn {
        exe: Exe::Descriptor(exe.as_fd()),
        argv0: program.as_os_str(),
        args,
        env: &std::env::vars_os().collect::<Vec<_>>(),
        fds,
        ignored: &[],
        own_group: false,
        dies_with_us: true,
        confine: None,
    };
    evergate_sys::spawn(&spec).map_err(words("the worker does not start"))
}

/// Has the program check its configuration, as the master does.
fn compile(evergate: &Path, config: &Path) -> Result<(Plan, OwnedFd), String> {
    let plan = evergate_sys::memfd(c"plan").map_err(words("memfd"))?;
    let sealed = evergate_sys::memfd(c"config").map_err(words("memfd"))?;
    let args: [&OsStr; 3] = ["compile".as_ref(), "--config".as_ref(), config.as_ref()];
    let fds = [(plan.as_fd(), inherit::COMPILE_PLAN), (sealed.as_fd(), inherit::COMPILE_CONFIG)];
    let pid = spawn(evergate, &args.map(OsString::from), &fds)?;
    match wait(pid) {
        Some(Status::Code(0)) => {}
        other => return Err(format!("compile ended with {other:?}")),
    }
    let plan = evergate_sys::reopen_read_only(&plan).map_err(words("the plan"))?;
    let text = std::io::read_to_string(File::from(plan)).map_err(words("the plan"))?;
    let sealed = evergate_sys::reopen_read_only(&sealed).map_err(words("the configuration"))?;
    Ok((Plan::parse(&text)?, sealed))
}

/// valgrind's command line for one run, with callgrind's file.
pub fn callgrind(valgrind: PathBuf, file: &Path) -> Vec<OsString> {
    let mut out = OsString::from("--callgrind-out-file=");
    out.push(file);
    vec![valgrind.into(), "--quiet".into(), "--tool=callgrind".into(), out]
}
