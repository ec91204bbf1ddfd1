//! `orchctl get`: the server renders tables (columns come from it), this file only prints them.

use orch_client::Client;
use serde_json::{Value, json};

use super::resource::{Resource, Resources};
use super::wire::{self, Query};
use crate::output;

const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io";

#[derive(clap::Args)]
pub(crate) struct Flags {
    /// Resources, for example `pods` or `nodes,pods`, or KIND/NAME
    what: String,
    /// Names of objects
    names: Vec<String>,
    #[command(flatten)]
    namespace: super::NamespaceFlag,
    /// All namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Label selector, for example app=web
    #[arg(short = 'l', long)]
    selector: Option<String>,
    /// Field selector, for example spec.nodeName=node-1
    #[arg(long)]
    field_selector: Option<String>,
    /// Output format
    #[arg(short, long, value_enum)]
    output: Option<Format>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Wide,
    Json,
    Yaml,
    Name,
}

pub(crate) async fn run(client: &Client, mut flags: Flags) -> anyhow::Result<()> {
    let resources = Resources::discover(client).await?;
    if let Some((kind, name)) = flags.what.clone().split_once('/') {
        flags.names.insert(0, name.to_owned());
        kind.clone_into(&mut flags.what);
    }
    let found = resources.find_all(&flags.what)?;
    if found.len() > 1 && !flags.names.is_empty() {
        return Err(output::usage(format!(
            "names go with one resource only, not with {}",
            flags.what
        )));
    }
    match flags.output {
        None | Some(Format::Wide) => tables(client, &found, &flags).await,
        Some(format) => objects(client, &found, &flags, format).await,
    }
}

fn query(flags: &Flags) -> Query {
    let mut query = Query::default();
    if let Some(selector) = &flags.selector {
        query.add("labelSelector", selector);
    }
    if let Some(selector) = &flags.field_selector {
        query.add("fieldSelector", selector);
    }
    query
}

fn collection(resource: &Resource, flags: &Flags) -> String {
    let namespace = (!flags.all_namespaces).then_some(flags.namespace.namespace.as_str());
    query(flags).append_to(&resource.path(namespace))
}

async fn tables(client: &Client, found: &[&Resource], flags: &Flags) -> anyhow::Result<()> {
    let mut printed = 0;
    for resource in found {
        let mut documents = Vec::new();
        if flags.names.is_empty() {
            documents.push(wire::get_as(client, &collection(resource, flags), TABLE).await?);
        }
        for name in &flags.names {
            let path = resource.object_path(&flags.namespace.namespace, name);
            documents.push(
                wire::get_as(client, &path, TABLE)
                    .await
                    .map_err(|error| absent(error, resource, name, flags))?,
            );
        }
        let namespaces = flags.all_namespaces && resource.namespaced;
        let (headings, rows) = columns(&documents, flags.output == Some(Format::Wide), namespaces);
        if rows.is_empty() {
            continue;
        }
        if printed > 0 {
            output::line("")?;
        }
        printed += 1;
        let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
        output::table(&headings, rows)?;
    }
    if printed == 0 {
        let place = if flags.all_namespaces {
            "the cluster".to_owned()
        } else {
            format!("namespace {}", flags.namespace.namespace)
        };
        eprintln!("nothing found in {place}");
    }
    Ok(())
}

fn absent(error: anyhow::Error, resource: &Resource, name: &str, flags: &Flags) -> anyhow::Error {
    match error.downcast_ref::<orch_client::Error>() {
        Some(answer) if answer.is_not_found() => resource.absent(name, &flags.namespace.namespace),
        _ => error,
    }
}

/// Headings and cells of server-side tables (meta.k8s.io/v1 Table).
fn columns(documents: &[Value], wide: bool, namespaces: bool) -> (Vec<String>, Vec<Vec<String>>) {
    let mut headings = Vec::new();
    let mut rows = Vec::new();
    for document in documents {
        let definitions: &[Value] =
            document["columnDefinitions"].as_array().map_or(&[], Vec::as_slice);
        let shown: Vec<usize> = (0..definitions.len())
            .filter(|index| wide || definitions[*index]["priority"].as_i64().unwrap_or(0) == 0)
            .collect();
        if headings.is_empty() {
            headings.extend(namespaces.then(|| "NAMESPACE".to_owned()));
            headings.extend(shown.iter().map(|index| {
                definitions[*index]["name"].as_str().unwrap_or_default().to_uppercase()
            }));
        }
        for row in document["rows"].as_array().into_iter().flatten() {
            let mut cells = Vec::new();
            if namespaces {
                cells.push(
                    row["object"]["metadata"]["namespace"].as_str().unwrap_or_default().to_owned(),
                );
            }
            cells.extend(shown.iter().map(|index| match &row["cells"][*index] {
                Value::String(text) => text.clone(),
                Value::Null => String::new(),
                other => other.to_string(),
            }));
            rows.push(cells);
        }
    }
    (headings, rows)
}

async fn objects(
    client: &Client,
    found: &[&Resource],
    flags: &Flags,
    format: Format,
) -> anyhow::Result<()> {
    let mut items = Vec::new();
    for resource in found {
        if flags.names.is_empty() {
            let list = wire::get(client, &collection(resource, flags)).await?;
            for item in list["items"].as_array().into_iter().flatten() {
                let mut item = item.clone();
                item["apiVersion"] = json!(resource.api_version());
                item["kind"] = json!(resource.kind);
                items.push((*resource, item));
            }
        }
        for name in &flags.names {
            let path = resource.object_path(&flags.namespace.namespace, name);
            let item = wire::get(client, &path)
                .await
                .map_err(|error| absent(error, resource, name, flags))?;
            items.push((*resource, item));
        }
    }
    if format == Format::Name {
        for (resource, item) in &items {
            output::line(&format!(
                "{}/{}",
                resource.qualified(),
                item["metadata"]["name"].as_str().unwrap_or_default()
            ))?;
        }
        return Ok(());
    }
    let document = if flags.names.len() == 1 && items.len() == 1 {
        items.remove(0).1
    } else {
        let items: Vec<Value> = items.into_iter().map(|(_, item)| item).collect();
        json!({ "apiVersion": "v1", "kind": "List", "items": items })
    };
    match format {
        Format::Yaml => output::line(super::manifest::to_yaml(&document)?.trim_end()),
        _ => output::line(&serde_json::to_string_pretty(&document)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_columns_and_namespaces_appear_only_when_asked_for() {
        let table = json!({
            "columnDefinitions": [{ "name": "Name" }, { "name": "IP", "priority": 1 }],
            "rows": [{ "cells": ["web-0", "10.244.1.7"], "object": { "metadata": { "namespace": "shop" } } }],
        });
        let (headings, rows) = columns(std::slice::from_ref(&table), false, false);
        assert_eq!((headings, rows), (vec!["NAME".to_owned()], vec![vec!["web-0".to_owned()]]));
        let (headings, rows) = columns(&[table], true, true);
        assert_eq!(headings, ["NAMESPACE", "NAME", "IP"]);
        assert_eq!(rows, [["shop", "web-0", "10.244.1.7"]]);
    }
}
