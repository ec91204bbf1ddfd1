//! Finding configuration lists.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cni_spec::{ConfList, Error, NetworkName, PluginConf, code};
use serde_json::Value;

use crate::InvokeError;

/// Endings of configuration files, as the reference has them.
const ENDINGS: [&str; 3] = ["conf", "conflist", "json"];

/// The first usable list of a folder, by file name. A broken file does not hide a good one behind it.
pub(crate) fn first(dir: &Path) -> Result<ConfList, InvokeError> {
    let (lists, problems) = all(dir)?;
    let first = lists.into_iter().next();
    first.ok_or_else(|| InvokeError::NoConf { dir: dir.to_owned(), problems })
}

/// The list of a name.
pub(crate) fn named(dir: &Path, name: &NetworkName) -> Result<ConfList, InvokeError> {
    let (lists, _) = all(dir)?;
    let found = lists.into_iter().find(|list| list.name == *name);
    found.ok_or_else(|| InvokeError::NoNetwork { dir: dir.to_owned(), name: name.clone() })
}

/// All usable lists by file name, and what is wrong with the rest.
pub(crate) fn all(dir: &Path) -> Result<(Vec<ConfList>, Vec<String>), InvokeError> {
    let mut lists = Vec::new();
    let mut problems = Vec::new();
    for file in files(dir, &ENDINGS)? {
        match read(&file) {
            Ok(list) => lists.push(list),
            Err(problem) => problems.push(format!("{}: {problem}", file.display())),
        }
    }
    Ok((lists, problems))
}

/// Files with one of the endings, sorted. A folder that is missing has none.
fn files(dir: &Path, endings: &[&str]) -> Result<Vec<PathBuf>, InvokeError> {
    let failed = |error| InvokeError::Read { path: dir.to_owned(), error };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && ending.is_some_and(|ending| endings.contains(&ending)) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read(file: &Path) -> Result<ConfList, String> {
    let text = fs::read(file).map_err(|error| error.to_string())?;
    let mut list = ConfList::parse(&text).map_err(|error| error.to_string())?;
    if !list.only_inlined {
        let folder = file.parent().unwrap_or(Path::new("/")).join(list.name.as_str());
        for part in files(&folder, &["conf"]).map_err(|error| error.to_string())? {
            let plugin =
                read_plugin(&part).map_err(|error| format!("{}: {error}", part.display()))?;
            list.plugins.push(plugin);
        }
    }
    if list.plugins.is_empty() {
        return Err("the list names no plugin".to_owned());
    }
    Ok(list)
}

fn read_plugin(file: &Path) -> Result<PluginConf, Error> {
    let text = fs::read(file)?;
    let value: Value = serde_json::from_slice(&text)
        .map_err(|error| Error::new(code::DECODE, format!("decode: {error}")))?;
    PluginConf::from_value(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) {
        fs::create_dir_all(dir.join(name).parent().expect("parent")).expect("folder");
        fs::write(dir.join(name), text).expect("write");
    }

    #[test]
    fn the_first_good_file_counts_and_the_bad_ones_are_named() {
        let dir = tempfile::tempdir().expect("temporary folder");
        assert!(matches!(first(dir.path()), Err(InvokeError::NoConf { .. })));
        assert!(matches!(first(&dir.path().join("absent")), Err(InvokeError::NoConf { .. })));
        write(dir.path(), "05-bad.conflist", "{");
        write(dir.path(), "01-note.txt", "hello");
        let error = first(dir.path()).expect_err("only a bad one").to_string();
        assert!(error.contains("05-bad.conflist"), "{error}");
        write(dir.path(), "20-b.conflist", r#"{"name":"b","plugins":[{"type":"x"}]}"#);
        write(dir.path(), "10-a.conf", r#"{"name":"a","type":"x"}"#);
        assert_eq!(first(dir.path()).expect("found").name.as_str(), "a");
        let name: NetworkName = "b".parse().expect("name");
        assert_eq!(named(dir.path(), &name).expect("found").name, name);
        let absent = named(dir.path(), &"c".parse().expect("name"));
        assert!(matches!(absent, Err(InvokeError::NoNetwork { .. })));
    }

    #[test]
    fn plugins_of_the_folder_beside_are_appended_unless_the_list_says_no() {
        let dir = tempfile::tempdir().expect("temporary folder");
        write(dir.path(), "10-a.conflist", r#"{"name":"a","plugins":[{"type":"x"}]}"#);
        write(dir.path(), "a/20.conf", r#"{"type":"z"}"#);
        write(dir.path(), "a/10.conf", r#"{"type":"y"}"#);
        let types = || -> Vec<String> {
            first(dir.path()).expect("found").plugins.into_iter().map(|p| p.plugin).collect()
        };
        assert_eq!(types(), ["x", "y", "z"]);
        write(
            dir.path(),
            "10-a.conflist",
            r#"{"name":"a","loadOnlyInlinedPlugins":true,"plugins":[{"type":"x"}]}"#,
        );
        assert_eq!(types(), ["x"]);
    }
}
