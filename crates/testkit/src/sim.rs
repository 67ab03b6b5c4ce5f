//! Where the program that misbehaves to order is (`bin/adaptersim.rs`).

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// The program, built first if it has to be: cargo builds a package's programs for its own tests only.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn adaptersim() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(build).clone()
}

fn build() -> PathBuf {
    // TARGET/debug/deps/test-1234. A test asks where it is itself; nothing replaces it while it runs.
    #[allow(clippy::disallowed_methods)]
    let test = std::env::current_exe().expect("the test's own path");
    let profile = test.parent().and_then(|deps| deps.parent()).expect("the folder of the profile");
    let target = profile.parent().expect("the folder of the build");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--offline", "--locked", "-p", "evergate-testkit", "--bin", "adaptersim"]);
    cargo.arg("--target-dir").arg(target).current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    assert!(cargo.status().expect("cargo runs").success(), "adaptersim is not built");
    profile.join("adaptersim")
}
