//! Certificates for nodes: approves what a node may ask for, and signs what was approved.
//!
//! A new node comes with a bootstrap token and gets the client certificate of `system:node:NAME`; with that it gets its
//! serving certificate and one for etcd. Whatever else is asked for waits for a person (`kubectl certificate approve`).
//!
//! A token is known to more people than a node's key, and is good for many hosts unless it was made for one
//! ([`bootstrap_token`]). So it never gives away a name that a Node has: whoever replays it
//! cannot become a node that is there, not even while that node reboots. Upstream approves by group alone.
//! Signers: Kubernetes, "Certificate Signing Requests"; `orch.dev/etcd-client` is ours.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition,
};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use orch_api::bootstrap_token::USER_PREFIX;
use orch_client::DeleteParams;
use orch_pki::{Asked, Authority, ETCD_NETWORK_USER, Identity, KUBELET_CLIENT_USER, Usage};
use orch_reconcile::{Action, Informer, Queue, Reconciler};
use tracing::{info, warn};

use crate::bootstrap_token::{self, Token};
use crate::context::{Context, name, uid};
use crate::error::{Failure, Step as _, gone_is_fine};

/// Client certificates of nodes.
const NODE_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// Serving certificates of nodes.
const NODE_SERVING: &str = "kubernetes.io/kubelet-serving";
/// Client certificates of anybody, for a person to approve.
const CLIENT: &str = "kubernetes.io/kube-apiserver-client";
/// Client certificates of network agents at etcd.
const ETCD_CLIENT: &str = "orch.dev/etcd-client";

const NODE_PREFIX: &str = "system:node:";
const NODES: &str = "system:nodes";
const BOOTSTRAPPERS: &str = "system:bootstrappers";
/// A finished request is kept this long, for people to look at.
const KEEP: Duration = Duration::from_secs(3600);

/// The authorities that sign.
#[derive(Clone)]
pub struct Signers {
    /// The cluster's.
    pub cluster: Arc<Authority>,
    /// etcd's.
    pub etcd: Arc<Authority>,
}

impl std::fmt::Debug for Signers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signers")
    }
}

pub(crate) struct Certificates {
    cx: Arc<Context>,
    signers: Signers,
    requests: Informer<CertificateSigningRequest>,
}

/// What happens to a request that nobody decided about yet.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Approve,
    Deny(String),
    /// A person decides.
    Leave,
}

/// A request as it is to be stored next.
struct Next {
    object: CertificateSigningRequest,
    /// The token that has to be used up before, if it is good for one host.
    uses_up: Option<Token>,
}

impl From<CertificateSigningRequest> for Next {
    fn from(object: CertificateSigningRequest) -> Self {
        Self { object, uses_up: None }
    }
}

/// What became of the token that a requester came with.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Came {
    /// With something else.
    WithoutToken,
    With(Token),
    /// Its token was deleted since.
    WithDeletedToken,
}

/// Who asks.
struct Requester<'a> {
    user: &'a str,
    groups: &'a [String],
    came: &'a Came,
    /// UID of the request.
    request: &'a str,
}

impl Requester<'_> {
    fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|mine| mine == group)
    }

    /// The name of the node that asks.
    fn node(&self) -> Option<&str> {
        self.is_in(NODES).then(|| self.user.strip_prefix(NODE_PREFIX)).flatten()
    }
}

/// What is known about the cluster's hosts.
#[derive(Default)]
struct Hosts {
    /// Names of all nodes, somebody holds their certificates already; and whether each is Ready.
    nodes: BTreeMap<String, bool>,
    /// Addresses and the node that has each; without name for control planes that are no nodes.
    addresses: Vec<(IpAddr, Option<String>)>,
}

/// The identity that a signer certifies, or why the request does not fit the signer.
fn identity(signer: &str, usages: &[String], asked: &Asked) -> Result<Identity, String> {
    if asked.has_more {
        return Err("it asks for names or extensions that this signer does not certify".to_owned());
    }
    let usage = match signer {
        NODE_SERVING => Usage::Server,
        _ => Usage::Client,
    };
    let (needed, other) = match usage {
        Usage::Server => ("server auth", "client auth"),
        _ => ("client auth", "server auth"),
    };
    if !usages.iter().any(|usage| usage == needed) || usages.iter().any(|usage| usage == other) {
        return Err(format!("its usages have to have {needed:?} and not {other:?}"));
    }
    let known = ["digital signature", "key encipherment", needed];
    if let Some(unknown) = usages.iter().find(|usage| !known.contains(&usage.as_str())) {
        return Err(format!("usage {unknown:?} is none that this signer certifies"));
    }
    let is_node = asked.user.len() > NODE_PREFIX.len()
        && asked.user.starts_with(NODE_PREFIX)
        && asked.groups == [NODES];
    let has_names = !asked.dns_names.is_empty() || !asked.addresses.is_empty();
    match signer {
        NODE_CLIENT | NODE_SERVING if !is_node => {
            return Err(format!("its subject has to be O={NODES}, CN={NODE_PREFIX}NAME"));
        }
        ETCD_CLIENT if asked.user != ETCD_NETWORK_USER || !asked.groups.is_empty() => {
            return Err(format!("its subject has to be CN={ETCD_NETWORK_USER}"));
        }
        CLIENT if asked.groups.iter().any(|group| group == "system:masters") => {
            return Err("no certificate is given out for system:masters".to_owned());
        }
        CLIENT if asked.user == KUBELET_CLIENT_USER => {
            return Err(format!("{KUBELET_CLIENT_USER} is the API server's own name"));
        }
        CLIENT if asked.groups.len() > 1 => {
            return Err("more than one organisation is not supported".to_owned());
        }
        NODE_SERVING if !has_names => return Err("it names no address".to_owned()),
        NODE_CLIENT | ETCD_CLIENT | CLIENT if has_names => {
            return Err("a client certificate has no alternative names".to_owned());
        }
        _ => {}
    }
    Ok(Identity {
        user: asked.user.clone(),
        group: asked.groups.first().cloned(),
        dns_names: asked.dns_names.clone(),
        addresses: asked.addresses.clone(),
        usage,
    })
}

/// Pure: whether the requester may have it. The request fits its signer.
fn decide(signer: &str, requester: &Requester<'_>, asked: &Asked, hosts: &Hosts) -> Verdict {
    let node = asked.user.strip_prefix(NODE_PREFIX).unwrap_or_default();
    match signer {
        NODE_CLIENT if requester.node() == Some(node) => Verdict::Approve,
        NODE_CLIENT if requester.is_in(BOOTSTRAPPERS) => newcomer(node, requester, hosts),
        NODE_CLIENT => {
            Verdict::Deny("only a node itself, or a bootstrap token, may ask".to_owned())
        }
        NODE_SERVING => {
            if requester.node() != Some(node) {
                return Verdict::Deny("only the node itself may ask".to_owned());
            }
            if let Some(foreign) = asked.dns_names.iter().find(|name| *name != node) {
                return Verdict::Deny(format!("{foreign} is not the node's name"));
            }
            for address in &asked.addresses {
                if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
                    return Verdict::Deny(format!("{address} is no host's address"));
                }
                let mut owners = hosts.addresses.iter().filter(|(taken, _)| taken == address);
                let mine = owners.clone().any(|(_, owner)| owner.as_deref() == Some(node));
                if !mine && owners.next().is_some() {
                    return Verdict::Deny(format!("{address} is another host's address"));
                }
            }
            Verdict::Approve
        }
        ETCD_CLIENT if requester.node().is_some() => Verdict::Approve,
        ETCD_CLIENT => Verdict::Deny("only nodes may ask".to_owned()),
        _ => Verdict::Leave,
    }
}

/// Pure: whether who came with a bootstrap token may become `node`.
fn newcomer(node: &str, requester: &Requester<'_>, hosts: &Hosts) -> Verdict {
    let token = match requester.came {
        Came::With(token) => Some(token),
        Came::WithoutToken => None,
        Came::WithDeletedToken => {
            return Verdict::Deny(
                "the token has ended: make one with `orchctl token create`".to_owned(),
            );
        }
    };
    if let Some(other) = token.and_then(|token| token.node.as_deref()).filter(|own| *own != node) {
        return Verdict::Deny(format!("the token is good for node {other} only"));
    }
    if token.and_then(|token| token.used_by.as_deref()).is_some_and(|by| by != requester.request) {
        return Verdict::Deny(
            "the token was good for one host, and one has joined with it: make another with `orchctl token create`"
                .to_owned(),
        );
    }
    match hosts.nodes.get(node) {
        Some(true) => Verdict::Deny(format!(
            "node {node} is alive: reset it and delete its Node object before another host takes its name"
        )),
        Some(false) if token.is_none_or(|token| token.node.is_none()) => Verdict::Deny(format!(
            "there is a node {node}: if its host is gone for good, `orchctl delete node {node}` frees the name; if this host \
             is that node, join with a token made for it by `orchctl token create --node {node}`"
        )),
        Some(false) | None => Verdict::Approve,
    }
}

impl Certificates {
    pub(crate) fn new(cx: Arc<Context>, signers: Signers) -> (Arc<Self>, Arc<Queue<String>>) {
        let queue = Arc::new(Queue::new());
        let requests: Informer<CertificateSigningRequest> = cx.informers.of();
        let changed = queue.clone();
        requests.on_change(move |change| {
            if let Some(found) = change.object() {
                changed.add(name(&found.metadata).to_owned());
            }
        });
        (Arc::new(Self { cx, signers, requests }), queue)
    }

    pub(crate) async fn synced(&self) {
        self.requests.synced().await;
    }

    fn hosts(&self) -> Hosts {
        let mut hosts = Hosts::default();
        for node in self.cx.nodes.list() {
            let own = name(&node.metadata).to_owned();
            hosts.nodes.insert(own.clone(), is_ready(&node));
            let addresses = node
                .status
                .as_ref()
                .and_then(|status| status.addresses.as_deref())
                .unwrap_or_default();
            hosts.addresses.extend(addresses.iter().filter_map(|address| {
                Some((address.address.parse::<IpAddr>().ok()?, Some(own.clone())))
            }));
        }
        if let Some(servers) = self.cx.endpoints.get("default", "kubernetes") {
            let subsets = servers.subsets.as_deref().unwrap_or_default();
            let addresses =
                subsets.iter().filter_map(|subset| subset.addresses.as_deref()).flatten();
            hosts.addresses.extend(
                addresses.filter_map(|address| Some((address.ip.parse::<IpAddr>().ok()?, None))),
            );
        }
        hosts
    }

    /// With which token the sender of an undecided request came, if with one.
    async fn came(&self, found: &CertificateSigningRequest) -> Result<Came, Failure> {
        let user = found.spec.username.as_deref().unwrap_or_default();
        let id = user.strip_prefix(USER_PREFIX);
        let Some(id) = id.filter(|_| conditions(found).is_empty()) else {
            return Ok(Came::WithoutToken);
        };
        Ok(bootstrap_token::find(&self.cx, id).await?.map_or(Came::WithDeletedToken, Came::With))
    }

    /// The request as it is to be stored next; `None` when there is nothing to do.
    fn advance(&self, found: &CertificateSigningRequest, came: &Came) -> Option<Next> {
        let has = |kind: &str| conditions(found).iter().any(|one| one.type_ == kind);
        let status = found.status.as_ref();
        let issued = status.and_then(|status| status.certificate.as_ref()).is_some();
        let signer = found.spec.signer_name.as_str();
        if issued
            || has("Denied")
            || has("Failed")
            || ![NODE_CLIENT, NODE_SERVING, CLIENT, ETCD_CLIENT].contains(&signer)
        {
            return None;
        }
        let approved = has("Approved");
        let pem = String::from_utf8_lossy(&found.spec.request.0);
        let usages = found.spec.usages.as_deref().unwrap_or_default();
        let fitting = orch_pki::read_request(&pem)
            .map_err(|error| format!("it cannot be read: {:#}", chain(&error)))
            .and_then(|asked| Ok((identity(signer, usages, &asked)?, asked)));
        let mut next = found.clone();
        let (identity, asked) = match fitting {
            Ok(fitting) => fitting,
            Err(why) => {
                let kind = if approved { "Failed" } else { "Denied" };
                add_condition(&mut next, kind, "DoesNotFit", &why);
                return Some(next.into());
            }
        };
        if !approved {
            let requester = Requester {
                user: found.spec.username.as_deref().unwrap_or_default(),
                groups: found.spec.groups.as_deref().unwrap_or_default(),
                came,
                request: uid(&found.metadata),
            };
            match decide(signer, &requester, &asked, &self.hosts()) {
                Verdict::Leave => return None,
                Verdict::Deny(why) => {
                    add_condition(&mut next, "Denied", "NotAllowed", &why);
                    return Some(next.into());
                }
                Verdict::Approve => add_condition(
                    &mut next,
                    "Approved",
                    "AutoApproved",
                    "the requester may have this certificate",
                ),
            }
        }
        let authority =
            if signer == ETCD_CLIENT { &self.signers.etcd } else { &self.signers.cluster };
        match authority.sign(&pem, &identity) {
            Ok(certificate) => {
                next.status.get_or_insert_default().certificate =
                    Some(ByteString(certificate.into_bytes()));
            }
            Err(error) => {
                add_condition(&mut next, "Failed", "CannotSign", &format!("{:#}", chain(&error)));
                return Some(next.into());
            }
        }
        let uses_up = match came {
            Came::With(token) if token.is_unused() => Some(token.clone()),
            _ => None,
        };
        Some(Next { object: next, uses_up })
    }
}

/// The error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

fn conditions(found: &CertificateSigningRequest) -> &[CertificateSigningRequestCondition] {
    found.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default()
}

fn add_condition(found: &mut CertificateSigningRequest, kind: &str, reason: &str, message: &str) {
    let now = Some(Time(Timestamp::now()));
    found.status.get_or_insert_default().conditions.get_or_insert_default().push(
        CertificateSigningRequestCondition {
            type_: kind.to_owned(),
            status: "True".to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_update_time: now.clone(),
            last_transition_time: now,
        },
    );
}

fn is_ready(node: &Node) -> bool {
    node.status
        .as_ref()
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default()
        .iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

impl Reconciler for Certificates {
    type Error = Failure;
    const NAME: &'static str = "certificates";

    async fn reconcile(&self, key: &str) -> Result<Action, Failure> {
        let Some(found) = self.requests.get("", key) else { return Ok(Action::done()) };
        let api = self.cx.api::<CertificateSigningRequest>("");
        let came = self.came(&found).await?;
        let Some(next) = self.advance(&found, &came) else {
            let since =
                found.metadata.creation_timestamp.as_ref().map_or(Timestamp::now(), |time| time.0);
            let age = Duration::from_secs(
                u64::try_from(Timestamp::now().as_second() - since.as_second()).unwrap_or(0),
            );
            if age < KEEP {
                return Ok(Action::requeue(KEEP - age + Duration::from_secs(1)));
            }
            gone_is_fine(api.delete(key, &DeleteParams::default()))
                .await
                .step(|| format!("delete the old certificate signing request {key}"))?;
            return Ok(Action::done());
        };
        if let Some(token) = &next.uses_up {
            // Before the certificate is out: whoever else comes with the token comes too late.
            token.use_up(&self.cx, uid(&found.metadata)).await?;
        }
        let next = next.object;
        let user = found.spec.username.as_deref().unwrap_or_default();
        let signer = found.spec.signer_name.as_str();
        match conditions(&next).iter().find(|one| one.type_ != "Approved") {
            Some(refusal) => {
                let why = refusal.message.as_deref().unwrap_or_default();
                warn!(request = key, user, signer, why, "a certificate is refused");
            }
            None => info!(request = key, user, signer, "a certificate is issued"),
        }
        gone_is_fine(api.replace_status(key, &next))
            .await
            .step(|| format!("answer the certificate signing request {key}"))?;
        Ok(Action::requeue(KEEP))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, addresses: &[&str]) -> Asked {
        Asked {
            user: format!("system:node:{name}"),
            groups: vec![NODES.to_owned()],
            dns_names: if addresses.is_empty() { Vec::new() } else { vec![name.to_owned()] },
            addresses: addresses.iter().map(|ip| ip.parse().expect("an address")).collect(),
            has_more: false,
        }
    }

    fn usages(list: &[&str]) -> Vec<String> {
        list.iter().map(|usage| (*usage).to_owned()).collect()
    }

    fn hosts() -> Hosts {
        let address = |text: &str| text.parse().expect("an address");
        Hosts {
            nodes: [("b".to_owned(), true), ("asleep".to_owned(), false)].into(),
            addresses: vec![
                (address("10.0.0.2"), Some("b".to_owned())),
                (address("10.0.0.10"), None),
            ],
        }
    }

    fn ask(signer: &str, user: &str, group: &str, asked: &Asked) -> Verdict {
        ask_with(&Came::WithoutToken, signer, user, group, asked)
    }

    fn ask_with(came: &Came, signer: &str, user: &str, group: &str, asked: &Asked) -> Verdict {
        let groups = [group.to_owned()];
        let requester = Requester { user, groups: &groups, came, request: "this" };
        decide(signer, &requester, asked, &hosts())
    }

    #[test]
    fn a_replayed_token_gives_away_no_name_that_a_node_has() {
        let with = |made_for: Option<&str>, wanted: &str| {
            let mut token = Token::default();
            token.node = made_for.map(str::to_owned);
            let user = "system:bootstrap:abcdef";
            let asked = node(wanted, &[]);
            match ask_with(&Came::With(token), NODE_CLIENT, user, BOOTSTRAPPERS, &asked) {
                Verdict::Deny(why) => why,
                other => format!("{other:?}"),
            }
        };
        assert_eq!(with(None, "a"), "Approve");
        assert!(with(None, "b").contains("node b is alive"));
        assert!(with(None, "asleep").contains("orchctl token create --node asleep"));

        // Made for one node: that one, also when it comes again, but not while it lives.
        assert_eq!(with(Some("asleep"), "asleep"), "Approve");
        assert!(with(Some("asleep"), "a").contains("good for node asleep only"));
        assert!(with(Some("b"), "b").contains("node b is alive"));

        // Made for one host.
        let used_by = |who: Option<&str>| {
            let mut token = Token::default();
            (token.single_use, token.used_by) = (true, who.map(str::to_owned));
            let came = Came::With(token);
            ask_with(&came, NODE_CLIENT, "system:bootstrap:abcdef", BOOTSTRAPPERS, &node("a", &[]))
        };
        assert_eq!(used_by(None), Verdict::Approve);
        assert!(matches!(used_by(Some("another")), Verdict::Deny(why) if why.contains("one host")));
        assert_eq!(used_by(Some("this")), Verdict::Approve, "what was begun is finished");

        let gone = ask_with(
            &Came::WithDeletedToken,
            NODE_CLIENT,
            "system:bootstrap:abcdef",
            BOOTSTRAPPERS,
            &node("a", &[]),
        );
        assert!(matches!(gone, Verdict::Deny(why) if why.contains("the token has ended")));
    }

    #[test]
    fn a_token_gets_a_new_nodes_certificate_and_not_that_of_a_living_one() {
        let token = ("system:bootstrap:abcdef", BOOTSTRAPPERS);
        assert_eq!(ask(NODE_CLIENT, token.0, token.1, &node("a", &[])), Verdict::Approve);
        let Verdict::Deny(why) = ask(NODE_CLIENT, token.0, token.1, &node("b", &[])) else {
            panic!("a living node's name is given away")
        };
        assert!(why.contains("node b is alive"), "{why}");
        assert!(matches!(
            ask(NODE_SERVING, token.0, token.1, &node("a", &["10.0.0.1"])),
            Verdict::Deny(_)
        ));
        assert!(matches!(ask(ETCD_CLIENT, token.0, token.1, &Asked::default()), Verdict::Deny(_)));
    }

    #[test]
    fn a_node_gets_its_own_and_nothing_of_others() {
        let own = ("system:node:a", NODES);
        assert_eq!(ask(NODE_CLIENT, own.0, own.1, &node("a", &[])), Verdict::Approve);
        assert!(matches!(ask(NODE_CLIENT, own.0, own.1, &node("c", &[])), Verdict::Deny(_)));
        assert_eq!(ask(NODE_SERVING, own.0, own.1, &node("a", &["10.0.0.1"])), Verdict::Approve);
        for foreign in ["10.0.0.2", "10.0.0.10", "127.0.0.1"] {
            let verdict = ask(NODE_SERVING, own.0, own.1, &node("a", &[foreign]));
            assert!(matches!(verdict, Verdict::Deny(_)), "{foreign}: {verdict:?}");
        }
        assert_eq!(
            ask(NODE_SERVING, "system:node:b", NODES, &node("b", &["10.0.0.2"])),
            Verdict::Approve,
            "a renewal"
        );
        assert_eq!(ask(ETCD_CLIENT, own.0, own.1, &Asked::default()), Verdict::Approve);
        // A name without the group is somebody else.
        assert!(matches!(ask(NODE_CLIENT, own.0, "people", &node("a", &[])), Verdict::Deny(_)));
        assert_eq!(ask(CLIENT, own.0, own.1, &Asked::default()), Verdict::Leave);
    }

    #[test]
    fn what_does_not_fit_the_signer_is_no_certificate() {
        let client = usages(&["digital signature", "client auth"]);
        let server = usages(&["digital signature", "key encipherment", "server auth"]);
        assert!(identity(NODE_CLIENT, &client, &node("a", &[])).is_ok());
        assert!(identity(NODE_SERVING, &server, &node("a", &["10.0.0.1"])).is_ok());
        assert!(identity(NODE_CLIENT, &server, &node("a", &[])).is_err());
        assert!(identity(NODE_CLIENT, &client, &node("a", &["10.0.0.1"])).is_err());
        assert!(
            identity(NODE_CLIENT, &usages(&["client auth", "cert sign"]), &node("a", &[])).is_err()
        );
        assert!(identity(NODE_CLIENT, &client, &node("", &[])).is_err());
        let mut asked = node("a", &[]);
        asked.groups.push("system:masters".to_owned());
        assert!(identity(NODE_CLIENT, &client, &asked).is_err());
        let masters = Asked {
            user: "eve".to_owned(),
            groups: vec!["system:masters".to_owned()],
            ..Asked::default()
        };
        assert!(identity(CLIENT, &client, &masters).is_err());
        let kubelets = Asked { user: KUBELET_CLIENT_USER.to_owned(), ..Asked::default() };
        assert!(identity(CLIENT, &client, &kubelets).is_err(), "nobody else opens the agents' API");
        let more = Asked { has_more: true, ..node("a", &[]) };
        assert!(identity(NODE_CLIENT, &client, &more).is_err());
        let etcd = Asked { user: ETCD_NETWORK_USER.to_owned(), ..Asked::default() };
        assert!(identity(ETCD_CLIENT, &client, &etcd).is_ok());
        let root = Asked { user: orch_pki::ETCD_ROOT_USER.to_owned(), ..Asked::default() };
        assert!(identity(ETCD_CLIENT, &client, &root).is_err(), "nobody becomes etcd's root");
    }
}
