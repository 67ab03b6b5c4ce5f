//! A process that the kernel holds on to: killed, and not to be buried. A frozen freezer cgroup (version 1) is such a hold: its
//! tasks are in state D and take not even a KILL before they are thawed.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use evergate_testkit::driver::{is_alive, state_of};
use evergate_testkit::raw::{chat_body, get_request, post_request};
use evergate_testkit::{Evergate, Raw, wait_until};
use serde_json::{Value, json};

use crate::{EXE, LIMIT};

/// A freezer of our own, below the one that we are in.
struct Freezer(PathBuf);

impl Freezer {
    fn make() -> Result<Self, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let own = std::fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
        let found = own.lines().find_map(|line| line.split_once(":freezer:")).map(|(_, path)| path);
        let Some(path) = found else { return Err("there is no freezer cgroup (version 1) here".into()) };
        let name = format!("evergate-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new("/sys/fs/cgroup/freezer").join(path.trim_start_matches('/')).join(name);
        std::fs::create_dir(&path).map_err(|error| format!("no freezer cgroup can be made here: {error}"))?;
        Ok(Self(path))
    }

    fn freeze(&self, pid: i32) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
        std::fs::write(self.0.join("freezer.state"), "FROZEN").unwrap();
        wait_until("state D", LIMIT, || state_of(pid) == Some('D'));
    }

    fn thaw(&self) {
        std::fs::write(self.0.join("freezer.state"), "THAWED").unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("freezer.state"), "THAWED");
        let _ = std::fs::remove_dir(&self.0);
    }
}

const CONFIG: &str = "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\n\
                      targets = [{ upstream = \"echo\" }]\n";

fn start(hang_timeout: &str) -> Evergate {
    start_with(hang_timeout, "")
}

fn start_with(hang_timeout: &str, more: &str) -> Evergate {
    let text = format!("{CONFIG}[workers]\nmin = 2\nmax = 2\nhang_timeout = \"{hang_timeout}\"\n{more}");
    let gateway = Evergate::builder(EXE).config(text).start();
    wait_phases(&gateway, 2, 0);
    gateway
}

fn wait_phases(gateway: &Evergate, ready: usize, ghosts: usize) {
    let lines = [("ready", ready), ("ghost", ghosts)]
        .map(|(phase, count)| format!("evergate_workers{{phase=\"{phase}\"}} {count}\n"));
    wait_until(&format!("{ready} ready workers, {ghosts} ghosts"), LIMIT, || {
        let metrics = scrape(gateway).unwrap_or_default();
        lines.iter().all(|line| metrics.contains(line))
    });
}

/// The metrics, unless it is the clerk that hangs.
fn scrape(gateway: &Evergate) -> Option<String> {
    let mut raw = Raw::try_connect(&gateway.admin()).ok()?;
    raw.try_send(&get_request("/metrics", "")).ok()?;
    raw.try_read_response(std::time::Duration::from_secs(2)).ok().map(|response| response.text())
}

/// The killed worker's work is another's two seconds later; its request stays on the board until it can be buried, and is
/// recorded then.
pub fn a_killed_worker_is_succeeded() -> Result<(), String> {
    let freezer = Freezer::make()?;
    let gateway = start("2s");
    // A request whose body is never finished: the board shows it as its worker's.
    let mut held = Raw::connect(&gateway.addr());
    let body = chat_body("echo", false, &Value::Null);
    let whole = post_request("/v1/chat/completions", "x-request-id: held\r\n", &body);
    held.send(&whole[..whole.len() - 1]);
    let status = || gateway.cli(&["status", "--json"]);
    let holder = || {
        let seen: Value = serde_json::from_slice(&status().stdout).ok()?;
        let request = seen["inflight"].as_array()?.iter().find(|request| request["client_id"] == "held")?.clone();
        let child = seen["children"].as_array()?.iter().find(|child| child["pid"] == request["pid"])?.clone();
        Some((child["pid"].as_i64()?, child["row"].as_i64()?))
    };
    let (pid, row) = evergate_testkit::wait_for("the request on the board", LIMIT, holder);
    let pid = i32::try_from(pid).unwrap();
    freezer.freeze(pid);

    wait_phases(&gateway, 2, 1);
    assert_eq!(state_of(pid), Some('D'), "it cannot die yet");
    gateway.wait_stderr("was killed and hangs in the kernel", LIMIT);
    assert!(gateway.exits().is_empty(), "{:?}", gateway.exits());
    assert_eq!(holder(), Some((pid.into(), row)), "its row is its own");
    let workers: Vec<_> = gateway.children().into_iter().filter(|child| child.kind == "worker").collect();
    assert_eq!(workers.len(), 3, "{workers:?}");
    for _ in 0..20 {
        let answer = evergate_testkit::post_chat(&gateway.addr(), "echo", false, &Value::Null);
        assert_eq!(answer.status, 200);
    }

    freezer.thaw();
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!((&record["signal"], &record["initiator"]), (&json!(9), &json!("hang")), "{record}");
    assert_eq!((&record["phase"], &record["lost"][0]["client_id"]), (&json!("ready"), &json!("held")), "{record}");
    wait_phases(&gateway, 2, 0);
    // It was replaced before; its burial starts nobody.
    assert_eq!(gateway.exits().len(), 1);
    assert!(!gateway.workers().contains(&pid) && gateway.workers().len() == 2);
    Ok(())
}

/// It is the clerk that writes to disks. Metrics and access records come from its successor.
pub fn a_killed_clerk_is_succeeded() -> Result<(), String> {
    let freezer = Freezer::make()?;
    let gateway = start("2s");
    let clerk = gateway.children().into_iter().find(|child| child.kind == "clerk").unwrap().pid;
    freezer.freeze(clerk);
    gateway.wait_stderr("the clerk was killed and hangs in the kernel", LIMIT);
    wait_phases(&gateway, 2, 0);
    let answer = evergate_testkit::post_chat(&gateway.addr(), "echo", false, &Value::Null);
    let id = answer.header("x-request-id").unwrap().to_owned();
    assert_eq!(gateway.wait_access(&id, LIMIT)["status"], 200);
    assert_eq!(state_of(clerk), Some('D'), "it cannot die yet");
    freezer.thaw();
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == clerk).remove(0);
    assert_eq!((&record["kind"], &record["initiator"]), (&json!("clerk"), &json!("hang")), "{record}");
    assert!(scrape(&gateway).is_some());
    Ok(())
}

/// A stop does not wait for it: two seconds after its KILL the master goes on, says so, and ends with 75. What it held is free
/// for the next start.
pub fn a_stop_does_not_wait() -> Result<(), String> {
    let freezer = Freezer::make()?;
    let stages = "[shutdown]\ndrain = \"500ms\"\ncancel = \"100ms\"\ncleanup = \"100ms\"\n";
    let mut gateway = start_with("60s", stages);
    let worker = gateway.workers()[0];
    let address = gateway.addr();
    freezer.freeze(worker);
    let began = std::time::Instant::now();
    gateway.signal(rustix::process::Signal::TERM);
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(75), "{}", gateway.stderr());
    let took = began.elapsed();
    assert!(took < std::time::Duration::from_secs(10), "{took:?}");
    assert_eq!(state_of(worker), Some('D'), "it cannot die yet");
    let said = gateway.last_words();
    assert!(said.contains("was killed and hangs in the kernel; the stop goes on without it"), "{said}");
    let exits = gateway.exits();
    let record = exits.iter().find(|record| record["pid"] == worker).unwrap();
    assert_eq!(
        (&record["code"], &record["signal"], &record["initiator"]),
        (&Value::Null, &Value::Null, &json!("operator"))
    );
    assert!(record["evidence"].as_str().unwrap().contains("hangs in the kernel"), "{record}");
    assert_eq!(exits.len(), 3, "one record each: {exits:?}");
    let text = CONFIG.replace("127.0.0.1:0\"]", &format!("{address}\"]"));
    let next = Evergate::builder(EXE).config(text).start();
    assert_eq!(evergate_testkit::post_chat(&next.addr(), "echo", false, &Value::Null).status, 200);
    freezer.thaw();
    wait_until("its end", LIMIT, || !is_alive(worker));
    Ok(())
}
