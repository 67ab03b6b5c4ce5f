//! From a section to a running program.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use evergate_core::config::SecretRef;
use evergate_core::config::process::{Cgroup, EnvValue, Frames, Mode, Process, ProcessLimits, Replace, Sandbox, Stdio};
use evergate_host::prepare::{Level, Surroundings, prepare};
use evergate_sys::Landlock;
use serde_json::Value;

use super::support::{folder, run, text};

fn section(argv: &[&str]) -> Process {
    let stdio = Stdio {
        min: 1,
        max: 1,
        frames: Frames::Lines,
        first_output: Duration::ZERO,
        idle: Duration::ZERO,
        requests_max: 0,
        lifetime_max: Duration::ZERO,
        rss_max: 0,
    };
    Process {
        mode: Mode::Stdio(stdio),
        argv: argv.iter().map(|arg| (*arg).to_owned()).collect(),
        dir: None,
        env: BTreeMap::new(),
        pass_env: Vec::new(),
        grace: Duration::from_secs(1),
        start_timeout: Duration::from_secs(1),
        in_flight_max: 1,
        queue: 1,
        output_bytes_max: 1 << 20,
        preload: false,
        idle_stop: Duration::ZERO,
        group: None,
        replace: Replace::Drain,
        limits: ProcessLimits::default(),
        sandbox: None,
        cgroup: Cgroup::Off,
        user: None,
    }
}

/// The gateway's own variables, secrets among them.
fn variable(name: &str) -> Option<OsString> {
    let known = [("PATH", "/usr/bin:/bin"), ("LANG", "C"), ("OPENAI_API_KEY", "sk-never"), ("HF_HOME", "/models")];
    known.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into())
}

fn secret(reference: &SecretRef) -> Option<String> {
    (reference.to_string() == "env:MODEL_KEY").then(|| "its own".into())
}

#[test]
fn g26_an_environment_is_what_the_section_says_and_the_usual_few() {
    run(|house| async move {
        let folder = folder();
        let mut section = section(&[evergate_testkit::adaptersim().to_str().unwrap(), "dump"]);
        section.pass_env = vec!["HF_HOME".into(), "NOT_SET".into(), "LANG".into()];
        section.env = BTreeMap::from([
            ("LANG".into(), EnvValue::Text("de".into())),
            ("TOKEN".into(), EnvValue::Secret(SecretRef::Env("MODEL_KEY".into()))),
        ]);
        section.limits.open_files = Some(99);
        let around = Surroundings { variable: &variable, secret: &secret, folder: folder.path(), socket_folder: None };
        let prepared = prepare(&section, around).unwrap();
        assert_eq!(prepared.level, Level::Open);
        let (output, _) = house.whole(&prepared.plan).await;
        let mut seen: Value = serde_json::from_slice(&output).unwrap();
        for mark in ["EVERGATE_HOST", "EVERGATE_PROGRAM"] {
            assert!(seen["env"].as_object_mut().unwrap().remove(mark).is_some());
        }
        let expected =
            serde_json::json!({ "PATH": "/usr/bin:/bin", "HF_HOME": "/models", "LANG": "de", "TOKEN": "its own" });
        assert_eq!(seen["env"], expected);
        assert_eq!(seen["dir"], folder.path().to_str().unwrap());
        let limits = seen["limits"].as_str().unwrap();
        assert!(
            limits.contains("Max open files            99 ") && limits.contains("Max core file size        0 "),
            "{limits}"
        );

        section.env.insert("X".into(), EnvValue::Secret(SecretRef::Env("GONE".into())));
        let error = prepare(&section, around).unwrap_err();
        assert!(error.detail.unwrap().contains("variable X"));
    });
}

#[test]
fn a_sandbox_is_the_system_its_folder_and_what_is_named() {
    if Landlock::new().unwrap().is_none() {
        println!("this kernel has no Landlock: nothing to test");
        return;
    }
    run(|house| async move {
        let (own, named, other) = (folder(), folder(), folder());
        std::fs::write(named.path().join("weights"), "w").unwrap();
        std::fs::write(other.path().join("secret"), "s").unwrap();
        let script = format!(
            "cat {0}/weights; echo x > mine; cat mine; echo x > /dev/null; echo x > {0}/weights; cat {1}/secret",
            named.path().display(),
            other.path().display(),
        );
        let mut section = section(&["sh", "-c", &script]);
        let read = vec![named.path().to_str().unwrap().to_owned()];
        section.sandbox = Some(Sandbox { read, write: Vec::new() });
        let around = Surroundings { variable: &variable, secret: &secret, folder: own.path(), socket_folder: None };
        let prepared = prepare(&section, around).unwrap();
        assert!(matches!(prepared.level, Level::Landlock(1..)), "{}", prepared.level);
        let (output, ended) = house.whole(&prepared.plan).await;
        assert_eq!(text(&output), "wx\n");
        assert_eq!(text(&ended.tail).matches("Permission denied").count(), 2, "{}", text(&ended.tail));

        section.sandbox = Some(Sandbox { read: vec!["/no/such/place".into()], write: Vec::new() });
        let error = prepare(&section, Surroundings { folder: Path::new("/"), ..around }).unwrap_err();
        assert!(error.detail.unwrap().contains("/no/such/place"));
    });
}
