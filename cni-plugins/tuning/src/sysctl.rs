//! Switches below `/proc/sys/net`, of the namespace that the thread is in.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cni_spec::{Error, code};
use regex_lite::Regex;

const ROOT: &str = "/proc/sys";
/// Stands for the interface in a name.
const IFNAME: &str = "IFNAME";
/// Names that may be set, one regular expression a line; without the file all may.
const ALLOWLIST: &str = "/etc/cni/tuning/allowlist.conf";

/// A switch and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sysctl {
    /// As it is written in the configuration.
    pub(crate) key: String,
    pub(crate) path: PathBuf,
    pub(crate) value: String,
}

/// A switch that was set, and what it was before.
#[derive(Debug)]
pub(crate) struct Set {
    path: PathBuf,
    before: Vec<u8>,
}

/// Pure.
pub(crate) fn parse(key: &str, value: String, ifname: &str) -> Result<Sysctl, Error> {
    // The interface comes last: there may be a dot in its name.
    let relative = key.replace('.', "/").replacen(IFNAME, ifname, 1);
    let parts = || relative.split('/');
    if parts().next() != Some("net") || parts().count() < 2 || parts().any(is_no_name) {
        let msg = format!("\"sysctl\" has \"{key}\", and only those below \"net.\" can be set");
        return Err(Error::new(code::INVALID_CONFIG, msg));
    }
    Ok(Sysctl { key: key.to_owned(), path: Path::new(ROOT).join(&relative), value })
}

/// Pure. Two names of one switch may not say different things: which of them would count is nobody's intention.
pub(crate) fn parse_all(
    values: &BTreeMap<String, String>,
    ifname: &str,
) -> Result<Vec<Sysctl>, Error> {
    let mut parsed: Vec<Sysctl> = Vec::new();
    for (key, value) in values {
        let next = parse(key, value.clone(), ifname)?;
        match parsed.iter().find(|sysctl| sysctl.path == next.path) {
            None => parsed.push(next),
            Some(same) if same.value == next.value => {}
            Some(Sysctl { key: other, value: first, .. }) => {
                let msg = format!(
                    "\"sysctl\" has \"{other}\" and \"{key}\", which are one switch, as \"{first}\" and \"{value}\""
                );
                return Err(Error::new(code::INVALID_CONFIG, msg));
            }
        }
    }
    Ok(parsed)
}

/// Pure. Those of all containers, with this container's own in their places.
pub(crate) fn overridden(all: Vec<Sysctl>, own: Vec<Sysctl>) -> Vec<Sysctl> {
    let others = all.into_iter().filter(|sysctl| own.iter().all(|one| one.path != sysctl.path));
    let mut sysctls: Vec<Sysctl> = others.chain(own.iter().cloned()).collect();
    sysctls.sort_by(|a, b| a.key.cmp(&b.key));
    sysctls
}

fn is_no_name(part: &str) -> bool {
    matches!(part, "" | "." | "..") || part.contains('\0')
}

/// Refuses what the administrator of this host does not allow.
pub(crate) fn allow(sysctls: &[Sysctl]) -> Result<(), Error> {
    if sysctls.is_empty() {
        return Ok(());
    }
    match fs::read_to_string(ALLOWLIST) {
        Ok(text) => allow_by(&text, sysctls),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::from_chain(code::IO, &error).context(format!("read {ALLOWLIST}"))),
    }
}

/// Pure.
fn allow_by(text: &str, sysctls: &[Sysctl]) -> Result<(), Error> {
    let mut patterns = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        patterns.push(Regex::new(line).map_err(|error| {
            Error::from_chain(code::INVALID_CONFIG, &error)
                .context(format!("{ALLOWLIST} has \"{line}\""))
        })?);
    }
    let refused = |sysctl: &&Sysctl| !patterns.iter().any(|pattern| pattern.is_match(&sysctl.key));
    match sysctls.iter().find(refused) {
        None => Ok(()),
        Some(Sysctl { key, .. }) => {
            let msg = format!("\"sysctl\" has \"{key}\", which {ALLOWLIST} does not allow");
            Err(Error::new(code::INVALID_CONFIG, msg))
        }
    }
}

/// Sets them in order; `done` says which and what they were before, whatever the outcome.
pub(crate) fn set(sysctls: &[Sysctl], done: &mut Vec<Set>) -> Result<(), Error> {
    for Sysctl { path, value, .. } in sysctls {
        let failed = |verb: &str, error: &io::Error| {
            Error::from_chain(code::IO, error).context(format!("{verb} {}", path.display()))
        };
        let before = match cni_skel::read_small(path) {
            Ok(before) => Some(before),
            // Some can only be written.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
            Err(error) => return Err(failed("read", &error)),
        };
        fs::write(path, value).map_err(|error| failed(&format!("write {value} to"), &error))?;
        done.extend(before.map(|before| Set { path: path.clone(), before }));
    }
    Ok(())
}

/// Puts them back, the last one first.
pub(crate) fn restore(set: &[Set]) -> Result<(), Error> {
    let mut failures = Vec::new();
    for Set { path, before } in set.iter().rev() {
        if let Err(error) = fs::write(path, before) {
            let doing = format!("restore {}", path.display());
            failures.push(Error::from_chain(code::IO, &error).context(doing));
        }
    }
    Error::join(failures).map_or(Ok(()), Err)
}

/// What is set otherwise now, for people.
pub(crate) fn differences(sysctls: &[Sysctl]) -> Result<Vec<String>, Error> {
    let mut differences = Vec::new();
    for Sysctl { path, value, .. } in sysctls {
        match cni_skel::read_small(path) {
            Ok(now) => {
                let now = String::from_utf8_lossy(&now).into_owned();
                // The kernel parts the numbers of a list by tabs.
                if !now.split_whitespace().eq(value.split_whitespace()) {
                    differences.push(format!(
                        "{} is {} and not {value}",
                        path.display(),
                        now.trim()
                    ));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => differences.push(format!("{}: {error}", path.display())),
        }
    }
    Ok(differences)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_below_net_and_the_interface_may_have_a_dot() {
        let path = |key| parse(key, "1".to_owned(), "eth0.5").map(|sysctl| sysctl.path);
        assert_eq!(
            path("net.ipv4.conf.IFNAME.forwarding").expect("good"),
            Path::new("/proc/sys/net/ipv4/conf/eth0.5/forwarding")
        );
        assert_eq!(
            path("net/core/somaxconn").expect("good"),
            Path::new("/proc/sys/net/core/somaxconn")
        );
        for wrong in
            ["", "net", "net.", "kernel.panic", "net/../kernel/panic", "net..core", "/net/a"]
        {
            assert_eq!(path(wrong).expect_err("outside").code, code::INVALID_CONFIG, "{wrong}");
        }
    }

    #[test]
    fn a_list_allows_what_one_of_its_lines_matches() {
        let one = |key: &str| [parse(key, "1".to_owned(), "eth0").expect("good")];
        let list = "^net\\.core\\.somaxconn$\n\n  ^net\\.ipv4\\.conf\\.IFNAME\\.[a-z_]*$  \n";
        assert!(allow_by(list, &one("net.core.somaxconn")).is_ok());
        assert!(allow_by(list, &one("net.ipv4.conf.IFNAME.arp_filter")).is_ok());
        let error = allow_by(list, &one("net.core.somaxconn2")).expect_err("not allowed");
        assert!(error.msg.contains("net.core.somaxconn2") && error.code == 7, "{error}");
        assert!(allow_by("", &one("net.core.somaxconn")).is_err());
        assert!(
            allow_by("(", &one("net.core.somaxconn"))
                .expect_err("no pattern")
                .msg
                .contains("\"(\"")
        );
    }
}
