//! Acting as somebody else by the `Impersonate-*` headers (Kubernetes, "User impersonation"): `kubectl --as`.

use http::HeaderMap;
use orch_api::ApiError;

use crate::auth::{ANONYMOUS, AUTHENTICATED, UNAUTHENTICATED, User};
use crate::authz::{self, Attributes, ResourceTarget};
use crate::request;
use crate::state::Shared;

const EXTRA: &str = "impersonate-extra-";

/// The user that `user` wants to act as, or `user`.
///
/// # Errors
/// 403 for who may not, 400 for headers that name groups of nobody.
pub(crate) async fn acting_user(
    shared: &Shared,
    user: User,
    headers: &HeaderMap,
) -> Result<User, ApiError> {
    let Some(wanted) = wanted(headers)? else { return Ok(user) };
    for target in rights(&wanted) {
        authz::require(shared, &user, &Attributes::resource("impersonate", target)).await?;
    }
    Ok(completed(wanted))
}

/// Pure: what the headers say.
fn wanted(headers: &HeaderMap) -> Result<Option<User>, ApiError> {
    let texts = |name: &str| -> Vec<String> {
        let values = headers.get_all(name).iter();
        values.filter_map(|value| value.to_str().ok()).map(str::to_owned).collect()
    };
    let Some(name) = texts("impersonate-user").pop().filter(|name| !name.is_empty()) else {
        let named = headers.keys().any(|key| key.as_str().starts_with("impersonate-"));
        return if named {
            Err(ApiError::bad_request(
                "Impersonate-User is missing beside other Impersonate headers",
            ))
        } else {
            Ok(None)
        };
    };
    let extra = headers.keys().filter_map(|key| {
        let short = key.as_str().strip_prefix(EXTRA)?;
        Some((request::decode(short), texts(key.as_str())))
    });
    Ok(Some(User {
        name,
        uid: texts("impersonate-uid").pop().unwrap_or_default(),
        groups: texts("impersonate-group"),
        extra: extra.collect(),
    }))
}

fn account(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("system:serviceaccount:")?.split_once(':')
}

/// Pure: all that somebody has to be allowed to impersonate.
fn rights(wanted: &User) -> Vec<ResourceTarget<'_>> {
    let mut all = Vec::new();
    all.push(match account(&wanted.name) {
        Some((namespace, name)) => ResourceTarget {
            resource: "serviceaccounts",
            namespace,
            name,
            ..ResourceTarget::default()
        },
        None => {
            ResourceTarget { resource: "users", name: &wanted.name, ..ResourceTarget::default() }
        }
    });
    for name in &wanted.groups {
        all.push(ResourceTarget { resource: "groups", name, ..ResourceTarget::default() });
    }
    let group = "authentication.k8s.io";
    if !wanted.uid.is_empty() {
        let name = wanted.uid.as_str();
        all.push(ResourceTarget { group, resource: "uids", name, ..ResourceTarget::default() });
    }
    for (key, values) in &wanted.extra {
        all.extend(values.iter().map(|name| ResourceTarget {
            group,
            resource: "userextras",
            subresource: key,
            name,
            ..ResourceTarget::default()
        }));
    }
    all
}

/// Pure: with the groups that everybody of the kind is in.
fn completed(mut user: User) -> User {
    if user.groups.is_empty()
        && let Some((namespace, _)) = account(&user.name)
    {
        user.groups = vec![
            "system:serviceaccounts".to_owned(),
            format!("system:serviceaccounts:{namespace}"),
        ];
    }
    let group = if user.name == ANONYMOUS { UNAUTHENTICATED } else { AUTHENTICATED };
    if !user.is_in(AUTHENTICATED) && !user.is_in(UNAUTHENTICATED) {
        user.groups.push(group.to_owned());
    }
    user
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, value.parse().expect("a header"));
        }
        map
    }

    #[test]
    fn every_part_of_an_identity_needs_its_own_right() {
        let headers = headers(&[
            ("impersonate-user", "jane"),
            ("impersonate-group", "dev"),
            ("impersonate-group", "ops"),
            ("impersonate-uid", "u1"),
            ("impersonate-extra-example.com%2fscope", "view"),
        ]);
        let wanted = wanted(&headers).expect("good headers").expect("a user");
        let rights: Vec<String> = rights(&wanted)
            .iter()
            .map(|right| format!("{} {}", right.path(), right.name))
            .collect();
        assert_eq!(
            rights,
            [
                "users jane",
                "groups dev",
                "groups ops",
                "uids u1",
                "userextras/example.com/scope view"
            ]
        );
        assert_eq!(completed(wanted).groups, ["dev", "ops", "system:authenticated"]);
    }

    #[test]
    fn accounts_and_strangers_get_the_groups_of_their_kind() {
        let acting = |name: &str| {
            let wanted = wanted(&headers(&[("impersonate-user", name)])).expect("good headers");
            completed(wanted.expect("a user"))
        };
        let till = acting("system:serviceaccount:shop:till");
        assert_eq!(
            till.groups,
            ["system:serviceaccounts", "system:serviceaccounts:shop", "system:authenticated"]
        );
        let right = rights(&till)[0];
        assert_eq!(
            (right.resource, right.namespace, right.name),
            ("serviceaccounts", "shop", "till")
        );
        assert_eq!(acting(ANONYMOUS), User::anonymous());
    }

    #[test]
    fn groups_of_nobody_are_refused() {
        let error =
            wanted(&headers(&[("impersonate-group", "system:masters")])).expect_err("refused");
        assert_eq!(error.code, 400);
        assert_eq!(wanted(&headers(&[])).expect("none"), None);
    }
}
