//! `orchctl apply` and `orchctl delete`.
//!
//! Apply is kubectl's client-side three-way merge with the same annotation, so both can be used on one object:
//! what the last applied manifest had and the new one has not is removed, the rest of the live object stays.
//! Lists are taken from the manifest as a whole (JSON merge patch, RFC 7386).

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use orch_client::Client;
use serde_json::{Map, Value, json};

use super::manifest::{self, Manifest};
use super::resource::{self, Resource, Resources};
use super::wire::{self, Query};
use crate::output;

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// How long `delete` waits for the object to be gone.
const DELETE_LIMIT: Duration = Duration::from_secs(120);

#[derive(clap::Args)]
pub(crate) struct ApplyFlags {
    /// Manifest, or - for stdin
    #[arg(short, long, required = true)]
    filename: Vec<PathBuf>,
    #[command(flatten)]
    namespace: super::NamespaceFlag,
}

#[derive(clap::Args)]
pub(crate) struct CreateFlags {
    /// Manifest, or - for stdin
    #[arg(short, long, required = true)]
    filename: Vec<PathBuf>,
    #[command(flatten)]
    namespace: super::NamespaceFlag,
}

#[derive(clap::Args)]
pub(crate) struct DeleteFlags {
    /// KIND/NAME, or KIND followed by names
    what: Vec<String>,
    /// Manifest, or - for stdin
    #[arg(short, long)]
    filename: Vec<PathBuf>,
    #[command(flatten)]
    namespace: super::NamespaceFlag,
    /// Seconds a pod gets to end; 0 kills it at once
    #[arg(long)]
    grace_period: Option<i64>,
    /// An absent object is no error
    #[arg(long)]
    ignore_not_found: bool,
    /// Do not wait until the object is gone
    #[arg(long)]
    no_wait: bool,
}

pub(crate) async fn apply(client: &Client, flags: ApplyFlags) -> anyhow::Result<()> {
    for file in &flags.filename {
        for line in apply_file(client, file, &flags.namespace.namespace).await? {
            output::line(&line)?;
        }
    }
    Ok(())
}

pub(crate) async fn create(client: &Client, flags: CreateFlags) -> anyhow::Result<()> {
    let resources = Resources::discover(client).await?;
    for file in &flags.filename {
        for found in manifest::read(file)? {
            let resource = resources.of_kind(&found.api_version, &found.kind)?;
            let namespace = found.namespace.as_deref().unwrap_or(&flags.namespace.namespace);
            let label = format!("{}/{}", resource.qualified(), found.name);
            let path = strict().append_to(&resource.path(Some(namespace)));
            wire::send(client, http::Method::POST, &path, wire::JSON, &found.object)
                .await
                .with_context(|| format!("create {label}"))?;
            output::line(&format!("{label} created"))?;
        }
    }
    Ok(())
}

/// Says who writes, and that unknown fields are errors.
fn strict() -> Query {
    let mut query = Query::default();
    query.add("fieldManager", "orchctl");
    query.add("fieldValidation", "Strict");
    query
}

/// Applies a manifest that is part of this program.
pub(crate) async fn apply_text(
    client: &Client,
    text: &str,
    namespace: &str,
) -> anyhow::Result<Vec<String>> {
    apply_manifests(client, manifest::parse(text)?, namespace).await
}

/// Applies one file; returns a line per object, for example `deployment.apps/web created`.
async fn apply_file(client: &Client, file: &Path, namespace: &str) -> anyhow::Result<Vec<String>> {
    apply_manifests(client, manifest::read(file)?, namespace).await
}

async fn apply_manifests(
    client: &Client,
    manifests: Vec<Manifest>,
    namespace: &str,
) -> anyhow::Result<Vec<String>> {
    let resources = Resources::discover(client).await?;
    // First all kinds, so that a mistake in the last object does not leave the first ones applied.
    let known: Vec<(&Resource, &Manifest)> = manifests
        .iter()
        .map(|found| Ok((resources.of_kind(&found.api_version, &found.kind)?, found)))
        .collect::<anyhow::Result<_>>()?;
    let mut lines = Vec::new();
    for (resource, found) in known {
        let outcome = apply_one(client, resource, found, namespace)
            .await
            .with_context(|| format!("apply {}/{}", resource.qualified(), found.name))?;
        lines.push(format!("{}/{} {outcome}", resource.qualified(), found.name));
    }
    Ok(lines)
}

async fn apply_one(
    client: &Client,
    resource: &Resource,
    found: &Manifest,
    namespace: &str,
) -> anyhow::Result<&'static str> {
    let namespace = found.namespace.as_deref().unwrap_or(namespace);
    let mut wanted = found.object.clone();
    annotate(&mut wanted, &found.object)?;
    let query = strict();
    let path = resource.object_path(namespace, &found.name);
    let Some(live) = wire::get_opt(client, &path).await? else {
        let path = query.append_to(&resource.path(Some(namespace)));
        wire::send(client, http::Method::POST, &path, wire::JSON, &wanted).await?;
        return Ok("created");
    };
    let last: Value = live["metadata"]["annotations"][LAST_APPLIED]
        .as_str()
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or(Value::Null);
    let mut patch = Value::Null;
    removed(&last, &found.object, &mut patch);
    let patch = overlay(patch, wanted);
    let after =
        wire::send(client, http::Method::PATCH, &query.append_to(&path), wire::MERGE_PATCH, &patch)
            .await?;
    let same = after["metadata"]["resourceVersion"] == live["metadata"]["resourceVersion"];
    Ok(if same { "unchanged" } else { "configured" })
}

fn annotate(wanted: &mut Value, applied: &Value) -> anyhow::Result<()> {
    let mut plain = applied.clone();
    if let Some(annotations) =
        plain["metadata"].get_mut("annotations").and_then(Value::as_object_mut)
    {
        annotations.shift_remove(LAST_APPLIED);
    }
    let text = format!("{}\n", serde_json::to_string(&plain)?);
    let metadata = wanted["metadata"].as_object_mut().context("metadata is no object")?;
    let annotations = metadata.entry("annotations").or_insert_with(|| json!({}));
    if annotations.is_null() {
        *annotations = json!({});
    }
    annotations[LAST_APPLIED] = Value::String(text);
    Ok(())
}

/// Nulls for what the last manifest set and the new one does not.
fn removed(last: &Value, new: &Value, patch: &mut Value) {
    let (Value::Object(last), Value::Object(new)) = (last, new) else { return };
    let mut nulls = Map::new();
    for (key, before) in last {
        match new.get(key) {
            None => {
                nulls.insert(key.clone(), Value::Null);
            }
            Some(now) => {
                let mut below = Value::Null;
                removed(before, now, &mut below);
                if !below.is_null() {
                    nulls.insert(key.clone(), below);
                }
            }
        }
    }
    if !nulls.is_empty() {
        *patch = Value::Object(nulls);
    }
}

/// `top` over `base`, keeping the nulls of `base`: they are what deletes.
fn overlay(base: Value, top: Value) -> Value {
    match (base, top) {
        (Value::Object(mut base), Value::Object(top)) => {
            for (key, value) in top {
                let below = base.shift_remove(&key).unwrap_or(Value::Null);
                base.insert(key, overlay(below, value));
            }
            Value::Object(base)
        }
        (_, top) => top,
    }
}

pub(crate) async fn delete(client: &Client, flags: DeleteFlags) -> anyhow::Result<()> {
    let resources = Resources::discover(client).await?;
    let namespace = flags.namespace.namespace.as_str();
    let mut targets: Vec<(&Resource, String, String)> = Vec::new();
    for file in &flags.filename {
        for found in manifest::read(file)? {
            let place = found.namespace.clone().unwrap_or_else(|| namespace.to_owned());
            targets.push((resources.of_kind(&found.api_version, &found.kind)?, place, found.name));
        }
    }
    match flags.what.as_slice() {
        [] => {}
        [one] => {
            let (kind, name) = resource::kind_and_name(one, None)?;
            targets.push((resources.find(kind)?, namespace.to_owned(), name.to_owned()));
        }
        [kind, names @ ..] => {
            let found = resources.find(kind)?;
            targets.extend(names.iter().map(|name| (found, namespace.to_owned(), name.clone())));
        }
    }
    if targets.is_empty() {
        return Err(output::usage("name what to delete, as KIND/NAME or with -f FILE"));
    }
    let mut options =
        json!({ "apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background" });
    if let Some(seconds) = flags.grace_period {
        options["gracePeriodSeconds"] = json!(seconds);
    }
    for (resource, place, name) in &targets {
        let path = resource.object_path(place, name);
        let label = format!("{}/{name}", resource.qualified());
        match wire::send(client, http::Method::DELETE, &path, wire::JSON, &options).await {
            Ok(_) => {}
            Err(error)
                if error
                    .downcast_ref::<orch_client::Error>()
                    .is_some_and(|error| error.is_not_found()) =>
            {
                if flags.ignore_not_found {
                    continue;
                }
                return Err(resource.absent(name, place));
            }
            Err(error) => return Err(error.context(format!("delete {label}"))),
        }
        output::line(&format!("{label} deleted"))?;
    }
    if !flags.no_wait {
        for (resource, place, name) in &targets {
            wait_gone(client, &resource.object_path(place, name), name).await?;
        }
    }
    Ok(())
}

async fn wait_gone(client: &Client, path: &str, name: &str) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + DELETE_LIMIT;
    let mut uid = None;
    while let Some(object) = wire::get_opt(client, path).await? {
        let seen = object["metadata"]["uid"].as_str().map(str::to_owned);
        if *uid.get_or_insert_with(|| seen.clone()) != seen {
            return Ok(()); // Another object of the same name.
        }
        if tokio::time::Instant::now() > deadline {
            bail!(
                "{name} is still there after {} s; its finalizers are {}",
                DELETE_LIMIT.as_secs(),
                object["metadata"]["finalizers"]
            );
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_left_the_manifest_is_removed_and_the_rest_stays() {
        let last = json!({ "spec": { "replicas": 3, "paused": true }, "metadata": { "labels": { "a": "1", "b": "2" } } });
        let new = json!({ "spec": { "replicas": 2 }, "metadata": { "labels": { "a": "1" } } });
        let mut patch = Value::Null;
        removed(&last, &new, &mut patch);
        let patch = overlay(patch, new);

        let mut live = json!({
            "spec": { "replicas": 3, "paused": true, "minReadySeconds": 1 },
            "metadata": { "labels": { "a": "1", "b": "2", "theirs": "x" } },
        });
        json_patch::merge(&mut live, &patch);
        assert_eq!(
            live,
            json!({
                "spec": { "replicas": 2, "minReadySeconds": 1 },
                "metadata": { "labels": { "a": "1", "theirs": "x" } },
            })
        );
    }
}
