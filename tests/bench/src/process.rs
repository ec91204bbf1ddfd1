//! What this process costs.

use std::time::Duration;

use anyhow::Context as _;

/// CPU time of this process, the kernel's work for it included.
pub(crate) fn cpu_time() -> Duration {
    // SAFETY: all-zero bytes are a valid `rusage`, which is plain data.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the structure outlives the call.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let time = |value: libc::timeval| {
        Duration::new(value.tv_sec.unsigned_abs(), u32::try_from(value.tv_usec * 1000).unwrap_or(0))
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// A line of `/proc/self/status`, such as `VmRSS`.
///
/// # Errors
/// The kernel does not tell it.
pub(crate) fn memory_mib(name: &'static str) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib: f64 = value.context(name)?.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}
