//! Driving a gateway from outside.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use evergate_board::Board;
use evergate_supervisor::{EXITS_FILE, Run, client};
use evergate_sys::{Pid, Signal, is_alive, kill_if_same};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, kill_process, pidfd_open};

/// Nothing here takes so long unless it is broken.
const LIMIT: Duration = Duration::from_secs(30);

/// Waits for a condition.
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "never: {what}");
        poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 2_000_000 })).unwrap();
    }
}

/// What is configured.
#[derive(Clone)]
pub struct Setup {
    pub listen: String,
    pub workers: (u32, u32),
    pub drain_ms: u64,
    pub hang_ms: u64,
    pub boot_ms: u64,
    pub config: String,
}

impl Default for Setup {
    fn default() -> Self {
        let config = String::new();
        Self {
            listen: "127.0.0.1:0".into(),
            workers: (2, 3),
            drain_ms: 20_000,
            hang_ms: 10_000,
            boot_ms: 20_000,
            config,
        }
    }
}

impl Setup {
    fn plan(&self) -> String {
        format!(
            "evergate-plan=1\nlisten={}\nadmin=127.0.0.1:0\nworkers_min={}\nworkers_max={}\nslots=16\n\
             boot_timeout_ms={}\nhang_timeout_ms={}\ndrain_ms={}\ncancel_ms=100\ncleanup_ms=100\n\
             banner=serving at {{listen}} with {{admin}}\n",
            self.listen, self.workers.0, self.workers.1, self.boot_ms, self.hang_ms, self.drain_ms
        )
    }

    pub fn with(config: &str) -> Self {
        Self { config: config.into(), ..Self::default() }
    }
}

/// A gateway under test. Dropped, it leaves nothing running.
pub struct Gateway {
    pub process: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    folder: std::path::PathBuf,
}

impl Gateway {
    /// Starts one and does not wait for anything.
    pub fn launch(folder: &Path, setup: &Setup) -> Self {
        let config = format!("log={} {}", folder.join("access.log").display(), setup.config);
        let mut process = Command::new("/proc/self/exe")
            .arg("serve")
            .arg(folder.join("state"))
            .args([setup.plan(), config])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = process.stderr.take().unwrap();
        let (send, lines) = sync_channel(10_000);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Self { process, lines, seen: Vec::new(), folder: folder.to_owned() }
    }

    /// Starts one and waits until it serves.
    pub fn start(folder: &Path, setup: &Setup) -> Self {
        let mut gateway = Self::launch(folder, setup);
        gateway.line("serving at http://127.0.0.1:");
        gateway
    }

    /// Waits for a line on standard error that holds this text.
    pub fn line(&mut self, text: &str) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.seen.push(line),
                Err(error) => panic!("no line with \"{text}\" ({error}); there were {:#?}", self.seen),
            }
            if let Some(line) = self.seen.last().filter(|line| line.contains(text)) {
                return line.clone();
            }
        }
    }

    pub fn state(&self) -> std::path::PathBuf {
        self.folder.join("state")
    }

    pub fn run(&self) -> Run {
        until("a run file", || Run::read(&self.state()).unwrap())
    }

    pub fn address(&self) -> SocketAddr {
        self.run().listen[0].parse().unwrap()
    }

    pub fn board(&self) -> Board {
        Board::attach(client::request(&self.state(), "status").unwrap().fd.unwrap()).unwrap()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Pids of its workers that are ready, by row.
    pub fn ready_workers(&self) -> Vec<(u32, i32)> {
        use evergate_board::Phase;
        use evergate_core::exit::Kind;
        let board = self.board();
        let rows = board.children().filter(|(_, row)| row.kind() == Some(Kind::Worker) && row.phase() == Phase::Ready);
        rows.map(|(number, row)| (number, row.pid())).collect()
    }

    pub fn wait_workers(&self, count: usize) -> Vec<(u32, i32)> {
        until("so many ready workers", || {
            let workers = self.ready_workers();
            (workers.len() == count).then_some(workers)
        })
    }

    /// Waits for its end; exit code, or the negative signal.
    pub fn wait(&mut self) -> i32 {
        let process = pidfd_open(self.pid(), PidfdFlags::empty()).unwrap();
        let limit = Timespec::try_from(LIMIT).unwrap();
        let ready = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(ready, 1, "it did not end; it said {:#?}", self.said());
        let status = self.process.wait().unwrap();
        status.code().unwrap_or_else(|| -status.signal().unwrap())
    }

    pub fn said(&mut self) -> String {
        self.seen.extend(self.lines.try_iter());
        self.seen.join("\n")
    }

    /// Everything it said, after its end.
    pub fn last_words(&mut self) -> String {
        while let Ok(line) = self.lines.recv_timeout(LIMIT) {
            self.seen.push(line);
        }
        self.seen.join("\n")
    }

    /// The exit records that hold this text.
    pub fn exits(&self, text: &str) -> Vec<String> {
        let all = std::fs::read_to_string(self.state().join(EXITS_FILE)).unwrap_or_default();
        all.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let children = Run::read(&self.state()).ok().flatten().map(|run| run.children).unwrap_or_default();
        let _ = self.process.kill();
        let _ = self.process.wait();
        for child in children {
            if let Some(pid) = Pid::from_raw(child.pid) {
                let _ = kill_if_same(pid, child.start_ticks, Signal::KILL);
            }
        }
    }
}

/// One request, one answer line; the connection too.
pub fn ask(address: SocketAddr, text: &str) -> (String, TcpStream) {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.write_all(format!("{text}\n").as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(&socket).read_line(&mut line).unwrap();
    (line.trim().to_owned(), socket)
}

/// Holds one request; the pid and row of the worker that has it.
pub fn hold(address: SocketAddr, id: &str) -> (i32, u32, TcpStream) {
    let (line, socket) = ask(address, &format!("hold {id}"));
    let (pid, row) = line.split_once(' ').unwrap();
    (pid.parse().unwrap(), row.parse().unwrap(), socket)
}

/// Waits until the other side has closed.
pub fn closed(socket: &TcpStream) {
    let mut rest = Vec::new();
    // A reset is an end as well.
    let _ = (&mut &*socket).read_to_end(&mut rest);
}

/// Waits until none of the run's children is there.
pub fn all_gone(run: &Run) {
    until("all children gone", || {
        let left = run.children.iter().any(|child| is_alive(Pid::from_raw(child.pid).unwrap(), child.start_ticks));
        (!left).then_some(())
    });
}
