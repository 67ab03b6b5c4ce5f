//! The table of rooms and arrows (DESIGN.md section 3), and its check against the real tree.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::{source, tree};

/// One crate: whom it may know, what it must not know, and why.
struct Room {
    name: &'static str,
    /// Our crates it may depend on.
    knows: &'static [&'static str],
    /// Crates of others it must not depend on; transitive ones are their own room's business.
    never: &'static [&'static str],
    /// Paths and words that its code must not contain outside tests.
    words: &'static [&'static str],
    /// Whether it may contain `unsafe`; then its roots need no `forbid`.
    is_unsafe: bool,
    /// Path prefixes of the files that may write to standard output.
    prints: &'static [&'static str],
    why: &'static str,
}

const CORE: &str = "evergate-core";
const SYS: &str = "evergate-sys";
const BOARD: &str = "evergate-board";
const SUPERVISOR: &str = "evergate-supervisor";
const UPSTREAM: &str = "evergate-upstream";
const HOST: &str = "evergate-host";
/// Tests drive the real binary with it; nothing that is shipped may know it.
const TESTKIT: &str = "evergate-testkit";

#[rustfmt::skip]
const ROOMS: &[Room] = &[
    Room {
        name: CORE, knows: &[], is_unsafe: false, prints: &[],
        never: &["tokio", "hyper", "rustls", "rusqlite", "rustix", "libc", "http", "http-body", "signal-hook"],
        words: &[
            "std::net::TcpStream", "std::net::TcpListener", "std::net::UdpSocket", "std::net::ToSocketAddrs",
            "std::os", "std::fs", "std::thread", "std::process", "std::env", "Instant::now", "SystemTime::now",
        ],
        why: "rules over values: no sockets, files, threads, Tokio, SQL, nor the machine's clock",
    },
    Room {
        name: SYS, knows: &[], is_unsafe: true, prints: &[],
        never: &["tokio", "hyper", "http", "rustls", "rusqlite", "serde_json", "toml"],
        words: &[],
        why: "the few system calls that no safe crate wraps, and nothing else",
    },
    Room {
        name: BOARD, knows: &[CORE, SYS], is_unsafe: true, prints: &[],
        never: &["tokio", "hyper", "http", "rustls", "rusqlite", "serde_json", "toml"],
        words: &[],
        why: "the shared memory and its layout knows core and sys only",
    },
    Room {
        name: SUPERVISOR, knows: &[CORE, SYS, BOARD], is_unsafe: false, prints: &[],
        never: &["tokio", "hyper", "http", "http-body", "rustls", "rusqlite", "toml", "serde", "serde_json"],
        words: &["std::thread::spawn"],
        why: "the master has no Tokio, no HTTP, no TOML, no JSON bodies, no SQL, and no thread but the state folder's writer",
    },
    Room {
        name: UPSTREAM, knows: &[CORE], is_unsafe: false, prints: &[],
        never: &["rusqlite", "libc", "clap", "toml"],
        words: &["std::process"],
        why: "one HTTP backend knows nothing of serving, routes, SQL or processes",
    },
    Room {
        name: HOST, knows: &[CORE, SYS, BOARD], is_unsafe: false, prints: &[],
        never: &["rusqlite", "rustls", "libc", "clap", "toml"],
        words: &["std::process::Command", "std::thread::spawn", "tokio::process"],
        why: "runs programs and serves them; no routing, auth, SQL or TOML, and every child is started and buried in one place",
    },
    Room {
        name: "evergate", knows: &[CORE, SYS, BOARD, SUPERVISOR, UPSTREAM, HOST], is_unsafe: false,
        prints: &["crates/evergate/src/commands/", "crates/evergate/src/main.rs"],
        never: &["rusqlite", "libc", "toml"],
        words: &[],
        why: "puts the rooms together; no SQL text, no raw system calls; standard output belongs to the CLI",
    },
    Room {
        name: TESTKIT, knows: &[CORE], is_unsafe: false, prints: &["crates/testkit/src/"],
        never: &["tokio", "hyper", "rusqlite"],
        words: &[],
        why: "drives the binary from outside, byte by byte, so it must not share the gateway's HTTP",
    },
    Room {
        name: "xtask", knows: &[CORE, SYS, BOARD], is_unsafe: false, prints: &["xtask/src/"],
        never: &["rusqlite", "toml"],
        words: &[],
        why: "a developer's tool measures and checks from outside; it starts a worker alone as the master would",
    },
];

/// Every broken arrow, as `where: what, why`.
///
/// # Errors
/// When cargo or git cannot be asked.
pub fn check() -> Result<Vec<String>, String> {
    let root = tree::root()?;
    let metadata = metadata(&root)?;
    let mut found = dependencies(&metadata);
    let crates = crates(&metadata, &root);
    let files = tree::files(&root)?;
    for name in files.iter().filter(|name| name.ends_with(".rs")) {
        let Some(owner) = crates.iter().find(|owner| owner.holds(name)) else { continue };
        let (Some(room), Some(text)) = (room(&owner.name), tree::text(&root, name)?) else { continue };
        let is_test = is_test_file(&root, owner, name)?;
        found.extend(file(room, name, &text, is_test));
        if owner.roots.contains(name) {
            found.extend(forbids(room, name, &text));
        }
    }
    Ok(found)
}

fn room(name: &str) -> Option<&'static Room> {
    ROOMS.iter().find(|room| room.name == name)
}

fn metadata(root: &Path) -> Result<Value, String> {
    let output = Command::new(tree::cargo())
        .current_dir(root)
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .output()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata: {error}"))
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// Objections to the manifests.
fn dependencies(metadata: &Value) -> Vec<String> {
    let packages = list(metadata, "packages");
    let ours: BTreeSet<&str> = packages.iter().map(|package| text(package, "name")).collect();
    let mut found = Vec::new();
    for package in packages {
        let name = text(package, "name");
        let Some(room) = room(name) else {
            found.push(format!("{name}: this crate has no row in xtask/src/arrows.rs; decide what it may know first"));
            continue;
        };
        for dependency in list(package, "dependencies") {
            let to = text(dependency, "name");
            let is_dev = text(dependency, "kind") == "dev";
            let is_fine = if ours.contains(to) {
                room.knows.contains(&to) || (is_dev && to == TESTKIT)
            } else {
                // A test may use what the code must not know (a TLS server, a temporary folder).
                is_dev || !room.never.contains(&to)
            };
            if !is_fine {
                found.push(format!("{name} -> {to}: not an arrow of DESIGN.md section 3: {}", room.why));
            }
        }
    }
    found
}

/// A crate's place in the tree.
struct Crate {
    name: String,
    /// Relative to the repository's root, with a slash at its end.
    folder: String,
    /// Roots of its library and binaries.
    roots: Vec<String>,
}

impl Crate {
    fn holds(&self, file: &str) -> bool {
        file.starts_with(&self.folder)
    }
}

fn crates(metadata: &Value, root: &Path) -> Vec<Crate> {
    let relative = |path: &str| Path::new(path).strip_prefix(root).map(|path| path.display().to_string()).ok();
    let shipped = |target: &&Value| list(target, "kind").iter().any(|kind| kind == "lib" || kind == "bin");
    let one = |package: &Value| {
        let roots = list(package, "targets").iter().filter(shipped);
        Some(Crate {
            name: text(package, "name").into(),
            folder: relative(text(package, "manifest_path"))?.strip_suffix("Cargo.toml")?.into(),
            roots: roots.filter_map(|target| relative(text(target, "src_path"))).collect(),
        })
    };
    list(metadata, "packages").iter().filter_map(one).collect()
}

/// Whether a file is compiled for tests only: in `tests/`, or a module behind `#[cfg(test)]` in its parent.
fn is_test_file(root: &Path, owner: &Crate, name: &str) -> Result<bool, String> {
    let inside = name.strip_prefix(&owner.folder).unwrap_or(name);
    if ["tests/", "benches/", "examples/"].iter().any(|folder| inside.starts_with(folder)) {
        return Ok(true);
    }
    // Each folder above may be the test module: src/step/sim/model.rs is inside sim, declared in src/step/mod.rs.
    let mut path = Path::new(name).with_extension("");
    while path.starts_with(&owner.folder) {
        let (Some(module), Some(folder)) = (path.file_name(), path.parent()) else { break };
        for parent in
            [folder.join("mod.rs"), folder.join("lib.rs"), folder.join("main.rs"), folder.with_extension("rs")]
        {
            if !root.join(&parent).is_file() {
                continue;
            }
            let parent_text = tree::text(root, &parent.display().to_string())?.unwrap_or_default();
            if source::test_modules(&source::code(&parent_text)).iter().any(|test| module == *test) {
                return Ok(true);
            }
        }
        path = folder.to_path_buf();
    }
    Ok(false)
}

/// Objections to one file's code.
fn file(room: &Room, name: &str, text: &str, is_test: bool) -> Vec<String> {
    let code = source::code(text);
    let mut found = Vec::new();
    let mut object = |line: usize, what: &str, why: &str| found.push(format!("{name}:{line}: {what}: {why}"));
    if !room.is_unsafe {
        for line in source::lines_with(&code, "unsafe") {
            object(line, "`unsafe`", "only evergate-sys and evergate-board may contain it");
        }
    }
    if is_test {
        return found;
    }
    let code = source::without_tests(&code);
    let uses = source::uses(&code);
    for word in room.words {
        let used = uses.iter().filter(|(_, path)| path == word || path.starts_with(&format!("{word}::")));
        let lines: BTreeSet<usize> = used.map(|(line, _)| *line).chain(source::lines_with(&code, word)).collect();
        for line in lines {
            object(line, &format!("`{word}` in {}", room.name), room.why);
        }
    }
    if !room.prints.iter().any(|prefix| name.starts_with(prefix)) {
        for word in ["print!", "println!"] {
            for line in source::lines_with(&code, word) {
                object(line, &format!("`{word}`"), "standard output is the CLI's data; talk goes to standard error");
            }
        }
    }
    found
}

/// Objections to the root file of a library or binary.
fn forbids(room: &Room, name: &str, text: &str) -> Option<String> {
    let is_forbidden = source::code(text).contains("#![forbid(unsafe_code)]");
    let is_fine = room.is_unsafe || is_forbidden;
    (!is_fine).then(|| format!("{name}:1: `#![forbid(unsafe_code)]` is missing: every room but sys and board has it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn package(name: &str, dependencies: &Value) -> Value {
        json!({ "packages": [
            { "name": name, "dependencies": dependencies },
            { "name": CORE, "dependencies": [] },
            { "name": TESTKIT, "dependencies": [] },
            { "name": UPSTREAM, "dependencies": [] },
        ] })
    }

    fn the(name: &str) -> &'static Room {
        room(name).expect("a row")
    }

    #[test]
    fn a_forbidden_arrow_between_rooms_is_named() {
        let found = dependencies(&package(SUPERVISOR, &json!([{ "name": UPSTREAM }, { "name": CORE }])));
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("evergate-supervisor -> evergate-upstream: "), "{found:?}");
    }

    #[test]
    fn a_forbidden_library_is_named_unless_only_tests_use_it() {
        let found =
            dependencies(&package(SUPERVISOR, &json!([{ "name": "tokio" }, { "name": "toml", "kind": "dev" }])));
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("-> tokio: ") && found[0].contains("no thread but"), "{found:?}");
    }

    #[test]
    fn only_tests_may_know_the_testkit() {
        assert!(dependencies(&package(SUPERVISOR, &json!([{ "name": TESTKIT, "kind": "dev" }]))).is_empty());
        assert_eq!(dependencies(&package(SUPERVISOR, &json!([{ "name": TESTKIT }]))).len(), 1);
    }

    #[test]
    fn a_crate_without_a_row_is_refused() {
        assert!(dependencies(&package("evergate-utils", &json!([])))[0].contains("no row"));
    }

    #[test]
    fn core_may_not_look_at_the_clock_or_the_files() {
        let text = "use std::{fmt, fs};\nfn a() { let _ = std::time::Instant::now(); }\n";
        let found = file(the(CORE), "crates/core/src/a.rs", text, false);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found.iter().any(|line| line.starts_with("crates/core/src/a.rs:1: `std::fs`")));
        assert!(found.iter().any(|line| line.starts_with("crates/core/src/a.rs:2: `Instant::now`")));
    }

    #[test]
    fn tests_in_core_may_look_at_the_clock() {
        let text = "#[cfg(test)]\nmod tests {\n fn a() { std::time::Instant::now(); }\n}\n";
        assert!(file(the(CORE), "crates/core/src/a.rs", text, false).is_empty());
        assert!(file(the(CORE), "crates/core/tests/a.rs", "fn a() { std::fs::read(p); }", true).is_empty());
    }

    #[test]
    fn unsafe_and_printing_have_their_places() {
        let text = "fn a() { unsafe { b() } }\nfn c() { println!(); }\n";
        assert_eq!(file(the(UPSTREAM), "crates/upstream/src/a.rs", text, false).len(), 2);
        assert_eq!(file(the(SYS), "crates/sys/src/a.rs", text, false).len(), 1);
        assert_eq!(file(the("evergate"), "crates/evergate/src/http/status.rs", text, true).len(), 1);
    }

    #[test]
    fn roots_forbid_unsafe() {
        assert!(forbids(the(CORE), "lib.rs", "//! #![forbid(unsafe_code)]\n").is_some());
        assert!(forbids(the(CORE), "lib.rs", "//! A.\n#![forbid(unsafe_code)]\n").is_none());
        assert!(forbids(the(BOARD), "lib.rs", "//! A.\n").is_none());
    }

    #[test]
    fn every_arrow_points_to_a_room() {
        for room in ROOMS {
            assert!(room.knows.iter().all(|name| ROOMS.iter().any(|other| other.name == *name)), "{}", room.name);
        }
    }
}
