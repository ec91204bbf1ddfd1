//! events.k8s.io/v1: the same Events as in the core group, with newer field names.
//!
//! They are stored in the core form. A request for the newer one is rewritten into a request for the stored one, and
//! its answer is rewritten back; no other handler knows of it.

use std::convert::Infallible;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, header};
use http_body_util::BodyExt as _;
use orch_api::ApiError;
use orch_client::Body;
use serde_json::{Map, Value, json};

use crate::decode;
use crate::request::{Query, RequestInfo, Verb};

/// The newer group.
pub(crate) const GROUP: &str = "events.k8s.io";
const API_VERSION: &str = "events.k8s.io/v1";

/// Names of the same field: newer, stored.
const FIELDS: [(&str, &str); 7] = [
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
];

fn stored_name(newer: &str) -> Option<&'static str> {
    FIELDS.iter().find(|(known, _)| *known == newer).map(|(_, stored)| *stored)
}

fn newer_name(stored: &str) -> Option<&'static str> {
    FIELDS.iter().find(|(_, known)| *known == stored).map(|(newer, _)| *newer)
}

fn rename(object: &mut Value, name: impl Fn(&str) -> Option<&'static str>) {
    let Some(map) = object.as_object_mut() else { return };
    *map = std::mem::take(map)
        .into_iter()
        .map(|(key, value)| (name(&key).map_or(key, str::to_owned), value))
        .collect::<Map<_, _>>();
}

/// A request for the newer form, rewritten.
pub(crate) struct Rewritten {
    pub(crate) info: RequestInfo,
    pub(crate) headers: HeaderMap,
    pub(crate) query: Query,
    pub(crate) body: Bytes,
}

/// Rewrites a request into one for the stored form.
///
/// # Errors
/// The body cannot be decoded.
pub(crate) fn request(
    info: &RequestInfo,
    headers: &HeaderMap,
    query: &Query,
    body: &Bytes,
) -> Result<Rewritten, ApiError> {
    let mut out = Rewritten {
        info: RequestInfo { group: String::new(), ..info.clone() },
        headers: headers.clone(),
        query: query.map("fieldSelector", fields),
        body: body.clone(),
    };
    match info.verb {
        Verb::Create | Verb::Update => {
            let mut object = decode::object(headers, query, body, GROUP, "v1", "Event")?.object;
            stored_form(&mut object);
            out.body = object.to_string().into();
            let json = HeaderValue::from_static("application/json");
            out.headers.insert(header::CONTENT_TYPE, json);
        }
        Verb::Patch => {
            let mut patch = decode::yaml(body)?;
            match patch.as_array_mut() {
                Some(operations) => {
                    for operation in operations {
                        for key in ["path", "from"] {
                            if let Some(path) = operation[key].as_str() {
                                operation[key] = json!(stored_path(path));
                            }
                        }
                    }
                }
                None => stored_form(&mut patch),
            }
            out.body = patch.to_string().into();
        }
        _ => {}
    }
    Ok(out)
}

fn stored_form(object: &mut Value) {
    rename(object, stored_name);
    if object["apiVersion"] == API_VERSION {
        object["apiVersion"] = json!("v1");
    }
}

fn newer_form(object: &mut Value) {
    rename(object, newer_name);
    object["apiVersion"] = json!(API_VERSION);
}

/// A JSON pointer into the stored form.
fn stored_path(path: &str) -> String {
    let mut parts: Vec<&str> = path.split('/').collect();
    if let Some(first) = parts.get_mut(1)
        && let Some(stored) = stored_name(first)
    {
        *first = stored;
    }
    parts.join("/")
}

/// A field selector over the stored form.
fn fields(selector: &str) -> String {
    let one = |part: &str| match part.split_once('.') {
        Some((first, rest)) => {
            format!("{}.{rest}", stored_name(first.trim()).unwrap_or(first))
        }
        None => part.replacen("reportingController", "reportingComponent", 1),
    };
    selector.split(',').map(one).collect::<Vec<_>>().join(",")
}

/// Rewrites an answer of the stored form.
pub(crate) async fn answer(response: Response<Body>, watch: bool) -> Response<Body> {
    let (mut parts, body) = response.into_parts();
    if watch {
        // Each frame of a watch is one line.
        let body = body.map_frame(|frame| frame.map_data(|data| rewrite(&data)));
        return Response::from_parts(parts, body.boxed_unsync());
    }
    let body = match body.collect().await {
        Ok(collected) => rewrite(&collected.to_bytes()),
        Err(_) => Bytes::new(),
    };
    parts.headers.remove(header::CONTENT_LENGTH);
    let body = http_body_util::Full::new(body).map_err(|never: Infallible| match never {});
    Response::from_parts(parts, body.boxed_unsync())
}

fn rewrite(text: &[u8]) -> Bytes {
    let Ok(mut value) = serde_json::from_slice::<Value>(text) else {
        return Bytes::copy_from_slice(text);
    };
    if value["type"].is_string() && value["object"].is_object() && value["kind"].is_null() {
        convert(&mut value["object"]);
    } else {
        convert(&mut value);
    }
    let mut line = value.to_string();
    line.push('\n');
    line.into()
}

fn convert(value: &mut Value) {
    match (value["kind"].as_str(), value["apiVersion"].as_str()) {
        (Some("Event"), Some("v1")) => newer_form(value),
        (Some("EventList"), Some("v1")) => {
            value["apiVersion"] = json!(API_VERSION);
            value["items"].as_array_mut().into_iter().flatten().for_each(newer_form);
        }
        (Some("Table"), _) => {
            for row in value["rows"].as_array_mut().into_iter().flatten() {
                if row["object"].is_object() {
                    convert(&mut row["object"]);
                }
            }
        }
        (Some("Status"), _) if value["details"]["kind"] == "events" => {
            value["details"]["group"] = json!(GROUP);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_forms_lead_into_each_other() {
        let newer = json!({ "kind": "Event", "apiVersion": API_VERSION, "metadata": { "name": "a" }, "note": "text",
                            "regarding": { "kind": "Pod" }, "reportingController": "x", "deprecatedCount": 2 });
        let mut object = newer.clone();
        stored_form(&mut object);
        assert_eq!((&object["message"], &object["count"]), (&json!("text"), &json!(2)));
        assert_eq!(
            (&object["apiVersion"], &object["involvedObject"]["kind"]),
            (&json!("v1"), &json!("Pod"))
        );
        let line = rewrite(json!({ "type": "ADDED", "object": object }).to_string().as_bytes());
        let line: Value = serde_json::from_slice(&line).expect("JSON");
        assert_eq!(line["object"], newer);
    }

    #[test]
    fn selectors_and_pointers_are_renamed() {
        assert_eq!(
            fields("regarding.name=a,metadata.name=b,reportingController=c,reason=d"),
            "involvedObject.name=a,metadata.name=b,reportingComponent=c,reason=d"
        );
        assert_eq!(stored_path("/regarding/name"), "/involvedObject/name");
        assert_eq!(stored_path("/series"), "/series");
    }
}
