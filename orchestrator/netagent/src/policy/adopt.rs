//! Pods that were attached without the plugin (policy was off, or the list was older), or by one whose maps had another
//! layout: the plugin is called for them as the runtime would have called it, with what the runtime remembers of their ADD.

use std::collections::BTreeSet;

use cni_invoke::{CachedAttachment, Cni, Delegate};
use cni_netlink::NetNs;
use cni_spec::{Env, Error};
use orch_config::Paths;
use orch_ebpf_loader::{Announcement, Hook, Kept, Maps, Pins, is_attached, retire_others};
use orch_policy::Name;
use serde_json::{Map, Value, json};
use tracing::{info, warn};

use super::{PLUGIN, connections, plugin_conf, state_dir};

/// Calls the plugin for those of the pods that came without it; gives what stays open. When nothing does, programs of
/// earlier builds go.
pub(super) fn adopt_all(paths: &Paths, wanted: &BTreeSet<Name>) -> Vec<String> {
    let found = match find(paths, |pod| wanted.contains(pod)) {
        Ok(found) => found,
        Err(why) => return vec![format!("pods without policy are not looked for: {why}")],
    };
    let mut open = Vec::new();
    let mut adopted = BTreeSet::new();
    for (pod, attachment) in found {
        match adopt(paths, &attachment) {
            Ok(()) => drop(adopted.insert(pod)),
            Err(error) => {
                warn!(%pod, %error, "no policy applies to a pod that was started without the policy plugin");
                open.push(format!("no policy applies to pod {pod}: {error}"));
            }
        }
    }
    if !adopted.is_empty() {
        info!(pods = list(&adopted), "pods that were started without policy have it now");
    }
    if open.is_empty() {
        match retire_others(&Pins::below(paths.root())) {
            Ok(true) => info!("policy programs of an earlier version are gone"),
            Ok(false) => {}
            Err(error) => open.push(format!("policy programs of an earlier version stay: {error}")),
        }
    }
    open
}

/// Attachments of pods that `is_wanted`, and that the plugin knows nothing of, has no row for, or has not put the programs
/// on: it may have been killed on the way.
///
/// # Errors
/// If the runtime's cache cannot be read.
fn find(
    paths: &Paths,
    is_wanted: impl Fn(&Name) -> bool,
) -> Result<Vec<(Name, CachedAttachment)>, String> {
    let pins = Pins::below(paths.root());
    let rows = Maps::open(&pins).and_then(|maps| maps.endpoints());
    let rows = rows.map_err(|error| crate::chain(&error))?;
    let has_programs = |ifindex| {
        let name = nix::net::if_::if_indextoname(ifindex).ok();
        name.as_ref().and_then(|name| name.to_str().ok()).is_some_and(|name| {
            [Hook::FromPod, Hook::ToPod]
                .iter()
                .all(|hook| is_attached(&pins, name, ifindex, *hook).unwrap_or_default())
        })
    };
    let is_judged = |made: &Announcement| {
        rows.iter().any(|(ifindex, row)| (*ifindex, row.uid) == (made.ifindex, made.uid))
            && has_programs(made.ifindex)
    };
    let cached = cni(paths).cached().map_err(|error| error.to_string())?;
    Ok(cached
        .into_iter()
        .filter_map(|one| Some((pod(&one)?, one)))
        .filter(|(pod, one)| {
            let kept = Kept::of(&state_dir(paths), one.network.as_ref());
            let id = &one.id;
            is_wanted(pod)
                && !kept
                    .read(id.container_id.as_ref(), id.ifname.as_str())
                    .is_some_and(|made| is_judged(&made))
                && NetNs::is_nsfs(&one.attachment.netns)
        })
        .collect())
}

/// The pod of an attachment, if it is one's.
fn pod(attachment: &CachedAttachment) -> Option<Name> {
    let get = |wanted: &str| {
        let args = &attachment.attachment.args;
        args.iter().find(|(key, _)| key == wanted).map(|(_, value)| value.as_str())
    };
    Some(Name::new(get("K8S_POD_NAMESPACE")?, get("K8S_POD_NAME")?))
}

pub(crate) fn cni(paths: &Paths) -> Cni {
    Cni {
        conf_dir: paths.cni_conf_dir(),
        bin_dirs: vec![paths.cni_bin_dir()],
        cache_dir: paths.cni_cache_dir(),
    }
}

/// Calls the plugin, and tells the programs what the pod has open. After a failure the pod is closed or as it was, and stays
/// among those that [`find`] gives until it is judged.
///
/// # Errors
/// The plugin's.
fn adopt(paths: &Paths, attachment: &CachedAttachment) -> Result<(), Error> {
    let id = &attachment.id;
    let args: Vec<String> =
        attachment.attachment.args.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let env = Env {
        container_id: id.container_id.to_string(),
        netns: attachment.attachment.netns.clone(),
        ifname: id.ifname.to_string(),
        args: args.join(";"),
        path: paths.cni_bin_dir().display().to_string(),
        ..Env::default()
    };
    Delegate::new(&env, &[]).add(PLUGIN, &conf(paths, attachment))?;
    let kept = Kept::of(&state_dir(paths), attachment.network.as_ref());
    let made = kept.read(id.container_id.as_ref(), id.ifname.as_str());
    if let (Some(made), Ok(mut maps)) = (made, Maps::open(&Pins::below(paths.root()))) {
        connections::take_over(&mut maps, &attachment.attachment.netns, &made);
    }
    Ok(())
}

fn conf(paths: &Paths, attachment: &CachedAttachment) -> Map<String, Value> {
    let result = attachment.result.clone().unwrap_or_default();
    let mut conf = match plugin_conf(paths) {
        Value::Object(conf) => conf,
        _ => Map::new(),
    };
    let version = result["cniVersion"].as_str().unwrap_or("1.0.0");
    conf.insert("cniVersion".to_owned(), json!(version));
    conf.insert("name".to_owned(), json!(attachment.network.to_string()));
    conf.insert("prevResult".to_owned(), result);
    conf.insert("running".to_owned(), json!(true));
    conf
}

/// Pods as the log has them.
fn list(pods: &BTreeSet<Name>) -> String {
    pods.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
