//! get and list (API concepts, "Resource versions", "Retrieving large results sets in chunks").

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::StatusCode;
use orch_api::{ApiError, FieldSelector, Selector};
use orch_client::Body;
use orch_store::cache::{Meta, Stale};
use orch_store::{Revision, StoreError, splice_resource_version};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::request::Query;
use crate::resources::Resource;
use crate::respond::{self, Form};
use crate::state::{Shared, Stored};
use crate::table;

/// How long a read waits for the cache to see a revision before it answers 504.
const FRESH_LIMIT: Duration = Duration::from_secs(3);
/// Objects read from the store at once when a later page is served at an old revision.
const STORE_PAGE: usize = 500;

/// Selectors of a list, watch or deletion of a collection.
#[derive(Debug, Clone)]
pub(crate) struct Filter {
    labels: Selector,
    fields: FieldSelector,
}

impl Filter {
    /// # Errors
    /// A selector does not parse, or names a field that cannot be selected by.
    pub(crate) fn parse(resource: &Resource, query: &Query) -> Result<Self, ApiError> {
        let labels = Selector::parse(query.get("labelSelector").unwrap_or_default())
            .map_err(|error| ApiError::bad_request(error.to_string()))?;
        let fields = FieldSelector::parse(query.get("fieldSelector").unwrap_or_default())
            .map_err(|error| ApiError::bad_request(error.to_string()))?;
        for requirement in fields.requirements() {
            if !resource.selectable(&requirement.field) {
                // kubectl puts the rest of upstream's sentence around it.
                return Err(ApiError::bad_request(format!(
                    "field label not supported: {}",
                    requirement.field
                )));
            }
        }
        Ok(Self { labels, fields })
    }

    pub(crate) fn matches(&self, meta: &Meta) -> bool {
        self.labels.matches(&meta.labels)
            && self.fields.matches(|field| match field {
                "metadata.name" => Some(meta.name.as_str()),
                "metadata.namespace" => Some(meta.namespace.as_str()),
                _ => meta.field(field),
            })
    }

    fn is_empty(&self) -> bool {
        self.labels.is_everything() && self.fields.requirements().is_empty()
    }
}

/// The key prefix of a namespace's objects, or of all.
pub(crate) fn scope(resource: &Resource, namespace: &str) -> String {
    if resource.namespaced && !namespace.is_empty() {
        format!("{}{namespace}/", resource.prefix())
    } else {
        resource.prefix()
    }
}

/// GET of one object.
pub(crate) async fn get(
    shared: &Shared,
    stored: &Stored,
    namespace: &str,
    name: &str,
    query: &Query,
    form: Form,
) -> Result<http::Response<Body>, ApiError> {
    let key = stored.resource.key(namespace, name);
    let absent = || ApiError::not_found(stored.resource.group, stored.resource.plural, name);
    let bytes = match query.get("resourceVersion") {
        None => {
            let (found, _) = shared.store.get(&key).await.map_err(|error| store_error(&error))?;
            let found = found.ok_or_else(absent)?;
            splice_resource_version(&found.value, found.mod_revision)
        }
        Some(version) => {
            wait_for(stored, parse_version(version)?).await?;
            stored.cache.get(&key).ok_or_else(absent)?.bytes.clone()
        }
    };
    Ok(match form {
        Form::Object => respond::bytes(StatusCode::OK, bytes),
        Form::Metadata => respond::json(StatusCode::OK, &table::partial(&parse(&bytes)?)),
        Form::Table => {
            let object = parse(&bytes)?;
            let version =
                object["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
            let include = query.get("includeObject").unwrap_or("Metadata");
            let rows = vec![table::row(stored.resource, object, include)];
            respond::json(
                StatusCode::OK,
                &table::table(stored.resource, rows, &json!({ "resourceVersion": version }), true),
            )
        }
    })
}

pub(crate) fn parse(bytes: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|error| ApiError::internal(format!("a stored object is no JSON: {error}")))
}

fn parse_version(text: &str) -> Result<Revision, ApiError> {
    text.parse::<Revision>().ok().filter(|version| *version >= 0).ok_or_else(|| {
        ApiError::bad_request(format!("Invalid value: {text:?}: resourceVersion is no number"))
    })
}

async fn wait_for(stored: &Stored, revision: Revision) -> Result<(), ApiError> {
    stored
        .cache
        .wait_for(revision, FRESH_LIMIT)
        .await
        .map_err(|_| ApiError::too_large_resource_version(revision, stored.cache.revision()))
}

/// Waits until the cache is as new as the store.
pub(crate) async fn fresh(stored: &Stored) -> Result<(), ApiError> {
    stored.cache.fresh(FRESH_LIMIT).await.map(|_| ()).map_err(|error| match error {
        Stale::Store(error) => store_error(&error),
        Stale::Behind { .. } => ApiError::service_unavailable(format!(
            "etcd does not tell what is newest within {} s; try again when it is up",
            FRESH_LIMIT.as_secs()
        )),
        Stale::Cancelled => ApiError::service_unavailable("the server is stopping"),
    })
}

pub(crate) fn store_error(error: &StoreError) -> ApiError {
    match error {
        StoreError::Compacted { .. } => {
            ApiError::expired("The resourceVersion for the provided list is too old.")
        }
        StoreError::Unavailable(why) => {
            ApiError::service_unavailable(format!("etcd does not answer: {why}"))
        }
        StoreError::TooLarge(why) => {
            ApiError::bad_request(format!("the object is too large for etcd: {why}"))
        }
        other => ApiError::internal(other),
    }
}

/// Where the next page starts.
#[derive(Serialize, Deserialize)]
struct Continue {
    v: String,
    rv: Revision,
    /// The first key, below the resource's prefix.
    start: String,
}

impl Continue {
    fn encode(rv: Revision, start: &str) -> String {
        let token = Self { v: "meta.k8s.io/v1".to_owned(), rv, start: start.to_owned() };
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).unwrap_or_default())
    }

    fn decode(text: &str) -> Result<Self, ApiError> {
        URL_SAFE_NO_PAD
            .decode(text.trim_end_matches('='))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok())
            .filter(|token| token.v == "meta.k8s.io/v1" && !token.start.contains(".."))
            .ok_or_else(|| ApiError::bad_request("continue key is not valid"))
    }
}

/// One page of matching objects.
struct Found {
    items: Vec<Bytes>,
    revision: Revision,
    /// First key of the next page, below the resource's prefix.
    next: Option<String>,
    remaining: Option<usize>,
}

/// GET of a collection.
pub(crate) async fn list(
    shared: &Shared,
    stored: &Stored,
    namespace: &str,
    query: &Query,
    form: Form,
) -> Result<http::Response<Body>, ApiError> {
    let filter = Filter::parse(stored.resource, query)?;
    let found = find(shared, stored, namespace, query, &filter).await?;
    let mut meta = json!({ "resourceVersion": found.revision.to_string() });
    if let Some(next) = &found.next {
        meta["continue"] = json!(Continue::encode(found.revision, next));
        if let Some(remaining) = found.remaining {
            meta["remainingItemCount"] = json!(remaining);
        }
    }
    let resource = stored.resource;
    Ok(match form {
        Form::Object => {
            let head = json!({ "kind": format!("{}List", resource.kind), "apiVersion": resource.api_version(), "metadata": meta });
            respond::bytes(StatusCode::OK, join(&head, &found.items))
        }
        Form::Metadata => {
            let items = found
                .items
                .iter()
                .map(|bytes| Ok(table::partial(&parse(bytes)?)))
                .collect::<Result<Vec<_>, ApiError>>()?;
            let list = json!({ "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": meta, "items": items });
            respond::json(StatusCode::OK, &list)
        }
        Form::Table => {
            let include = query.get("includeObject").unwrap_or("Metadata");
            let rows = found
                .items
                .iter()
                .map(|bytes| Ok(table::row(resource, parse(bytes)?, include)))
                .collect::<Result<Vec<_>, ApiError>>()?;
            respond::json(StatusCode::OK, &table::table(resource, rows, &meta, true))
        }
    })
}

/// A list without parsing its items: they are put behind each other as they are.
fn join(head: &Value, items: &[Bytes]) -> Bytes {
    let mut head = serde_json::to_vec(head).unwrap_or_default();
    head.pop();
    let mut out = BytesMut::with_capacity(
        head.len() + 16 + items.iter().map(|item| item.len() + 1).sum::<usize>(),
    );
    out.put_slice(&head);
    out.put_slice(b",\"items\":[");
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.put_u8(b',');
        }
        out.put_slice(item);
    }
    out.put_slice(b"]}\n");
    out.freeze()
}

/// Reads a page by the rules of `resourceVersion`, `resourceVersionMatch`, `limit` and `continue`.
async fn find(
    shared: &Shared,
    stored: &Stored,
    namespace: &str,
    query: &Query,
    filter: &Filter,
) -> Result<Found, ApiError> {
    let limit = usize::try_from(query.number("limit")?.unwrap_or(0)).unwrap_or(0);
    let version = query.get("resourceVersion");
    let matching = query.get("resourceVersionMatch");
    let scope = scope(stored.resource, namespace);
    if let Some(token) = query.get("continue") {
        if version.is_some_and(|version| version != "0") {
            return Err(ApiError::bad_request(
                "specifying resource version is not allowed when using continue",
            ));
        }
        let token = Continue::decode(token)?;
        let start = format!("{}{}", stored.resource.prefix(), token.start);
        if token.rv > 0 {
            return match at_revision(shared, stored, &scope, Some(&start), limit, token.rv, filter)
                .await
            {
                Err(StoreError::Compacted { .. }) => Err(expired_continue(&token.start)),
                other => other.map_err(|error| store_error(&error)),
            };
        }
        fresh(stored).await?;
        return Ok(from_cache(stored, &scope, Some(&start), limit, filter));
    }
    match (version, matching) {
        (None, Some(_)) => {
            return Err(ApiError::bad_request(
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ));
        }
        (Some("0"), Some("Exact")) => {
            return Err(ApiError::bad_request(
                "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
            ));
        }
        (Some(version), Some("Exact")) => {
            let at = parse_version(version)?;
            return at_revision(shared, stored, &scope, None, limit, at, filter).await.map_err(
                |error| match error {
                    StoreError::Future => {
                        ApiError::too_large_resource_version(at, stored.cache.revision())
                    }
                    other => store_error(&other),
                },
            );
        }
        (_, Some(other)) if other != "NotOlderThan" => {
            return Err(ApiError::bad_request(format!(
                "resourceVersionMatch {other:?} is not known"
            )));
        }
        (None, _) => fresh(stored).await?,
        // Anything that is there; a limit would only make the client come again.
        (Some("0"), _) => {
            wait_for(stored, 0).await?;
            return Ok(from_cache(stored, &scope, None, 0, filter));
        }
        (Some(version), _) => wait_for(stored, parse_version(version)?).await?,
    }
    Ok(from_cache(stored, &scope, None, limit, filter))
}

fn from_cache(
    stored: &Stored,
    scope: &str,
    start: Option<&str>,
    limit: usize,
    filter: &Filter,
) -> Found {
    let snapshot = stored.cache.snapshot();
    let prefix_len = stored.resource.prefix().len();
    let mut found =
        Found { items: Vec::new(), revision: snapshot.revision, next: None, remaining: None };
    let mut objects = snapshot.range(scope, start);
    while let Some(object) = objects.next() {
        if !filter.matches(&object.meta) {
            continue;
        }
        if limit > 0 && found.items.len() == limit {
            found.next = Some(object.key[prefix_len..].to_owned());
            found.remaining = filter.is_empty().then(|| objects.count() + 1);
            break;
        }
        found.items.push(object.bytes.clone());
    }
    found
}

/// Reads from the store as it was.
async fn at_revision(
    shared: &Shared,
    stored: &Stored,
    scope: &str,
    start: Option<&str>,
    limit: usize,
    at: Revision,
    filter: &Filter,
) -> Result<Found, StoreError> {
    let prefix_len = stored.resource.prefix().len();
    let mut found = Found { items: Vec::new(), revision: at, next: None, remaining: None };
    let mut start = start.map(str::to_owned);
    loop {
        let page = shared.store.list(scope, start.as_deref(), STORE_PAGE, Some(at)).await?;
        let last = page.items.last().map(|kv| kv.key.clone());
        for kv in page.items {
            let Ok(meta) = (stored.index)(&kv.value) else { continue };
            if !filter.matches(&meta) {
                continue;
            }
            if limit > 0 && found.items.len() == limit {
                found.next = Some(kv.key[prefix_len..].to_owned());
                return Ok(found);
            }
            found.items.push(splice_resource_version(&kv.value, kv.mod_revision));
        }
        match last {
            Some(last) if page.more => start = Some(format!("{last}\0")),
            _ => return Ok(found),
        }
    }
}

/// 410 with a token that goes on at today's state, for clients that can live with that.
fn expired_continue(start: &str) -> ApiError {
    let mut error = ApiError::expired(
        "The provided continue parameter is too old to display a consistent list result. You can start a new list \
         without the continue parameter, or use the continue token in this response to retrieve the remainder of the \
         results. Continuing with the provided token results in an inconsistent list - objects that were created, \
         modified, or deleted between the time the first chunk was returned and now may show up in the list.",
    );
    error.continue_token = Some(Continue::encode(-1, start));
    error
}

/// The matching objects of a collection, for `deletecollection`.
pub(crate) async fn matching(
    stored: &Stored,
    namespace: &str,
    query: &Query,
) -> Result<Vec<(String, String)>, ApiError> {
    let filter = Filter::parse(stored.resource, query)?;
    fresh(stored).await?;
    let scope = scope(stored.resource, namespace);
    Ok(stored
        .cache
        .snapshot()
        .range(&scope, None)
        .filter(|object| filter.matches(&object.meta))
        .map(|object| (object.meta.namespace.clone(), object.meta.name.clone()))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_put_together_without_parsing() {
        let head = json!({ "kind": "PodList", "metadata": {} });
        let items = [Bytes::from_static(b"{\"a\":1}"), Bytes::from_static(b"{\"b\":2}")];
        let list: Value = serde_json::from_slice(&join(&head, &items)).expect("JSON");
        assert_eq!(
            list,
            json!({ "kind": "PodList", "metadata": {}, "items": [{ "a": 1 }, { "b": 2 }] })
        );
        let empty: Value = serde_json::from_slice(&join(&head, &[])).expect("JSON");
        assert_eq!(empty["items"], json!([]));
    }

    #[test]
    fn continue_tokens_are_read_back_and_rubbish_is_refused() {
        let token = Continue::decode(&Continue::encode(7, "shop/web")).expect("token");
        assert_eq!((token.rv, token.start.as_str()), (7, "shop/web"));
        assert!(Continue::decode("rubbish").is_err());
    }
}
