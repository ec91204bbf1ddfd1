//! Manifests: YAML or JSON, several documents in one file, `List` objects taken apart.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::Value;

/// One object of a manifest.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Manifest {
    pub(crate) api_version: String,
    pub(crate) kind: String,
    pub(crate) name: String,
    pub(crate) namespace: Option<String>,
    pub(crate) object: Value,
}

/// Reads a file, or stdin for `-`.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<Manifest>> {
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("read stdin")?;
    } else {
        text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    }
    parse(&text).with_context(|| format!("{} is no manifest", path.display()))
}

/// Takes a text apart.
pub(crate) fn parse(text: &str) -> anyhow::Result<Vec<Manifest>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).context("broken YAML")?;
    let mut manifests = Vec::new();
    for document in documents {
        if document.is_null() {
            continue;
        }
        if document["kind"].as_str().is_some_and(|kind| kind.ends_with("List"))
            && document["items"].is_array()
        {
            for item in document["items"].as_array().into_iter().flatten() {
                manifests.push(object(item.clone())?);
            }
        } else {
            manifests.push(object(document)?);
        }
    }
    if manifests.is_empty() {
        bail!("it holds no object");
    }
    Ok(manifests)
}

fn object(object: Value) -> anyhow::Result<Manifest> {
    let field = |value: &Value, what: &str| -> anyhow::Result<String> {
        value.as_str().map(str::to_owned).with_context(|| format!("an object has no {what}"))
    };
    Ok(Manifest {
        api_version: field(&object["apiVersion"], "apiVersion")?,
        kind: field(&object["kind"], "kind")?,
        name: field(&object["metadata"]["name"], "metadata.name")?,
        namespace: object["metadata"]["namespace"].as_str().map(str::to_owned),
        object,
    })
}

/// An object as YAML.
pub(crate) fn to_yaml(value: &Value) -> anyhow::Result<String> {
    serde_saphyr::to_string(value).context("write YAML")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_and_lists_are_taken_apart() {
        let text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n---\n# nothing\n---\napiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Secret, metadata: {name: b, namespace: shop}}\n";
        let names: Vec<String> =
            parse(text).expect("manifests").into_iter().map(|found| found.name).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn a_broken_manifest_says_what_is_wrong() {
        let error = format!("{:#}", parse("a: [1").expect_err("broken"));
        assert!(error.starts_with("broken YAML"), "{error}");
        let error = parse("kind: Pod\nmetadata: {name: a}").expect_err("no version").to_string();
        assert_eq!(error, "an object has no apiVersion");
    }

    #[test]
    fn yaml_can_be_read_back() {
        let value = serde_json::json!({ "a": "yes", "b": ["1", 2, { "c": null }], "d": "x: y\nz" });
        let back: Value =
            serde_saphyr::from_str(&to_yaml(&value).expect("YAML")).expect("read back");
        assert_eq!(back, value);
    }
}
