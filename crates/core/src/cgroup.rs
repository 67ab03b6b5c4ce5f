//! Where a process's memory cgroup is, and what its files say. Pure: the texts are passed in.

use std::path::{Path, PathBuf};

/// A version of cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// A hierarchy for each controller; ours is that of memory.
    One,
    /// One hierarchy for all.
    Two,
}

impl Version {
    /// Its number.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }

    /// The file that bounds a group's memory.
    #[must_use]
    pub const fn memory_limit(self) -> &'static str {
        match self {
            Self::One => "memory.limit_in_bytes",
            Self::Two => "memory.max",
        }
    }

    /// The file whose `oom_kill` counts kills for want of memory.
    #[must_use]
    pub const fn memory_events(self) -> &'static str {
        match self {
            Self::One => "memory.oom_control",
            Self::Two => "memory.events",
        }
    }
}

/// Folders in which the memory controller of our own cgroup may be, cgroup v2 first, from the texts of `/proc/self/cgroup`
/// and `/proc/self/mountinfo` (cgroups(7), proc_pid_mountinfo(5)).
#[must_use]
pub fn folders(own: &str, mounts: &str) -> Vec<PathBuf> {
    places(own, mounts).into_iter().map(|(_, folder)| folder).collect()
}

/// The same with the version of each.
#[must_use]
pub fn places(own: &str, mounts: &str) -> Vec<(Version, PathBuf)> {
    let mut found = Vec::new();
    for version in [Version::Two, Version::One] {
        let is_v2 = version == Version::Two;
        let path = own.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let is_it = if is_v2 { controllers.is_empty() } else { controllers.split(',').any(|one| one == "memory") };
            is_it.then_some(path)
        });
        let Some(path) = path else { continue };
        for line in mounts.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let (mut before, mut after) = (before.split(' ').skip(3), after.split(' '));
            let (Some(root), Some(point)) = (before.next(), before.next()) else { continue };
            let (kind, options) = (after.next().unwrap_or_default(), after.nth(1).unwrap_or_default());
            let is_it = match is_v2 {
                true => kind == "cgroup2",
                false => kind == "cgroup" && options.split(',').any(|one| one == "memory"),
            };
            // A container often sees only its own part of the tree, mounted as the whole.
            let below = path.strip_prefix(root.trim_end_matches('/')).unwrap_or(path);
            if is_it {
                found.push((version, Path::new(point).join(below.trim_start_matches('/'))));
            }
        }
    }
    found
}

/// A limit in bytes; none for `max`, and for the number that cgroup v1 has in its place.
#[must_use]
pub fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|bytes| *bytes < 1 << 60)
}

/// The value of a key among lines of a key and a value.
#[must_use]
pub fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_values_are_read() {
        assert_eq!(
            (limit("max\n"), limit("536870912\n"), limit("9223372036854771712\n")),
            (None, Some(512 << 20), None)
        );
        let stat = "anon 5\nfile 7\ninactive_file 3\n";
        assert_eq!((value(stat, "inactive_file"), value(stat, "file"), value(stat, "none")), (Some(3), Some(7), None));
    }

    #[test]
    fn the_own_cgroup_is_found_in_every_arrangement() {
        let v2 = folders(
            "0::/system.slice/evergate.service\n",
            "31 23 0:28 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n",
        );
        assert_eq!(v2, [Path::new("/sys/fs/cgroup/system.slice/evergate.service")]);
        let own = "4:cpu,memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n";
        let mounts = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      42 31 0:39 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n";
        let both = folders(own, mounts);
        assert_eq!(both, [Path::new("/sys/fs/cgroup/unified"), Path::new("/sys/fs/cgroup/memory/")]);
        assert!(folders("", "nonsense\n - \n").is_empty());
    }
}
