//! Memory that is not needed any more.

use std::fs;
use std::io;

/// Gives back free pages of the heap, and the pages of this program's code. What runs from now on comes back from the page
/// cache at its next call, with what lies around it; the code of the start does not. Of the node agent's 21 MiB of code 17 are
/// left.
/// Returns how many bytes of code were mapped.
///
/// # Errors
/// `/proc` cannot be read, or the kernel refuses.
pub fn release_memory() -> io::Result<usize> {
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointers are passed; the allocator locks itself.
    unsafe {
        libc::malloc_trim(0);
    }
    let program = fs::read_link("/proc/self/exe")?;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mut bytes = 0;
    for (start, length) in code_of(&maps, &program.to_string_lossy()) {
        // SAFETY: the range is a private mapping of a file, executable and never written to (it is not writable, and the
        // code of a program needs no relocation), so the kernel reads the very same bytes again when they are used.
        let done =
            unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        bytes += length;
    }
    Ok(bytes)
}

/// Lets all threads share two heaps of the allocator: each heap keeps what its threads once needed at a time. For processes
/// that seldom do much at once; early, as heaps that are there stay.
pub fn share_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointers are passed; a refused value changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Start and length of the mappings of a program's code, as `/proc/PID/maps` shows them. Pure.
fn code_of(maps: &str, program: &str) -> Vec<(usize, usize)> {
    let code = |line: &str| {
        let mut words = line.splitn(6, ' ');
        let (range, permissions) = (words.next()?, words.next()?);
        let file = words.nth(3)?.trim_start();
        if permissions != "r-xp" || file != program {
            return None;
        }
        let (start, end) = range.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        let (start, end) = (number(start)?, number(end)?);
        Some((start, end.checked_sub(start)?))
    };
    maps.lines().filter_map(code).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0c0000000-55d0c0001000 r--p 00000000 fe:00 7                          /opt/my bin/orchestrator
55d0c0001000-55d0c0005000 r-xp 00001000 fe:00 7                          /opt/my bin/orchestrator
55d0c0005000-55d0c0006000 r--p 00005000 fe:00 7                          /opt/my bin/orchestrator
55d0c0006000-55d0c0007000 rw-p 00006000 fe:00 7                          /opt/my bin/orchestrator
7f0000000000-7f0000001000 r-xp 00000000 fe:00 9                          /usr/lib/libc.so.6
7f0000002000-7f0000003000 rw-p 00000000 00:00 0
7ffe00000000-7ffe00001000 r-xp 00000000 00:00 0                          [vdso]
";

    #[test]
    fn only_the_programs_code_is_given_back() {
        assert_eq!(code_of(MAPS, "/opt/my bin/orchestrator"), [(0x55d0_c000_1000, 0x4000)]);
        assert_eq!(code_of(MAPS, "/opt/orchestrator"), []);
    }

    /// Code in memory, from the same file that the function reads.
    fn resident_code_kib() -> u64 {
        let smaps = fs::read_to_string("/proc/self/smaps").expect("smaps");
        let program = fs::read_link("/proc/self/exe").expect("a program");
        let program = program.to_string_lossy();
        let mut ours = false;
        let mut sum = 0;
        for line in smaps.lines() {
            if line.contains('-') && line.contains(':') && !line.ends_with("kB") {
                ours = !code_of(line, &program).is_empty();
            } else if ours && let Some(rest) = line.strip_prefix("Rss:") {
                let number = rest.trim().trim_end_matches(" kB");
                sum += number.parse::<u64>().unwrap_or(0);
            }
        }
        sum
    }

    #[test]
    fn code_goes_and_comes_back_when_it_runs() {
        let before = resident_code_kib();
        let bytes = release_memory().expect("given back");
        let after = resident_code_kib();
        assert!(bytes > 0 && after < before, "{before} KiB before, {after} KiB after");
        // What was given back still runs.
        assert_eq!(code_of(MAPS, "/opt/my bin/orchestrator").len(), 1);
        release_memory().expect("again");
    }
}
