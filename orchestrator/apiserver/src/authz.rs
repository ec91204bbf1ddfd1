//! Whether somebody may do something.
//!
//! Three authorisers are asked in turn, and one that allows is enough: the group `system:masters` may do all
//! (Kubernetes, "Authorization overview"), nodes may do what belongs to them ([`node`]), and everybody else what roles
//! give them ([`rbac`]). All three are pure; [`authorize`] brings them what they look at, which comes from the watch
//! caches: no request costs a read of the store, except that a node which is refused is asked about again once the
//! caches are known to be new.
//!
//! What can only be said when the object is known is [`guard`]: nobody gives others more than they have
//! ([`escalation`]), and a node writes its own objects only ([`restrict`]). The roles every cluster has are
//! [`defaults`], kept by [`reconcile()`]; ClusterRoles made of others are put together by [`aggregate()`].

mod aggregate;
mod defaults;
mod escalation;
pub(crate) mod guard;
mod live;
mod node;
mod rbac;
mod reconcile;
pub(crate) mod restrict;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use orch_api::{ApiError, FieldSelector};

use crate::auth::User;
use crate::request::{Query, RequestInfo, Verb};
use crate::state::{Shared, Stored};
use node::Opinion;

pub(crate) use aggregate::run as aggregate;
pub(crate) use live::Live;
pub(crate) use rbac::Rule;
pub(crate) use reconcile::run as reconcile;

/// Group whose members may do all, whatever the roles say: nobody locks them out.
pub(crate) const MASTERS: &str = "system:masters";
/// Paths that need no right, so that a server can be watched before it knows any roles.
const OPEN_PATHS: [&str; 3] = ["/healthz", "/livez", "/readyz"];
/// How long a request waits for caches that fill or have to catch up.
const CACHE_LIMIT: Duration = Duration::from_secs(5);

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attributes<'a> {
    /// Any word: `get`, and also `bind`, `escalate`, `impersonate`, `approve`.
    pub(crate) verb: &'a str,
    pub(crate) target: Target<'a>,
}

/// On what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target<'a> {
    Resource(ResourceTarget<'a>),
    /// A path that names no resource.
    Path(&'a str),
}

/// A resource, or one object of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ResourceTarget<'a> {
    pub(crate) group: &'a str,
    pub(crate) resource: &'a str,
    pub(crate) subresource: &'a str,
    /// Empty = all namespaces, or none.
    pub(crate) namespace: &'a str,
    /// Empty where the request names no object.
    pub(crate) name: &'a str,
    /// Of a list or watch.
    pub(crate) field_selector: &'a str,
}

impl<'a> Attributes<'a> {
    pub(crate) fn path(verb: &'a str, path: &'a str) -> Self {
        Self { verb, target: Target::Path(path) }
    }

    pub(crate) fn resource(verb: &'a str, target: ResourceTarget<'a>) -> Self {
        Self { verb, target: Target::Resource(target) }
    }
}

/// The name that a selector of a collection narrows it to, for requests that name none: a list of one object needs no
/// more rights than the object.
pub(crate) fn selected_name(info: &RequestInfo, query: &Query) -> Option<String> {
    if !info.name.is_empty()
        || !matches!(info.verb, Verb::List | Verb::Watch | Verb::DeleteCollection)
    {
        return None;
    }
    required(query.get("fieldSelector")?, "metadata.name")
}

/// The one value that a field selector lets a field have.
fn required(selector: &str, field: &str) -> Option<String> {
    let selector = FieldSelector::parse(selector).ok()?;
    let mut found = selector.requirements().iter().filter(|one| one.field == field && !one.negated);
    found.next().map(|one| one.value.clone())
}

/// An answer of the authorisers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    Allowed(By),
    /// Nobody allows it; why, where there is more to say than that.
    Refused(String),
    /// A node asks about a pod that is not there: whether it would be the node's is not known.
    NoSuchPod,
}

impl Decision {
    pub(crate) fn is_allowed(&self) -> bool {
        matches!(self, Self::Allowed(_))
    }

    /// Why, for a review.
    pub(crate) fn reason(&self) -> String {
        match self {
            Self::Allowed(by) => by.to_string(),
            Self::Refused(why) => why.clone(),
            Self::NoSuchPod => "there is no such pod".to_owned(),
        }
    }
}

/// Who allows something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum By {
    Everybody,
    Masters,
    Node,
    /// A binding, and which of its subjects.
    Binding(Arc<rbac::Binding>, usize),
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everybody | Self::Masters | Self::Node => Ok(()),
            Self::Binding(binding, subject) => {
                let of = if binding.namespace().is_empty() {
                    format!("ClusterRoleBinding {:?}", binding.name())
                } else {
                    format!("RoleBinding \"{}/{}\"", binding.name(), binding.namespace())
                };
                let role = &binding.role_ref;
                write!(f, "RBAC: allowed by {of} of {} {:?}", role.kind, role.name)?;
                match binding.subjects.get(*subject) {
                    Some(subject) => write!(f, " to {subject}"),
                    None => Ok(()),
                }
            }
        }
    }
}

/// Asks all authorisers.
///
/// # Errors
/// The roles are not read yet.
pub(crate) async fn authorize(
    shared: &Shared,
    user: &User,
    asked: &Attributes<'_>,
) -> Result<Decision, ApiError> {
    if let Target::Path(path) = asked.target
        && OPEN_PATHS.contains(&path)
    {
        return Ok(Decision::Allowed(By::Everybody));
    }
    if user.is_in(MASTERS) {
        return Ok(Decision::Allowed(By::Masters));
    }
    let of_node = match user.node() {
        Some(name) => node_opinion(shared, name, asked)?,
        None => Opinion::None(String::new()),
    };
    if of_node == Opinion::Allowed {
        return Ok(Decision::Allowed(By::Node));
    }
    let policy = shared.roles.ready(CACHE_LIMIT).await.ok_or_else(not_ready)?;
    let mut decision = policy.decide(user, asked);
    if !decision.is_allowed() && !*shared.has_default_roles.borrow() {
        // A cluster that was made this moment: what everybody has is being written.
        let mut roles = shared.has_default_roles.subscribe();
        let waiting = tokio::time::timeout(CACHE_LIMIT, roles.wait_for(|there| *there));
        let there = matches!(waiting.await, Ok(Ok(_)));
        if !there {
            return Err(not_ready());
        }
        let policy = shared.roles.ready(CACHE_LIMIT).await.ok_or_else(not_ready)?;
        decision = policy.decide(user, asked);
    }
    let Decision::Refused(why) = decision else { return Ok(decision) };
    let of_node = match user.node() {
        // The node may know its pod from another server, whose cache is ahead of ours.
        Some(name) if of_node.depends_on_pods() => {
            pods(shared)?.cache.fresh(CACHE_LIMIT).await.map_err(|error| {
                ApiError::service_unavailable(format!(
                    "which pods the node has is unknown: {error}"
                ))
            })?;
            node_opinion(shared, name, asked)?
        }
        _ => of_node,
    };
    Ok(match of_node {
        Opinion::Allowed => Decision::Allowed(By::Node),
        Opinion::NoSuchPod => Decision::NoSuchPod,
        Opinion::None(before) | Opinion::Unrelated(before) => {
            let both = [before, why].into_iter().filter(|text| !text.is_empty());
            Decision::Refused(both.collect::<Vec<_>>().join(", "))
        }
    })
}

/// The default roles were written: says so once the caches have them.
pub(crate) async fn has_default_roles(shared: &Shared) {
    if let Some(roles) = shared.stored(crate::resources::RBAC, "roles") {
        while roles.cache.fresh(CACHE_LIMIT).await.is_err() {
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }
    shared.has_default_roles.send_replace(true);
}

fn pods(shared: &Shared) -> Result<&Stored, ApiError> {
    shared.stored("", "pods").ok_or_else(|| ApiError::internal("there is no pods resource"))
}

fn node_opinion(shared: &Shared, name: &str, asked: &Attributes<'_>) -> Result<Opinion, ApiError> {
    Ok(node::opinion(name, asked, &pods(shared)?.cache.snapshot()))
}

fn not_ready() -> ApiError {
    ApiError::service_unavailable("the server has not read the roles yet")
}

/// Refuses what nobody allows, in upstream's words.
///
/// # Errors
/// 403, or 404 for a pod that a node asks about and that is not there.
pub(crate) async fn require(
    shared: &Shared,
    user: &User,
    asked: &Attributes<'_>,
) -> Result<(), ApiError> {
    match authorize(shared, user, asked).await? {
        Decision::Allowed(_) => Ok(()),
        Decision::Refused(why) => Err(refusal(user, asked, &why)),
        Decision::NoSuchPod => match asked.target {
            Target::Resource(target) => Err(ApiError::not_found("", "pods", target.name)),
            Target::Path(_) => Err(refusal(user, asked, "")),
        },
    }
}

/// The answer to who may not do something.
fn refusal(user: &User, asked: &Attributes<'_>, why: &str) -> ApiError {
    let mut error = match asked.target {
        Target::Path(path) => {
            let mut error = ApiError::refused("", "", "", "");
            error.details = None;
            error.message =
                format!("forbidden: User {:?} cannot {} path {path:?}", user.name, asked.verb);
            error
        }
        Target::Resource(target) => {
            let resource = target.path();
            let (group, namespace) = (target.group, target.namespace);
            ApiError::forbidden(&user.name, asked.verb, group, &resource, namespace, target.name)
        }
    };
    if !why.is_empty() {
        error.message.push_str(": ");
        error.message.push_str(why);
    }
    error
}

impl ResourceTarget<'_> {
    /// `pods`, `pods/log`.
    pub(crate) fn path(&self) -> String {
        match self.subresource {
            "" => self.resource.to_owned(),
            subresource => format!("{}/{subresource}", self.resource),
        }
    }
}

/// The rules of a user, as reviews tell them.
pub(crate) struct Rules {
    pub(crate) rules: Vec<Rule>,
    /// Roles that bindings name and nobody has made.
    pub(crate) errors: Vec<String>,
    /// There may be more rights than these.
    pub(crate) incomplete: bool,
}

/// All that `user` may do in a namespace and by paths.
///
/// # Errors
/// The roles are not read yet.
pub(crate) async fn rules_of(
    shared: &Shared,
    user: &User,
    namespace: &str,
) -> Result<Rules, ApiError> {
    let policy = shared.roles.ready(CACHE_LIMIT).await.ok_or_else(not_ready)?;
    let (rules, mut errors) = policy.rules_of(user, namespace);
    let mut rules: Vec<Rule> = rules.into_iter().cloned().collect();
    if user.is_in(MASTERS) {
        rules.extend([Rule::everything(), Rule::every_path()]);
    }
    let incomplete = user.node().is_some() || !errors.is_empty();
    if user.node().is_some() {
        errors.insert(0, "node authorizer does not support user rule resolution".to_owned());
    }
    Ok(Rules { rules, errors, incomplete })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_read_as_upstreams() {
        let jane = User::new("jane", &[]);
        let pods = ResourceTarget { resource: "pods", ..ResourceTarget::default() };
        let text = |asked: &Attributes<'_>, why| refusal(&jane, asked, why).message;
        let list = Attributes::resource("list", ResourceTarget { namespace: "shop", ..pods });
        assert_eq!(
            text(&list, ""),
            r#"pods is forbidden: User "jane" cannot list resource "pods" in API group "" in the namespace "shop""#
        );
        let log = ResourceTarget { subresource: "log", namespace: "shop", name: "web", ..pods };
        assert_eq!(
            text(&Attributes::resource("get", log), "why"),
            r#"pods/log "web" is forbidden: User "jane" cannot get resource "pods/log" in API group "" in the namespace "shop": why"#
        );
        assert_eq!(
            text(&Attributes::path("get", "/metrics"), ""),
            r#"forbidden: User "jane" cannot get path "/metrics""#
        );
    }

    #[test]
    fn a_list_of_one_object_is_about_that_object() {
        let info = |verb, name: &str| RequestInfo {
            verb,
            name: name.to_owned(),
            ..RequestInfo::default()
        };
        let query = Query::parse(Some("fieldSelector=metadata.name%3Da,status.phase%21%3Db"));
        assert_eq!(selected_name(&info(Verb::List, ""), &query).as_deref(), Some("a"));
        assert_eq!(selected_name(&info(Verb::Get, "b"), &query), None);
        assert_eq!(selected_name(&info(Verb::Create, ""), &query), None);
        let not = Query::parse(Some("fieldSelector=metadata.name%21%3Da"));
        assert_eq!(selected_name(&info(Verb::Watch, ""), &not), None);
    }
}
