//! Files that change all at once (Kubernetes' atomic writer).
//!
//! A volume's folder holds `..data`, a link to a folder named after the time of the last change, and one link per
//! top-level name through `..data`. Swapping `..data` by a rename changes every file in one step.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Component, Path};

/// A file of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) data: Vec<u8>,
    pub(crate) mode: u32,
}

/// Files by relative path.
pub(crate) type Payload = BTreeMap<String, File>;

const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

/// Whether a path stays inside the volume and clear of the writer's own names.
pub(crate) fn is_safe(path: &str) -> bool {
    !path.is_empty()
        && !path.starts_with("..")
        && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Makes the folder hold exactly the payload. Returns whether anything changed. `group` owns the files, as a pod's
/// `fsGroup` wants it.
///
/// # Errors
/// The file system refuses, or a path leaves the volume.
pub(crate) fn write(folder: &Path, payload: &Payload, group: Option<u32>) -> io::Result<bool> {
    if let Some(path) = payload.keys().find(|path| !is_safe(path)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the path {path:?} leaves the volume"),
        ));
    }
    fs::create_dir_all(folder)?;
    let data = folder.join(DATA);
    if read(&data).is_ok_and(|old| old == *payload) {
        return Ok(false);
    }
    let old = fs::read_link(&data).ok();
    let stamp = format!("..{}", jiff::Timestamp::now().strftime("%Y_%m_%d_%H_%M_%S.%9f"));
    let fresh = folder.join(&stamp);
    fs::create_dir(&fresh)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
    for (path, file) in payload {
        let target = fresh.join(path);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&target, &file.data)?;
        fs::set_permissions(&target, fs::Permissions::from_mode(file.mode))?;
        if group.is_some() {
            std::os::unix::fs::chown(&target, None, group)?;
        }
    }
    let new_data = folder.join(NEW_DATA);
    remove_file(&new_data)?;
    symlink(&stamp, &new_data)?;
    fs::rename(&new_data, &data)?;
    let names: BTreeSet<&str> = payload.keys().filter_map(|path| path.split('/').next()).collect();
    for name in &names {
        let link = folder.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(name), &link)?;
        }
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("..") && !names.contains(name.as_str()) {
            remove_file(&entry.path())?;
        }
    }
    if let Some(old) = old {
        let _ = fs::remove_dir_all(folder.join(old));
    }
    Ok(true)
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn read(folder: &Path) -> io::Result<Payload> {
    let mut payload = Payload::new();
    let mut open = vec![(fs::canonicalize(folder)?, String::new())];
    while let Some((folder, prefix)) = open.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.file_type()?.is_dir() {
                open.push((entry.path(), format!("{name}/")));
            } else {
                let mode = entry.metadata()?.permissions().mode() & 0o7777;
                payload.insert(name, File { data: fs::read(entry.path())?, mode });
            }
        }
    }
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        let file = |text: &str| File { data: text.as_bytes().to_vec(), mode: 0o644 };
        files.iter().map(|(path, text)| ((*path).to_owned(), file(text))).collect()
    }

    #[test]
    fn files_change_together_and_what_is_gone_disappears() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path().join("v");
        let text = |name: &str| fs::read_to_string(folder.join(name)).ok();
        assert!(write(&folder, &payload(&[("a", "1"), ("sub/b", "2")]), None).expect("written"));
        assert_eq!((text("a").as_deref(), text("sub/b").as_deref()), (Some("1"), Some("2")));
        assert!(!write(&folder, &payload(&[("a", "1"), ("sub/b", "2")]), None).expect("written"));
        assert!(write(&folder, &payload(&[("a", "3"), ("c", "4")]), None).expect("written"));
        assert_eq!((text("a").as_deref(), text("c").as_deref()), (Some("3"), Some("4")));
        assert!(fs::symlink_metadata(folder.join("sub")).is_err());
        let folders = fs::read_dir(&folder).expect("a folder").count();
        assert_eq!(folders, 4, "..data, its folder and two links");
    }

    #[test]
    fn no_path_leaves_the_volume() {
        for path in ["", "..", "../x", "/x", "a/../../x", "..x"] {
            assert!(!is_safe(path), "{path}");
        }
        assert!(is_safe("a/b.c"));
    }
}
