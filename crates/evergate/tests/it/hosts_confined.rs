//! What a program is given of the gateway, in each mode: what its section names, and nothing else.

use std::collections::BTreeSet;
use std::path::Path;

use evergate_testkit::{Evergate, adaptersim, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::hosts::{ask, config, said};
use crate::hosts_kept::{ANSWER, program, question, section};
use crate::support::{EXE, LIMIT, send, wait_ready};

const MODES: [&str; 3] = ["command", "stdio", "server"];
const SECRETS: &str = "[upstreams.far]\nbase_url = \"http://127.0.0.1:9\"\napi_key = { env = \"FAR_KEY\" }\n";

/// A program in a mode that does `steps` first.
fn own(mode: &str, steps: &[&str], more: &str) -> String {
    if mode != "command" {
        return section(mode, steps, more);
    }
    let sim = adaptersim().display().to_string();
    let argv: Vec<&str> = std::iter::once(&*sim).chain(steps.iter().copied()).chain(["read", "out:Hello"]).collect();
    format!("process = {{ mode = \"command\", argv = {argv:?}{more} }}")
}

/// A gateway with secrets in its environment, whose program has answered once.
fn run(mode: &str, section: &str) -> Evergate {
    let text = format!("{}{SECRETS}", config(&[("tiny", section)]));
    let builder = Evergate::builder(EXE).config(text).env("FAR_KEY", "sk-far-away-0123456789").env("OWN", "its own");
    let gateway = builder.env("LANG", "xx").env("ANY_OTHER", "stays here").start();
    wait_ready(&gateway, 2);
    let (name, text, expected) =
        if mode == "command" { ("tiny/x", "hi", "Hello") } else { (question(mode).0, question(mode).1, ANSWER) };
    assert_eq!(said(&ask(&gateway, name, text, false)), expected, "{mode}");
    gateway
}

fn written(folder: &Path, name: &str) -> Value {
    wait_for("what the program has seen", LIMIT, || {
        serde_json::from_slice(&std::fs::read(folder.join(name)).ok()?).ok()
    })
}

#[test]
fn g26_a_program_sees_nothing_of_the_gateway_but_what_its_section_names() {
    for mode in MODES {
        let more = ", pass_env = [\"OWN\"], env = { MORE = \"more\" }, cgroup = \"off\", \
                    limits = { open_files = 77, memory = \"8GiB\" }";
        let gateway = run(mode, &own(mode, &["dump:seen.json"], more));
        let folder = gateway.state_dir().join("models/tiny");
        let seen = written(&folder, "seen.json");
        let env = seen["env"].as_object().unwrap();
        let allowed = evergate_core::config::process::PASSED;
        let allowed: BTreeSet<&str> =
            allowed.into_iter().chain(["OWN", "MORE", "EVERGATE_HOST", "EVERGATE_PROGRAM"]).collect();
        assert!(env.keys().all(|name| allowed.contains(&**name)), "{mode}: {env:?}");
        assert_eq!((&env["OWN"], &env["MORE"], &env["LANG"]), (&json!("its own"), &json!("more"), &json!("xx")));
        let fds: BTreeSet<&str> = seen["fds"].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(fds, BTreeSet::from(["0", "1", "2"]), "{mode}: {seen}");
        let text = seen.to_string();
        assert!(!text.contains("sk-far") && !text.contains("stays here"), "{mode}: {text}");
        assert_eq!((&seen["dir"], &seen["group"]), (&json!(folder), &seen["pid"]), "{mode}");
        let limit = |name: &str| {
            let limits = seen["limits"].as_str().unwrap();
            let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(limit("Max open files"), ["77", "77"]);
        assert_eq!(limit("Max address space"), ["8589934592", "8589934592"]);
        assert_eq!(limit("Max core file size"), ["0", "0"]);
        assert!(seen["status"].as_str().unwrap().contains("NoNewPrivs:\t1"), "{mode}");
    }
}

#[test]
fn a_confined_program_reaches_its_own_places_and_no_others() {
    let places = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let path = places.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (read, write, other) = (folder("read"), folder("write"), folder("other"));
    for mode in MODES {
        let sim = adaptersim().display().to_string();
        let step = format!("try:{read},{write},{other}");
        let more = format!(", sandbox = {{ read = [{read:?}, {sim:?}], write = [{write:?}] }}");
        let gateway = run(mode, &own(mode, &[&step], &more));
        let level = gateway.wait_stderr("sandbox: ", LIMIT);
        if level.contains("not possible") {
            println!("this kernel has no Landlock: nothing to test");
            return;
        }
        assert!(level.contains("evergate host tiny: sandbox: Landlock "), "{level}");
        let tried = written(&gateway.state_dir().join("models/tiny"), "tried.json");
        let expected = json!({ &read: [true, false], &write: [true, true], &other: [false, false] });
        assert_eq!(tried, expected, "{mode}");
    }
}

#[test]
fn a_confined_server_listens_at_its_socket_and_reaches_nothing_else() {
    let places = tempfile::tempdir().unwrap();
    let other = places.path().to_str().unwrap();
    let sim = adaptersim().display().to_string();
    let more = format!(", sandbox = {{ read = [{sim:?}] }}");
    let own = own("server", &[&format!("try:{other}")], &more);
    let gateway = run("server", &own.replace("serve:127.0.0.1:{port}", "serve:{socket}"));
    if gateway.wait_stderr("sandbox: ", LIMIT).contains("not possible") {
        println!("this kernel has no Landlock: nothing to test");
        return;
    }
    assert_eq!(written(&gateway.state_dir().join("models/tiny"), "tried.json"), json!({ other: [false, false] }));
    let address = gateway.model("tiny")["address"].as_str().unwrap().to_owned();
    assert!(Path::new(&address).starts_with(gateway.state_dir().join("hosts")), "{address}");
    // The next one finds the folder as the first did.
    let pid = program(&gateway, "tiny");
    send(pid, Signal::KILL);
    wait_until(
        "the next one",
        LIMIT,
        || !matches!(gateway.model("tiny")["program_pid"].as_i64(), Some(now) if now == i64::from(pid)),
    );
    assert_eq!(said(&ask(&gateway, "tiny/ok", "hi", false)), ANSWER);
}

#[test]
fn a_program_of_another_user_has_its_own_folders() {
    if !rustix::process::geteuid().is_root() {
        println!("only root can change users: nothing to test");
        return;
    }
    // Of this user's alone, as built: the program needs one that others may execute.
    let place = tempfile::tempdir().unwrap();
    let mode_of = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(place.path(), mode_of(0o755)).unwrap();
    let sim = place.path().join("sim");
    std::fs::copy(adaptersim(), &sim).unwrap();
    for mode in MODES {
        let user = ", user = { uid = 65534, gid = 65533 }";
        let mut section = own(mode, &["dump:seen.json"], user);
        section = section.replace(adaptersim().to_str().unwrap(), sim.to_str().unwrap());
        if mode == "server" {
            section = section.replace("serve:127.0.0.1:{port}", "serve:{socket}");
        }
        let gateway = run(mode, &section);
        let seen = written(&gateway.state_dir().join("models/tiny"), "seen.json");
        let status = seen["status"].as_str().unwrap();
        assert!(status.contains("Uid:\t65534\t65534\t65534\t65534"), "{mode}: {status}");
        assert!(status.contains("Gid:\t65533\t65533\t65533\t65533"), "{mode}: {status}");
    }
}
