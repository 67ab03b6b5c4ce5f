//! The programs that are measured: how each is started, found and ended.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use rustix::thread::CpuSet;

use super::{load, proc};

/// What stands between the load and the mock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Nothing: the mock itself.
    Direct,
    /// nginx, as `proxy_pass` with kept upstream connections and no buffering.
    Nginx,
    /// The bare hyper proxy.
    Proxy,
    /// Evergate with so many workers.
    Evergate {
        /// `workers.min` and `workers.max`.
        workers: u32,
    },
}

impl Kind {
    /// The column's title.
    pub fn title(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Nginx => "nginx",
            Self::Proxy => "hyper proxy",
            Self::Evergate { .. } => "Evergate",
        }
    }
}

/// Where things are.
#[derive(Debug)]
pub struct Place {
    /// A folder of this run.
    pub folder: PathBuf,
    /// The release binary.
    pub evergate: PathBuf,
    /// The mock's address.
    pub mock: SocketAddr,
    /// The CPU that subjects are pinned to.
    pub cpu: usize,
}

/// One running subject; ended when dropped.
#[derive(Debug)]
pub struct Subject {
    /// The root of its tree; `None` for the mock, whose cost is nobody's.
    child: Option<Child>,
    /// Where it takes requests.
    pub address: SocketAddr,
    /// From just before it was executed to its first right answer.
    pub first_answer: Duration,
    kind: Kind,
}

/// The CPU that subjects run on; mock and load have another, so that only what is measured runs there.
pub const SUBJECT_CPU: usize = 0;
/// The CPU of mock and load.
pub const LOAD_CPU: usize = 1;

const READY_WITHIN: Duration = Duration::from_secs(30);

/// Pins this thread, and what it starts from now on.
fn pin(cpu: usize) {
    // With one CPU there is nothing to separate.
    if proc::cpus() > 1 {
        let mut set = CpuSet::new();
        set.set(cpu);
        let _ = rustix::thread::sched_setaffinity(None, &set);
    }
}

/// Pins this thread to the load's CPU.
pub fn pin_load() {
    pin(LOAD_CPU);
}

/// Does something on the subjects' CPU, and what it starts runs there too.
pub fn at_the_subjects<T>(place: &Place, act: impl FnOnce() -> T) -> T {
    pin(place.cpu);
    let done = act();
    pin_load();
    done
}

/// Starts a program on a CPU.
fn spawn(command: &mut Command, cpu: usize) -> Result<Child, String> {
    pin(cpu);
    let child = command.spawn().map_err(|error| format!("{}: {error}", command.get_program().display()));
    pin_load();
    child
}

/// Starts one of this program's own servers; it says where it listens on its first line.
fn start_own(arguments: &[&str], cpu: usize) -> Result<(Child, SocketAddr), String> {
    // The running program, whatever has become of its file since.
    start_listening(Command::new("/proc/self/exe").args(arguments), cpu)
}

/// Starts a server that says where it listens on its first line.
fn start_listening(command: &mut Command, cpu: usize) -> Result<(Child, SocketAddr), String> {
    let arguments = command.get_args().map(|text| text.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ");
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = spawn(command, cpu)?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).map_err(|error| format!("{arguments:?}: {error}"))?;
    }
    match line.trim().parse() {
        Ok(address) => Ok((child, address)),
        Err(_) => {
            end(&mut child);
            Err(format!("{arguments:?}: did not start"))
        }
    }
}

/// The bare hyper proxy under another program.
pub fn start_proxy_under(place: &Place, under: &[OsString]) -> Result<Subject, String> {
    let (program, arguments) = under.split_first().ok_or("nothing to run the proxy under")?;
    let own = std::fs::read_link("/proc/self/exe").map_err(|error| format!("own program: {error}"))?;
    let mut command = Command::new(program);
    command.args(arguments).arg(own).args(["bench-proxy", &place.mock.to_string()]);
    let (child, address) = start_listening(&mut command, place.cpu)?;
    Ok(Subject { child: Some(child), address, first_answer: Duration::ZERO, kind: Kind::Proxy })
}

impl Subject {
    /// Starts a subject and waits until it answers.
    pub async fn start(kind: Kind, place: &Place) -> Result<Self, String> {
        Self::start_with(kind, place, "").await
    }

    /// The same, with more in Evergate's configuration.
    pub async fn start_with(kind: Kind, place: &Place, more: &str) -> Result<Self, String> {
        let address = match kind {
            Kind::Direct | Kind::Proxy => place.mock,
            Kind::Nginx | Kind::Evergate { .. } => free_address()?,
        };
        let mut command = match kind {
            Kind::Nginx => Some(nginx(place, address)?),
            Kind::Evergate { workers } => Some(evergate(place, address, workers, more)?),
            Kind::Direct | Kind::Proxy => None,
        };
        let start = Instant::now();
        let (child, address) = match &mut command {
            Some(command) => (Some(spawn(command, place.cpu)?), address),
            None if kind == Kind::Direct => (None, address),
            None => {
                let (child, address) = start_own(&["bench-proxy", &address.to_string()], place.cpu)?;
                (Some(child), address)
            }
        };
        let mut subject = Self { child, address, first_answer: Duration::ZERO, kind };
        subject.wait_ready(start).await.map_err(|error| format!("{}: {error}", kind.title()))?;
        subject.first_answer = start.elapsed();
        Ok(subject)
    }

    /// Root of the tree; `None` for direct.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Waits for the first right answer.
    async fn wait_ready(&mut self, start: Instant) -> Result<(), String> {
        let one = load::Load { model: "u0", connections: 1, requests: 1, events: 0 };
        loop {
            let outcome = load::run(self.address, one).await;
            let Some(error) = outcome.errors.first() else { return Ok(()) };
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                return Err(format!("ended with {status}"));
            }
            if start.elapsed() > READY_WITHIN {
                return Err(format!("no right answer within {READY_WITHIN:?}: {error}"));
            }
            pause(Duration::from_micros(250));
        }
    }

    /// Ends it and waits for that.
    pub fn end(mut self) {
        if let Some(child) = &mut self.child {
            end(child);
        }
    }
}

/// Waits without a timer's coarseness.
pub fn pause(time: Duration) {
    let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: i64::from(time.subsec_nanos()) };
    let _ = rustix::event::poll(&mut [], Some(&timeout));
}

/// Starts the mock, beside the load.
pub fn start_mock() -> Result<Mock, String> {
    start_own(&["bench-mock"], LOAD_CPU).map(|(child, address)| Mock { child, address })
}

/// The running mock; ended when dropped.
#[derive(Debug)]
pub struct Mock {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Drop for Mock {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end(child);
        }
    }
}

/// Ends a child of ours: politely, and after ten seconds not.
fn end(child: &mut Child) {
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else { return };
    let _ = rustix::process::kill_process(pid, Signal::TERM);
    let start = Instant::now();
    while matches!(child.try_wait(), Ok(None)) {
        if start.elapsed() > Duration::from_secs(10) {
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        pause(Duration::from_millis(2));
    }
}

/// A loopback address that was free a moment ago: programs that cannot tell us where they listen are told.
fn free_address() -> Result<SocketAddr, String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(|error| format!("bind: {error}"))?;
    listener.local_addr().map_err(|error| format!("bind: {error}"))
}

/// A program's path; `None` when it is not installed.
pub fn find_program(name: &str) -> Option<PathBuf> {
    // Debian keeps servers out of an ordinary user's PATH.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn folder(place: &Place, name: &str, address: SocketAddr) -> Result<PathBuf, String> {
    let folder = place.folder.join(format!("{name}-{}", address.port()));
    std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(folder)
}

fn nginx(place: &Place, address: SocketAddr) -> Result<Command, String> {
    let program = find_program("nginx").ok_or("nginx is not installed")?;
    let folder = folder(place, "nginx", address)?;
    let at = folder.display();
    // As root, nginx gives its workers to another user, who could not write into our folder.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|name| format!("{name}_temp_path {at}/{name};"))
        .collect();
    let config = format!(
        "{user} daemon off; worker_processes 2; pid {at}/pid; error_log stderr crit;\n\
         worker_rlimit_nofile 16384;\n\
         events {{ worker_connections 16384; }}\n\
         http {{\n  access_log off; {temp} keepalive_requests 1000000000; client_max_body_size 20m; client_body_buffer_size 64k;\n\
         upstream mock {{ server {mock}; keepalive 128; keepalive_requests 1000000000; }}\n\
         server {{ listen {address} backlog=4096; location / {{\n\
         proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_buffering off;\n\
         proxy_read_timeout 1h; }} }}\n}}\n",
        mock = place.mock
    );
    let file = folder.join("nginx.conf");
    write(&file, &config)?;
    let mut command = Command::new(program);
    command.arg("-p").arg(&folder).arg("-c").arg(&file).stdin(Stdio::null()).stdout(Stdio::null());
    Ok(command)
}

/// Every model name the bench asks for.
const MODELS: [&str; 6] = ["u0", "u20", "s500x0", "s160x5", "hold", "s100x0"];

/// Evergate's configuration for the bench, in a folder of its own.
pub fn configuration(place: &Place, address: SocketAddr, workers: u32, more: &str) -> Result<PathBuf, String> {
    let folder = folder(place, "evergate", address)?;
    let models: String = MODELS
        .iter()
        .map(|name| format!("[models.\"{name}\"]\ntargets = [ {{ upstream = \"mock\", model = \"{name}\" }} ]\n"))
        .collect();
    // The https upstream is never called: it is there for what it costs to have one.
    let config = format!(
        "[server]\nlisten = [\"{address}\"]\nauth = \"none\"\n\
         [admin]\nlisten = \"127.0.0.1:0\"\n\
         [workers]\nmin = {workers}\nmax = {workers}\nslots = 8192\nboot_timeout = \"300s\"\nhang_timeout = \"300s\"\n\
         [limits]\nconnections = 8192\n\
         [upstreams.mock]\ndialect = \"openai\"\nbase_url = \"http://{mock}/v1\"\n\
         [upstreams.far]\ndialect = \"openai\"\nbase_url = \"https://api.openai.com/v1\"\n\
         [models.\"far\"]\ntargets = [ {{ upstream = \"far\", model = \"far\" }} ]\n{models}{more}",
        mock = place.mock
    );
    let file = folder.join("evergate.toml");
    write(&file, &config)?;
    Ok(file)
}

/// `evergate serve` with a configuration and a state folder of its own.
fn evergate(place: &Place, address: SocketAddr, workers: u32, more: &str) -> Result<Command, String> {
    let file = configuration(place, address, workers, more)?;
    let folder = folder(place, "evergate", address)?;
    let log = std::fs::File::create(folder.join("stderr")).map_err(|error| format!("evergate: {error}"))?;
    let mut command = Command::new(&place.evergate);
    command.arg("serve").arg("--config").arg(&file).arg("--state-dir").arg(folder.join("state"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    Ok(command)
}

/// The end of what Evergate last said, for a failure's message.
pub fn last_words(folder: &Path) -> String {
    let newest = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path().join("stderr"));
    let newest = newest.filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path))).max();
    let text = newest.and_then(|(_, path)| std::fs::read_to_string(path).ok()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(8).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}
