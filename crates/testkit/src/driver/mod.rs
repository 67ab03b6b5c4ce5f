//! Starts the real binary, watches it from outside and leaves nothing behind.

mod builder;
mod process;
mod state;
mod tail;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use serde_json::Value;

pub use builder::{Builder, Ended, gateway_config};
pub use process::{Child, is_alive, start_ticks, state_of};
pub use tail::Tail;

use crate::raw::{self, Response};
use crate::wait::{try_wait_for, wait_for, wait_until};
use process::Known;

/// A running Evergate: its master, started by us, and what its state folder says.
///
/// Dropping it sends TERM to the master and, after five seconds, KILL to the master and to exactly those children
/// that it knew; a test that cares how it ends says so with [`Evergate::wait_exit`].
pub struct Evergate {
    master: std::process::Child,
    exe: PathBuf,
    state_dir: PathBuf,
    env: Vec<(String, String)>,
    stderr: Arc<Mutex<String>>,
    stdout: Arc<Mutex<String>>,
    status: Option<ExitStatus>,
    /// Every child that was seen, so that Drop can tell ours from strangers.
    known: Mutex<Vec<Known>>,
    /// Holds the configuration, and the state unless the test gave a folder.
    folder: tempfile::TempDir,
}

impl Evergate {
    /// Prepares a start of that binary; a test of the `evergate` crate gives `env!("CARGO_BIN_EXE_evergate")`.
    #[must_use]
    pub fn builder(exe: impl AsRef<Path>) -> Builder {
        Builder::new(exe.as_ref())
    }

    /// The first public address, `127.0.0.1:PORT` or `unix:PATH`.
    ///
    /// # Panics
    /// When the run file has none.
    #[must_use]
    pub fn addr(&self) -> String {
        self.addrs().into_iter().next().expect("an address in run.json")
    }

    /// All public addresses.
    #[must_use]
    pub fn addrs(&self) -> Vec<String> {
        state::addresses(&self.run())
    }

    /// The admin listener's address.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn admin(&self) -> String {
        self.run()["admin"].as_str().expect("an admin address in run.json").to_owned()
    }

    /// The master's process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.master.id()).expect("a pid")
    }

    /// The run file as it stands; null when there is none.
    #[must_use]
    pub fn run(&self) -> Value {
        state::run_file(&self.state_dir)
    }

    /// The children that the run file lists now.
    #[must_use]
    pub fn children(&self) -> Vec<Child> {
        let children = state::children(&self.run());
        let mut known = self.known.lock().expect("known");
        for child in &children {
            if !known.iter().any(|one| one.pid == child.pid) {
                known.extend(Known::of(child));
            }
        }
        children
    }

    /// Process ids of the workers that the run file lists now, by slot.
    #[must_use]
    pub fn workers(&self) -> Vec<i32> {
        let mut workers: Vec<Child> = self.children().into_iter().filter(|child| child.kind == "worker").collect();
        workers.sort_by_key(|child| child.slot);
        workers.iter().map(|child| child.pid).collect()
    }

    /// Waits until the run file lists that many workers and all of them are alive.
    ///
    /// # Panics
    /// When it does not within 20 s.
    #[track_caller]
    pub fn wait_workers(&self, count: usize) -> Vec<i32> {
        wait_for("the wanted number of living workers", Duration::from_secs(20), || {
            let workers = self.workers();
            (workers.len() == count && workers.iter().all(|&pid| is_alive(pid))).then_some(workers)
        })
    }

    /// Sends a signal to the master.
    pub fn signal(&self, signal: Signal) {
        process::kill(self.pid(), signal);
    }

    /// Kills the `index`th worker, by slot, with SIGKILL and returns its process id.
    ///
    /// # Panics
    /// When there is none.
    pub fn kill_worker(&self, index: usize) -> i32 {
        let pid = *self.workers().get(index).expect("a worker to kill");
        process::kill(pid, Signal::KILL);
        pid
    }

    /// Waits for the master's end.
    ///
    /// # Panics
    /// When it still runs after `limit`.
    #[track_caller]
    pub fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let _ = self.children();
        let status = match self.status {
            Some(status) => Some(status),
            None => try_wait_for(limit, || self.master.try_wait().expect("wait for the master")),
        };
        self.status = status;
        match status {
            Some(status) => status,
            None => panic!("the master still runs after {limit:?}; it said:\n{}", self.stderr()),
        }
    }

    /// Whether the master still runs.
    pub fn is_running(&mut self) -> bool {
        if self.status.is_none() {
            self.status = self.master.try_wait().expect("look for the master");
        }
        self.status.is_none()
    }

    /// Waits until none of the children that were ever seen is alive.
    ///
    /// # Panics
    /// When one is after `limit`.
    #[track_caller]
    pub fn wait_no_children(&self, limit: Duration) {
        wait_until("the end of every child", limit, || {
            self.known.lock().expect("known").iter().all(|child| !child.is_alive())
        });
    }

    /// All exit records so far, of all runs in this state folder.
    #[must_use]
    pub fn exits(&self) -> Vec<Value> {
        state::lines(&self.state_dir, "exits.jsonl")
    }

    /// Waits for that many exit records that satisfy `wanted`.
    ///
    /// # Panics
    /// When they are not there within `limit`.
    #[track_caller]
    pub fn wait_exits(&self, count: usize, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
        wait_for("exit records", limit, || {
            let found: Vec<Value> = self.exits().into_iter().filter(|record| wanted(record)).collect();
            (found.len() >= count).then_some(found)
        })
    }

    /// Follows the exit records from the beginning of the present file on: for drills whose records fill several.
    #[must_use]
    pub fn follow_exits(&self) -> Tail {
        Tail::new(self.state_dir.join("exits.jsonl"))
    }

    /// Follows the access records.
    #[must_use]
    pub fn follow_access(&self) -> Tail {
        Tail::new(self.state_dir.join("access.jsonl"))
    }

    /// All access records so far.
    #[must_use]
    pub fn access(&self) -> Vec<Value> {
        state::lines(&self.state_dir, "access.jsonl")
    }

    /// Waits for the access record of the request with that id: ours (`x-request-id` of the answer) or the client's.
    ///
    /// # Panics
    /// When it is not there within `limit`.
    #[track_caller]
    #[must_use]
    pub fn wait_access(&self, id: &str, limit: Duration) -> Value {
        wait_for(&format!("the access record of {id}"), limit, || {
            self.access().into_iter().find(|record| record["request_id"] == id || record["client_id"] == id)
        })
    }

    /// The admin listener's metrics, as text.
    #[must_use]
    pub fn metrics(&self) -> String {
        raw::get(&self.admin(), "/metrics").text()
    }

    /// One GET on the first public address.
    #[track_caller]
    #[must_use]
    pub fn get(&self, path: &str) -> Response {
        raw::get(&self.addr(), path)
    }

    /// Runs the same binary as a command (`status`, `exits`, `stop` ...) on this state folder and waits for its end.
    #[must_use]
    pub fn cli(&self, args: &[&str]) -> Output {
        let mut command = Command::new(&self.exe);
        builder::environment(&mut command, &self.env);
        command.args(args).arg("--state-dir").arg(&self.state_dir).stdin(Stdio::null());
        command.output().expect("run the command")
    }

    /// What a command prints that succeeds.
    ///
    /// # Panics
    /// When it fails, or prints what is no UTF-8.
    #[track_caller]
    #[must_use]
    pub fn printed(&self, args: &[&str]) -> String {
        let out = self.cli(args);
        assert!(out.status.success(), "{args:?}: {out:?}");
        String::from_utf8(out.stdout).expect("UTF-8")
    }

    /// What `evergate models --json` says of one model.
    ///
    /// # Panics
    /// When there is none of that name.
    #[track_caller]
    #[must_use]
    pub fn model(&self, name: &str) -> Value {
        let all: Vec<Value> = serde_json::from_str(&self.printed(&["models", "--json"])).expect("JSON");
        all.into_iter().find(|model| model["model"] == name).unwrap_or_else(|| panic!("no model {name}"))
    }

    /// Writes a file beside the configuration file, or `evergate.toml` itself.
    ///
    /// # Panics
    /// When that is impossible.
    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.folder.path().join(name), text).expect("write a file");
    }

    /// The configuration file.
    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.folder.path().join("evergate.toml")
    }

    /// The state folder.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// What the master and its children have said so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.lock().expect("stderr").clone()
    }

    /// What stood on standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.lock().expect("stdout").clone()
    }
}

impl Drop for Evergate {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- evergate said:\n{}--- end of what evergate said", self.stderr());
        }
        self.remember_children();
        if self.is_running() {
            self.signal(Signal::TERM);
            let ended = try_wait_for(Duration::from_secs(5), || (!self.is_running()).then_some(()));
            if ended.is_none() {
                // It may have started more children meanwhile.
                self.remember_children();
                let _ = self.master.kill();
                let _ = self.master.wait();
            }
        }
        for child in self.known.get_mut().expect("known") {
            child.kill();
        }
    }
}

impl Evergate {
    /// For Drop: a run file that cannot be read must not become a second panic.
    fn remember_children(&self) {
        let look = std::panic::AssertUnwindSafe(|| self.children());
        let _ = std::panic::catch_unwind(look);
    }
}

fn pid_of(pid: i32) -> Pid {
    Pid::from_raw(pid).expect("a process id is positive")
}
