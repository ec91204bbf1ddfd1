//! Rules of volumes.

use std::collections::BTreeSet;

use serde_json::Value;

use super::super::{items, one_of};
use super::container::{field_ref, required_text};
use crate::status::FieldError;
use crate::{Quantity, names};

/// Fields of a pod that a file can be made of.
const FILE_FIELDS: [&str; 5] = [
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
];
const HOST_PATH_TYPES: [&str; 8] = [
    "",
    "BlockDevice",
    "CharDevice",
    "Directory",
    "DirectoryOrCreate",
    "File",
    "FileOrCreate",
    "Socket",
];
/// A ServiceAccount token lives at least ten minutes.
const TOKEN_SECS_LEAST: i64 = 600;

/// Checks all volumes; returns their names.
pub(super) fn volumes(spec: &Value, at: &str, errors: &mut Vec<FieldError>) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    for (index, volume) in items(&spec["volumes"]) {
        let at = format!("{at}[{index}]");
        let name = volume["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.push(FieldError::required(format!("{at}.name"), ""));
        } else if let Err(why) = names::is_dns1123_label(name) {
            errors.push(FieldError::invalid(format!("{at}.name"), &volume["name"], why));
        }
        if !name.is_empty() && !seen.insert(name.to_owned()) {
            errors.push(FieldError::duplicate(format!("{at}.name"), &volume["name"]));
        }
        let mut sources =
            volume.as_object().into_iter().flatten().filter(|(key, _)| *key != "name");
        if let Some((kind, body)) = sources.next() {
            source(kind, body, &format!("{at}.{kind}"), errors);
        }
        for (kind, _) in sources {
            errors.push(FieldError::forbidden(
                format!("{at}.{kind}"),
                "may not specify more than 1 volume type",
            ));
        }
    }
    seen
}

fn source(kind: &str, body: &Value, at: &str, errors: &mut Vec<FieldError>) {
    match kind {
        "configMap" => {
            required_text(body, "name", at, errors);
            keys(body, at, errors);
        }
        "secret" => {
            required_text(body, "secretName", at, errors);
            keys(body, at, errors);
        }
        "persistentVolumeClaim" => required_text(body, "claimName", at, errors),
        "hostPath" => {
            required_text(body, "path", at, errors);
            if body["path"].as_str().is_some_and(|path| path.split('/').any(|part| part == "..")) {
                errors.push(FieldError::invalid(
                    format!("{at}.path"),
                    &body["path"],
                    "must not contain '..'",
                ));
            }
            one_of(&body["type"], &format!("{at}.type"), &HOST_PATH_TYPES, errors);
        }
        "emptyDir" => {
            if let Some(limit) = body.get("sizeLimit") {
                match Quantity::parse(limit.as_str().unwrap_or_default()) {
                    Ok(size) if !size.is_negative() => {}
                    Ok(_) => errors.push(FieldError::forbidden(
                        format!("{at}.sizeLimit"),
                        "SizeLimit field must be a valid resource quantity",
                    )),
                    Err(error) => {
                        errors.push(FieldError::invalid(
                            format!("{at}.sizeLimit"),
                            limit,
                            error.to_string(),
                        ));
                    }
                }
            }
        }
        "downwardAPI" => {
            mode(&body["defaultMode"], &format!("{at}.defaultMode"), errors);
            downward_items(body, at, errors);
        }
        "projected" => projected(body, at, errors),
        "nfs" => {
            required_text(body, "server", at, errors);
            required_text(body, "path", at, errors);
        }
        _ => {}
    }
}

fn mode(value: &Value, field: &str, errors: &mut Vec<FieldError>) {
    if let Some(bits) = value.as_i64()
        && !(0..=0o777).contains(&bits)
    {
        let detail = "must be a number between 0 and 0777 (octal), both inclusive";
        errors.push(FieldError::invalid(field, value, detail));
    }
}

/// Files picked from a ConfigMap or Secret.
fn keys(body: &Value, at: &str, errors: &mut Vec<FieldError>) {
    mode(&body["defaultMode"], &format!("{at}.defaultMode"), errors);
    for (index, item) in items(&body["items"]) {
        let at = format!("{at}.items[{index}]");
        required_text(item, "key", &at, errors);
        file(item, &at, errors);
    }
}

fn file(item: &Value, at: &str, errors: &mut Vec<FieldError>) {
    mode(&item["mode"], &format!("{at}.mode"), errors);
    match item["path"].as_str().filter(|path| !path.is_empty()) {
        None => errors.push(FieldError::required(format!("{at}.path"), "")),
        Some(path) => {
            let field = format!("{at}.path");
            relative_path(path, &item["path"], &field, errors);
            if path.starts_with("..") && path != ".." && !path.starts_with("../") {
                errors.push(FieldError::invalid(field, &item["path"], "must not start with '..'"));
            }
        }
    }
}

/// A path that stays below where it starts.
pub(super) fn relative_path(path: &str, value: &Value, field: &str, errors: &mut Vec<FieldError>) {
    if path.starts_with('/') {
        errors.push(FieldError::invalid(field, value, "must be a relative path"));
    }
    if path.split('/').any(|part| part == "..") {
        errors.push(FieldError::invalid(field, value, "must not contain '..'"));
    }
}

fn downward_items(body: &Value, at: &str, errors: &mut Vec<FieldError>) {
    for (index, item) in items(&body["items"]) {
        let at = format!("{at}.items[{index}]");
        file(item, &at, errors);
        match (item["fieldRef"].is_null(), item["resourceFieldRef"].is_null()) {
            (false, true) => {
                field_ref(&item["fieldRef"], &format!("{at}.fieldRef"), &FILE_FIELDS, errors)
            }
            (true, false) => {
                let at = format!("{at}.resourceFieldRef");
                required_text(&item["resourceFieldRef"], "containerName", &at, errors);
                required_text(&item["resourceFieldRef"], "resource", &at, errors);
            }
            (true, true) => {
                errors.push(FieldError::required(
                    at,
                    "one of fieldRef and resourceFieldRef is required",
                ));
            }
            (false, false) => {
                let detail = "fieldRef and resourceFieldRef can not be specified simultaneously";
                errors.push(FieldError::invalid(at, &Value::String("resource".to_owned()), detail));
            }
        }
    }
}

fn projected(body: &Value, at: &str, errors: &mut Vec<FieldError>) {
    mode(&body["defaultMode"], &format!("{at}.defaultMode"), errors);
    for (index, part) in items(&body["sources"]) {
        let at = format!("{at}.sources[{index}]");
        let mut kinds = part.as_object().into_iter().flatten();
        let first = kinds.next();
        for (kind, _) in kinds {
            errors.push(FieldError::forbidden(
                format!("{at}.{kind}"),
                "may not specify more than 1 volume type",
            ));
        }
        let Some((kind, source)) = first else {
            continue;
        };
        let at = format!("{at}.{kind}");
        match kind.as_str() {
            "configMap" | "secret" => {
                required_text(source, "name", &at, errors);
                keys(source, &at, errors);
            }
            "downwardAPI" => downward_items(source, &at, errors),
            "serviceAccountToken" => {
                if source["expirationSeconds"]
                    .as_i64()
                    .is_some_and(|seconds| seconds < TOKEN_SECS_LEAST)
                {
                    errors.push(FieldError::invalid(
                        format!("{at}.expirationSeconds"),
                        &source["expirationSeconds"],
                        "may not specify a duration less than 10 minutes",
                    ));
                }
                file(source, &at, errors);
            }
            _ => {}
        }
    }
}
