//! Real children: descriptors, environment, signals, exact statuses. Runs without the test harness's threads, because
//! the spawner is made for a single-threaded process and the child lives are told apart by argument.
#![allow(clippy::unwrap_used, clippy::panic, clippy::exit)]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;

use evergate_sys::{Exe, Exit, Pid, Signal, Spawn, Status, own_executable, peek_exit, reap, spawn};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, kill_process, pidfd_open};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("life") => life(args.get(2).unwrap(), args.get(3).map(String::as_str)),
        // `cargo test` may list or filter; there is one test here.
        Some("--list") => {}
        _ => {
            println!("running 5 tests");
            statuses_are_exact();
            descriptors_do_not_clobber_each_other();
            environment_and_names_are_exact();
            signals_are_as_asked();
            failures_are_reported();
            println!("test result: ok. 5 passed; 0 failed; 0 ignored");
        }
    }
}

fn life(what: &str, argument: Option<&str>) {
    match what {
        "exit" => std::process::exit(argument.unwrap().parse().unwrap()),
        "read" => {
            // Each of 3, 4, 5 holds one letter; 6 and above must be closed.
            let mut text = String::new();
            for number in 3..6 {
                File::from(evergate_sys::adopt(number).unwrap()).read_to_string(&mut text).unwrap();
            }
            let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
            // 0, 1, 2 and the directory itself; the three files are closed by now.
            std::process::exit(if text == "cab" && open == 4 { 0 } else { 1 });
        }
        "env" => {
            let env: Vec<_> = std::env::vars().collect();
            let name = std::env::args().next().unwrap();
            let cmdline = std::fs::read_to_string("/proc/self/cmdline").unwrap();
            let good = env == [("ONE".to_owned(), "1 =2".to_owned())]
                && name == "evergate: test"
                && cmdline.starts_with("evergate: test\0life\0");
            std::process::exit(i32::from(!good));
        }
        "wait" => {
            let _ = std::io::stdin().read(&mut [0]);
        }
        other => panic!("no such life: {other}"),
    }
}

fn start(args: &[&str], env: &[(OsString, OsString)], fds: &[(BorrowedFd<'_>, i32)], ignored: &[Signal]) -> Pid {
    let exe = own_executable().unwrap();
    let args: Vec<OsString> = std::iter::once("life").chain(args.iter().copied()).map(OsString::from).collect();
    let spec = Spawn {
        exe: Exe::Descriptor(exe.as_fd()),
        argv0: OsStr::new("evergate: test"),
        args: &args,
        env,
        fds,
        ignored,
        own_group: false,
        dies_with_us: false,
        confine: None,
    };
    spawn(&spec).unwrap()
}

fn end_of(pid: Pid) -> Exit {
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).unwrap(), 1, "the child did not end");
    assert_eq!(peek_exit().unwrap(), Some(pid));
    assert_eq!(peek_exit().unwrap(), Some(pid), "a look takes nothing");
    let exit = reap(pid).unwrap();
    assert_eq!(peek_exit().unwrap(), None);
    exit
}

fn statuses_are_exact() {
    for code in [0_u8, 1, 70, 127, 255] {
        let exit = end_of(start(&["exit", &code.to_string()], &[], &[], &[]));
        assert_eq!(exit.status, Status::Code(code));
        assert!(exit.rss_max_kib > 0);
    }
    // Not SEGV: one that is sent, not caused, is swallowed once by the Rust runtime's handler for stack overflows.
    for signal in [Signal::KILL, Signal::TERM, Signal::ABORT, Signal::INT] {
        let (read, _write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let pid = start(&["wait"], &[], &[(read.as_fd(), 0)], &[]);
        kill_process(pid, signal).unwrap();
        let Status::Signal { number, .. } = end_of(pid).status else { panic!("{signal:?}") };
        assert_eq!(i32::from(number), signal.as_raw());
    }
    let (read, _write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let pid = start(&["wait"], &[], &[(read.as_fd(), 0)], &[]);
    assert_eq!(reap(pid).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    kill_process(pid, Signal::KILL).unwrap();
    end_of(pid);
}

fn descriptors_do_not_clobber_each_other() {
    let file = |text: &str| {
        let mut file = File::from(evergate_sys::memfd(c"letter").unwrap());
        file.write_all(text.as_bytes()).unwrap();
        evergate_sys::reopen_read_only(&file).unwrap()
    };
    let (one, two, three) = (file("a"), file("b"), file("c"));
    // Their own numbers are most likely among the targets, crosswise.
    let pid = start(&["read"], &[], &[(one.as_fd(), 4), (two.as_fd(), 5), (three.as_fd(), 3)], &[]);
    assert_eq!(end_of(pid).status, Status::Code(0));
}

fn environment_and_names_are_exact() {
    let env = [(OsString::from("ONE"), OsString::from("1 =2"))];
    assert_eq!(end_of(start(&["env"], &env, &[], &[])).status, Status::Code(0));
}

fn signals_are_as_asked() {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let pid = start(&["wait"], &[], &[(read.as_fd(), 0)], &[Signal::INT, Signal::HUP]);
    kill_process(pid, Signal::INT).unwrap();
    kill_process(pid, Signal::HUP).unwrap();
    drop(write);
    assert_eq!(end_of(pid).status, Status::Code(0), "ignored from the first instruction on");
}

fn failures_are_reported() {
    let not_a_program = evergate_sys::memfd(c"empty").unwrap();
    let spec = Spawn {
        exe: Exe::Descriptor(not_a_program.as_fd()),
        argv0: OsStr::new("x"),
        args: &[],
        env: &[],
        fds: &[],
        ignored: &[],
        own_group: true,
        dies_with_us: false,
        confine: None,
    };
    assert!(spawn(&spec).is_err());
    assert_eq!(peek_exit().unwrap(), None, "a failed start leaves no zombie");
}
