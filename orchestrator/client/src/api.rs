//! The typed view of one kind.

use std::fmt::Write as _;
use std::marker::PhantomData;

use bytes::Bytes;
use futures::Stream;
use http::Method;
use orch_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use orch_api::k8s_openapi::{Metadata, Resource};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Client, Error, WatchEvent};

/// A kind with metadata. Implemented by all of them.
pub trait Kind:
    Resource
    + Metadata<Ty = ObjectMeta>
    + Serialize
    + DeserializeOwned
    + Clone
    + Send
    + Sync
    + std::fmt::Debug
    + 'static
{
}

impl<K> Kind for K where
    K: Resource
        + Metadata<Ty = ObjectMeta>
        + Serialize
        + DeserializeOwned
        + Clone
        + Send
        + Sync
        + std::fmt::Debug
        + 'static
{
}

/// Path of a kind's collection; without a namespace: of the whole cluster.
#[must_use]
pub fn collection_path<K: Resource>(namespace: Option<&str>) -> String {
    let mut path = if K::GROUP.is_empty() {
        format!("/api/{}", K::VERSION)
    } else {
        format!("/apis/{}/{}", K::GROUP, K::VERSION)
    };
    if let Some(namespace) = namespace {
        let _ = write!(path, "/namespaces/{namespace}");
    }
    let _ = write!(path, "/{}", K::URL_PATH_SEGMENT);
    path
}

/// What to list or watch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListParams {
    pub label_selector: Option<String>,
    pub field_selector: Option<String>,
    /// As the API means it: absent = newest, "0" = any, N = not older than N.
    pub resource_version: Option<String>,
    pub limit: Option<u32>,
    pub continue_token: Option<String>,
}

impl ListParams {
    fn query(&self) -> Vec<(&'static str, String)> {
        let mut query = Vec::new();
        let mut add = |key, value: &Option<String>| {
            if let Some(value) = value {
                query.push((key, value.clone()));
            }
        };
        add("labelSelector", &self.label_selector);
        add("fieldSelector", &self.field_selector);
        add("resourceVersion", &self.resource_version);
        add("limit", &self.limit.map(|limit| limit.to_string()));
        add("continue", &self.continue_token);
        query
    }
}

/// How to delete.
#[derive(Debug, Clone, Default)]
pub struct DeleteParams {
    pub grace_period_seconds: Option<i64>,
    /// `Background`, `Foreground` or `Orphan`.
    pub propagation: Option<&'static str>,
    pub precondition_uid: Option<String>,
    pub precondition_resource_version: Option<String>,
}

impl DeleteParams {
    fn body(&self) -> Value {
        let mut body = json!({ "apiVersion": "v1", "kind": "DeleteOptions" });
        if let Some(seconds) = self.grace_period_seconds {
            body["gracePeriodSeconds"] = json!(seconds);
        }
        if let Some(policy) = self.propagation {
            body["propagationPolicy"] = json!(policy);
        }
        if let Some(uid) = &self.precondition_uid {
            body["preconditions"]["uid"] = json!(uid);
        }
        if let Some(version) = &self.precondition_resource_version {
            body["preconditions"]["resourceVersion"] = json!(version);
        }
        body
    }
}

/// A change to part of an object.
#[derive(Debug, Clone)]
pub enum Patch {
    /// JSON merge patch, RFC 7386.
    Merge(Value),
    /// Strategic merge patch.
    Strategic(Value),
    /// JSON patch, RFC 6902.
    Json(Value),
}

/// A page of objects.
#[derive(Debug, Clone)]
pub struct ObjectList<K> {
    pub items: Vec<K>,
    pub resource_version: String,
    pub continue_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", bound(deserialize = "K: DeserializeOwned"))]
struct WireList<K> {
    #[serde(default)]
    metadata: WireListMeta,
    #[serde(default = "Vec::new")]
    items: Vec<K>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct WireListMeta {
    resource_version: String,
    r#continue: Option<String>,
}

/// The objects of one kind, in one namespace or in all.
pub struct Api<K> {
    client: Client,
    namespace: Option<String>,
    kind: PhantomData<fn() -> K>,
}

impl<K> Clone for Api<K> {
    fn clone(&self) -> Self {
        Self { client: self.client.clone(), namespace: self.namespace.clone(), kind: PhantomData }
    }
}

impl<K: Kind> Api<K> {
    /// All namespaces, or a kind that has none.
    #[must_use]
    pub fn all(client: Client) -> Self {
        Self { client, namespace: None, kind: PhantomData }
    }

    #[must_use]
    pub fn namespaced(client: Client, namespace: &str) -> Self {
        Self { client, namespace: Some(namespace.to_owned()), kind: PhantomData }
    }

    fn path(
        &self,
        name: Option<&str>,
        subresource: Option<&str>,
        query: &[(&str, String)],
    ) -> String {
        let mut path = collection_path::<K>(self.namespace.as_deref());
        for part in [name, subresource].into_iter().flatten() {
            path.push('/');
            path.push_str(part);
        }
        append_query(path, query)
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        content_type: &'static str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Error> {
        self.client.json(method, path, content_type, body).await
    }

    /// # Errors
    /// The object is absent, or the request fails.
    pub async fn get(&self, name: &str) -> Result<K, Error> {
        self.send(Method::GET, &self.path(Some(name), None, &[]), JSON, None::<&Value>).await
    }

    /// # Errors
    /// The request fails; an absent object is `None`.
    pub async fn get_opt(&self, name: &str) -> Result<Option<K>, Error> {
        match self.get(name).await {
            Ok(object) => Ok(Some(object)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// # Errors
    /// The request fails.
    pub async fn list(&self, params: &ListParams) -> Result<ObjectList<K>, Error> {
        let path = self.path(None, None, &params.query());
        let list: WireList<K> = self.send(Method::GET, &path, JSON, None::<&Value>).await?;
        Ok(ObjectList {
            items: list.items,
            resource_version: list.metadata.resource_version,
            continue_token: list.metadata.r#continue.filter(|token| !token.is_empty()),
        })
    }

    /// # Errors
    /// The object exists, is not valid, or the request fails.
    pub async fn create(&self, object: &K) -> Result<K, Error> {
        self.send(Method::POST, &self.path(None, None, &[]), JSON, Some(object)).await
    }

    /// # Errors
    /// The object changed meanwhile, is not valid, or the request fails.
    pub async fn replace(&self, name: &str, object: &K) -> Result<K, Error> {
        self.send(Method::PUT, &self.path(Some(name), None, &[]), JSON, Some(object)).await
    }

    /// # Errors
    /// As [`Api::replace`].
    pub async fn replace_status(&self, name: &str, object: &K) -> Result<K, Error> {
        self.send(Method::PUT, &self.path(Some(name), Some("status"), &[]), JSON, Some(object))
            .await
    }

    /// # Errors
    /// The result is not valid, or the request fails.
    pub async fn patch(&self, name: &str, patch: &Patch) -> Result<K, Error> {
        self.patch_at(name, None, patch).await
    }

    /// # Errors
    /// As [`Api::patch`].
    pub async fn patch_status(&self, name: &str, patch: &Patch) -> Result<K, Error> {
        self.patch_at(name, Some("status"), patch).await
    }

    async fn patch_at(
        &self,
        name: &str,
        subresource: Option<&str>,
        patch: &Patch,
    ) -> Result<K, Error> {
        let (content_type, body) = match patch {
            Patch::Merge(body) => ("application/merge-patch+json", body),
            Patch::Strategic(body) => ("application/strategic-merge-patch+json", body),
            Patch::Json(body) => ("application/json-patch+json", body),
        };
        self.send(Method::PATCH, &self.path(Some(name), subresource, &[]), content_type, Some(body))
            .await
    }

    /// Creates below an object: `binding`, `eviction`, `token`.
    ///
    /// # Errors
    /// The request fails.
    pub async fn create_subresource<T: DeserializeOwned>(
        &self,
        name: &str,
        subresource: &str,
        body: &Value,
    ) -> Result<T, Error> {
        self.send(Method::POST, &self.path(Some(name), Some(subresource), &[]), JSON, Some(body))
            .await
    }

    /// # Errors
    /// The object is absent, a precondition fails, or the request fails.
    pub async fn delete(&self, name: &str, params: &DeleteParams) -> Result<(), Error> {
        let path = self.path(Some(name), None, &[]);
        let _: Value = self.send(Method::DELETE, &path, JSON, Some(&params.body())).await?;
        Ok(())
    }

    /// Events after `resource_version`. The stream ends when the server closes it; bookmarks are asked for.
    ///
    /// # Errors
    /// The watch cannot be started; later errors are items of the stream.
    pub async fn watch(
        &self,
        params: &ListParams,
        resource_version: &str,
        timeout_seconds: u32,
    ) -> Result<impl Stream<Item = Result<WatchEvent<K>, Error>> + Send + use<K>, Error> {
        let mut query = ListParams { resource_version: None, ..params.clone() }.query();
        query.push(("watch", "true".to_owned()));
        query.push(("allowWatchBookmarks", "true".to_owned()));
        query.push(("timeoutSeconds", timeout_seconds.to_string()));
        if !resource_version.is_empty() {
            query.push(("resourceVersion", resource_version.to_owned()));
        }
        let request =
            crate::client::build(Method::GET, &self.path(None, None, &query), Bytes::new())?;
        let response = self.client.stream_ok(request).await?;
        Ok(crate::watch::events(response.into_body()))
    }
}

const JSON: &str = "application/json";

pub(crate) fn append_query(mut path: String, query: &[(&str, String)]) -> String {
    for (index, (key, value)) in query.iter().enumerate() {
        path.push(if index == 0 { '?' } else { '&' });
        path.push_str(key);
        path.push('=');
        for byte in value.bytes() {
            // RFC 3986 §2.3, unreserved characters.
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                path.push(char::from(byte));
            } else {
                let _ = write!(path, "%{byte:02X}");
            }
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use orch_api::k8s_openapi::api::apps::v1::Deployment;
    use orch_api::k8s_openapi::api::core::v1::Node;

    use super::*;

    #[test]
    fn paths_follow_group_and_namespace() {
        assert_eq!(collection_path::<Node>(None), "/api/v1/nodes");
        assert_eq!(
            collection_path::<Deployment>(Some("shop")),
            "/apis/apps/v1/namespaces/shop/deployments"
        );
    }

    #[test]
    fn selectors_are_escaped() {
        let params =
            ListParams { label_selector: Some("a in (b,c)".to_owned()), ..ListParams::default() };
        let path = append_query("/p".to_owned(), &params.query());
        assert_eq!(path, "/p?labelSelector=a%20in%20%28b%2Cc%29");
    }
}
