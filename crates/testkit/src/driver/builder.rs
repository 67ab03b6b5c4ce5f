//! Preparing a start: configuration, environment, folder; and watching it until it serves or has ended.

use std::fmt::Write as _;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::ClientConfig;

use super::Evergate;
use crate::raw::{Raw, get_request};
use crate::wait::{try_wait_for, wait_for};

/// A start has that long; the binary itself needs well under a second.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A gateway that answers from `echo` only, on free ports.
const ECHO_CONFIG: &str = "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n\
     [models.echo]\ntargets = [{ upstream = \"echo\", model = \"echo\" }]\n";

/// A configuration on free ports with one upstream `fake` of that base URL, whose models are served by their own
/// names; `more` is put after it and may open any section but `[server]`, `[admin]` and `[upstreams.fake]`.
#[must_use]
pub fn gateway_config(base_url: &str, models: &[&str], more: &str) -> String {
    let mut text = format!(
        "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n\
         [upstreams.fake]\ndialect = \"openai\"\nbase_url = \"{base_url}\"\n"
    );
    for model in models {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "[models.\"{model}\"]\ntargets = [{{ upstream = \"fake\", model = \"{model}\" }}]");
    }
    text + more + "\n"
}

/// How a start is to be made.
pub struct Builder {
    exe: PathBuf,
    config: Option<String>,
    env: Vec<(String, String)>,
    args: Vec<String>,
    state_dir: Option<PathBuf>,
    files: Vec<(String, String)>,
    tls: Option<Arc<ClientConfig>>,
    wrapper: Vec<String>,
    listeners: Vec<OwnedFd>,
}

/// A start that ended by itself.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it said.
    pub stderr: String,
}

impl Ended {
    /// The exit code, -1 when a signal ended it.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }
}

impl Builder {
    pub(super) fn new(exe: &Path) -> Self {
        Self {
            exe: exe.to_owned(),
            config: Some(ECHO_CONFIG.to_owned()),
            env: Vec::new(),
            args: Vec::new(),
            state_dir: None,
            files: Vec::new(),
            tls: None,
            wrapper: Vec::new(),
            listeners: Vec::new(),
        }
    }

    /// The configuration file's text; see [`gateway_config`]. Without it, only `echo` on free ports.
    #[must_use]
    pub fn config(mut self, text: impl Into<String>) -> Self {
        self.config = Some(text.into());
        self
    }

    /// No configuration file, so that the binary's own defaults rule: `--listen 127.0.0.1:0` is added, but the admin
    /// port is the fixed default, so that only one test at a time can do this.
    #[must_use]
    pub fn without_config(mut self) -> Self {
        self.config = None;
        self
    }

    /// One environment variable. There are no others but `PATH` and `HOME`.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// One argument after `serve`'s own.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// A file beside the configuration file, which may name it without a folder.
    #[must_use]
    pub fn file(mut self, name: &str, text: &str) -> Self {
        self.files.push((name.to_owned(), text.to_owned()));
        self
    }

    /// Another state folder than one of its own, so that a second run can follow a first.
    #[must_use]
    pub fn state_dir(mut self, folder: &Path) -> Self {
        self.state_dir = Some(folder.to_owned());
        self
    }

    /// The listener speaks TLS: readiness is asked for with this.
    #[must_use]
    pub fn tls(mut self, config: &Arc<ClientConfig>) -> Self {
        self.tls = Some(config.clone());
        self
    }

    /// A program and its first arguments, which is started instead and is given the binary and its arguments after those,
    /// to execute it in its own place: a cgroup or a namespace is entered like this.
    #[must_use]
    pub fn wrapper(mut self, words: &[&str]) -> Self {
        self.wrapper = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Listening sockets, at most two, as systemd would pass them: descriptors 3 and 4 with `LISTEN_FDS` and `LISTEN_PID`.
    #[must_use]
    pub fn listeners(mut self, listeners: impl IntoIterator<Item = impl Into<OwnedFd>>) -> Self {
        self.listeners = listeners.into_iter().map(Into::into).collect();
        self
    }

    /// Starts it and waits until it serves.
    ///
    /// # Panics
    /// When it ends before that, or does not serve within 20 s; the message has what it said.
    #[track_caller]
    #[must_use]
    pub fn start(self) -> Evergate {
        match self.try_start() {
            Ok(evergate) => evergate,
            Err(ended) => panic!("the start failed with {}:\n{}", ended.status, ended.stderr),
        }
    }

    /// Starts it and waits until it serves.
    ///
    /// # Errors
    /// How it ended and what it said, when it ended before it served.
    ///
    /// # Panics
    /// When it neither serves nor ends within 20 s.
    #[track_caller]
    pub fn try_start(self) -> Result<Evergate, Ended> {
        let tls = self.tls.clone();
        let mut evergate = self.spawn();
        let pid = i64::from(evergate.pid());
        let end = Instant::now() + START_LIMIT;
        loop {
            let ready = try_wait_for(Duration::from_millis(50), || {
                if !evergate.is_running() {
                    return Some(false);
                }
                // A run file of the run before does not count.
                let run = evergate.run();
                let address = super::state::addresses(&run).into_iter().next()?;
                (run["pid"] == pid && is_ready(&address, tls.as_ref())).then_some(true)
            });
            match ready {
                Some(true) => {
                    let _ = evergate.children();
                    return Ok(evergate);
                }
                Some(false) => {
                    let status = evergate.wait_exit(Duration::ZERO);
                    return Err(Ended { status, stderr: evergate.last_words() });
                }
                None => assert!(Instant::now() < end, "not ready within {START_LIMIT:?}:\n{}", evergate.stderr()),
            }
        }
    }

    /// Starts it and does not wait for anything.
    ///
    /// # Panics
    /// When the binary cannot be started.
    #[must_use]
    pub fn spawn(self) -> Evergate {
        let folder = tempfile::tempdir().expect("a folder");
        let state_dir = self.state_dir.clone().unwrap_or_else(|| folder.path().join("state"));
        let mut words = self.wrapper.clone();
        let mut stdio = [Stdio::null(), Stdio::piped()];
        if !self.listeners.is_empty() {
            // A shell knows its pid before it becomes the binary, which is what systemd does, and it moves descriptors,
            // which a `Command` cannot: the sockets travel as its standard input and output.
            let moves = ["3<&0", "4>&1"].get(..self.listeners.len()).expect("two listeners at most").join(" ");
            let script =
                format!("LISTEN_PID=$$ LISTEN_FDS={} exec \"$@\" {moves} </dev/null >/dev/null", self.listeners.len());
            words.extend(["/bin/sh".into(), "-c".into(), script, "sh".into()]);
            for (place, listener) in stdio.iter_mut().zip(self.listeners) {
                *place = listener.into();
            }
        }
        let mut command = match words.split_first() {
            Some((program, rest)) => {
                let mut command = Command::new(program);
                command.args(rest).arg(&self.exe);
                command
            }
            None => Command::new(&self.exe),
        };
        environment(&mut command, &self.env);
        command.current_dir(folder.path()).arg("serve").arg("--state-dir").arg(&state_dir);
        for (name, text) in &self.files {
            std::fs::write(folder.path().join(name), text).expect("write a file");
        }
        match &self.config {
            Some(text) => {
                let path = folder.path().join("evergate.toml");
                std::fs::write(&path, text).expect("write the configuration");
                command.arg("--config").arg(path);
            }
            None => {
                command.args(["--listen", "127.0.0.1:0"]);
            }
        }
        let [stdin, stdout] = stdio;
        command.args(&self.args).stdin(stdin).stdout(stdout).stderr(Stdio::piped());
        let mut master = command.spawn().unwrap_or_else(|error| panic!("start {}: {error}", self.exe.display()));
        let stderr = collect(master.stderr.take().expect("stderr"));
        let stdout = master.stdout.take().map_or_else(Default::default, collect);
        Evergate {
            master,
            exe: self.exe,
            state_dir,
            env: self.env,
            stderr,
            stdout,
            status: None,
            known: Mutex::default(),
            folder,
        }
    }
}

impl Evergate {
    /// Its words once all who could speak have ended; without waiting long for a child that holds the pipe. What was said
    /// just before an end is in the pipe then, and perhaps not yet in [`Evergate::stderr`].
    #[must_use]
    pub fn last_words(&self) -> String {
        // The collecting thread holds the second handle until the pipe's end.
        let _ = try_wait_for(Duration::from_secs(2), || (Arc::strong_count(&self.stderr) == 1).then_some(()));
        self.stderr()
    }

    /// Waits until its standard error holds `text`, and returns all of it.
    ///
    /// # Panics
    /// When it does not within `limit`.
    #[track_caller]
    pub fn wait_stderr(&self, text: &str, limit: Duration) -> String {
        wait_for(&format!("{text:?} on stderr"), limit, || {
            let said = self.stderr();
            said.contains(text).then_some(said)
        })
    }
}

/// Nothing of the test's own environment but what a shell needs.
pub(super) fn environment(command: &mut Command, env: &[(String, String)]) {
    command.env_clear();
    for name in ["PATH", "HOME"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.envs(env.iter().map(|(name, value)| (name, value)));
}

fn is_ready(address: &str, tls: Option<&Arc<ClientConfig>>) -> bool {
    let mut raw = match tls {
        Some(config) => Raw::connect_tls(address, config),
        None => match Raw::try_connect(address) {
            Ok(raw) => raw,
            Err(_) => return false,
        },
    };
    raw.try_send(&get_request("/readyz", "")).is_ok()
        && raw.try_read_response(Duration::from_secs(2)).is_ok_and(|response| response.status == 200)
}

/// Reads a pipe to its end on a thread of its own.
fn collect(mut pipe: impl Read + Send + 'static) -> Arc<Mutex<String>> {
    let said = Arc::new(Mutex::new(String::new()));
    let shared = said.clone();
    std::thread::spawn(move || {
        let mut piece = [0_u8; 4096];
        while let Ok(size @ 1..) = pipe.read(&mut piece) {
            shared.lock().expect("said").push_str(&String::from_utf8_lossy(&piece[..size]));
        }
    });
    said
}
