//! Where the API servers and etcd's members are: learned while the daemon runs, and kept for its next start.
//!
//! A worker that joined when there was one control plane has to find the others when that one dies. The endpoints of
//! `default/kubernetes` tell the servers that live now; where etcd is stands in the ConfigMap that `orchctl` keeps. A server
//! that is not among the living stays known, behind them: it may be the only one that is left tomorrow.

use std::path::{Path, PathBuf};
use std::time::Duration;

use orch_api::k8s_openapi::api::core::v1::ConfigMap;
use orch_api::k8s_openapi::api::discovery::v1::EndpointSlice;
use orch_client::{Api, Client, ListParams};
use orch_reconcile::{Informer, Informers};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Servers that are remembered. More than any cluster has; hosts that left long ago fall out first.
const SERVERS_AT_MOST: usize = 9;
/// When the ConfigMap is read again although no server came or went: it is written some time after that. First, and at most.
const LOOK: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// The ConfigMap in `kube-system`, and its entry with etcd's client URLs.
const CONFIG_MAP: (&str, &str) = ("orch-cluster", "etcd");

/// Follows the members until cancelled.
pub(crate) struct Follower {
    pub(crate) client: Client,
    /// The kubeconfig that is to name all servers.
    pub(crate) kubeconfig: PathBuf,
    /// Where etcd is, for those who have no etcd of their own, and the file in which that is kept.
    pub(crate) etcd: Option<(watch::Sender<Vec<String>>, PathBuf)>,
}

impl Follower {
    pub(crate) async fn run(self, stop: CancellationToken) {
        let params = ListParams {
            label_selector: Some("kubernetes.io/service-name=kubernetes".to_owned()),
            ..ListParams::default()
        };
        let informers = Informers::new(self.client.clone(), stop.clone());
        let slices = informers.selected::<EndpointSlice>(&params);
        let mut changed = slices.changed();
        let work = async {
            slices.synced().await;
            let mut pause = LOOK.0;
            loop {
                changed.mark_unchanged();
                self.learn_servers(&slices);
                self.learn_etcd().await;
                match tokio::time::timeout(pause, changed.changed()).await {
                    Ok(Ok(())) => pause = LOOK.0,
                    Ok(Err(_)) => return,
                    Err(_) => pause = (pause * 2).min(LOOK.1),
                }
            }
        };
        stop.run_until_cancelled(work).await;
        // A daemon ends when one of its parts does.
        stop.cancelled().await;
    }

    fn learn_servers(&self, slices: &Informer<EndpointSlice>) {
        let living: Vec<String> =
            slices.list_in("default").iter().flat_map(|slice| urls(slice)).collect();
        let kept = match orch_client::read_servers(&self.kubeconfig) {
            Ok(kept) => kept,
            Err(error) => return warn!(%error, "the servers are not kept for the next start"),
        };
        let all = merged(&living, &kept);
        if all == kept || living.is_empty() {
            return;
        }
        info!(servers = all.join(","), living = living.len(), "the cluster's servers");
        if let Err(error) = self.client.set_servers(&all) {
            warn!(%error, "the cluster's servers");
        }
        if let Err(error) = orch_client::write_servers(&self.kubeconfig, &all) {
            warn!(%error, "the servers are not kept for the next start");
        }
    }

    async fn learn_etcd(&self) {
        let Some((known, file)) = &self.etcd else { return };
        let api = Api::<ConfigMap>::namespaced(self.client.clone(), "kube-system");
        let found = match api.get_opt(CONFIG_MAP.0).await {
            Ok(found) => found.and_then(|found| found.data).unwrap_or_default(),
            Err(error) => return debug!(%error, "where etcd is was not read"),
        };
        let urls = split(found.get(CONFIG_MAP.1).map_or("", String::as_str));
        if urls.is_empty() || *known.borrow() == urls {
            return;
        }
        info!(etcd = urls.join(","), "etcd's members");
        if let Err(error) = keep_etcd(file, &urls) {
            warn!(file = %file.display(), %error, "etcd's members are not kept for the next start");
        }
        known.send_replace(urls);
    }
}

/// etcd's members as they were kept, and those that the command line names.
pub(crate) fn known_etcd(file: &Path, flags: &[String]) -> Vec<String> {
    let mut all = split(&std::fs::read_to_string(file).unwrap_or_default());
    all.extend(flags.iter().filter(|url| !all.contains(url)).cloned().collect::<Vec<_>>());
    all
}

fn keep_etcd(file: &Path, urls: &[String]) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let fresh = file.with_extension("new");
    std::fs::write(&fresh, urls.join(",") + "\n")?;
    std::fs::rename(&fresh, file)
}

fn split(text: &str) -> Vec<String> {
    let urls = text.split(',').map(str::trim);
    urls.filter(|url| url.starts_with("https://") || url.starts_with("http://"))
        .map(str::to_owned)
        .collect()
}

fn urls(slice: &EndpointSlice) -> Vec<String> {
    let ports = slice.ports.iter().flatten().filter_map(|port| port.port);
    ports
        .flat_map(|port| {
            let addresses = slice.endpoints.iter().flatten().flat_map(|one| &one.addresses);
            addresses.map(move |address| match address.contains(':') {
                true => format!("https://[{address}]:{port}"),
                false => format!("https://{address}:{port}"),
            })
        })
        .collect()
}

/// Pure: the living in the order in which they were known, new ones behind, the others last.
fn merged(living: &[String], known: &[String]) -> Vec<String> {
    let mut all: Vec<String> = known.iter().filter(|url| living.contains(url)).cloned().collect();
    for url in living.iter().chain(known) {
        if !all.contains(url) {
            all.push(url.clone());
        }
    }
    all.truncate(SERVERS_AT_MOST);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_living_come_first_and_nobody_is_forgotten() {
        assert_eq!(merged(&list(&["a", "b"]), &list(&["a"])), ["a", "b"]);
        assert_eq!(merged(&list(&["b", "c"]), &list(&["a", "b"])), ["b", "c", "a"]);
        assert_eq!(merged(&list(&["a", "b", "c"]), &list(&["b", "c", "a"])), ["b", "c", "a"]);
        let many: Vec<String> = (0..20).map(|n| n.to_string()).collect();
        let all = merged(&list(&["x"]), &many);
        assert_eq!((all.len(), all[0].as_str()), (SERVERS_AT_MOST, "x"));
    }

    #[test]
    fn members_of_etcd_are_kept_and_the_command_lines_stay_among_them() {
        let folder = std::env::temp_dir().join(format!("orch-members-{}", std::process::id()));
        let file = folder.join("etcd-members");
        assert_eq!(known_etcd(&file, &list(&["https://a:2379"])), ["https://a:2379"]);
        keep_etcd(&file, &list(&["https://b:2379", "https://c:2379"])).expect("kept");
        let known = known_etcd(&file, &list(&["https://a:2379", "https://c:2379"]));
        assert_eq!(known, ["https://b:2379", "https://c:2379", "https://a:2379"]);
        std::fs::write(&file, "garbage\n").expect("write");
        assert_eq!(known_etcd(&file, &list(&["https://a:2379"])), ["https://a:2379"]);
        std::fs::remove_dir_all(folder).expect("clean up");
    }
}
