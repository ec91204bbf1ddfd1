//! What can only be decided when the object is known: on the way of every write.

use orch_api::ApiError;
use serde_json::Value;

use super::rbac::{Policy, Role, RoleRef};
use super::{
    Attributes, CACHE_LIMIT, MASTERS, ResourceTarget, Rule, authorize, escalation, not_ready,
    restrict,
};
use crate::auth::User;
use crate::certificates;
use crate::resources::{RBAC, Resource};
use crate::state::Shared;
use crate::strategy::Part;

/// A write: who, and on what.
pub(crate) struct Write<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) user: &'a User,
    pub(crate) resource: &'static Resource,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
}

impl Write<'_> {
    /// Before a new object is stored.
    ///
    /// # Errors
    /// 403, or 404 for a binding to a role that is not there.
    pub(crate) async fn create(&self, object: &Value) -> Result<(), ApiError> {
        if self.user.is_in(MASTERS) {
            return Ok(());
        }
        if let Some(node) = self.user.node() {
            restrict::create(node, self.resource, object).map_err(|why| self.refused(&why))?;
        }
        if self.resource.group == RBAC {
            return self.grants(&Value::Null, object).await;
        }
        Ok(())
    }

    /// Before a changed object is stored.
    ///
    /// # Errors
    /// As [`Write::create`].
    pub(crate) async fn update(
        &self,
        part: Part,
        old: &Value,
        new: &Value,
    ) -> Result<(), ApiError> {
        if self.user.is_in(MASTERS) {
            return Ok(());
        }
        if let Some(node) = self.user.node() {
            restrict::update(node, self.resource, old, new).map_err(|why| self.refused(&why))?;
        }
        match self.resource.group {
            RBAC => self.grants(old, new).await,
            certificates::GROUP if part == Part::Status => self.signing(old, new).await,
            _ => Ok(()),
        }
    }

    fn refused(&self, why: &str) -> ApiError {
        ApiError::refused(self.resource.group, self.resource.plural, self.name, why)
    }

    async fn may(
        &self,
        verb: &str,
        group: &str,
        resource: &str,
        name: &str,
    ) -> Result<bool, ApiError> {
        let target = ResourceTarget {
            group,
            resource,
            namespace: self.namespace,
            name,
            ..ResourceTarget::default()
        };
        let asked = Attributes::resource(verb, target);
        Ok(authorize(self.shared, self.user, &asked).await?.is_allowed())
    }

    /// Who writes a role or a binding needs the rights it gives, or the word to give any.
    async fn grants(&self, old: &Value, new: &Value) -> Result<(), ApiError> {
        let is_binding = self.resource.kind.ends_with("Binding");
        let fields =
            if is_binding { ["roleRef", "subjects"] } else { ["rules", "aggregationRule"] };
        if old.is_object() && fields.iter().all(|field| old[*field] == new[*field]) {
            return Ok(());
        }
        let policy = self.shared.roles.ready(CACHE_LIMIT).await.ok_or_else(not_ready)?;
        let given = if is_binding {
            let role: RoleRef = read(&new["roleRef"])?;
            let plural = if role.kind == "Role" { "roles" } else { "clusterroles" };
            if self.may("bind", RBAC, plural, &role.name).await? {
                return Ok(());
            }
            let found = policy.role(&role, self.namespace);
            found.map_err(|_| ApiError::not_found(RBAC, plural, &role.name))?.rules.clone()
        } else {
            if self.may("escalate", RBAC, self.resource.plural, self.name).await? {
                return Ok(());
            }
            let mut rules = read::<Role>(new)?.rules;
            // Whatever somebody adds to it later: who makes it has to have all rights.
            if new["aggregationRule"].is_object() || old["aggregationRule"].is_object() {
                rules.extend([Rule::everything(), Rule::every_path()]);
            }
            rules
        };
        self.holds(&policy, &given)
    }

    fn holds(&self, policy: &Policy, given: &[Rule]) -> Result<(), ApiError> {
        let (held, _) = policy.rules_of(self.user, self.namespace);
        let missing = escalation::missing(&held, given);
        if missing.is_empty() {
            return Ok(());
        }
        Err(self.refused(&escalation::refusal(self.user, &missing)))
    }

    /// Who approves or signs a request needs the word for its signer (Kubernetes, "Certificate Signing Requests").
    async fn signing(&self, old: &Value, new: &Value) -> Result<(), ApiError> {
        let signer = new["spec"]["signerName"].as_str().unwrap_or_default();
        let all =
            signer.split_once('/').map(|(domain, _)| format!("{domain}/*")).unwrap_or_default();
        for (verb, field) in [("approve", "conditions"), ("sign", "certificate")] {
            if old["status"][field] == new["status"][field]
                || self.may(verb, certificates::GROUP, "signers", signer).await?
                || self.may(verb, certificates::GROUP, "signers", &all).await?
            {
                continue;
            }
            let why = format!("user not permitted to {verb} requests with signerName {signer:?}");
            return Err(self.refused(&why));
        }
        Ok(())
    }
}

fn read<T: serde::de::DeserializeOwned>(value: &Value) -> Result<T, ApiError> {
    serde_json::from_value(value.clone())
        .map_err(|error| ApiError::bad_request(format!("the object cannot be read: {error}")))
}
