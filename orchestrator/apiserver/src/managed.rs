//! `metadata.managedFields` and server-side apply (Kubernetes, "Server-Side Apply").
//!
//! Ownership is kept from the first apply of an object on, not for objects that nobody applies: it would double their
//! size for nothing. Who applies to an object without ownership finds all its fields with the manager
//! `before-first-apply`, as upstream does with objects that are older than the feature; what a client-side apply has
//! left in its annotation is found with `kubectl-client-side-apply`, so that kubectl can take it over.

use http::{HeaderMap, header};
use orch_api::{ApiError, defaults};
use orch_facts::ownership::{self, FieldSet};
use orch_facts::{TypeId, facts};
use serde_json::{Value, json};

use crate::request::Query;
use crate::resources::Resource;
use crate::strategy::Part;

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// Entries of those who update; older ones are put together under one name.
const UPDATERS: usize = 10;
const ANCIENT: &str = "ancient-changes";
/// Upper bound of a manager's name.
const NAME_LIMIT_BYTES: usize = 128;
/// Metadata that nobody owns.
const SYSTEM_METADATA: [&str; 11] = [
    "f:creationTimestamp",
    "f:deletionGracePeriodSeconds",
    "f:deletionTimestamp",
    "f:generateName",
    "f:generation",
    "f:managedFields",
    "f:name",
    "f:namespace",
    "f:resourceVersion",
    "f:selfLink",
    "f:uid",
];

/// One entry of `managedFields`.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    manager: String,
    applies: bool,
    api_version: String,
    time: String,
    subresource: Option<String>,
    fields: FieldSet,
}

impl Entry {
    fn parse(value: &Value) -> Self {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        Self {
            manager: text("manager"),
            applies: value["operation"] == "Apply",
            api_version: text("apiVersion"),
            time: text("time"),
            subresource: value["subresource"]
                .as_str()
                .filter(|name| !name.is_empty())
                .map(str::to_owned),
            fields: FieldSet::parse(&value["fieldsV1"]),
        }
    }

    fn to_json(&self) -> Value {
        let mut value = json!({
            "manager": self.manager,
            "operation": if self.applies { "Apply" } else { "Update" },
            "apiVersion": self.api_version,
            "time": self.time,
            "fieldsType": "FieldsV1",
            "fieldsV1": self.fields.to_json(),
        });
        if let Some(subresource) = &self.subresource {
            value["subresource"] = json!(subresource);
        }
        value
    }
}

/// Who writes, and to which part.
pub(crate) struct Writer<'a> {
    pub(crate) resource: &'a Resource,
    pub(crate) part: Part,
    pub(crate) manager: String,
}

/// The manager that a request names, or the program that sends it.
///
/// # Errors
/// The name is too long.
pub(crate) fn manager(headers: &HeaderMap, query: &Query) -> Result<String, ApiError> {
    if let Some(name) = query.get("fieldManager") {
        if name.len() > NAME_LIMIT_BYTES || name.chars().any(char::is_control) {
            let why = format!("may not be longer than {NAME_LIMIT_BYTES} printable characters");
            let error = orch_api::FieldError::invalid("fieldManager", &json!(name), why);
            return Err(ApiError::invalid("meta.k8s.io", "PatchOptions", "", &[error]));
        }
        return Ok(name.to_owned());
    }
    let agent = headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok());
    let program = agent.and_then(|agent| agent.split(['/', ' ']).next()).unwrap_or_default();
    Ok(if program.is_empty() { "unknown" } else { program }
        .chars()
        .take(NAME_LIMIT_BYTES)
        .collect())
}

impl Writer<'_> {
    fn kind(&self) -> Result<TypeId, ApiError> {
        facts().kind(self.resource.group, self.resource.version, self.resource.kind).ok_or_else(
            || ApiError::internal(format!("the fields of {} are not known", self.resource.kind)),
        )
    }

    fn subresource(&self) -> Option<String> {
        match self.part {
            Part::Status => Some("status".to_owned()),
            Part::Ephemeral => Some("ephemeralcontainers".to_owned()),
            Part::Main | Part::All => None,
        }
    }

    fn is_own(&self, entry: &Entry, applies: bool) -> bool {
        entry.applies == applies
            && entry.manager == self.manager
            && entry.subresource == self.subresource()
    }

    /// A set without what this write cannot reach and what nobody owns.
    fn strip(&self, mut set: FieldSet) -> FieldSet {
        for step in ["f:apiVersion", "f:kind"] {
            set.remove(&[step]);
        }
        for step in SYSTEM_METADATA {
            set.remove(&["f:metadata", step]);
        }
        match self.part {
            Part::Status => set.retain("f:status"),
            Part::Main if self.resource.status => set.remove(&["f:status"]),
            Part::Main | Part::Ephemeral | Part::All => {}
        }
        set
    }

    fn entry(&self, applies: bool, fields: FieldSet, former: Option<&Entry>) -> Entry {
        // The time tells when the set changed, not when somebody came by.
        let time =
            former.filter(|former| former.fields == fields).map(|former| former.time.clone());
        Entry {
            manager: self.manager.clone(),
            applies,
            api_version: self.resource.api_version(),
            time: time.unwrap_or_else(now),
            subresource: self.subresource(),
            fields,
        }
    }

    /// Makes `config` part of `live`, and says who owns what then.
    ///
    /// # Errors
    /// 409: others own fields that would change, and `force` is not set.
    pub(crate) fn apply(
        &self,
        live: &Value,
        config: &Value,
        force: bool,
    ) -> Result<Value, ApiError> {
        let id = self.kind()?;
        let mut entries = match live["metadata"]["managedFields"].as_array() {
            Some(list) if !list.is_empty() => list.iter().map(Entry::parse).collect(),
            _ => self.first_entries(id, live),
        };
        let wanted = self.strip(ownership::fields_of(facts(), id, config));
        let mut object = ownership::merge(facts(), id, live.clone(), config);
        let changes = self.strip(ownership::changed(facts(), id, live, &object));
        let mut conflicts = Vec::new();
        for entry in &mut entries {
            if self.is_own(entry, true) {
                continue;
            }
            let common = entry.fields.intersection(&changes);
            if common.is_empty() {
                continue;
            }
            if force {
                entry.fields = entry.fields.difference(&common);
            } else {
                conflicts.push((entry.clone(), common.paths()));
            }
        }
        if !conflicts.is_empty() {
            return Err(conflict(&conflicts));
        }
        let former = entries.iter().position(|entry| self.is_own(entry, true));
        let former = former.map(|place| entries.remove(place));
        if let Some(former) = &former {
            let mut keep =
                entries.iter().fold(wanted.clone(), |all, entry| all.union(&entry.fields));
            for step in ["f:apiVersion", "f:kind", "f:metadata", "f:spec"] {
                keep.insert(step);
            }
            ownership::prune(facts(), id, &mut object, &former.fields, &keep);
        }
        entries.push(self.entry(true, wanted, former.as_ref()));
        object["metadata"]["managedFields"] = to_json(entries);
        Ok(object)
    }

    /// The owner of a new object that is applied.
    ///
    /// # Errors
    /// The kind is not known.
    pub(crate) fn first(&self, config: &Value) -> Result<Value, ApiError> {
        let fields = self.strip(ownership::fields_of(facts(), self.kind()?, config));
        Ok(to_json(vec![self.entry(true, fields, None)]))
    }

    /// Owners of an object that has none yet.
    fn first_entries(&self, id: TypeId, live: &Value) -> Vec<Entry> {
        let whole = Writer { resource: self.resource, part: Part::Main, manager: String::new() };
        let mut rest = whole.strip(ownership::fields_of(facts(), id, live));
        let mut entries = Vec::new();
        let time = live["metadata"]["creationTimestamp"].as_str().map_or_else(now, str::to_owned);
        let entry = |manager: &str, fields: FieldSet| Entry {
            manager: manager.to_owned(),
            applies: false,
            api_version: self.resource.api_version(),
            time: time.clone(),
            subresource: None,
            fields,
        };
        let annotation = &live["metadata"]["annotations"][LAST_APPLIED];
        let applied = annotation.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
        if let Some(mut applied) = applied.filter(Value::is_object) {
            applied["metadata"]["annotations"][LAST_APPLIED] = annotation.clone();
            let fields = whole.strip(ownership::fields_of(facts(), id, &applied));
            let fields = fields.intersection(&rest);
            // Defaults of what was applied go with it: nobody owns them, unless somebody has set another value.
            defaults::apply(self.resource.group, self.resource.kind, &mut applied);
            let others = ownership::changed(facts(), id, &applied, live);
            let defaulted = ownership::fields_of(facts(), id, &applied).difference(&others);
            rest = rest.difference(&fields).difference(&defaulted);
            entries.push(entry("kubectl-client-side-apply", fields));
        }
        entries.push(entry(BEFORE_FIRST_APPLY, rest));
        entries
    }

    /// Who owns what after a change that is no apply. `requested` is what the client sent in `managedFields`. `None` =
    /// ownership is not kept.
    ///
    /// # Errors
    /// The kind is not known.
    pub(crate) fn update(
        &self,
        old: &Value,
        new: &Value,
        requested: &Value,
    ) -> Result<Option<Value>, ApiError> {
        let kept = &old["metadata"]["managedFields"];
        let base = match requested.as_array().map(Vec::as_slice) {
            // An empty list, or a list of one empty entry, gives ownership up.
            Some([]) => return Ok(None),
            Some([one]) if one.as_object().is_some_and(serde_json::Map::is_empty) => {
                return Ok(None);
            }
            Some(_) => requested,
            None => kept,
        };
        let Some(list) = base.as_array().filter(|list| !list.is_empty()) else { return Ok(None) };
        let id = self.kind()?;
        let changes = self.strip(ownership::changed(facts(), id, old, new));
        let gone =
            self.strip(ownership::fields_of(facts(), id, old).difference(&ownership::fields_of(
                facts(),
                id,
                new,
            )));
        if changes.is_empty() && gone.is_empty() {
            return Ok(Some(base.clone()));
        }
        let mut entries: Vec<Entry> = list.iter().map(Entry::parse).collect();
        let own = entries.iter().position(|entry| self.is_own(entry, false));
        let own = own.map(|place| entries.remove(place));
        for entry in &mut entries {
            entry.fields = entry.fields.difference(&changes).difference(&gone);
        }
        let before = own.as_ref().map(|own| own.fields.clone()).unwrap_or_default();
        entries.push(self.entry(false, before.union(&changes).difference(&gone), own.as_ref()));
        let mut updaters: Vec<usize> =
            (0..entries.len()).filter(|place| !entries[*place].applies).collect();
        while updaters.len() > UPDATERS {
            updaters.sort_by(|a, b| entries[*a].time.cmp(&entries[*b].time));
            let (first, second) = (updaters[0], updaters[1]);
            entries[second].fields = entries[second].fields.union(&entries[first].fields);
            ANCIENT.clone_into(&mut entries[second].manager);
            entries[first].fields = FieldSet::default();
            updaters.remove(0);
        }
        Ok(Some(to_json(entries)))
    }
}

fn now() -> String {
    crate::strategy::now().as_str().unwrap_or_default().to_owned()
}

fn to_json(mut entries: Vec<Entry>) -> Value {
    entries.retain(|entry| !entry.fields.is_empty());
    entries.sort_by(|a, b| {
        let key = |entry: &Entry| (!entry.applies, entry.time.clone(), entry.manager.clone());
        key(a).cmp(&key(b))
    });
    entries.iter().map(Entry::to_json).collect()
}

fn conflict(conflicts: &[(Entry, Vec<String>)]) -> ApiError {
    let who = |entry: &Entry| {
        let subresource =
            entry.subresource.as_ref().map(|name| format!(" with subresource {name:?}"));
        format!(
            "{:?}{} using {}",
            entry.manager,
            subresource.unwrap_or_default(),
            entry.api_version
        )
    };
    let count: usize = conflicts.iter().map(|(_, paths)| paths.len()).sum();
    let message = match conflicts {
        [(entry, paths)] if count == 1 => {
            format!("Apply failed with 1 conflict: conflict with {}: {}", who(entry), paths[0])
        }
        many => {
            let parts: Vec<String> = many
                .iter()
                .map(|(entry, paths)| {
                    format!("conflicts with {}:\n- {}", who(entry), paths.join("\n- "))
                })
                .collect();
            format!("Apply failed with {count} conflicts: {}", parts.join("\n"))
        }
    };
    let causes: Vec<Value> = conflicts
        .iter()
        .flat_map(|(entry, paths)| {
            let message = format!("conflict with {}", who(entry));
            paths.iter().map(move |path| {
                json!({ "reason": "FieldManagerConflict", "message": message, "field": path })
            })
        })
        .collect();
    let mut error = ApiError::conflict("", "", "", "");
    error.message = message;
    error.details = Some(Box::new(json!({ "causes": causes })));
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::find;

    fn writer(manager: &str) -> Writer<'static> {
        let resource = find("apps", "v1", "deployments").expect("deployments");
        Writer { resource, part: Part::Main, manager: manager.to_owned() }
    }

    fn config(replicas: Option<i64>, image: &str) -> Value {
        let mut config = json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web" },
            "spec": { "template": { "spec": { "containers": [{ "name": "a", "image": image }] } } } });
        if let Some(replicas) = replicas {
            config["spec"]["replicas"] = json!(replicas);
        }
        config
    }

    fn created() -> Value {
        let mut live = config(Some(1), "x:1");
        live["metadata"]["managedFields"] = writer("one").first(&live).expect("owned");
        live
    }

    fn managers(object: &Value) -> Vec<&str> {
        object["metadata"]["managedFields"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|entry| entry["manager"].as_str())
            .collect()
    }

    #[test]
    fn a_field_of_another_manager_is_a_conflict_until_forced() {
        let live = created();
        let error =
            writer("two").apply(&live, &config(None, "x:2"), false).expect_err("a conflict");
        assert_eq!(
            error.message,
            "Apply failed with 1 conflict: conflict with \"one\" using apps/v1: \
             .spec.template.spec.containers[name=\"a\"].image"
        );
        let object = writer("two").apply(&live, &config(None, "x:2"), true).expect("forced");
        assert_eq!(object["spec"]["template"]["spec"]["containers"][0]["image"], "x:2");
        assert_eq!(managers(&object), ["one", "two"]);
        // The same value may have two owners.
        assert!(writer("three").apply(&object, &config(None, "x:2"), false).is_ok());
        // Who has lost a field meets its new owner.
        assert!(writer("one").apply(&object, &config(Some(1), "x:1"), false).is_err());
    }

    #[test]
    fn what_an_applier_leaves_out_goes_unless_another_owns_it() {
        let live = created();
        let object = writer("one").apply(&live, &config(None, "x:1"), false).expect("applied");
        assert!(object["spec"].get("replicas").is_none());
        let mut scaled = live.clone();
        scaled["spec"]["replicas"] = json!(5);
        let owners = writer("hand").update(&live, &scaled, &Value::Null).expect("known");
        scaled["metadata"]["managedFields"] = owners.expect("kept");
        assert_eq!(managers(&scaled), ["one", "hand"]);
        assert!(writer("one").apply(&scaled, &config(Some(1), "x:1"), false).is_err());
        let object = writer("one").apply(&scaled, &config(None, "x:1"), false).expect("applied");
        assert_eq!(object["spec"]["replicas"], 5);
    }

    #[test]
    fn applying_the_same_changes_nothing() {
        let live = created();
        let again = writer("one").apply(&live, &config(Some(1), "x:1"), false).expect("applied");
        assert_eq!(again, live);
        assert_eq!(
            writer("x").update(&live, &live, &Value::Null).expect("known"),
            Some(live["metadata"]["managedFields"].clone())
        );
    }

    #[test]
    fn an_object_without_ownership_is_taken_over() {
        let mut live = config(Some(3), "x:1");
        assert_eq!(
            writer("x").update(&live, &config(Some(4), "x:1"), &Value::Null).expect("known"),
            None
        );
        live["metadata"]["annotations"] = json!({ LAST_APPLIED: config(None, "x:1").to_string() });
        let object = writer("kubectl").apply(&live, &config(None, "x:1"), false).expect("applied");
        assert_eq!(managers(&object), ["kubectl", BEFORE_FIRST_APPLY, "kubectl-client-side-apply"]);
        assert!(writer("x").apply(&object, &config(Some(4), "x:1"), false).is_err());
    }

    #[test]
    fn the_program_is_the_manager_of_who_names_none() {
        let mut headers = HeaderMap::new();
        headers.insert(header::USER_AGENT, "kubectl/v1.33 (linux)".parse().expect("a header"));
        assert_eq!(manager(&headers, &Query::parse(None)).expect("a name"), "kubectl");
        let query = Query::parse(Some("fieldManager=me"));
        assert_eq!(manager(&headers, &query).expect("a name"), "me");
        assert_eq!(manager(&HeaderMap::new(), &Query::parse(None)).expect("a name"), "unknown");
    }
}
