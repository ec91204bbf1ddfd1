//! `subPath` of a volume mount: a file or folder inside the volume, and never outside of it.

use std::path::{Path, PathBuf};

/// The place inside the volume; a folder is made if nothing is there. Symbolic links count, so that one that leads
/// out of the volume is refused.
///
/// # Errors
/// The path leaves the volume or cannot be made; the text is for the container's waiting message.
pub(crate) fn resolve(volume: &Path, path: &str) -> Result<PathBuf, String> {
    let relative = Path::new(path);
    if relative.is_absolute() || relative.components().any(|part| part.as_os_str() == "..") {
        return Err(format!("subPath \"{path}\" must be a relative path inside the volume"));
    }
    let failed = |error: std::io::Error| format!("failed to prepare subPath \"{path}\": {error}");
    let root = volume.canonicalize().map_err(failed)?;
    // Part by part, so that nothing is created behind a link that leads away.
    let mut place = root.clone();
    for part in relative.components() {
        place.push(part);
        if std::fs::symlink_metadata(&place).is_err() {
            std::fs::create_dir(&place).map_err(failed)?;
        }
        place = place.canonicalize().map_err(failed)?;
        if !place.starts_with(&root) {
            return Err(format!("subPath \"{path}\" leads outside the volume"));
        }
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_made_and_ways_out_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        let made = resolve(root, "a/b").expect("a folder");
        assert!(made.is_dir());
        std::os::unix::fs::symlink("/etc", root.join("out")).expect("a link");
        for path in ["../x", "/etc", "out", "out/x"] {
            assert!(resolve(root, path).is_err(), "{path}");
        }
        assert!(!Path::new("/etc/x").exists());
    }
}
