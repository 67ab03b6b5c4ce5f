//! A host that serves a model server: the scripted upstream as a program.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use evergate_core::config::process::Server as Config;
use evergate_host::gate::Gate;
use evergate_host::server::{Condition, Server, Setup};
use evergate_host::{Plan, service::Stage};
use serde_json::{Value, json};

use super::support::{House, LONG, sim};
use super::wire::{Host, Response, serve_mode};

/// How a host is set up in a test.
pub(crate) struct Given {
    pub(crate) plan: Plan,
    pub(crate) config: Config,
    pub(crate) start_timeout: Duration,
    pub(crate) output_bytes_max: u64,
    pub(crate) places: u32,
    pub(crate) queue: u32,
    pub(crate) preload: bool,
    pub(crate) failures: u32,
}

/// The steps of a program that serves at its port.
pub(crate) const SERVES: [&str; 3] = ["pid", "serve:127.0.0.1:{port}", "hang"];

pub(crate) fn given(steps: &[&str]) -> Given {
    Given {
        plan: sim(steps),
        config: Config {
            // The one path besides the endpoints that the scripted upstream answers with 200.
            health: "/v1/models".into(),
            health_interval: Duration::ZERO,
            health_timeout: LONG,
            base_path: "/v1".into(),
            stop: Vec::new(),
            strip: Vec::new(),
            set: BTreeMap::new(),
        },
        start_timeout: LONG,
        output_bytes_max: 32 << 20,
        places: 8,
        queue: 8,
        preload: false,
        failures: 0,
    }
}

/// A host at its socket.
pub(crate) struct Served {
    pub(crate) server: Arc<Server>,
    host: Host,
    folder: tempfile::TempDir,
}

impl Deref for Served {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.host.stage.send_replace(Stage::Cutting);
    }
}

pub(crate) fn serve(house: &House, given: Given) -> Served {
    let folder = super::support::folder();
    let gate = Gate::new(given.places, given.queue, house.ear.clone());
    let setup = Setup {
        start_timeout: given.start_timeout,
        output_bytes_max: given.output_bytes_max,
        preload: given.preload,
        failures: given.failures,
        folder: folder.path().to_owned(),
    };
    let server = Arc::new(Server::new(house.programs.clone(), given.plan, given.config, setup, gate));
    Served { host: serve_mode(Arc::clone(&server), 32 << 20), server, folder }
}

impl Served {
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Asks for what a script does.
    pub(crate) async fn play(&self, script: &str) -> Response {
        self.ask(&body(script, false)).await
    }

    pub(crate) async fn play_stream(&self, script: &str) -> Response {
        self.ask(&body(script, true)).await
    }

    /// Waits until the program serves.
    pub(crate) async fn is_ready(&self) -> i32 {
        let mut known = self.server.condition();
        loop {
            if let Condition::Ready(pid) = known {
                return pid.as_raw_nonzero().get();
            }
            known = self.server.changed(&known).await;
        }
    }
}

/// The system's table of sockets has state and queues in hexadecimal (proc_pid_net(5)).
const ESTABLISHED: &str = "01";
const LISTENING: &str = "0A";

impl Served {
    /// Connections that the program has open: established ones to its port.
    pub(crate) fn open_connections(&self) -> usize {
        let port = self.port();
        sockets().iter().filter(|fields| fields[2].ends_with(&port) && fields[3] == ESTABLISHED).count()
    }

    /// Connections that the program has not accepted yet.
    pub(crate) fn queued_connections(&self) -> u64 {
        let port = self.port();
        let all = sockets();
        let own = all.iter().find(|fields| fields[1].ends_with(&port) && fields[3] == LISTENING).unwrap();
        u64::from_str_radix(own[4].split_once(':').unwrap().1, 16).unwrap()
    }

    /// As that table has it: `:1F90`.
    fn port(&self) -> String {
        let Condition::Ready(pid) = self.server.condition() else { panic!("it is not ready") };
        let args = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap();
        let args = String::from_utf8(args).unwrap();
        let port = args.split('\0').find_map(|arg| arg.strip_prefix("serve:127.0.0.1:")).unwrap();
        format!(":{:04X}", port.parse::<u16>().unwrap())
    }
}

fn sockets() -> Vec<Vec<String>> {
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    table.lines().skip(1).map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}

pub(crate) fn body(script: &str, is_stream: bool) -> Value {
    json!({ "model": script, "messages": [{ "role": "user", "content": "x" }], "stream": is_stream })
}

pub(crate) fn signal(pid: i32, signal: evergate_sys::Signal) {
    rustix::process::kill_process(evergate_sys::Pid::from_raw(pid).unwrap(), signal).unwrap();
}
