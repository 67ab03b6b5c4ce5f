//! What the kernel counts for a process and all below it.

use std::collections::BTreeMap;
use std::fs;

/// A process and all its descendants.
pub fn tree(root: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for pid in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = pid.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![root];
    let mut at = 0;
    while let Some(pid) = found.get(at) {
        let below = children.remove(pid).unwrap_or_default();
        found.extend(below);
        at += 1;
    }
    found
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may itself hold blanks and parentheses.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// CPU time of all threads of a tree, user and system, ns. `utime` and `stime` count in ticks of 10 ms; this does not.
pub fn cpu_ns(root: u32) -> u64 {
    tree(root).into_iter().map(cpu_ns_of).sum()
}

fn cpu_ns_of(pid: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|text| text.split_whitespace().next().and_then(|first| first.parse::<u64>().ok()))
        .sum()
}

/// Anonymous memory of a tree, KiB.
pub fn rss_anon_kib(root: u32) -> u64 {
    tree(root).into_iter().filter_map(|pid| field(&format!("/proc/{pid}/status"), "RssAnon:")).sum()
}

/// Memory of a tree with shared pages divided among those who share them, KiB.
pub fn pss_kib(root: u32) -> u64 {
    tree(root).into_iter().filter_map(|pid| field(&format!("/proc/{pid}/smaps_rollup"), "Pss:")).sum()
}

fn field(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}

/// `Linux 6.1.0, AMD EPYC, 2 CPUs`.
pub fn machine() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim()));
    format!("Linux {}, {}, {} CPUs", kernel.trim(), model.unwrap_or("unknown CPU"), cpus())
}

/// CPUs of the machine. (What the standard library counts is what this thread is pinned to.)
pub fn cpus() -> usize {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines().filter(|line| line.starts_with("processor")).count().max(1)
}
