//! The children of this process: programs' first processes, and the orphans that come to us because we are a subreaper.
//!
//! One table for the whole process, because children belong to a process and not to a part of it. Whoever is in it is
//! reaped by its own life and by nobody else; whoever is not is an orphan, and belongs to the program that its mark, its
//! group or its session names.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use evergate_sys::{Pid, Signal};

use super::NUMBER;

/// A program's first process.
#[derive(Clone, Copy, Debug)]
struct Leader {
    pid: i32,
    /// In clock ticks since boot.
    start: u64,
    /// Whether it has ended, so that whatever is left of it is to go.
    is_over: bool,
}

/// By number, which is never used twice.
static LEADERS: Mutex<BTreeMap<u64, Leader>> = Mutex::new(BTreeMap::new());

fn leaders() -> MutexGuard<'static, BTreeMap<u64, Leader>> {
    LEADERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Enters a program that `fork` starts; nobody looks for orphans meanwhile, since it would be taken for one.
pub(crate) fn enter<T>(number: u64, fork: impl FnOnce() -> io::Result<(Pid, T)>) -> io::Result<(Pid, T)> {
    let mut leaders = leaders();
    let (pid, value) = fork()?;
    let start = evergate_sys::start_ticks(pid).unwrap_or(0);
    leaders.insert(number, Leader { pid: pid.as_raw_nonzero().get(), start, is_over: false });
    Ok((pid, value))
}

/// Strikes out a program whose first process is reaped.
pub(crate) fn leave(number: u64) {
    leaders().remove(&number);
}

/// What a sweep found.
#[derive(Debug, Default)]
pub(crate) struct Swept {
    /// Orphans of programs that are over, alive until now: killed, and to be looked for again.
    pub(crate) killed: Vec<Killed>,
    /// Those found dead. What they had made has come to us since, perhaps behind our look.
    pub(crate) dead: usize,
}

/// A process that was killed: its number and its start.
pub(crate) type Killed = (i32, u64);

impl Swept {
    /// Whether nothing can be left.
    pub(crate) fn is_clean(&self) -> bool {
        self.killed.is_empty() && self.dead == 0
    }
}

/// Reaps dead orphans, and kills those whose program is over; `over` is one more such program. One that is dying has no
/// environment any more, so those of the looks before are known as `seen`.
pub(crate) fn sweep(over: Option<u64>, seen: &BTreeSet<Killed>) -> Swept {
    let mut leaders = leaders();
    if let Some(leader) = over.and_then(|number| leaders.get_mut(&number)) {
        leader.is_over = true;
    }
    let mut swept = Swept::default();
    for orphan in orphans(&leaders, &mut swept.dead) {
        let itself = (orphan.pid.as_raw_nonzero().get(), orphan.start);
        if seen.contains(&itself) || is_doomed(&orphan, &leaders) {
            // It is our child and not reaped, so its number is its own.
            let _ = rustix::process::kill_process(orphan.pid, Signal::KILL);
            swept.killed.push(itself);
        }
    }
    swept
}

/// Those of a program's cgroup that have left its process group, of which this is the first.
pub(crate) fn strays(members: &[i32], first: Pid) -> BTreeSet<Killed> {
    let first = u64::from(first.as_raw_nonzero().get().unsigned_abs());
    let found = members.iter().filter_map(|pid| Some((*pid, stat(*pid)?.1)));
    // The fields after the state, which is number 3: the group is number 5, the start number 22 (proc_pid_stat(5)).
    let found = found.filter(|(_, fields)| fields.get(1) != Some(&first));
    found.map(|(pid, fields)| (pid, fields.get(18).copied().unwrap_or(0))).collect()
}

/// Whether orphans of a program are alive.
pub(crate) fn has_orphans(number: u64) -> bool {
    let leaders = leaders();
    orphans(&leaders, &mut 0).iter().any(|orphan| owner(orphan, &leaders) == Some(number))
}

/// A child that is no program's first process.
#[derive(Clone, Copy, Debug)]
struct Orphan {
    pid: Pid,
    group: i32,
    session: i32,
    start: u64,
    /// The program that its environment names.
    mark: Option<u64>,
}

/// Whose it is, as far as can be told.
fn owner(orphan: &Orphan, leaders: &BTreeMap<u64, Leader>) -> Option<u64> {
    orphan.mark.or_else(|| {
        let is_its = |leader: &Leader| [orphan.group, orphan.session].contains(&leader.pid);
        leaders.iter().find(|(_, leader)| is_its(leader)).map(|(number, _)| *number)
    })
}

/// Whether its program is over. One that hides whose it is goes when every program that could have made it has.
fn is_doomed(orphan: &Orphan, leaders: &BTreeMap<u64, Leader>) -> bool {
    match owner(orphan, leaders) {
        Some(number) => leaders.get(&number).is_none_or(|leader| leader.is_over),
        None => !leaders.values().any(|leader| !leader.is_over && leader.start <= orphan.start),
    }
}

/// Children that are no first processes; dead ones are counted, reaped and left out.
fn orphans(leaders: &BTreeMap<u64, Leader>, dead: &mut usize) -> Vec<Orphan> {
    let is_leader = |pid: i32| leaders.values().any(|leader| leader.pid == pid);
    let mut found = Vec::new();
    for pid in children().into_iter().filter(|pid| !is_leader(*pid)).filter_map(Pid::from_raw) {
        let Some((state, fields)) = stat(pid.as_raw_nonzero().get()) else { continue };
        if matches!(state, 'Z' | 'X') {
            // Its status is of interest to nobody; only the first process's is. One whose other threads are still on their
            // way out cannot be reaped yet.
            let _ = evergate_sys::reap(pid);
            *dead += 1;
            continue;
        }
        // The fields after the state, which is number 3 (proc_pid_stat(5)).
        let field = |number: usize| fields.get(number - 4).copied().unwrap_or(0);
        let id = |number: usize| i32::try_from(field(number)).unwrap_or(0);
        found.push(Orphan { pid, group: id(5), session: id(6), start: field(22), mark: mark(pid) });
    }
    found
}

/// State (field 3) and what follows, as numbers (proc_pid_stat(5)).
fn stat(pid: i32) -> Option<(char, Vec<u64>)> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name in field 2 may hold spaces and parentheses; the last one closes it.
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = std::str::from_utf8(stat.get(end + 1..)?).ok()?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // Some are negative (a terminal's group); none that we look at.
    Some((state, fields.map(|field| field.parse().unwrap_or(0)).collect()))
}

/// The program that a process's environment names; none where it names none of this process.
fn mark(pid: Pid) -> Option<u64> {
    let environment = std::fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).ok()?;
    let mut variables = environment.split(|byte| *byte == 0);
    let value = variables.find_map(|variable| variable.strip_prefix(NUMBER.as_bytes())?.strip_prefix(b"="))?;
    number_in(std::str::from_utf8(value).ok()?)
}

/// The variable's value for a program.
pub(crate) fn mark_of(number: u64) -> String {
    format!("{}.{number}", std::process::id())
}

fn number_in(mark: &str) -> Option<u64> {
    let (host, number) = mark.split_once('.')?;
    // A gateway that is itself a program of ours has such marks too.
    (host.parse() == Ok(std::process::id())).then(|| number.parse().ok())?
}

/// The children of this process. Orphans come to its first thread, programs to the one that forks, which is this.
fn children() -> Vec<i32> {
    let (process, thread) = (rustix::process::getpid(), rustix::thread::gettid());
    let mut found = Vec::new();
    for thread in [process, thread].iter().take(if process == thread { 1 } else { 2 }) {
        match std::fs::read_to_string(format!("/proc/self/task/{}/children", thread.as_raw_nonzero())) {
            Ok(text) => found.extend(text.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok())),
            // A kernel without CONFIG_PROC_CHILDREN.
            Err(_) => return children_of_all(process.as_raw_nonzero().get()),
        }
    }
    found
}

/// The long way: every process there is.
fn children_of_all(parent: i32) -> Vec<i32> {
    let Ok(folder) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = folder.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let is_ours =
        |pid: &i32| stat(*pid).is_some_and(|(_, fields)| fields.first() == Some(&u64::from(parent.unsigned_abs())));
    pids.filter(is_ours).collect()
}

/// The living processes of a program: its first, those of its group and session, orphans of ours with its mark, and the
/// descendants of all of them.
pub(crate) fn members(number: u64, first: Pid) -> BTreeSet<i32> {
    let first = first.as_raw_nonzero().get();
    let own = rustix::process::getpid().as_raw_nonzero().get();
    let Ok(folder) = std::fs::read_dir("/proc") else { return BTreeSet::from([first]) };
    let pids = folder.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let mut members = BTreeSet::from([first]);
    let mut parents = Vec::new();
    for pid in pids {
        let Some((_, fields)) = stat(pid) else { continue };
        let id = |at: usize| fields.get(at).and_then(|id| i32::try_from(*id).ok()).unwrap_or(0);
        let (parent, is_near) = (id(0), [id(1), id(2)].contains(&first));
        if is_near || (parent == own && Pid::from_raw(pid).and_then(mark) == Some(number)) {
            members.insert(pid);
        }
        parents.push((pid, parent));
    }
    // Each round finds one generation more.
    loop {
        let children = parents.iter().filter(|(_, parent)| members.contains(parent)).map(|(pid, _)| *pid);
        let grown: BTreeSet<i32> = children.chain(members.iter().copied()).collect();
        if grown.len() == members.len() {
            return members;
        }
        members = grown;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orphan(group: i32, session: i32, start: u64, mark: Option<u64>) -> Orphan {
        Orphan { pid: Pid::from_raw(99).unwrap(), group, session, start, mark }
    }

    fn leaders(of: &[(u64, i32, u64, bool)]) -> BTreeMap<u64, Leader> {
        of.iter()
            .map(|(number, pid, start, is_over)| (*number, Leader { pid: *pid, start: *start, is_over: *is_over }))
            .collect()
    }

    #[test]
    fn an_orphan_goes_with_the_program_that_made_it() {
        let leaders = leaders(&[(1, 10, 100, false), (2, 20, 100, true)]);
        for (orphan, expected) in [
            (orphan(99, 99, 150, Some(1)), false),
            (orphan(99, 99, 150, Some(2)), true),
            (orphan(99, 99, 150, Some(3)), true),
            (orphan(10, 7, 150, None), false),
            (orphan(20, 7, 150, None), true),
            (orphan(99, 20, 150, None), true),
        ] {
            assert_eq!(is_doomed(&orphan, &leaders), expected, "{orphan:?}");
        }
    }

    #[test]
    fn one_that_hides_its_maker_goes_when_all_who_could_be_it_are_over() {
        let stranger = orphan(99, 99, 150, None);
        assert!(!is_doomed(&stranger, &leaders(&[(1, 10, 100, false), (2, 20, 160, false)])));
        assert!(is_doomed(&stranger, &leaders(&[(1, 10, 100, true), (2, 20, 160, false)])));
        assert!(is_doomed(&stranger, &leaders(&[])));
    }

    #[test]
    fn marks_of_other_hosts_are_none() {
        assert_eq!(number_in(&mark_of(7)), Some(7));
        assert_eq!(number_in("1.7"), None);
        assert_eq!(number_in("seven"), None);
    }
}
