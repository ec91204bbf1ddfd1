//! How a plugin is called: the `CNI_*` variables.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::{Error, code};

/// A verb of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// Attach a container.
    Add,
    /// Detach it.
    Del,
    /// Compare with what ADD answered.
    Check,
    /// Remove what belongs to no valid attachment.
    Gc,
    /// Say whether ADD could be served.
    Status,
    /// Say which versions are known.
    Version,
}

impl Command {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];

    /// As in `CNI_COMMAND`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Command {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|command| command.as_str() == text).ok_or_else(|| {
            Error::new(code::INVALID_ENVIRONMENT, format!("CNI_COMMAND: {text:?} is not a command"))
        })
    }
}

/// The variables as they are, before any check; an empty one counts as missing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Env {
    /// `CNI_COMMAND`.
    pub command: String,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`.
    pub netns: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_ARGS`.
    pub args: String,
    /// `CNI_PATH`.
    pub path: String,
    /// `CNI_NETNS_OVERRIDE`, an invention of the reference library: `TRUE` or `1` allows the plugin's own netns.
    pub netns_override: String,
}

impl Env {
    /// Reads the variables through `get`, so that tests need no real environment.
    #[must_use]
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| get(name).unwrap_or_default();
        Self {
            command: get("CNI_COMMAND"),
            container_id: get("CNI_CONTAINERID"),
            netns: get("CNI_NETNS"),
            ifname: get("CNI_IFNAME"),
            args: get("CNI_ARGS"),
            path: get("CNI_PATH"),
            netns_override: get("CNI_NETNS_OVERRIDE"),
        }
    }

    /// Name and value of each variable, for a child process. An empty value means: not set.
    #[must_use]
    pub fn variables(&self) -> [(&'static str, &str); 7] {
        [
            ("CNI_COMMAND", &self.command),
            ("CNI_CONTAINERID", &self.container_id),
            ("CNI_NETNS", &self.netns),
            ("CNI_IFNAME", &self.ifname),
            ("CNI_ARGS", &self.args),
            ("CNI_PATH", &self.path),
            ("CNI_NETNS_OVERRIDE", &self.netns_override),
        ]
    }

    /// The same call with another verb, as for a delegate.
    #[must_use]
    pub fn with_command(&self, command: Command) -> Self {
        Self { command: command.as_str().to_owned(), ..self.clone() }
    }

    /// The folders of `CNI_PATH`, in order.
    #[must_use]
    pub fn path_dirs(&self) -> Vec<PathBuf> {
        self.path.split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from).collect()
    }

    /// Whether the plugin's own netns is allowed as the container's.
    #[must_use]
    pub fn allows_own_netns(&self) -> bool {
        self.netns_override == "1" || self.netns_override.eq_ignore_ascii_case("true")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_read_back() {
        let env = Env {
            command: "ADD".into(),
            path: "/a::/b".into(),
            ifname: "eth0".into(),
            ..Env::default()
        };
        let read = Env::read(|name| {
            env.variables()
                .into_iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.to_owned())
        });
        assert_eq!(read, env);
        assert_eq!(env.path_dirs(), [PathBuf::from("/a"), PathBuf::from("/b")]);
    }

    #[test]
    fn commands_read_back_and_others_are_refused() {
        for command in Command::ALL {
            assert_eq!(command.as_str().parse::<Command>().expect("known"), command);
        }
        assert_eq!(
            "add".parse::<Command>().expect_err("case counts").code,
            code::INVALID_ENVIRONMENT
        );
    }
}
