//! What CNI plugins owe to their callers, row by row, asked of real executables against the real kernel.
//!
//! There is no official conformance suite for CNI (containernetworking/cni#540), so this is our own list: the points
//! that follow from the specification (`rows/spec.rs`, `rows/upkeep.rs`), each option of the reference's `bridge`,
//! `host-local` and `static` (`rows/bridge.rs`, `rows/host_local.rs`, `rows/static_ipam.rs`), input that is wrong (`rows/bad_input.rs`) and processes that are killed
//! (`rows/faults.rs`).
//!
//! `CNI_UNDER_TEST=FOLDER` points all of it at the plugins of that folder; without it, it is about ours. [`Bed`] is one
//! host with the plugins under test.

use std::fmt;
use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use cni_netlink::{Link, NetNs, Netlink, Route, RouteFilter};
use serde_json::{Value, json};
use tests_netns::{Answer, Pod, Testbed, spawn};

/// Names the folder with the plugins under test.
pub const UNDER_TEST: &str = "CNI_UNDER_TEST";
/// The subnet of [`Bed::conf`].
pub const SUBNET: &str = "10.88.0.0/24";

/// What a row says: nothing, or in what the plugin falls short.
pub type Result<T = ()> = anyhow::Result<T>;

/// The folder of somebody else's plugins, if it is them that are tested.
#[must_use]
pub fn foreign() -> Option<PathBuf> {
    std::env::var_os(UNDER_TEST).filter(|folder| !folder.is_empty()).map(PathBuf::from)
}

/// A host with the plugins under test.
pub struct Bed {
    testbed: Testbed,
    /// The newest version of the specification that `bridge` speaks.
    pub version: String,
}

impl Deref for Bed {
    type Target = Testbed;

    fn deref(&self) -> &Testbed {
        &self.testbed
    }
}

/// Everything a process said and how it ended.
pub struct Reply {
    /// Whether it exited with 0.
    pub ok: bool,
    /// What it wrote to stdout, byte by byte.
    pub stdout: Vec<u8>,
    /// What it said to people.
    pub stderr: String,
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stdout = String::from_utf8_lossy(&self.stdout);
        write!(f, "ok={} stdout={stdout:?} stderr={:?}", self.ok, self.stderr)
    }
}

impl Reply {
    /// The one document on stdout; `Null` if there is nothing.
    ///
    /// # Errors
    /// If stdout is anything else.
    pub fn document(&self) -> Result<Value> {
        if self.stdout.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&self.stdout)
            .with_context(|| format!("stdout is {:?}", String::from_utf8_lossy(&self.stdout)))
    }

    /// Code and message of a failure.
    ///
    /// # Errors
    /// If it is none, or not told as the specification wants it told.
    pub fn failure(&self) -> Result<(u64, String)> {
        let document = self.document()?;
        let code = document["code"].as_u64();
        let (false, Some(code)) = (self.ok, code) else {
            bail!("expected a failure: ok={} {document} {}", self.ok, self.stderr);
        };
        Ok((code, document["msg"].as_str().unwrap_or_default().to_owned()))
    }
}

impl Bed {
    /// A host with nothing but `lo`.
    ///
    /// # Errors
    /// Without root, or without plugins.
    pub fn new() -> Result<Self> {
        let testbed = match foreign() {
            Some(folder) => Testbed::with_plugins(&folder)?,
            None => Testbed::new()?,
        };
        let answer = testbed.call("bridge", "VERSION", &[], &json!({"cniVersion": "1.0.0"}))?;
        let supported = answer.success()?["supportedVersions"].clone();
        let newest = supported.as_array().and_then(|all| all.last()).and_then(Value::as_str);
        let version = newest.context("VERSION names no version")?.to_owned();
        Ok(Self { testbed, version })
    }

    /// Network `net`: bridge `cni0` as default gateway of `ranges`, in the newest version.
    #[must_use]
    pub fn conf(&self, ranges: &[&str]) -> Value {
        let mut conf = self.testbed.conf(ranges);
        conf["cniVersion"] = json!(self.version);
        conf
    }

    /// As [`conf`](Self::conf) of [`SUBNET`], with other keys.
    #[must_use]
    pub fn conf_with(&self, keys: Value) -> Value {
        let mut conf = self.conf(&[SUBNET]);
        merge(&mut conf, keys);
        conf
    }

    /// A plugin on its own, with exactly these variables.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn raw(&self, plugin: &str, variables: &[(&str, &str)], stdin: &[u8]) -> Result<Reply> {
        self.raw_under(&[], plugin, variables, stdin)
    }

    /// As [`raw`](Self::raw), as the argument of another program.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn raw_under(
        &self,
        observer: &[&str],
        plugin: &str,
        variables: &[(&str, &str)],
        stdin: &[u8],
    ) -> Result<Reply> {
        let path = self.plugins.join(plugin);
        let mut command = Command::new(observer.first().map_or(path.as_os_str(), AsRef::as_ref));
        if let [_, arguments @ ..] = observer {
            command.args(arguments).arg(&path);
        }
        command
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let output = self.host.run(|| -> Result<_> {
            let mut child = spawn(&mut command)?;
            // A plugin that fails before it has read all closes the pipe.
            let _ = child.stdin.take().context("stdin")?.write_all(stdin);
            Ok(child.wait_with_output()?)
        })?;
        Ok(Reply {
            ok: output.status.success(),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// The variables of a call about a pod's `eth0`.
    #[must_use]
    pub fn variables(&self, command: &str, pod: &Pod) -> Vec<(&'static str, String)> {
        vec![
            ("CNI_COMMAND", command.to_owned()),
            ("CNI_CONTAINERID", pod.id.clone()),
            ("CNI_NETNS", pod.path()),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_PATH", self.plugins.display().to_string()),
        ]
    }

    /// A call about a pod with `CNI_ARGS`.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn with_args(&self, command: &str, pod: &Pod, args: &str, conf: &Value) -> Result<Answer> {
        let mut variables = self.variables(command, pod);
        variables.push(("CNI_ARGS", args.to_owned()));
        let plugin = conf["type"].as_str().context("type")?;
        self.call(plugin, command, &borrowed(&variables), conf)
    }

    /// ADD that has to fail and to leave nothing of this pod; returns code and message.
    ///
    /// # Errors
    /// If it succeeds, or something is left.
    pub fn refused(&self, conf: &Value) -> Result<(u64, String)> {
        let pod = self.pod()?;
        let before = (self.veths()?.len(), self.leases()?.len());
        let failure = self.attachment("ADD", &pod, conf)?.failure()?;
        let after = (self.veths()?.len(), self.leases()?.len());
        ensure!(before == after, "left veths and leases {before:?} -> {after:?} after {failure:?}");
        ensure!(pod.eth0()?.is_none(), "left eth0 after {failure:?}");
        Ok(failure)
    }

    /// Nothing of any pod is on the host.
    ///
    /// # Errors
    /// Names what is.
    pub fn clean(&self) -> Result {
        let veths: Vec<String> = self.veths()?.into_iter().map(|link| link.name).collect();
        ensure!(veths.is_empty(), "veths left: {veths:?}");
        let leases = self.leases()?;
        ensure!(leases.is_empty(), "leases left: {leases:?}");
        Ok(())
    }

    /// The bridge `cni0`.
    ///
    /// # Errors
    /// If it is not there.
    pub fn bridge(&self) -> Result<Link> {
        self.netlink.link("cni0")?.context("there is no cni0")
    }

    /// The only port of `cni0`.
    ///
    /// # Errors
    /// If there is none, or several.
    pub fn port(&self) -> Result<Link> {
        let mut ports = self.veths()?;
        ensure!(ports.len() == 1, "ports: {ports:?}");
        Ok(ports.remove(0))
    }

    /// Folder of the leases of network `net`.
    #[must_use]
    pub fn lease_folder(&self) -> PathBuf {
        self.state.path().join("leases/net")
    }
}

/// For calls that take borrowed pairs.
#[must_use]
pub fn borrowed<'a>(variables: &'a [(&'static str, String)]) -> Vec<(&'a str, &'a str)> {
    variables.iter().map(|(name, value)| (*name, value.as_str())).collect()
}

/// Puts keys into an object; `null` takes one away, and objects are merged.
pub fn merge(into: &mut Value, keys: Value) {
    let (Some(object), Value::Object(keys)) = (into.as_object_mut(), keys) else { return };
    for (key, value) in keys {
        match value {
            Value::Null => drop(object.shift_remove(&key)),
            Value::Object(_) if object.get(&key).is_some_and(Value::is_object) => {
                merge(&mut object[&key], value);
            }
            value => drop(object.insert(key, value)),
        }
    }
}

/// A configuration with the result of its ADD.
#[must_use]
pub fn with_result(conf: &Value, result: &Value) -> Value {
    let mut conf = conf.clone();
    conf["prevResult"] = result.clone();
    conf
}

/// A file below `/proc/sys/net` of a namespace.
///
/// # Errors
/// If it is not there.
pub fn sysctl(netns: &NetNs, key: &str) -> Result<String> {
    let path = format!("/proc/sys/net/{key}");
    netns.run(|| {
        Ok(fs::read_to_string(&path).with_context(|| format!("read {path}"))?.trim().to_owned())
    })
}

/// The default routes of a namespace.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn default_routes(netns: &NetNs) -> Result<Vec<Route>> {
    let mut routes = Netlink::open_in(netns)?.routes(&RouteFilter::default())?;
    routes.retain(|route| route.dst.prefix() == 0);
    Ok(routes)
}

/// Addresses of a link.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn addresses(netlink: &Netlink, link: &Link) -> Result<Vec<String>> {
    Ok(netlink.addresses(link.index)?.iter().map(ToString::to_string).collect())
}

/// An address of a text.
///
/// # Errors
/// If it is none.
pub fn ip(text: &str) -> Result<IpAddr> {
    Ok(text.parse()?)
}
