//! An out-of-memory kill is told from an operator's KILL (SUPERVISION.md 7, line 10).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, gateway_config, wait_until};
use serde_json::{Value, json};

use crate::{EXE, LIMIT, can};

/// A gateway needs some 150 MiB of it in a debug build, and a victim takes the rest.
const BYTES: u64 = 512 << 20;
/// How often each way.
const TRIALS: usize = 20;

/// A memory cgroup of our own, below the one that we are in.
struct Cgroup(PathBuf);

impl Cgroup {
    fn make() -> Result<Self, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let own = std::fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
        let find = |is_it: fn(&str) -> bool| {
            let found =
                own.lines().filter_map(|line| line.split_once(':')?.1.split_once(':')).find(|(one, _)| is_it(one));
            found.map(|(_, path)| path.trim_start_matches('/').to_owned())
        };
        let (v1, v2) = (find(|one| one.split(',').any(|one| one == "memory")), find(str::is_empty));
        let parents = [
            (v1.map(|path| Path::new("/sys/fs/cgroup/memory").join(path)), "memory.limit_in_bytes"),
            (v2.map(|path| Path::new("/sys/fs/cgroup").join(path)), "memory.max"),
        ];
        let name = format!("evergate-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        for (parent, limit) in parents {
            let Some(path) = parent.map(|parent| parent.join(&name)) else { continue };
            if std::fs::create_dir(&path).is_err() {
                continue;
            }
            let made = Self(path);
            if std::fs::write(made.0.join(limit), BYTES.to_string()).is_ok() {
                // What is swapped out is not killed for.
                let _ = std::fs::write(made.0.join("memory.swap.max"), "0");
                return Ok(made);
            }
        }
        Err("no memory cgroup can be made here".into())
    }

    fn start(&self) -> Evergate {
        self.start_with(
            "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n\
             [models.echo]\ntargets = [{ upstream = \"echo\" }]\n[workers]\nmin = 2\nmax = 2\n",
        )
    }

    fn start_with(&self, text: &str) -> Evergate {
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.0.display());
        let builder = Evergate::builder(EXE).config(text).env("EVERGATE_FAULT", "1");
        builder.wrapper(&["/bin/sh", "-c", &enter, "sh"]).start()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Makes one worker take all memory; gives its record.
fn eat(gateway: &Evergate, seen: usize) -> Value {
    let mut raw = Raw::connect(&gateway.addr());
    let body = chat_body("echo", false, &Value::Null);
    raw.send(&post_request("/v1/chat/completions", "x-evergate-fault: eat\r\n", &body));
    let record = next_record(gateway, seen);
    assert_eq!(record["lost"].as_array().map(Vec::len), Some(1), "{record}");
    record
}

fn next_record(gateway: &Evergate, seen: usize) -> Value {
    gateway.wait_exits(seen + 1, LIMIT, |record| record["kind"] == "worker").pop().unwrap()
}

/// Waits until there are two ready workers, none of which is the dead one.
fn recover(gateway: &Evergate, dead: &Value) {
    wait_until("two ready workers", LIMIT, || {
        let has_gone = gateway.wait_workers(2).iter().all(|pid| dead != pid);
        has_gone && gateway.metrics().contains("evergate_workers{phase=\"ready\"} 2")
    });
}

pub fn twenty_of_twenty() -> Result<(), String> {
    let cgroup = Cgroup::make()?;
    // A start for each pair: deaths in a row would be paused for.
    for trial in 0..TRIALS {
        let gateway = cgroup.start();
        recover(&gateway, &Value::Null);
        let record = eat(&gateway, 0);
        assert_eq!(
            (record["signal"].as_u64(), record["initiator"].as_str()),
            (Some(9), Some("out_of_memory")),
            "{record}"
        );
        assert_eq!(record["oom_kills"], 1, "{record}");
        recover(&gateway, &record["pid"]);
        gateway.kill_worker(trial % 2);
        let record = next_record(&gateway, 1);
        assert_eq!((record["signal"].as_u64(), record["initiator"].as_str()), (Some(9), Some("unknown")), "{record}");
        assert_eq!(record["oom_kills"], 0, "{record}");
    }
    Ok(())
}

/// Somebody else lives in the cgroup, who could have been the victim.
pub fn a_stranger_makes_it_a_suspicion() -> Result<(), String> {
    let cgroup = Cgroup::make()?;
    let enter = format!("echo $$ > {}/cgroup.procs && exec sleep 600", cgroup.0.display());
    let mut stranger = std::process::Command::new("/bin/sh").args(["-c", &enter]).spawn().unwrap();
    let gateway = cgroup.start();
    recover(&gateway, &Value::Null);
    let record = eat(&gateway, 0);
    let _ = stranger.kill();
    let _ = stranger.wait();
    assert_eq!((&record["initiator"], &record["oom_kills"]), (&"oom_suspected".into(), &1.into()), "{record}");
    Ok(())
}

/// Where no cgroup can be seen, the record says that it cannot know.
pub fn nothing_is_guessed() -> Result<(), String> {
    let hide = "mount -t tmpfs none /sys/fs/cgroup && exec \"$@\"";
    let wrapper = ["unshare", "--mount", "/bin/sh", "-c", hide, "sh"];
    if !can(wrapper[0], &[&wrapper[1..], &["true"]].concat()) {
        return Err("a mount namespace is not allowed here".into());
    }
    let gateway = Evergate::builder(EXE).wrapper(&wrapper).start();
    // One that is still booting would have failed at that.
    recover(&gateway, &Value::Null);
    let pid = gateway.kill_worker(0);
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!((&record["initiator"], &record["oom_kills"]), (&"unknown".into(), &Value::Null), "{record}");
    assert!(record["evidence"].as_str().unwrap().starts_with("no memory cgroup counts kills here"), "{record}");
    Ok(())
}

/// Sixty bodies of 15 MiB come at once, nearly twice what there is: some are answered, the others are told why not, and no worker
/// dies. Without the guard the kernel ends some.
pub fn large_bodies_end_no_worker() -> Result<(), String> {
    let cgroup = Cgroup::make()?;
    let is_guarded = |guard: bool| {
        let fake = FakeUpstream::start();
        let more = format!("[workers]\nmin = 2\nmax = 2\n[limits]\nmemory_guard = {guard}\n");
        let gateway = cgroup.start_with(&gateway_config(fake.base_url(), &[], &more));
        recover(&gateway, &Value::Null);
        let said = crowd(&gateway, &fake);
        let deaths: Vec<Value> = gateway.exits().into_iter().filter(|record| record["kind"] == "worker").collect();
        (said, deaths)
    };
    let (said, deaths) = is_guarded(true);
    println!("guarded: {said:?}");
    let of = |status| said.get(&status).copied().unwrap_or(0);
    assert_eq!((of(200) + of(503), deaths.len()), (60, 0), "{said:?} {deaths:?}");
    assert!(of(200) > 0 && of(503) > 0, "{said:?}");
    let (said, deaths) = is_guarded(false);
    println!("not guarded: {said:?}, {} deaths", deaths.len());
    assert!(!deaths.is_empty(), "without the guard nobody dies: the test shows nothing");
    Ok(())
}

/// What became of all of them, by status; 0 for a connection that ended.
fn crowd(gateway: &Evergate, fake: &FakeUpstream) -> BTreeMap<u16, usize> {
    let extra = json!({ "messages": [{ "role": "user", "content": "x".repeat(15 << 20) }] });
    let request = post_request("/v1/chat/completions", "", &chat_body("fake/hold", false, &extra));
    let said = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..60 {
            scope.spawn(|| {
                let answer = Raw::try_connect(&gateway.addr()).ok().and_then(|mut raw| {
                    // A refusal may come before the last byte.
                    let _ = raw.try_send(&request);
                    raw.try_read_response(2 * LIMIT).ok()
                });
                *said.lock().unwrap().entry(answer.map_or(0, |answer| answer.status)).or_default() += 1;
            });
        }
        scope.spawn(|| {
            // Held until all have come to something: an answer, or the upstream.
            let _ = evergate_testkit::wait::try_wait_for(LIMIT, || {
                let answered: usize = said.lock().unwrap().values().sum();
                (answered + fake.request_count() >= 60).then_some(())
            });
            fake.release();
        });
    });
    said.into_inner().unwrap()
}
