//! The machine's memory, and how much of it control groups leave to a process: Linux kills a process whose group
//! exceeds its limit, however much memory is free.
//!
//! A limit applies to a group and all groups in it, so the process has the least of what its own group and its
//! ancestors leave. Files of both cgroup versions are read. Inactive file pages count as used there but are reclaimed
//! on demand, so they are treated as free here.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// The file names and keys of one cgroup version.
struct Names {
    /// The limit, in bytes, or a word that means none.
    limit: &'static str,
    usage: &'static str,
    /// The first of these keys that memory.stat has: bytes of inactive file pages.
    inactive: [&'static str; 2],
}

const SECOND: Names =
    Names { limit: "memory.max", usage: "memory.current", inactive: ["inactive_file", "inactive_file"] };
/// In version 1 the plain key counts only the group itself, without its descendants.
const FIRST: Names = Names {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    inactive: ["total_inactive_file", "inactive_file"],
};

/// Memory that this program can still allocate, if the system reports it: Linux's MemAvailable, or less where a control
/// group has a limit.
pub fn free_memory_bytes() -> Option<u64> {
    [memory_line("MemAvailable:"), group_limits_leave()].into_iter().flatten().min()
}

/// Memory of the machine, if the system reports it.
pub fn total_memory_bytes() -> Option<u64> {
    memory_line("MemTotal:")
}

fn memory_line(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Bytes that this process may still allocate before it exceeds a group's limit; `None` where there is no such limit.
fn group_limits_leave() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    free_bytes_under(Path::new("/sys/fs/cgroup"), &groups)
}

/// The same for a process in `groups`, in the format of /proc/self/cgroup, where the files of all groups are under
/// `root`.
fn free_bytes_under(root: &Path, groups: &str) -> Option<u64> {
    let of_line = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, group) = (parts.next()?, parts.next()?);
        match controllers {
            "" => least_free_bytes(root, group, &SECOND),
            _ if controllers.split(',').any(|c| c == "memory") => least_free_bytes(&root.join("memory"), group, &FIRST),
            _ => None,
        }
    };
    groups.lines().filter_map(of_line).min()
}

/// The least of what `group` and its ancestors leave. In a container a group's path may not exist as seen from inside:
/// then the root is used.
fn least_free_bytes(root: &Path, group: &str, names: &Names) -> Option<u64> {
    let inside = Path::new(group).components().filter(|part| matches!(part, Component::Normal(_)));
    let group: PathBuf = inside.collect();
    group.ancestors().filter_map(|group| group_free_bytes(&root.join(group), names)).min()
}

fn group_free_bytes(folder: &Path, names: &Names) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let (limit, usage) = (number(names.limit)?, number(names.usage)?);
    let stat = read("memory.stat").unwrap_or_default();
    let of_key =
        |key: &&str| stat.lines().find_map(|line| line.strip_prefix(*key)?.strip_prefix(' ')?.trim().parse().ok());
    let inactive: u64 = names.inactive.iter().find_map(of_key).unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(inactive)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Free bytes in a tree of such files.
    fn check(files: &[(&str, &str)], groups: &str, want: Option<u64>) {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        assert_eq!(free_bytes_under(root.path(), groups), want, "{files:?} {groups}");
    }

    #[test]
    fn the_least_of_all_groups_around_a_process_counts() {
        let own = [("a/b/memory.max", "1000"), ("a/b/memory.current", "400")];
        let around = [("a/memory.max", "1500"), ("a/memory.current", "1400")];
        check(&own, "0::/a/b\n", Some(600));
        check(&[&own[..], &around].concat(), "0::/a/b\n", Some(100));
        // What nobody has used of late is given back.
        let stat = ("a/memory.stat", "anon 7\ninactive_file 300\nactive_file 500");
        check(&[&own[..], &around, &[stat]].concat(), "0::/a/b\n", Some(400));
        check(&[&own[..], &[("a/b/memory.stat", "inactive_file 5000")]].concat(), "0::/a/b\n", Some(1000));
        // No limit, none that is known, and one that is exceeded.
        check(&[("a/memory.max", "max"), ("a/memory.current", "400")], "0::/a\n", None);
        check(&own, "0::/elsewhere\n", None);
        check(&own, "", None);
        check(&own, "nonsense\n0:\n", None);
        check(&[("a/memory.max", "1000"), ("a/memory.current", "1200")], "0::/a\n", Some(0));
    }

    #[test]
    fn a_container_sees_its_own_group_as_the_root() {
        let root = [("memory.max", "1000"), ("memory.current", "400")];
        check(&root, "0::/\n", Some(600));
        check(&root, "0::/docker/not/here\n", Some(600));
        check(&root, "0::/../../other\n", Some(600));
    }

    #[test]
    fn the_first_version_has_other_names() {
        let groups = "12:cpu,cpuacct:/a\n5:memory:/a\n1:name=systemd:/a\n0::/a\n";
        let own = [("memory/a/memory.limit_in_bytes", "1000"), ("memory/a/memory.usage_in_bytes", "900")];
        check(&own, groups, Some(100));
        let stat = ("memory/a/memory.stat", "inactive_file 10\ntotal_inactive_file 300");
        check(&[&own[..], &[stat]].concat(), groups, Some(400));
        let around = [("memory/memory.limit_in_bytes", "9223372036854771712"), ("memory/memory.usage_in_bytes", "900")];
        check(&[&own[..], &around].concat(), groups, Some(100));
        check(&around, groups, Some(9_223_372_036_854_771_712 - 900));
    }
}
