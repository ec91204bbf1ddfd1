//! meta.k8s.io/v1 `Table` and `PartialObjectMetadata`.

use serde_json::{Value, json};

use crate::printers;
use crate::resources::Resource;

/// A table; `columns` says whether the definitions are part of it.
pub(crate) fn table(resource: &Resource, rows: Vec<Value>, meta: &Value, columns: bool) -> Value {
    let definitions: Value = if columns {
        printers::columns(resource.plural)
            .iter()
            .map(|column| {
                json!({
                    "name": column.name,
                    "type": column.kind,
                    "format": column.format,
                    "description": column.name,
                    "priority": column.priority,
                })
            })
            .collect()
    } else {
        Value::Null
    };
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": meta,
        "columnDefinitions": definitions,
        "rows": rows,
    })
}

/// One row; `include` is the query's `includeObject`.
pub(crate) fn row(resource: &Resource, object: Value, include: &str) -> Value {
    let cells = printers::cells(resource.plural, &object, jiff::Timestamp::now());
    let mut row = json!({ "cells": cells });
    match include {
        "None" => {}
        "Object" => row["object"] = object,
        _ => row["object"] = partial(&object),
    }
    row
}

/// The metadata of an object.
pub(crate) fn partial(object: &Value) -> Value {
    json!({ "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"] })
}
