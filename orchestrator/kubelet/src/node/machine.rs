//! What the machine has: processors, memory, disk, kernel.

use std::fs;
use std::path::Path;

use crate::Options;

/// Free memory below this is pressure (kubelet's default eviction threshold).
const MEMORY_PRESSURE_BYTES: i64 = 100 << 20;
/// Free disk below this share is pressure.
const DISK_PRESSURE_PERCENT: u64 = 10;
/// Free process IDs below this share are pressure.
const PID_PRESSURE_PERCENT: u64 = 2;

/// Facts that do not change while the agent runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Machine {
    pub(crate) cpu_milli: i64,
    pub(crate) memory_bytes: i64,
    pub(crate) disk_bytes: i64,
    pub(crate) kernel: String,
    pub(crate) os_image: String,
    pub(crate) machine_id: String,
    pub(crate) boot_id: String,
    pub(crate) system_uuid: String,
}

impl Machine {
    pub(crate) fn read(options: &Options) -> Self {
        let text = |path: &str| {
            fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
        };
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let cpu_milli = i64::try_from(cpus).unwrap_or(1) * 1000;
        let memory = meminfo(&text("/proc/meminfo"), "MemTotal").unwrap_or_default();
        let at_most =
            |value: i64, limit: Option<i64>| limit.map_or(value, |limit| value.min(limit));
        let machine_id = text("/etc/machine-id");
        let system_uuid = text("/sys/class/dmi/id/product_uuid");
        Self {
            cpu_milli: at_most(cpu_milli, options.cpu_milli_limit),
            memory_bytes: at_most(memory, options.memory_bytes_limit),
            disk_bytes: disk(&options.paths.lib())
                .map_or(0, |disk| i64::try_from(disk.total).unwrap_or(i64::MAX)),
            kernel: text("/proc/sys/kernel/osrelease"),
            os_image: os_name(&text("/etc/os-release")),
            system_uuid: if system_uuid.is_empty() { machine_id.clone() } else { system_uuid },
            machine_id,
            boot_id: text("/proc/sys/kernel/random/boot_id"),
        }
    }
}

/// What the machine runs short of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Pressure {
    pub(crate) memory: bool,
    pub(crate) disk: bool,
    pub(crate) pids: bool,
}

impl Pressure {
    /// Looks at the memory, at the disks of the agent and the engine, and at process IDs.
    pub(crate) fn read(agent: &Path, engine: &str) -> Self {
        let available = fs::read_to_string("/proc/meminfo")
            .ok()
            .and_then(|text| meminfo(&text, "MemAvailable"));
        let full = |path: &Path| {
            disk(path).is_some_and(|disk| disk.free * 100 < disk.total * DISK_PRESSURE_PERCENT)
        };
        Self {
            memory: available.is_some_and(|bytes| bytes < MEMORY_PRESSURE_BYTES),
            disk: full(agent) || (!engine.is_empty() && full(Path::new(engine))),
            pids: pids_short(),
        }
    }
}

fn pids_short() -> bool {
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // proc(5): the fourth field of loadavg is running/all tasks.
    let tasks = fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|text| text.split(' ').nth(3)?.split('/').nth(1)?.parse::<u64>().ok());
    match (number("/proc/sys/kernel/pid_max"), tasks) {
        (Some(most), Some(tasks)) => most.saturating_sub(tasks) * 100 < most * PID_PRESSURE_PERCENT,
        _ => false,
    }
}

struct Disk {
    total: u64,
    free: u64,
}

/// The file system of a path, or of its nearest parent that exists.
fn disk(path: &Path) -> Option<Disk> {
    let existing = path.ancestors().find(|path| path.exists())?;
    let stat = nix::sys::statvfs::statvfs(existing).ok()?;
    let block = stat.fragment_size();
    Some(Disk { total: stat.blocks() * block, free: stat.blocks_available() * block })
}

/// A value of `/proc/meminfo` in bytes.
fn meminfo(text: &str, key: &str) -> Option<i64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kibibytes: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

fn os_name(text: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    line.unwrap_or("Linux").trim_matches('"').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_understood() {
        let text = "MemTotal:       24683900 kB\nMemFree: 1 kB\nMemAvailable:   24000000 kB\n";
        assert_eq!(meminfo(text, "MemTotal"), Some(24_683_900 * 1024));
        assert_eq!(meminfo(text, "MemAvailable"), Some(24_000_000 * 1024));
        assert_eq!(meminfo(text, "Mem"), None);
        assert_eq!(os_name("ID=x\nPRETTY_NAME=\"Debian 12\"\n"), "Debian 12");
    }
}
