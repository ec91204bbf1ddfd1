//! Rules of ConfigMaps and Secrets.

use serde_json::{Value, json};

use super::{immutable, too_long};
use crate::status::FieldError;

/// Upper bound of the data of a ConfigMap or Secret.
const DATA_LIMIT_BYTES: usize = 1024 * 1024;

pub(super) fn config_map(object: &Value, errors: &mut Vec<FieldError>) {
    let (texts, binary) = (&object["data"], &object["binaryData"]);
    let mut size = keys(texts, "data", errors);
    keys(binary, "binaryData", errors);
    for (key, value) in binary.as_object().into_iter().flatten() {
        if texts.get(key).is_some() {
            let detail = format!("duplicate of key present in data[{key}]");
            errors.push(FieldError::invalid(format!("binaryData[{key}]"), &json!(key), detail));
        }
        size += bytes(value, &format!("binaryData[{key}]"), errors);
    }
    if size > DATA_LIMIT_BYTES {
        errors.push(too_long("", DATA_LIMIT_BYTES));
    }
}

pub(super) fn secret(object: &Value, errors: &mut Vec<FieldError>) {
    let data = &object["data"];
    keys(data, "data", errors);
    let mut size = 0;
    for (key, value) in data.as_object().into_iter().flatten() {
        size += bytes(value, &format!("data[{key}]"), errors);
    }
    if size > DATA_LIMIT_BYTES {
        errors.push(too_long("data", DATA_LIMIT_BYTES));
    }
    let required: &[&str] = match object["type"].as_str().unwrap_or_default() {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        "kubernetes.io/basic-auth" => {
            if data.get("username").is_none() && data.get("password").is_none() {
                errors.push(FieldError::required("data[username]", ""));
                errors.push(FieldError::required("data[password]", ""));
            }
            &[]
        }
        "kubernetes.io/service-account-token" => {
            let account = &object["metadata"]["annotations"]["kubernetes.io/service-account.name"];
            if account.as_str().is_none_or(str::is_empty) {
                let field = "metadata.annotations[kubernetes.io/service-account.name]";
                errors.push(FieldError::required(field, ""));
            }
            &[]
        }
        _ => &[],
    };
    for key in required {
        if data.get(*key).is_none() {
            errors.push(FieldError::required(format!("data[{key}]"), ""));
        }
    }
}

/// An immutable one stays as it is, and stays immutable. A Secret's type never changes.
pub(super) fn update(kind: &str, new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    if kind == "Secret" {
        immutable("type", &new["type"], &old["type"], errors);
    }
    if old["immutable"] != true {
        return;
    }
    for field in ["immutable", "data", "binaryData"] {
        if new[field] != old[field] {
            errors.push(FieldError::forbidden(field, "field is immutable when `immutable` is set"));
        }
    }
}

/// Checks the keys; returns the length of all values as they are written.
fn keys(map: &Value, field: &str, errors: &mut Vec<FieldError>) -> usize {
    let mut size = 0;
    for (key, value) in map.as_object().into_iter().flatten() {
        if let Err(why) = is_config_key(key) {
            errors.push(FieldError::invalid(format!("{field}[{key}]"), &json!(key), why));
        }
        size += value.as_str().map_or(0, str::len);
    }
    size
}

fn is_config_key(key: &str) -> Result<(), String> {
    if key.len() > 253 {
        return Err("must be no more than 253 characters".to_owned());
    }
    if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Err("a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')".to_owned());
    }
    match key {
        "." => Err("must not be '.'".to_owned()),
        ".." => Err("must not be '..'".to_owned()),
        _ if key.starts_with("..") => Err("must not start with '..'".to_owned()),
        _ => Ok(()),
    }
}

/// Checks that a value is base64 (RFC 4648 §4, padded); returns how many bytes it stands for. A value that no client
/// can decode would stop the caches of all of them.
fn bytes(value: &Value, field: &str, errors: &mut Vec<FieldError>) -> usize {
    let text: Vec<u8> = value
        .as_str()
        .unwrap_or_default()
        .bytes()
        .filter(|b| !matches!(b, b'\r' | b'\n'))
        .collect();
    let padding = text.iter().rev().take_while(|b| **b == b'=').count();
    let digits = &text[..text.len() - padding];
    let good = text.len().is_multiple_of(4)
        && padding <= 2
        && digits.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/'));
    if !good {
        errors.push(FieldError::invalid(field, &json!("<base64>"), "illegal base64 data"));
        return 0;
    }
    text.len() / 4 * 3 - padding
}
