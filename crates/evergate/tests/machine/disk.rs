//! A disk that takes nothing and says nothing: a frozen file system (fsfreeze(8)), as at a snapshot of a virtual machine. Whoever
//! writes to it waits in state D.

use std::path::PathBuf;

use evergate_testkit::driver::is_alive;
use evergate_testkit::{Evergate, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{EXE, LIMIT, can};

/// A file system of our own in a file, mounted.
struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    fn make() -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let disk = Self { folder };
        let (image, place) = (disk.path("image"), disk.path("mounted"));
        let made = std::fs::File::create(&image).and_then(|file| file.set_len(32 << 20));
        made.and_then(|()| std::fs::create_dir(&place)).map_err(|error| error.to_string())?;
        let (image, place) = (image.to_str().unwrap(), place.to_str().unwrap());
        let is_there = can("mkfs.ext4", &["-q", image]) && can("mount", &["-o", "loop", image, place]);
        // Not every kernel and not every container allows it.
        if is_there && can("fsfreeze", &["--freeze", place]) {
            drop(Frozen(&disk));
            return Ok(disk);
        }
        Err("no file system can be mounted and frozen here".into())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Until what is given is dropped, which must be before the gateway is: nobody waits for who cannot end.
    fn freeze(&self) -> Frozen<'_> {
        assert!(can("fsfreeze", &["--freeze", self.path("mounted").to_str().unwrap()]));
        Frozen(self)
    }

    fn start(&self) -> Evergate {
        let text = "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\n\
                    targets = [{ upstream = \"echo\" }]\n[workers]\nmin = 2\nmax = 2\n\
                    [shutdown]\ndrain = \"500ms\"\ncancel = \"100ms\"\ncleanup = \"100ms\"\n";
        let gateway = Evergate::builder(EXE).config(text).state_dir(&self.path("mounted").join("state")).start();
        gateway.wait_workers(2);
        gateway
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whoever ends on it now may take a moment.
        can("umount", &["--lazy", self.path("mounted").to_str().unwrap()]);
    }
}

/// While it hangs.
struct Frozen<'a>(&'a Disk);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        can("fsfreeze", &["--unfreeze", self.0.path("mounted").to_str().unwrap()]);
    }
}

/// The workers that serve, by the board: what the run file says is older than the freeze.
fn workers(gateway: &Evergate) -> Vec<i64> {
    let status: Value = serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap_or_default();
    let children = status["children"].as_array().cloned().unwrap_or_default();
    let serves = |child: &&Value| child["kind"] == "worker" && child["phase"] == "ready";
    children.iter().filter(serves).map(|child| child["pid"].as_i64().unwrap()).collect()
}

fn assert_served(gateway: &Evergate) {
    assert_eq!(evergate_testkit::post_chat(&gateway.addr(), "echo", false, &Value::Null).status, 200);
}

/// Workers are replaced and a reload comes into force while the disk hangs; what is for it is there when it goes on.
pub fn everything_else_goes_on() -> Result<(), String> {
    let disk = Disk::make()?;
    let gateway = disk.start();
    let mut dead = Vec::new();
    let frozen = disk.freeze();
    gateway.wait_stderr("the disk of the state folder has taken nothing for ", LIMIT);
    for _ in 0..3 {
        let before = workers(&gateway);
        let pid = i32::try_from(before[0]).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        let is_new = |now: &Vec<i64>| now.len() == 2 && !now.contains(&before[0]);
        wait_for("its successor", LIMIT, || Some(workers(&gateway)).filter(is_new));
        dead.push(pid);
        assert_served(&gateway);
    }
    let reload = gateway.cli(&["reload"]);
    assert!(reload.status.success(), "{reload:?}");
    assert_served(&gateway);
    assert!(gateway.exits().is_empty(), "{:?}", gateway.exits());
    let shown = gateway.printed(&["status"]);
    assert!(shown.contains(&format!("{}", dead[2])), "the last ends are on the board: {shown}");
    drop(frozen);
    gateway.wait_stderr("the disk of the state folder goes on after ", LIMIT);
    for pid in &dead {
        let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == *pid).remove(0);
        assert_eq!((&record["signal"], &record["generation"]), (&json!(9), &json!(1)), "{record}");
    }
    let pids: Vec<Value> = gateway.exits().iter().map(|record| record["pid"].clone()).collect();
    assert_eq!(pids[..3], dead.iter().map(|pid| json!(pid)).collect::<Vec<_>>(), "in their order");
    wait_until("the run file of now", LIMIT, || {
        let named: Vec<i64> = gateway.workers().into_iter().map(i64::from).collect();
        named.len() == 2 && workers(&gateway).iter().all(|pid| named.contains(pid))
    });
    Ok(())
}

/// A stop has its stages and says what may be lost. The kernel keeps the process until the disk goes on; it serves nobody any more.
pub fn a_stop_does_not_wait() -> Result<(), String> {
    let disk = Disk::make()?;
    let mut gateway = disk.start();
    let children: Vec<i32> = gateway.workers();
    let address = gateway.addr();
    let frozen = disk.freeze();
    gateway.wait_stderr("the disk of the state folder has taken nothing for ", LIMIT);
    // Its record is one that the clerk cannot write.
    assert_served(&gateway);
    gateway.signal(Signal::TERM);
    gateway.wait_stderr("the disk of the state folder takes nothing; the end does not wait for it", LIMIT);
    assert!(children.iter().all(|pid| !is_alive(*pid)));
    assert!(std::net::TcpStream::connect(&address).is_err(), "nobody answers there");
    drop(frozen);
    // The clerk could not close its log.
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(75), "{}", gateway.stderr());
    // What was not written in the moment before it ended is found by the next start.
    let next = disk.start();
    assert_served(&next);
    for pid in children {
        next.wait_exits(1, LIMIT, |record| record["pid"] == pid);
    }
    Ok(())
}
