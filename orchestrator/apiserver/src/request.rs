//! What a request asks for, read from its method and URL (API concepts, "Resource URIs").

use http::Method;
use orch_api::ApiError;

/// A request, taken apart.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct RequestInfo {
    pub(crate) verb: Verb,
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) resource: String,
    pub(crate) subresource: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Verb {
    #[default]
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
        }
    }
}

/// The query string, decoded. Empty pairs (`?&a=b`) are ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(text: Option<&str>) -> Self {
        let pairs = text
            .unwrap_or_default()
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                (decode(key), decode(value))
            })
            .collect();
        Self(pairs)
    }

    /// The first value of a key, unless it is empty.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }

    pub(crate) fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// A boolean as Go's `strconv.ParseBool` reads it; present without value means true.
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.0.iter().any(|(name, value)| {
            name == key && matches!(value.as_str(), "" | "1" | "t" | "T" | "true" | "TRUE" | "True")
        })
    }

    /// # Errors
    /// The value is no number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<i64>, ApiError> {
        self.get(key)
            .map(|text| {
                text.parse().map_err(|_| {
                    ApiError::bad_request(format!(
                        "unable to decode query parameter {key}: {text:?} is no number"
                    ))
                })
            })
            .transpose()
    }

    /// The same query with one more requirement of a selector key.
    pub(crate) fn with(&self, key: &str, value: &str) -> Self {
        let mut pairs: Vec<(String, String)> =
            self.0.iter().filter(|(name, _)| name != key).cloned().collect();
        let joined = match self.get(key) {
            Some(before) => format!("{before},{value}"),
            None => value.to_owned(),
        };
        pairs.push((key.to_owned(), joined));
        Self(pairs)
    }

    /// The same query with the values of a key rewritten.
    pub(crate) fn map(&self, key: &str, rewrite: impl Fn(&str) -> String) -> Self {
        let pair = |(name, value): &(String, String)| {
            (name.clone(), if name == key { rewrite(value) } else { value.clone() })
        };
        Self(self.0.iter().map(pair).collect())
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(name, _)| name == key)
    }
}

pub(crate) fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while index < bytes.len() {
        let escaped = (bytes[index] == b'%')
            .then(|| {
                text.get(index + 1..index + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok())
            })
            .flatten();
        if let Some(byte) = escaped {
            out.push(byte);
            index += 3;
        } else {
            out.push(if bytes[index] == b'+' { b' ' } else { bytes[index] });
            index += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Takes a path below `/api` or `/apis` apart; `None` when it names no resource.
pub(crate) fn parse(method: &Method, path: &str, query: &Query) -> Option<RequestInfo> {
    let parts: Vec<String> =
        path.split('/').filter(|part| !part.is_empty()).map(decode_path).collect();
    let mut info = RequestInfo::default();
    let mut rest: &[String] = match parts.first()?.as_str() {
        "api" => {
            info.version.clone_from(parts.get(1)?);
            &parts[2..]
        }
        "apis" => {
            info.group.clone_from(parts.get(1)?);
            info.version.clone_from(parts.get(2)?);
            &parts[3..]
        }
        _ => return None,
    };
    // The oldest form of a watch: /api/v1/watch/…
    let old_watch = rest.first().is_some_and(|part| part == "watch");
    if old_watch {
        rest = &rest[1..];
    }
    let core_namespaces =
        info.group.is_empty() && rest.first().is_some_and(|part| part == "namespaces");
    if rest.first().is_some_and(|part| part == "namespaces")
        && rest.len() > 2
        && !(core_namespaces && is_namespace_part(rest))
    {
        info.namespace.clone_from(&rest[1]);
        rest = &rest[2..];
    }
    info.resource.clone_from(rest.first()?);
    if let Some(name) = rest.get(1) {
        info.name.clone_from(name);
    }
    if rest.len() > 2 {
        // What follows `proxy` is for what is behind it.
        info.subresource = if rest[2] == "proxy" { rest[2].clone() } else { rest[2..].join("/") };
    }
    if core_namespaces && info.resource == "namespaces" {
        info.namespace.clone_from(&info.name);
    }
    // A slash that was escaped would reach into other keys of the store.
    if info.name.contains('/') || info.namespace.contains('/') {
        return None;
    }
    let collection = info.name.is_empty();
    info.verb = match *method {
        Method::GET | Method::HEAD
            if old_watch || (query.flag("watch") && info.subresource.is_empty()) =>
        {
            Verb::Watch
        }
        Method::GET | Method::HEAD if collection => Verb::List,
        Method::GET | Method::HEAD => Verb::Get,
        Method::POST => Verb::Create,
        Method::PUT => Verb::Update,
        Method::PATCH => Verb::Patch,
        Method::DELETE if collection => Verb::DeleteCollection,
        Method::DELETE => Verb::Delete,
        _ => return None,
    };
    Some(info)
}

/// `/namespaces/NAME/status` and `/finalize` are parts of the Namespace itself.
fn is_namespace_part(rest: &[String]) -> bool {
    rest.len() == 3 && matches!(rest[2].as_str(), "status" | "finalize")
}

fn decode_path(part: &str) -> String {
    // A plus is a plus in a path.
    decode(&part.replace('+', "%2B"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(method: Method, url: &str) -> RequestInfo {
        let (path, query) =
            url.split_once('?').map_or((url, None), |(path, query)| (path, Some(query)));
        parse(&method, path, &Query::parse(query)).expect(url)
    }

    #[test]
    fn urls_by_table() {
        for (method, url, verb, group, resource, subresource, namespace, name) in [
            (Method::GET, "/api/v1/pods", "list", "", "pods", "", "", ""),
            (Method::GET, "/api/v1/namespaces/a/pods?watch=1", "watch", "", "pods", "", "a", ""),
            (
                Method::GET,
                "/api/v1/namespaces/a/pods/b/log?follow=true",
                "get",
                "",
                "pods",
                "log",
                "a",
                "b",
            ),
            (
                Method::POST,
                "/api/v1/namespaces/a/pods/b/binding",
                "create",
                "",
                "pods",
                "binding",
                "a",
                "b",
            ),
            (
                Method::DELETE,
                "/apis/apps/v1/namespaces/a/deployments",
                "deletecollection",
                "apps",
                "deployments",
                "",
                "a",
                "",
            ),
            (
                Method::PUT,
                "/api/v1/namespaces/a/finalize",
                "update",
                "",
                "namespaces",
                "finalize",
                "a",
                "a",
            ),
            (Method::GET, "/api/v1/namespaces/a", "get", "", "namespaces", "", "a", "a"),
            (Method::PATCH, "/api/v1/nodes/n/status", "patch", "", "nodes", "status", "", "n"),
        ] {
            let found = info(method, url);
            assert_eq!(
                (
                    found.verb.as_str(),
                    found.group.as_str(),
                    found.resource.as_str(),
                    found.subresource.as_str(),
                    found.namespace.as_str(),
                    found.name.as_str()
                ),
                (verb, group, resource, subresource, namespace, name),
                "{url}"
            );
        }
    }

    #[test]
    fn an_escaped_slash_is_no_part_of_a_name() {
        let parse = |path| parse(&Method::GET, path, &Query::default());
        assert_eq!(parse("/api/v1/namespaces/a%2Fb/pods/c"), None);
        assert_eq!(parse("/api/v1/namespaces/a/pods/..%2fb"), None);
        assert!(parse("/api/v1/namespaces/a/pods/b%2Bc").is_some());
    }

    #[test]
    fn queries_are_decoded_and_empty_pairs_ignored() {
        let query =
            Query::parse(Some("&labelSelector=a%20in+%28b%2Cc%29&&watch&limit=x&broken=%zz"));
        assert_eq!(query.get("labelSelector"), Some("a in (b,c)"));
        assert!(query.flag("watch") && query.number("limit").is_err());
        assert_eq!(query.get("broken"), Some("%zz"));
    }
}
