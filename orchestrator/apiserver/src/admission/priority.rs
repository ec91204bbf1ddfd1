//! Priority: a pod gets the number and the preemption policy of its PriorityClass, and none of its own.

use orch_api::{ApiError, priority};
use serde_json::{Value, json};

use crate::read::{parse, store_error};
use crate::resources::PRIORITY_CLASSES;
use crate::state::{Shared, Stored};

/// What a class gives its pods.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Class {
    name: String,
    value: i64,
    policy: String,
}

impl Class {
    fn read(object: &Value) -> Self {
        Self {
            name: object["metadata"]["name"].as_str().unwrap_or_default().to_owned(),
            value: object["value"].as_i64().unwrap_or(0),
            policy: object["preemptionPolicy"].as_str().unwrap_or(priority::PREEMPT).to_owned(),
        }
    }

    /// What a pod has where there is no default class.
    fn none() -> Self {
        Self { name: String::new(), value: 0, policy: priority::PREEMPT.to_owned() }
    }
}

/// Gives a new pod its priority.
///
/// # Errors
/// There is no such class, or the pod asks for another number or policy than its class has.
pub(super) async fn pod(shared: &Shared, pod: &mut Value) -> Result<(), ApiError> {
    let named = pod["spec"]["priorityClassName"].as_str().unwrap_or_default().to_owned();
    let class = if named.is_empty() {
        Some(default(shared)?.unwrap_or_else(Class::none))
    } else {
        find(shared, &named).await?
    };
    let name = pod["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let given = class.ok_or_else(|| format!("no PriorityClass with name {named} was found"));
    given
        .and_then(|class| give(pod, &class))
        .map_err(|why| ApiError::refused("", "pods", &name, &why))
}

/// Pure.
fn give(pod: &mut Value, class: &Class) -> Result<(), String> {
    let spec = &mut pod["spec"];
    let must_not = |what: &str, given: &str, computed: &str| {
        Err(format!(
            "the {what} ({given}) must not be provided in pod spec; priority admission controller computed {computed} from the \
             given PriorityClass name"
        ))
    };
    if let Some(given) = spec["priority"].as_i64()
        && given != class.value
    {
        return must_not("integer value of priority", &given.to_string(), &class.value.to_string());
    }
    if let Some(given) = spec["preemptionPolicy"].as_str()
        && given != class.policy
    {
        return must_not("string value of PreemptionPolicy", given, &class.policy);
    }
    if !class.name.is_empty() {
        spec["priorityClassName"] = json!(class.name);
    }
    spec["priority"] = json!(class.value);
    spec["preemptionPolicy"] = json!(class.policy);
    Ok(())
}

/// Checks a class, new or changed: one is the default at most.
///
/// # Errors
/// There is another default.
pub(super) fn class(shared: &Shared, object: &Value) -> Result<(), ApiError> {
    if object["globalDefault"] != true {
        return Ok(());
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let other = defaults(classes(shared)?)?.into_iter().find(|class| class.name != name);
    let Some(other) = other else { return Ok(()) };
    let why = format!(
        "PriorityClass {} is already marked as default. Only one default can exist",
        other.name
    );
    Err(ApiError::refused(priority::GROUP, PRIORITY_CLASSES, name, &why))
}

fn classes(shared: &Shared) -> Result<&Stored, ApiError> {
    shared
        .stored(priority::GROUP, PRIORITY_CLASSES)
        .ok_or_else(|| ApiError::internal("there is no priorityclasses resource"))
}

/// The class of pods that name none. Two servers may each have let one in at the same moment: then it is the lower one.
fn default(shared: &Shared) -> Result<Option<Class>, ApiError> {
    Ok(defaults(classes(shared)?)?.into_iter().min_by_key(|class| class.value))
}

fn defaults(classes: &Stored) -> Result<Vec<Class>, ApiError> {
    let mut found = Vec::new();
    for object in classes.cache.snapshot().range(&classes.resource.prefix(), None) {
        let class = parse(&object.bytes)?;
        if class["globalDefault"] == true {
            found.push(Class::read(&class));
        }
    }
    Ok(found)
}

async fn find(shared: &Shared, name: &str) -> Result<Option<Class>, ApiError> {
    let classes = classes(shared)?;
    let key = classes.resource.key("", name);
    let found = match classes.cache.get(&key) {
        Some(object) => Some(parse(&object.bytes)?),
        // The cache may be a moment behind: the store knows.
        None => match shared.store.get(&key).await.map_err(|error| store_error(&error))?.0 {
            Some(found) => Some(parse(&found.value)?),
            None => None,
        },
    };
    // The built-in ones count before they are stored, and if somebody has deleted them.
    let built_in = || {
        let (name, value, _) =
            priority::SYSTEM_CLASSES.into_iter().find(|(known, ..)| *known == name)?;
        Some(Class { name: name.to_owned(), value, ..Class::none() })
    };
    Ok(found.map(|class| Class::read(&class)).or_else(built_in))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_gets_the_number_of_its_class_and_no_other() {
        let class = Class { name: "high".to_owned(), value: 7, policy: "Never".to_owned() };
        let with = |spec: Value, class: &Class| {
            let mut pod = json!({ "spec": spec });
            give(&mut pod, class).map(|()| pod["spec"].take())
        };
        let given =
            json!({ "priorityClassName": "high", "priority": 7, "preemptionPolicy": "Never" });
        assert_eq!(with(json!({}), &class), Ok(given.clone()));
        assert_eq!(with(given.clone(), &class), Ok(given));
        let none = json!({ "priority": 0, "preemptionPolicy": "PreemptLowerPriority" });
        assert_eq!(with(json!({}), &Class::none()), Ok(none));
        assert_eq!(
            with(json!({ "priority": 8 }), &class).expect_err("refused"),
            "the integer value of priority (8) must not be provided in pod spec; priority admission controller computed 7 from \
             the given PriorityClass name"
        );
        let policy = json!({ "preemptionPolicy": "PreemptLowerPriority" });
        assert!(
            with(policy, &class).expect_err("refused").contains("string value of PreemptionPolicy")
        );
    }
}
