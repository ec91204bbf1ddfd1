//! Leaving a cluster: what the others know of this host is removed before the host forgets them.
//!
//! The one thing that must not stay is a vote in etcd. A member that is gone for good is counted all the same, and of two
//! members one alone decides nothing: the cluster would stand still for ever. So a control plane goes only when the others
//! have let it go, or when the operator says that there are none.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, bail};
use orch_client::Client;
use orch_store::EtcdConfig;
use orch_store::admin::{Admin, AdminError, Member};
use tokio::time::Instant;

use super::config::Config;
use super::host::Host;
use super::init;
use crate::kube::wire;
use crate::{output, progress};

/// How long the API may take to forget this host. A trace that stays there does no harm.
const API_LIMIT: Duration = Duration::from_secs(10);
/// One call to etcd.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Between two tries.
const RETRY: Duration = Duration::from_millis(500);

/// Takes this host out of what the cluster knows. etcd gets `limit` for it: it may be electing a leader, or waiting for
/// another member.
///
/// # Errors
/// The others count this host's vote still, and `force` is not given.
pub(super) async fn run(
    host: &Host,
    config: &Config,
    limit: Duration,
    force: bool,
) -> anyhow::Result<()> {
    if !config.is_control_plane() {
        let step = progress::Step::new("leave the cluster");
        step.done(&format!("on a control plane, run: orchctl delete node {}", config.node.name));
        return Ok(());
    }
    // The API first: it may be this host's own, which ends when its member does.
    let known = tokio::time::timeout(API_LIMIT, api(host, config)).await;
    let known = match known.unwrap_or_else(|_| bail!("no answer")) {
        Ok(etcd) => etcd,
        Err(error) => {
            eprintln!("  ! the API was not told that {} leaves: {error:#}", config.node.name);
            Vec::new()
        }
    };
    match etcd(host, config, known, limit).await {
        Err(error) if force => {
            eprintln!("  ! {error:#}; --force: going on");
            Ok(())
        }
        outcome => outcome,
    }
}

/// Removes the Node and this host's addresses; returns where etcd is.
async fn api(host: &Host, config: &Config) -> anyhow::Result<Vec<String>> {
    let client = Client::from_kubeconfig(&host.paths.pki().join("admin.conf"))?;
    let known = init::read_cluster(&client).await?;
    let (own_url, own_etcd) = (config.own_url()?, config.own_etcd()?);
    // The last one leaves nobody behind who would read it.
    if known.etcd.iter().any(|url| *url != own_etcd) {
        let path = format!("/api/v1/nodes/{}", config.node.name);
        if wire::get_opt(&client, &path).await?.is_some() {
            wire::send(&client, http::Method::DELETE, &path, wire::JSON, &serde_json::json!({}))
                .await?;
        }
        init::change_cluster(&client, |known| {
            known.servers.retain(|url| *url != own_url);
            known.etcd.retain(|url| *url != own_etcd);
        })
        .await?;
    }
    Ok(known.etcd)
}

/// Removes this host's member of etcd, through another one where there is one.
async fn etcd(
    host: &Host,
    config: &Config,
    known: Vec<String>,
    limit: Duration,
) -> anyhow::Result<()> {
    let mut step = progress::Step::new("leave etcd");
    let own_etcd = config.own_etcd()?;
    let peer = format!("https://{}:{}", config.address()?, orch_config::ETCD_PEER_PORT);
    let mut others = known;
    others.extend(config.cluster.etcd.iter().cloned());
    // Where there is a server, there is an etcd.
    let servers = orch_client::read_servers(&host.paths.pki().join("admin.conf"));
    others.extend(servers.unwrap_or_default().iter().filter_map(|url| etcd_beside(url)));
    let deadline = Instant::now() + limit;
    loop {
        // The own one tells of members that nobody wrote down, and of them only: it may be cut off from them.
        if let Ok(members) = ask(host, &own_etcd).await {
            if members.len() == 1 {
                step.done("it ends with this host");
                return Ok(());
            }
            others.extend(members.into_iter().flat_map(|member| member.client_urls));
        }
        others.sort();
        others.dedup();
        others.retain(|url| *url != own_etcd);
        if others.is_empty() {
            step.done("it ends with this host");
            return Ok(());
        }
        let mut why = String::new();
        for url in &others {
            match remove(host, url, &peer).await {
                Ok(left) => {
                    step.done(&format!("{left} members are left"));
                    return Ok(());
                }
                Err(error) => why = format!("{url}: {error:#}"),
            }
        }
        if Instant::now() > deadline {
            step.failed();
            return Err(output::hinted(
                "start the other control planes, or one more than half of them, and run this again; if they are gone for good, \
                 --force goes on without them",
                format!("the other control planes still count this host's vote in etcd: {why}"),
            ));
        }
        step.waiting(&why);
        tokio::time::sleep(RETRY).await;
    }
}

/// Client URL of the etcd on the host of a server.
fn etcd_beside(server: &str) -> Option<String> {
    let (host, _) = server.strip_prefix("https://")?.rsplit_once(':')?;
    Some(format!("https://{host}:{}", orch_config::ETCD_CLIENT_PORT))
}

async fn connect(host: &Host, url: &str) -> anyhow::Result<Admin> {
    let pki = host.paths.pki();
    let read =
        |name: &str| fs::read_to_string(pki.join(name)).with_context(|| format!("read {name}"));
    let config = EtcdConfig {
        endpoints: vec![url.to_owned()],
        ca_pem: Some(read("etcd-ca.crt")?),
        cert_pem: Some(read("etcd-client.crt")?),
        key_pem: Some(read("etcd-client.key")?),
    };
    Ok(Admin::connect(&config).await?)
}

async fn limited<T>(call: impl Future<Output = Result<T, AdminError>>) -> anyhow::Result<T> {
    match tokio::time::timeout(CALL_LIMIT, call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => bail!("no answer within {} s", CALL_LIMIT.as_secs()),
    }
}

async fn ask(host: &Host, url: &str) -> anyhow::Result<Vec<Member>> {
    limited(connect(host, url).await?.members()).await
}

/// Removes the member with this peer URL, as the etcd at `url` sees it; returns how many are left.
async fn remove(host: &Host, url: &str, peer: &str) -> anyhow::Result<usize> {
    let mut admin = connect(host, url).await?;
    let is_own = |member: &&Member| member.peer_urls.iter().any(|known| known == peer);
    let members = limited(admin.members()).await?;
    if let Some(own) = members.iter().find(is_own) {
        limited(admin.remove(own)).await?;
    }
    // Asked again: what counts is what they say afterwards.
    let left = limited(admin.members()).await?;
    if left.iter().any(|member| is_own(&member)) {
        bail!("it still names this host");
    }
    Ok(left.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcd_is_looked_for_beside_every_server() {
        assert_eq!(etcd_beside("https://10.0.0.1:7443").as_deref(), Some("https://10.0.0.1:2379"));
        assert_eq!(
            etcd_beside("https://[fd00::1]:6443").as_deref(),
            Some("https://[fd00::1]:2379")
        );
        assert_eq!(etcd_beside("10.0.0.1"), None);
    }
}
