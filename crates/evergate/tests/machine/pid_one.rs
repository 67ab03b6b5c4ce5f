//! As process 1 of a container without an init (SUPERVISION.md 7, lines 11 and 30).

use std::process::{Command, Stdio};

use evergate_testkit::driver::state_of;
use evergate_testkit::{Evergate, Raw, wait_for, wait_until};
use rustix::process::{Pid, Signal, kill_process};

use crate::{EXE, LIMIT, can};

fn children(pid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

pub fn needs_no_init() -> Result<(), String> {
    let wrapper = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
    if !can(wrapper[0], &[&wrapper[1..], &["true"]].concat()) || !can("nsenter", &["--version"]) {
        return Err("a process namespace is not allowed here".into());
    }
    let mut gateway = Evergate::builder(EXE).wrapper(&wrapper).spawn();
    // By its own count it is process 1; by ours it is unshare's only child.
    wait_until("a run file", LIMIT, || gateway.run()["pid"] == 1);
    wait_until("serving", LIMIT, || gateway.run()["phase"] == "serving" && Raw::try_connect(&gateway.addr()).is_ok());
    let master = wait_for("the master", LIMIT, || children(gateway.pid()).first().copied());
    let before = wait_for("clerk and two workers", LIMIT, || Some(children(master)).filter(|pids| pids.len() == 3));

    // Processes that nobody waits for, with every code that would mean something from a child of ours.
    for end in ["exit 0", "exit 71", "exit 78", "exit 255", "kill -KILL $$", "kill -TERM $$"] {
        let script = format!("/bin/sh -c 'sleep 0.1; {end}' & exit 0");
        let target = master.to_string();
        let status = Command::new("nsenter")
            .args(["--target", &target, "--pid", "--mount", "/bin/sh", "-c", &script])
            .stdin(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        wait_until("the stranger was there and is gone without a trace", LIMIT, || children(master) == before);
        assert!(before.iter().all(|pid| state_of(*pid).is_some_and(|state| state != 'Z')));
    }
    assert!(gateway.exits().is_empty(), "{:?}", gateway.exits());

    kill_process(Pid::from_raw(master).unwrap(), Signal::TERM).unwrap();
    assert!(gateway.wait_exit(LIMIT).success(), "{}", gateway.stderr());
    assert_eq!(gateway.exits().iter().filter(|record| record["initiator"] == "operator").count(), 3);
    Ok(())
}
