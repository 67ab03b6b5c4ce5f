//! The files in packaging/.

use std::path::Path;
use std::process::Command;

use crate::{EXE, can};

/// systemd's own checker has nothing to say about the units; the binary's path is the one under test.
pub fn unit_files_are_valid() -> Result<(), String> {
    if !can("systemd-analyze", &["--version"]) {
        return Err("systemd-analyze is not installed".into());
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    let folder = tempfile::tempdir().unwrap();
    let mut units = Vec::new();
    for name in ["evergate.service", "evergate.socket"] {
        let text = std::fs::read_to_string(source.join(name)).unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text.replace("/usr/local/bin/evergate", EXE)).unwrap();
        units.push(path);
    }
    let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&units).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // Units of the machine's own are none of ours.
    let about_us: Vec<&str> = said.lines().filter(|line| line.contains("evergate")).collect();
    assert!(about_us.is_empty(), "{about_us:#?}");
    assert!(output.status.success(), "{said}");
    Ok(())
}
