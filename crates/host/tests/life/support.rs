//! A host's programs within a test, and what can be seen of them from outside.

use std::ffi::{OsStr, OsString};
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evergate_host::program::{Ended, Failed};
use evergate_host::report::Line;
use evergate_host::{Plan, Program, Programs, Report, Wiring};
use evergate_sys::{Pid, Status};
use tokio::time::MissedTickBehavior;

/// Longer than anything here takes on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// Hears everything.
#[derive(Default)]
pub(crate) struct Ear {
    pub(crate) lines: Mutex<Vec<String>>,
    pub(crate) dropped: Mutex<u64>,
    pub(crate) ended: Mutex<Vec<Ended>>,
    pub(crate) failed: Mutex<Vec<String>>,
    pub(crate) load: Mutex<(u32, u32)>,
}

impl Report for Ear {
    fn started(&self, _: Pid) {}
    fn failed(&self, failed: &Failed) {
        self.failed.lock().unwrap().push(failed.to_string());
    }
    fn listens(&self, _: Option<&str>) {}
    fn serves(&self, _: bool) {}
    fn load(&self, in_flight: u32, waiting: u32) {
        *self.load.lock().unwrap() = (in_flight, waiting);
    }
    fn ended(&self, ended: &Ended) {
        self.ended.lock().unwrap().push(ended.clone());
    }
    fn line(&self, line: Line<'_>) {
        *self.dropped.lock().unwrap() += line.dropped;
        self.lines.lock().unwrap().push(String::from_utf8_lossy(line.text).into_owned());
    }
}

/// A host within a test.
pub(crate) struct House {
    pub(crate) programs: Programs,
    pub(crate) ear: Arc<Ear>,
}

/// Runs a test as a host runs: on one thread.
pub(crate) fn run<F: Future<Output = ()>>(test: impl FnOnce(House) -> F) {
    // Before there are programs: whatever else this process starts would be taken for an orphan of theirs.
    let _ = evergate_testkit::adaptersim();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(LONG * 4, test(House::new())).await.expect("the test took too long");
    });
}

/// Runs a test in a process of its own: for what would disturb the others.
pub(crate) fn alone(name: &str, test: impl FnOnce()) {
    const INSIDE: &str = "EVERGATE_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        test();
        return;
    }
    let name = name.to_owned();
    run(|house| async move {
        #[allow(clippy::disallowed_methods, reason = "nothing replaces a test while it runs")]
        let own = std::env::current_exe().unwrap();
        let mut again = plan(&[own.as_os_str(), "--exact".as_ref(), name.as_ref()]);
        again.env = std::env::vars_os().chain([(INSIDE.into(), "1".into())]).collect();
        let (output, ended) = house.whole(&again).await;
        assert_eq!(ended.exit.status, Status::Code(0), "{}{}", text(&output), text(&ended.tail));
        assert!(text(&output).contains("1 passed"), "{}", text(&output));
    });
}

pub(crate) fn plan<S: AsRef<OsStr>>(argv: &[S]) -> Plan {
    Plan {
        argv: argv.iter().map(|arg| arg.as_ref().to_owned()).collect(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into())],
        dir: None,
        limits: Vec::new(),
        ids: None,
        landlock: None,
        cgroups: None,
        memory: None,
        grace: Duration::from_millis(300),
    }
}

/// The misbehaving program with its steps.
pub(crate) fn sim(steps: &[&str]) -> Plan {
    let program = evergate_testkit::adaptersim().into_os_string();
    let argv: Vec<OsString> = std::iter::once(program).chain(steps.iter().map(OsString::from)).collect();
    plan(&argv)
}

/// Input and output by pipes.
pub(crate) const PIPES: Wiring<'static> =
    Wiring { args: &[], request: None, fds: &[], has_input: true, has_output: true };
/// Output only.
pub(crate) const OUTPUT: Wiring<'static> =
    Wiring { args: &[], request: None, fds: &[], has_input: false, has_output: true };

impl House {
    /// Within a runtime.
    pub(crate) fn new() -> Self {
        let ear = Arc::new(Ear::default());
        Self { programs: Programs::new(OsStr::new("test.1"), ear.clone()).unwrap(), ear }
    }

    pub(crate) async fn start(&self, plan: &Plan, wiring: Wiring<'_>) -> Program {
        self.programs.start(plan, wiring, Instant::now() + LONG).await.unwrap()
    }

    /// Runs it to its end, with all of its output.
    pub(crate) async fn whole(&self, plan: &Plan) -> (Vec<u8>, Ended) {
        let mut program = self.start(plan, OUTPUT).await;
        let output = read(&mut program).await;
        (output, program.ended().await.unwrap())
    }

    /// Waits for a word on standard error, such as `pid 123`, and gives what follows it.
    pub(crate) async fn heard(&self, word: &str, count: usize) -> Vec<i32> {
        let found = || -> Vec<i32> {
            let lines = self.ear.lines.lock().unwrap();
            lines.iter().filter_map(|line| line.strip_prefix(word)?.trim().parse().ok()).collect()
        };
        until(word, || found().len() >= count).await;
        found()
    }
}

/// Waits until something holds, with the runtime turning: looks every few milliseconds.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let (mut looks, end) = (tokio::time::interval(Duration::from_millis(2)), Instant::now() + LONG);
    // A look that takes long leaves the runtime its turn all the same.
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !holds() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        looks.tick().await;
    }
}

/// Waits until what a program has written stays the same for a while; gives it, bytes.
pub(crate) async fn written_at_rest(pid: i32, rest: Duration) -> usize {
    let written = || {
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        io.lines().find_map(|line| line.strip_prefix("wchar: ")?.parse().ok()).unwrap_or(0)
    };
    let (mut last, mut since) = (written(), Instant::now());
    until("it writes no more", || {
        let now = written();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        since.elapsed() >= rest
    })
    .await;
    last
}

pub(crate) async fn read(program: &mut Program) -> Vec<u8> {
    let mut output = program.take_output().unwrap();
    let mut all = Vec::new();
    while let Some(chunk) = output.chunk().await.unwrap() {
        all.extend_from_slice(&chunk);
    }
    all
}

/// Whether there is such a process; a zombie is one.
pub(crate) fn exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

pub(crate) fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

pub(crate) fn is_full() -> bool {
    std::env::var_os("EVERGATE_TEST_FULL").is_some()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A folder of its own for each test.
pub(crate) fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    assert!(folder.path().as_os_str().as_bytes().starts_with(b"/"));
    folder
}
