//! What a service manager sees: notifications, the watchdog, sockets that it passes (SUPERVISION.md 7, line 30).

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::Path;
use std::time::{Duration, Instant};

use evergate_testkit::driver::Builder;
use evergate_testkit::raw::get_request;
use evergate_testkit::{Evergate, FakeUpstream, Raw, gateway_config, wait_until};
use rustix::process::Signal;

use crate::support::{EXE, LIMIT, assert_alive, assert_error_shape, assert_good_stream, open_stream, rest_of};

/// The manager's end of the notifications, with all that was said.
struct Manager {
    socket: UnixDatagram,
    said: Vec<String>,
}

impl Manager {
    fn at(path: &Path) -> Self {
        Self::of(UnixDatagram::bind(path).unwrap())
    }

    fn of(socket: UnixDatagram) -> Self {
        socket.set_nonblocking(true).unwrap();
        Self { socket, said: Vec::new() }
    }

    fn listen(&mut self) -> &[String] {
        let mut bytes = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut bytes) {
            self.said.push(String::from_utf8(bytes[..length].to_vec()).unwrap());
        }
        &self.said
    }

    #[track_caller]
    fn wait(&mut self, text: &str) {
        wait_until(text, LIMIT, || self.listen().iter().any(|said| said == text));
    }

    fn count(&mut self, text: &str) -> usize {
        self.listen().iter().filter(|said| *said == text).count()
    }
}

fn config(listen: &str, more: &str) -> String {
    format!("{listen}[admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\ntargets = [{{ upstream = \"echo\" }}]\n{more}")
}

fn free() -> Builder {
    Evergate::builder(EXE).config(config("[server]\nlisten = [\"127.0.0.1:0\"]\n", ""))
}

#[test]
fn s30_the_manager_hears_ready_status_and_stopping_and_children_hear_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let mut manager = Manager::at(&path);
    let mut gateway = free().env("NOTIFY_SOCKET", path.to_str().unwrap()).env("WATCHDOG_USEC", "60000000").start();
    manager.wait("READY=1");
    manager.wait("STATUS=serving; 2 workers ready");
    for child in gateway.children() {
        let environment = std::fs::read_to_string(format!("/proc/{}/environ", child.pid)).unwrap();
        assert!(!environment.contains("NOTIFY_SOCKET") && !environment.contains("WATCHDOG"), "{environment:?}");
    }
    assert_eq!((manager.count("READY=1"), manager.count("STOPPING=1")), (1, 0));
    gateway.signal(Signal::TERM);
    assert!(gateway.wait_exit(LIMIT).success());
    assert_eq!((manager.count("READY=1"), manager.count("STOPPING=1")), (1, 1), "{:?}", manager.said);
}

/// A start that fails is never called ready.
#[test]
fn s30_a_failed_start_is_not_ready() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let mut manager = Manager::at(&path);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let text = config(&format!("[server]\nlisten = [\"{}\"]\n", taken.local_addr().unwrap()), "");
    let ended =
        Evergate::builder(EXE).config(text).env("NOTIFY_SOCKET", path.to_str().unwrap()).try_start().err().unwrap();
    assert_eq!(ended.code(), 71, "{}", ended.stderr);
    assert_eq!(manager.count("READY=1"), 0);
}

#[test]
fn s30_the_watchdog_is_fed_while_the_master_turns_and_not_while_it_is_frozen() {
    let name = format!("evergate-it-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let mut manager = Manager::of(UnixDatagram::bind_addr(&address).unwrap());
    let gateway = free().env("NOTIFY_SOCKET", &format!("@{name}")).env("WATCHDOG_USEC", "200000").start();
    let begun = Instant::now();
    let before = manager.count("WATCHDOG=1");
    wait_until("ten signs of life", LIMIT, || manager.count("WATCHDOG=1") >= before + 10);
    // Every 100 ms and not in every turn.
    assert!(begun.elapsed() > Duration::from_millis(700), "{:?}", begun.elapsed());
    gateway.signal(Signal::STOP);
    wait_until("it is frozen", LIMIT, || evergate_testkit::driver::state_of(gateway.pid()) == Some('T'));
    let frozen = (manager.count("WATCHDOG=1"), Instant::now());
    wait_until("a while", LIMIT, || frozen.1.elapsed() > Duration::from_secs(1));
    assert_eq!(manager.count("WATCHDOG=1"), frozen.0);
    gateway.signal(Signal::CONT);
    wait_until("a sign of life", LIMIT, || manager.count("WATCHDOG=1") > frozen.0);
}

/// A watchdog that is meant for another process is not fed.
#[test]
fn s30_the_watchdog_of_another_process_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let mut manager = Manager::at(&path);
    let builder = free().env("NOTIFY_SOCKET", path.to_str().unwrap());
    let _gateway = builder.env("WATCHDOG_USEC", "2000").env("WATCHDOG_PID", "1").start();
    manager.wait("STATUS=serving; 2 workers ready");
    assert_eq!(manager.count("WATCHDOG=1"), 0);
}

#[test]
fn s30_a_passed_socket_is_served_answered_503_while_draining_and_never_closed() {
    let fake = FakeUpstream::start();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let text =
        gateway_config(fake.base_url(), &[], "[shutdown]\ndrain = \"20s\"\n").replacen("127.0.0.1:0", &address, 1);
    let mut gateway = Evergate::builder(EXE).config(text.clone()).listeners([socket.try_clone().unwrap()]).start();
    assert_eq!(gateway.addr(), address);
    let mut held = open_stream(&gateway, "hold-mid");
    gateway.signal(Signal::TERM);
    // Until the workers have taken what is queued, they still answer.
    let turned_away = || {
        let mut raw = Raw::connect(&address);
        raw.send(&get_request("/v1/models", ""));
        let response = raw.read_response(LIMIT);
        (response.status == 503).then_some(response)
    };
    for _ in 0..20 {
        let response = evergate_testkit::wait_for("503", LIMIT, turned_away);
        assert_eq!(response.json()["error"]["code"], "server_shutting_down");
        assert_eq!((response.header("connection"), response.header("retry-after")), (Some("close"), Some("1")));
        assert_error_shape(&response);
    }
    // Who says nothing is told as well, and does not hold the stop up.
    let mut silent = Raw::connect(&address);
    assert_eq!(silent.read_response(LIMIT).status, 503);
    fake.release();
    assert_good_stream(&rest_of(&mut held), held.body_is_complete());
    drop(held);
    assert!(gateway.wait_exit(LIMIT).success());
    // The manager keeps it: who comes now waits for the next start.
    let mut early = Raw::connect(&address);
    early.send(&get_request("/v1/models", ""));
    let _next = Evergate::builder(EXE).config(text).listeners([socket]).start();
    assert_eq!(early.read_response(LIMIT).status, 200);
}

#[test]
fn s30_passed_sockets_are_the_listeners_where_none_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("public.sock");
    let (tcp, unix) = (TcpListener::bind("127.0.0.1:0").unwrap(), UnixListener::bind(&path).unwrap());
    let addresses = [tcp.local_addr().unwrap().to_string(), format!("unix:{}", path.display())];
    let builder = Evergate::builder(EXE).config(config("", ""));
    let mut gateway = builder.listeners([std::os::fd::OwnedFd::from(tcp), unix.into()]).start();
    assert_eq!(gateway.addrs(), addresses);
    assert_alive(&gateway);
    assert_eq!(evergate_testkit::raw::get(&addresses[1], "/healthz").status, 200);
    gateway.signal(Signal::TERM);
    assert!(gateway.wait_exit(LIMIT).success());
    assert!(path.exists(), "the file is the manager's");
}

#[test]
fn s30_a_socket_that_no_address_names_is_a_mistake() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let ended = free().listeners([socket]).try_start().err().unwrap();
    assert_eq!(ended.code(), 78, "{}", ended.stderr);
    assert!(ended.stderr.contains(&address) && ended.stderr.contains("LISTEN_FDS"), "{}", ended.stderr);
}

/// A reload's exit code and what it said.
fn reload(gateway: &Evergate) -> (i32, String) {
    let output = gateway.cli(&["reload"]);
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Sockets that were passed stay the listeners over reloads, whether the configuration names them or not.
#[test]
fn s30_a_reload_keeps_passed_sockets() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("public.sock");
    let (tcp, unix) = (TcpListener::bind("127.0.0.1:0").unwrap(), UnixListener::bind(&path).unwrap());
    let addresses = [tcp.local_addr().unwrap().to_string(), format!("unix:{}", path.display())];
    let kept = tcp.try_clone().unwrap();
    let builder = Evergate::builder(EXE).config(config("", ""));
    let mut gateway = builder.listeners([std::os::fd::OwnedFd::from(tcp), unix.into()]).start();
    let model = |name: &str| format!("[models.{name}]\ntargets = [{{ upstream = \"echo\" }}]\n");
    let named = format!("[server]\nlisten = [\"{}\", \"{}\"]\n", addresses[1], addresses[0]);
    for (round, listen) in ["", &named, ""].into_iter().enumerate() {
        gateway.write("evergate.toml", &config(listen, &model(&format!("round-{round}"))));
        assert_eq!(reload(&gateway), (0, String::new()), "{}", gateway.stderr());
        assert_eq!(gateway.addrs(), addresses);
        for address in &addresses {
            let models = evergate_testkit::raw::get(address, "/v1/models").text();
            assert!(models.contains(&format!("round-{round}")), "{models}");
        }
    }
    // One of the two, the built-in address, another one: each is another place.
    let one = format!("[server]\nlisten = [\"{}\"]\n", addresses[0]);
    for listen in [&one, "[server]\nlisten = [\"127.0.0.1:4700\"]\n", "[server]\nlisten = [\"127.0.0.1:0\"]\n"] {
        gateway.write("evergate.toml", &config(listen, ""));
        let (code, why) = reload(&gateway);
        assert!(code == 78 && why.contains("[server] listen") && why.contains("needs a restart"), "{code} {why}");
    }
    assert_alive(&gateway);
    // And the manager's they stay: who comes after the end waits for the next start.
    gateway.signal(Signal::TERM);
    assert!(gateway.wait_exit(LIMIT).success());
    let mut early = Raw::connect(&addresses[0]);
    early.send(&get_request("/healthz", ""));
    let _next = Evergate::builder(EXE).config(config("", "")).listeners([kept]).start();
    assert_eq!(early.read_response(LIMIT).status, 200);
    assert!(path.exists());
}

/// What is refused at the start is refused by a reload: a socket that others can reach keeps its keys.
#[test]
fn s30_a_reload_does_not_open_a_passed_socket_to_all() {
    let socket = TcpListener::bind("0.0.0.0:0").unwrap();
    let address = format!("127.0.0.1:{}", socket.local_addr().unwrap().port());
    let keys = "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { env = \"KEY\" }\n";
    let builder = Evergate::builder(EXE).config(config(keys, "")).env("KEY", "0123456789abcdef0123");
    let gateway = builder.listeners([socket]).start();
    let asked = || evergate_testkit::raw::get(&address, "/v1/models").status;
    assert_eq!(asked(), 401);
    gateway.write("evergate.toml", &config("", ""));
    let (code, why) = reload(&gateway);
    assert!(code == 78 && why.contains("auth = \"keys\""), "{code} {why}");
    assert_eq!(asked(), 401);
    gateway.write("evergate.toml", &config(keys, ""));
    assert_eq!(reload(&gateway).0, 0);
    assert_eq!(asked(), 401);
}

/// `Type=notify-reload`: RELOADING with the time of its sending, and READY when it is over, whatever came of it.
#[test]
fn s30_the_manager_hears_when_a_reload_begins_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let mut manager = Manager::at(&path);
    let gateway = free().env("NOTIFY_SOCKET", path.to_str().unwrap()).start();
    manager.wait("STATUS=serving; 2 workers ready");
    let now_us = || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        u64::try_from(now.tv_sec * 1_000_000 + now.tv_nsec / 1_000).unwrap()
    };
    let good = config("[server]\nlisten = [\"127.0.0.1:0\"]\n", "");
    for (round, (text, by_signal)) in
        [(&*good, false), ("broken", false), (&good, true), ("broken", true)].iter().enumerate()
    {
        manager.said.clear();
        gateway.write("evergate.toml", text);
        let before = now_us();
        if *by_signal {
            // What systemd does.
            gateway.signal(Signal::HUP);
        } else {
            assert_eq!(reload(&gateway).0, if *text == "broken" { 78 } else { 0 });
        }
        manager.wait("READY=1");
        let after = now_us();
        let said: Vec<&String> = manager.said.iter().filter(|said| !said.starts_with("STATUS=")).collect();
        let time = said[0].strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect("RELOADING first");
        assert!((before..=after).contains(&time.parse().unwrap()), "{round}: {before} {said:?} {after}");
        assert_eq!(said[1..], ["READY=1"], "{round}");
    }
}

/// The rule for configured addresses holds for passed ones too.
#[test]
fn s30_a_passed_socket_open_to_all_needs_keys() {
    let socket = TcpListener::bind("0.0.0.0:0").unwrap();
    let ended = Evergate::builder(EXE).config(config("", "")).listeners([socket]).try_start().err().unwrap();
    assert_eq!(ended.code(), 78, "{}", ended.stderr);
    assert!(ended.stderr.contains("auth = \"keys\""), "{}", ended.stderr);
}

#[test]
fn s30_sockets_of_another_process_are_left_alone() {
    let gateway = free().env("LISTEN_FDS", "3").env("LISTEN_PID", "1").start();
    assert_alive(&gateway);
}
