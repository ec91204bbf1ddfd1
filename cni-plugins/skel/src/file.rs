//! Small files, read with as few system calls as there can be: a plugin lives for milliseconds, and a fifth of its calls
//! would be the two that `fs::read` spends on asking for the length and on a second read for the end.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// Bytes that are read at once: what we keep in such files, and what `/proc/sys` has, is shorter.
const AT_ONCE: usize = 256;

/// Reads a file that is expected to be short; a longer one is read as well.
///
/// # Errors
/// The system's.
pub fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    read_small_file(&mut File::open(path)?)
}

/// As [`read_small`], of a file that is open.
///
/// # Errors
/// The system's.
pub fn read_small_file(file: &mut File) -> io::Result<Vec<u8>> {
    let mut text = vec![0; AT_ONCE];
    let length = file.read(&mut text)?;
    text.truncate(length);
    // A plain file gives all it has, up to what was asked for.
    if length == AT_ONCE {
        file.read_to_end(&mut text)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_files_come_whole() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("file");
        for length in [0, 1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 5000] {
            std::fs::write(&path, vec![b'x'; length]).expect("written");
            assert_eq!(read_small(&path).expect("read").len(), length);
        }
        assert!(read_small(&dir.path().join("missing")).is_err());
    }
}
