//! How a child can end, and that its record says exactly that (SUPERVISION.md 7, lines 9 and 11).

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use crate::cases::no_zombies;
use crate::drive::{Gateway, Setup, ask, until};

/// Enough that pauses after deaths do not add up.
const WORKERS: u32 = 40;

/// Signals that end no process by default: CHLD, CONT, the four that stop, URG, WINCH. 32 and 33 are the C library's own:
/// whatever it has started by posix_spawn(3) ignores them, and so do its descendants.
const HARMLESS: [u32; 10] = [17, 18, 19, 20, 21, 22, 23, 28, 32, 33];

/// Sends a request that ends whoever takes it, without waiting for that.
fn tell(address: SocketAddr, text: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.write_all(format!("{text}\n").as_bytes()).unwrap();
    socket
}

/// How often each value of this key is among the records of workers.
fn tally(gateway: &Gateway, key: &str) -> BTreeMap<u32, u32> {
    let mut found = BTreeMap::new();
    for record in gateway.exits("\"kind\":\"worker\"") {
        let (_, rest) = record.split_once(&format!("\"{key}\":")).unwrap();
        if let Ok(value) = rest.split(',').next().unwrap().parse() {
            *found.entry(value).or_default() += 1;
        }
    }
    found
}

pub fn s09_every_code_and_signal_is_recorded_exactly(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup { workers: (WORKERS, WORKERS), ..Setup::with("nothing_blocked=1") });
    let address = gateway.address();
    let once = |values: std::ops::RangeInclusive<u32>, but: &[u32]| -> BTreeMap<u32, u32> {
        values.filter(|value| !but.contains(value)).map(|value| (value, 1)).collect()
    };
    let codes: Vec<_> = (0..=255).map(|code| tell(address, &format!("exit {code}"))).collect();
    let (wanted_codes, wanted_signals) = (once(0..=255, &[]), once(1..=64, &HARMLESS));
    until("a record for every code", || (tally(&gateway, "code") == wanted_codes).then_some(()));
    let signals: Vec<_> =
        wanted_signals.keys().map(|signal| tell(address, &format!("become kill -{signal} $$"))).collect();
    until("a record for every signal", || (tally(&gateway, "signal") == wanted_signals).then_some(()));
    assert_eq!(tally(&gateway, "code"), wanted_codes, "no signal is taken for a code");
    drop((codes, signals));
    no_zombies(&gateway);
}

pub fn s09_a_core_is_a_fact(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup { workers: (1, 1), ..Setup::default() });
    let cores = folder.join("cores");
    std::fs::create_dir(&cores).unwrap();
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    let _ended = tell(gateway.address(), &format!("become ulimit -c unlimited; cd {}; kill -ABRT $$", cores.display()));
    until("its record", || (gateway.exits("\"signal\":6,").len() == 1).then_some(()));
    // Where the pattern is no plain name, cores go elsewhere; where the limit is hard there are none.
    if !pattern.starts_with(['|', '/']) {
        let has_core = std::fs::read_dir(&cores).unwrap().next().is_some();
        assert_eq!(gateway.exits(&format!("\"signal\":6,\"core\":{has_core},")).len(), 1);
    }
    let _ended = tell(gateway.address(), "become ulimit -c 0; kill -ABRT $$");
    until("its record", || (gateway.exits("\"signal\":6,").len() == 2).then_some(()));
    assert!(!gateway.exits("\"signal\":6,\"core\":false,").is_empty());
}

pub fn s11_strangers_of_any_code_have_no_effect(folder: &Path) {
    let gateway = Gateway::start(folder, &Setup::default());
    let board = gateway.board();
    let before = gateway.wait_workers(2);
    // 70, 71 and 78 mean something when a child of ours says them; KILL is what the memory's end looks like.
    let ends = ["exit 0", "exit 3", "exit 70", "exit 71", "exit 75", "exit 78", "exit 255", "kill -KILL $$"];
    for end in ends {
        // The middle one ends first, so that its child is the master's; its own shell tells `$$` apart.
        let script = format!("/bin/sh -c 'sleep 0.05; {end}' & exit 4");
        assert_eq!(ask(gateway.address(), &format!("stranger {script}")).0, "left");
    }
    let count = u64::try_from(ends.len()).unwrap();
    until("every stranger was reaped", || (board.master().strangers() == count).then_some(()));
    assert_eq!(gateway.wait_workers(2), before);
    assert!(gateway.exits("").is_empty());
    no_zombies(&gateway);
}
