//! The lives besides the driver's: small stand-ins for what the real program does in each.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio, exit};

use evergate_board::{
    Board, ChildRow, Inflight, InflightPhase, InflightRows, InflightStart, Phase, SeriesKey, Ticket, monotonic_ns,
};
use evergate_core::exit::{Initiator, Kind};
use evergate_core::inherit;
use evergate_supervisor::Options;
use evergate_sys::{Signal, Signals, adopt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Counted by the hooks below.
pub const LOST: SeriesKey = SeriesKey { metric: 1, a: 0, b: 0, c: 0 };
pub const EXITS: SeriesKey = SeriesKey { metric: 2, a: 0, b: 0, c: 0 };

fn on_left(board: &Board, row: u32, left: &[Inflight]) -> Vec<(u16, &'static str)> {
    let end = |inflight: &Inflight| {
        if inflight.is_over() {
            return (204, "ok");
        }
        board.series(row).unwrap().add(LOST, 1);
        (0, "worker_lost")
    };
    left.iter().map(end).collect()
}

fn on_exit(board: &Board, _: Kind, _: Initiator) {
    board.master_series().unwrap().add(EXITS, 1);
}

pub fn serve(args: &[String]) -> u8 {
    let [folder, plan, config] = args else { panic!("{args:?}") };
    evergate_supervisor::serve(&Options {
        state_dir: folder.into(),
        compile_args: ["compile", plan, config].iter().map(OsString::from).collect(),
        halt_on_boot_error: false,
        child_env: vec![("EVERGATE_TEST_CHILD".into(), "1".into())],
        on_left,
        on_exit,
        on_respawn: |_, _, _| {},
        on_host_start: |_, _, _, _| {},
    })
}

pub fn compile(args: &[String]) {
    let [plan, config] = args else { panic!("{args:?}") };
    let settings = settings(config);
    if let Some(code) = settings.get("compile_exit") {
        eprintln!("the configuration is bad");
        exit(code.parse().unwrap());
    }
    if settings.contains_key("compile_hang") {
        let _ = poll(&mut [], None);
    }
    File::from(adopt(inherit::COMPILE_PLAN).unwrap()).write_all(plan.as_bytes()).unwrap();
    File::from(adopt(inherit::COMPILE_CONFIG).unwrap()).write_all(config.as_bytes()).unwrap();
}

/// `key=value` words.
fn settings(text: &str) -> HashMap<String, String> {
    text.split_whitespace().filter_map(|word| word.split_once('=')).map(|(a, b)| (a.into(), b.into())).collect()
}

/// What every child finds.
struct Found {
    board: Board,
    row: u32,
    epoch: u32,
    settings: HashMap<String, String>,
    life: OwnedFd,
    kick: OwnedFd,
    _writers: OwnedFd,
    listeners: Vec<OwnedFd>,
    signals: Signals,
}

impl Found {
    fn new(args: &[String]) -> Self {
        let value = |flag: &str| -> i32 {
            let at = args.iter().position(|arg| arg == flag).unwrap();
            args[at + 1].parse().unwrap()
        };
        let mut config = String::new();
        File::from(adopt(inherit::CONFIG).unwrap()).read_to_string(&mut config).unwrap();
        let settings = settings(&config);
        // What is blocked stays so in whatever a child becomes.
        let blocked: &[Signal] =
            if settings.contains_key("nothing_blocked") { &[] } else { &[Signal::TERM, Signal::QUIT] };
        let signals = Signals::block(blocked).unwrap();
        assert!(value("--generation") > 0);
        // What it is given, and nothing of what the master has.
        let mut names: Vec<String> = std::env::vars().map(|(name, _)| name).collect();
        names.sort_unstable();
        assert_eq!(names, [inherit::HOSTS_DIR_VARIABLE, "EVERGATE_TEST_CHILD"]);
        let found = Self {
            board: Board::attach(adopt(inherit::BOARD).unwrap()).unwrap(),
            row: u32::try_from(value("--row")).unwrap(),
            epoch: u32::try_from(value("--epoch")).unwrap(),
            settings,
            life: adopt(inherit::LIFE).unwrap(),
            kick: adopt(inherit::KICK).unwrap(),
            _writers: adopt(inherit::WRITERS).unwrap(),
            listeners: (0..value("--listeners")).map(|n| adopt(inherit::LISTENERS + n).unwrap()).collect(),
            signals,
        };
        assert_eq!(found.row().epoch(), found.epoch);
        found
    }

    fn row(&self) -> &ChildRow {
        self.board.child(self.row).unwrap()
    }

    fn kick(&self) {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).unwrap();
    }

    fn ready(&self) {
        self.row().set_beat_ns(monotonic_ns());
        self.row().set_ready_ns(monotonic_ns());
        self.row().set_phase(Phase::Ready);
        self.kick();
    }

    /// Waits a little for anything; says whether the master is gone.
    fn wait(&self, more: &[&dyn AsFd]) -> bool {
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.life, PollFlags::IN)];
        fds.extend(more.iter().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 })).unwrap();
        self.row().set_beat_ns(monotonic_ns());
        !fds[1].revents().is_empty()
    }

    fn boot(&self, kind: &str) {
        if let Some(code) = self.settings.get(&format!("{kind}_exit_at_boot")) {
            self.row().set_note("no luck today");
            exit(code.parse().unwrap());
        }
    }
}

pub fn clerk(args: &[String]) {
    let found = Found::new(args);
    found.boot("clerk");
    assert_eq!(found.listeners.len(), 1, "the admin listener");
    found.ready();
    let log = found.settings.get("log").unwrap();
    let mut log = File::options().append(true).create(true).open(log).unwrap();
    loop {
        let is_orphan = found.wait(&[]);
        let signal = found.signals.take().unwrap();
        let records = found.board.records();
        log.write_all(&records.bytes).unwrap();
        found.board.take_records(&records);
        if is_orphan || signal.is_some() {
            return;
        }
    }
}

/// A connection that is held open, and the place of its request on the board if it has one.
struct Held {
    socket: TcpStream,
    _ticket: Option<Ticket>,
}

pub fn worker(args: &[String]) {
    let mut found = Found::new(args);
    found.boot("worker");
    if found.settings.contains_key("worker_never_ready") {
        let _ = poll(&mut [], None);
    }
    found.ready();
    if found.settings.get("worker_loop_slot") == Some(&found.row().slot().to_string()) {
        exit(3);
    }
    let is_stubborn = found.settings.contains_key("worker_stubborn");
    let mut listener = Some(TcpListener::from(found.listeners.remove(0)));
    let rows = found.board.inflight_rows(found.row);
    let mut held: Vec<Held> = Vec::new();
    let mut seq = 0;
    let mut is_leaving = false;
    loop {
        let mut more: Vec<&dyn AsFd> = held.iter().map(|held| &held.socket as &dyn AsFd).collect();
        more.extend(listener.as_ref().map(|listener| listener as &dyn AsFd));
        let is_orphan = found.wait(&more);
        let signal = found.signals.take().unwrap();
        if signal.is_some_and(|signal| signal.number == Signal::QUIT.as_raw()) && !is_stubborn {
            return;
        }
        while let Some(Ok((socket, _))) = listener.as_ref().map(TcpListener::accept) {
            seq += 1;
            answer(&found, &rows, seq, socket, &mut held);
        }
        held.retain(|held| !is_closed(&held.socket));
        if (signal.is_some() || is_orphan) && !is_stubborn && !is_leaving {
            is_leaving = true;
            found.row().set_phase(Phase::Draining);
            found.row().set_took_queue(true);
            listener = None;
            found.kick();
        }
        if is_leaving && held.is_empty() {
            return;
        }
    }
}

fn is_closed(socket: &TcpStream) -> bool {
    socket.set_nonblocking(true).unwrap();
    matches!((&mut &*socket).read(&mut [0; 16]), Ok(0))
}

fn keep(found: &Found, held: &mut Vec<Held>, socket: &TcpStream, ticket: Option<Ticket>) {
    held.push(Held { socket: socket.try_clone().unwrap(), _ticket: ticket });
    found.row().set_connections(u32::try_from(held.len()).unwrap());
}

fn answer(found: &Found, rows: &InflightRows, seq: u32, mut socket: TcpStream, held: &mut Vec<Held>) {
    socket.set_nonblocking(false).unwrap();
    let mut line = String::new();
    if BufReader::new(&socket).read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let (word, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
    match word {
        "ping" => socket.write_all(format!("{} {}\n", std::process::id(), found.row).as_bytes()).unwrap(),
        // `answered` is as `hold`, at the moment between the last byte and the row's end.
        "hold" | "answered" => {
            let ticket = rows
                .admit(InflightStart {
                    seq,
                    epoch: found.epoch,
                    client_id: rest,
                    route: found.board.label("/hold"),
                    key: 0,
                    method: found.board.label("GET"),
                    started_ns: monotonic_ns(),
                })
                .unwrap();
            if word == "answered" {
                ticket.set_phase(InflightPhase::Write);
            }
            keep(found, held, &socket, Some(ticket));
            // After the row: whoever has read this is on the board.
            socket.write_all(format!("{} {}\n", std::process::id(), found.row).as_bytes()).unwrap();
        }
        "idle" => {
            keep(found, held, &socket, None);
            socket.write_all(format!("{} {}\n", std::process::id(), found.row).as_bytes()).unwrap();
        }
        "spin" => {
            socket.write_all(b"spinning\n").unwrap();
            loop {
                std::hint::spin_loop();
            }
        }
        // Becomes a shell, with every signal at its default: whatever that does is this child's end.
        "become" => {
            let error = Command::new("env").args(["--default-signal", "/bin/sh", "-c", rest]).exec();
            panic!("{error}");
        }
        "exit" => exit(rest.parse().unwrap()),
        "abort" => std::process::abort(),
        // Leaves a grandchild behind, which the master inherits as subreaper when this helper has ended.
        "stranger" => {
            let script = if rest.is_empty() { "sleep 0.05 & exit 4" } else { rest };
            let status = Command::new("/bin/sh").args(["-c", script]).stdin(Stdio::null()).status().unwrap();
            assert_eq!(status.code(), Some(4));
            socket.write_all(b"left\n").unwrap();
        }
        other => panic!("{other}"),
    }
}
