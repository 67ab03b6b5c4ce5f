//! What a program is given, and what it is not.

use std::sync::Arc;

use evergate_sys::{Landlock, Limit, Status};
use serde_json::Value;

use super::support::{folder, plan, run, sim, text};

#[test]
fn g26_a_program_has_its_own_environment_and_descriptors_and_no_others() {
    run(|house| async move {
        // Open in this process, as its listeners and logs are.
        let secret = std::fs::File::open("/proc/self/status").unwrap();
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        // One that its owner forgot to mark: it is not handed on either.
        let careless = rustix::io::dup(&secret).unwrap();
        assert!(std::env::vars_os().count() > 2, "there is something that could be inherited");
        let mut plan = sim(&["dump"]);
        plan.env.push(("MODEL_KEY".into(), "its own".into()));
        let (output, _) = house.whole(&plan).await;
        let seen: Value = serde_json::from_slice(&output).unwrap();
        let mark = seen["env"]["EVERGATE_PROGRAM"].as_str().unwrap();
        assert!(mark.starts_with(&format!("{}.", std::process::id())));
        let expected = serde_json::json!({
            "PATH": "/usr/bin:/bin", "MODEL_KEY": "its own", "EVERGATE_HOST": "test.1", "EVERGATE_PROGRAM": mark,
        });
        assert_eq!(seen["env"], expected);
        let fds = seen["fds"].as_object().unwrap();
        assert_eq!(fds.keys().collect::<Vec<_>>(), ["0", "1", "2"], "{fds:?}");
        assert_eq!(fds["0"], "/dev/null");
        assert!(["1", "2"].iter().all(|fd| fds[*fd].as_str().unwrap().starts_with("pipe:")));
        assert_eq!(seen["pid"], seen["group"], "a group of its own");
        assert!(seen["status"].as_str().unwrap().contains("NoNewPrivs:\t1"));
        drop((secret, socket, careless));
    });
}

#[test]
fn a_program_has_the_folder_and_the_limits_that_it_is_given() {
    run(|house| async move {
        let folder = folder();
        let mut plan = sim(&["dump"]);
        plan.dir = Some(folder.path().to_owned());
        plan.limits = vec![
            (Limit::Memory, 1 << 31),
            (Limit::OpenFiles, 77),
            (Limit::FileSize, 4096),
            (Limit::Cpu, 9),
            (Limit::Processes, 5555),
            (Limit::Core, 0),
        ];
        let (output, _) = house.whole(&plan).await;
        let seen: Value = serde_json::from_slice(&output).unwrap();
        assert_eq!(seen["dir"], folder.path().to_str().unwrap());
        let limits = seen["limits"].as_str().unwrap();
        for (name, value) in [
            ("Max address space", "2147483648"),
            ("Max open files", "77"),
            ("Max file size", "4096"),
            ("Max cpu time", "9"),
            ("Max processes", "5555"),
            ("Max core file size", "0"),
        ] {
            let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
            let words: Vec<_> = line[name.len()..].split_whitespace().take(2).collect();
            // A second later the kernel kills who does not heed it.
            let hard = if name == "Max cpu time" { "10" } else { value };
            assert_eq!(words, [value, hard], "{name}");
        }
    });
}

#[test]
fn a_program_over_its_memory_fails_alone() {
    run(|house| async move {
        let mut plan = sim(&["alloc:1000000000", "out:no"]);
        plan.limits = vec![(Limit::Memory, 1 << 29), (Limit::Core, 0)];
        let (output, ended) = house.whole(&plan).await;
        assert!(output.is_empty());
        assert_eq!(ended.exit.status, Status::Signal { number: 6, core: false });
        assert!(text(&ended.tail).contains("memory allocation"), "{}", text(&ended.tail));
    });
}

#[test]
fn a_program_spins_no_longer_than_its_cpu_limit() {
    run(|house| async move {
        let mut plan = sim(&["spin"]);
        plan.limits = vec![(Limit::Cpu, 1), (Limit::Core, 0)];
        let (_, ended) = house.whole(&plan).await;
        // XCPU, and no KILL that could be anybody's.
        assert_eq!(ended.exit.status, Status::Signal { number: 24, core: false });
    });
}

#[test]
fn landlock_keeps_a_program_to_its_places() {
    let Some(landlock) = Landlock::new().unwrap() else {
        println!("this kernel has no Landlock: nothing to test");
        return;
    };
    run(|house| async move {
        let (mine, other) = (folder(), folder());
        std::fs::write(mine.path().join("weights"), "w").unwrap();
        std::fs::write(other.path().join("secret"), "s").unwrap();
        for place in ["/usr", "/bin", "/lib", "/lib64", "/etc", "/dev/null"] {
            if std::path::Path::new(place).exists() {
                landlock.read(place.as_ref()).unwrap();
            }
        }
        landlock.write(mine.path()).unwrap();
        assert!(landlock.abi() >= 1);
        let script = format!(
            "cat {0}/weights; echo new > {0}/file; cat {0}/file; cat {1}/secret; echo x > {1}/secret; ls {1}",
            mine.path().display(),
            other.path().display()
        );
        let mut plan = plan(&["sh", "-c", &script]);
        plan.landlock = Some(Arc::new(landlock));
        let (output, ended) = house.whole(&plan).await;
        assert_eq!(text(&output), "wnew\n");
        assert_eq!(text(&ended.tail).matches("Permission denied").count(), 3, "{}", text(&ended.tail));
        assert_eq!(std::fs::read_to_string(other.path().join("secret")).unwrap(), "s");
    });
}

#[test]
fn a_program_runs_as_the_user_that_it_is_given() {
    if !rustix::process::geteuid().is_root() {
        println!("only root can change users: nothing to test");
        return;
    }
    run(|house| async move {
        let mut plan = plan(&["sh", "-c", "id -u; id -g; id -G"]);
        plan.ids = Some((65534, 65533));
        let mut program = house.start(&plan, super::support::OUTPUT).await;
        assert_eq!(text(&super::support::read(&mut program).await), "65534\n65533\n65533\n");
    });
}
