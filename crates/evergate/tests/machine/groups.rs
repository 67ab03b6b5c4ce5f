//! Programs in cgroups of their own: what the kernel counts there is on record, and no folder outlives its host.

use std::path::PathBuf;

use evergate_core::cgroup;
use evergate_testkit::{Evergate, adaptersim, post_chat, raw::Response, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::{EXE, LIMIT, can};

/// A model of mode stdio whose section has this too.
fn start(more: &str, wrapper: &[&str]) -> Evergate {
    let sim = adaptersim().display().to_string();
    let config = format!(
        "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n[workers]\nmin = 1\nmax = 1\n[upstreams.tiny]\nprocess = {{ \
         mode = \"stdio\", argv = [{sim:?}, \"model:\"], {more} }}\n"
    );
    let gateway = Evergate::builder(EXE).config(config).wrapper(wrapper).start();
    wait_until("a worker", LIMIT, || gateway.metrics().contains("evergate_workers{phase=\"ready\"} 1"));
    gateway
}

fn say(gateway: &Evergate, script: &str) -> Response {
    let more = json!({ "messages": [{ "role": "user", "content": script }] });
    post_chat(&gateway.addr(), "tiny/x", false, &more)
}

/// Folders of hosts in the cgroups that we are in, by name; those of one process.
fn homes(host: i32) -> Vec<PathBuf> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    let places = cgroup::folders(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"));
    let entries = places.into_iter().flat_map(|place| std::fs::read_dir(place).into_iter().flatten().flatten());
    let name = format!("evergate-host-{host}-");
    let is_its = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with(&name);
    entries.filter(is_its).map(|entry| entry.path()).collect()
}

fn host(gateway: &Evergate) -> i32 {
    gateway.children().into_iter().find(|child| child.kind == "host").map(|child| child.pid).unwrap()
}

/// The level that the host of a gateway has told of.
fn level(gateway: &Evergate) -> String {
    gateway.wait_stderr("cgroup: ", LIMIT)
}

fn ends(gateway: &Evergate, count: usize) -> Vec<Value> {
    let file = gateway.state_dir().join("models/tiny.exits.jsonl");
    let read = || -> Vec<Value> {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    };
    wait_until("its record", LIMIT, || read().len() >= count);
    read()
}

/// A program that takes more than `limits.memory` is ended by the kernel, and on record for that; a KILL is not.
pub fn memory_kills_are_told_from_others() -> Result<(), String> {
    let gateway = start("limits = { memory = \"128MiB\" }", &[]);
    assert_eq!(say(&gateway, "text=well").content(), "well");
    let level = level(&gateway);
    if !level.contains("with memory") {
        return Err(format!("no cgroup with the memory controller can be made here: {level}"));
    }
    for (script, initiator, is_counted) in
        [("leak=400000000;text=no", "out_of_memory", true), ("signal=9", "unknown", false)]
    {
        let before = ends(&gateway, 0).len();
        let response = say(&gateway, script);
        assert!(response.status == 502 && response.text().contains("ended by signal 9"), "{}", response.text());
        let record = ends(&gateway, before + 1).remove(before);
        assert_eq!((&record["initiator"], &record["signal"]), (&initiator.into(), &9.into()), "{record}");
        assert_eq!(record["oom_kills"].as_u64().map(|kills| kills > 0), Some(is_counted), "{record}");
        wait_until("the count", LIMIT, || {
            gateway
                .metrics()
                .contains(&format!("evergate_program_exits_total{{upstream=\"tiny\",cause=\"{initiator}\"}} 1"))
        });
        assert_eq!(say(&gateway, "text=well").content(), "well");
    }
    Ok(())
}

/// Groups are there as long as their host is, and no longer; those of a killed one go with the next.
pub fn folders_go_with_their_hosts() -> Result<(), String> {
    let mut gateway = start("cgroup = \"auto\"", &[]);
    assert_eq!(say(&gateway, "text=well").content(), "well");
    let level = level(&gateway);
    if level.contains("cgroup: none") {
        return Err(format!("no cgroup can be made here: {level}"));
    }
    let first = host(&gateway);
    let groups = || {
        homes(first)
            .iter()
            .flat_map(|home| std::fs::read_dir(home).unwrap().flatten())
            .filter(|entry| entry.path().is_dir())
            .count()
    };
    assert_eq!(groups(), homes(first).len(), "one program, one group in each hierarchy");
    // A program's end takes its group with it, and its successor has one.
    assert_eq!(say(&gateway, "exit=1").status, 502);
    assert_eq!(say(&gateway, "text=well").content(), "well");
    wait_until("one group again", LIMIT, || groups() == homes(first).len());
    kill_process(Pid::from_raw(first).unwrap(), Signal::KILL).unwrap();
    wait_until("the next host", LIMIT, || {
        gateway.children().iter().any(|child| child.kind == "host" && child.pid != first)
    });
    assert_eq!(say(&gateway, "text=well").content(), "well");
    assert_eq!(homes(first), Vec::<PathBuf>::new(), "the killed one's");
    let second = host(&gateway);
    assert!(!homes(second).is_empty());
    kill_process(Pid::from_raw(gateway.pid()).unwrap(), Signal::TERM).unwrap();
    gateway.wait_exit(2 * LIMIT);
    assert_eq!(homes(second), Vec::<PathBuf>::new(), "after the end");
    Ok(())
}

/// Where no group can be made, `auto` says so and goes on, and `required` says why not.
pub fn where_it_may_not() -> Result<(), String> {
    let hide = "mount -t tmpfs none /sys/fs/cgroup && exec \"$@\"";
    let wrapper = ["unshare", "--mount", "/bin/sh", "-c", hide, "sh"];
    if !can(wrapper[0], &[&wrapper[1..], &["true"]].concat()) {
        return Err("a mount namespace is not allowed here".into());
    }
    let gateway = start("limits = { memory = \"8GiB\" }", &wrapper);
    assert_eq!(say(&gateway, "text=well").content(), "well");
    let level = level(&gateway);
    assert!(level.contains("evergate host tiny: cgroup: none ("), "{level}");
    let gateway = start("cgroup = \"required\"", &wrapper);
    let response = say(&gateway, "text=no");
    assert_eq!((response.status, &*response.error_code()), (502, "adapter_spawn_failed"), "{}", response.text());
    let cause = gateway.model("tiny")["cause"].as_str().unwrap().to_owned();
    assert!(cause.contains("it must have a cgroup, and can have none"), "{cause}");
    Ok(())
}
