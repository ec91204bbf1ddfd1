//! The client: requests in, answers or errors out.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, header};
use http_body_util::BodyExt as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::fence::Fenced;
use crate::https::Https;
use crate::{Body, ClientConfig, Error, Fence, Transport, Upgraded};

/// Sends requests to one cluster. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    transport: Arc<dyn Transport>,
    https: Option<Arc<Https>>,
}

impl Client {
    /// A client over any transport, for example straight into an API server of the same process.
    pub fn new(transport: impl Transport) -> Self {
        Self { transport: Arc::new(transport), https: None }
    }

    /// A client over HTTPS.
    ///
    /// # Errors
    /// A URL, certificate or key cannot work.
    pub fn https(config: &ClientConfig) -> Result<Self, Error> {
        let https = Arc::new(Https::new(config)?);
        Ok(Self { transport: Arc::new(Shared(https.clone())), https: Some(https) })
    }

    /// A client for the current context of a kubeconfig file.
    ///
    /// # Errors
    /// The file cannot be read or names nothing that works.
    pub fn from_kubeconfig(path: &Path) -> Result<Self, Error> {
        Self::https(&crate::kubeconfig::read(path)?)
    }

    /// URLs of the servers that are known; none for a client inside of one.
    #[must_use]
    pub fn servers(&self) -> Vec<String> {
        self.https.as_ref().map(|https| https.known_servers()).unwrap_or_default()
    }

    /// Makes these the servers that are known, to all clones. A client inside of one needs none.
    ///
    /// # Errors
    /// There is none among them, or one is no `https://` URL.
    pub fn set_servers(&self, urls: &[String]) -> Result<(), Error> {
        self.https.as_ref().map_or(Ok(()), |https| https.set_servers(urls))
    }

    /// The same client, through which changes go only while the fence is open.
    #[must_use]
    pub fn behind(&self, fence: Fence) -> Self {
        let inner = self.transport.clone();
        Self { transport: Arc::new(Fenced { inner, fence }), https: self.https.clone() }
    }

    /// Sends a request and returns the answer, whatever its code; the body streams.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn stream(&self, request: Request<Bytes>) -> Result<Response<Body>, Error> {
        self.transport.send(request).await
    }

    /// As [`Client::stream`], but an answer that is no success becomes an error.
    ///
    /// # Errors
    /// There is no answer, or it is an error.
    pub async fn stream_ok(&self, request: Request<Bytes>) -> Result<Response<Body>, Error> {
        let response = self.transport.send(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let code = response.status().as_u16();
        Err(Error::from_status(code, &collect(response.into_body()).await?))
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// There is no answer, or it is an error.
    pub async fn request(&self, request: Request<Bytes>) -> Result<Bytes, Error> {
        collect(self.stream_ok(request).await?.into_body()).await
    }

    /// Sends a request with a JSON body, if any, and reads a JSON answer.
    ///
    /// # Errors
    /// There is no answer, it is an error, or it does not decode.
    pub async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        content_type: &'static str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Error> {
        let bytes = match body {
            Some(body) => serde_json::to_vec(body).map_err(|error| {
                Error::Config(format!("encode the request for {path}: {error}"))
            })?,
            None => Vec::new(),
        };
        let has_body = !bytes.is_empty();
        let mut request = build(method.clone(), path, bytes.into())?;
        if has_body {
            request
                .headers_mut()
                .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        }
        request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        let answer = self.request(request).await?;
        serde_json::from_slice(&answer)
            .map_err(|source| Error::Decode { request: format!("{method} {path}"), source })
    }

    /// GET of a plain text.
    ///
    /// # Errors
    /// There is no answer, or it is an error.
    pub async fn get_text(&self, path: &str) -> Result<String, Error> {
        let answer = self.request(build(Method::GET, path, Bytes::new())?).await?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Switches a connection of its own to another protocol (exec, attach).
    ///
    /// # Errors
    /// The server does not switch, or this client has no connections (in-process).
    pub async fn upgrade(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
    ) -> Result<Upgraded, Error> {
        let https = self.https.as_ref().ok_or_else(|| {
            Error::Config(
                "a client inside the server's process cannot upgrade connections".to_owned(),
            )
        })?;
        https.upgrade(method, path, headers).await
    }
}

/// A request for path and query.
pub(crate) fn build(method: Method, path: &str, body: Bytes) -> Result<Request<Bytes>, Error> {
    Request::builder()
        .method(method)
        .uri(path)
        .body(body)
        .map_err(|error| Error::Config(format!("path {path:?}: {error}")))
}

async fn collect(body: Body) -> Result<Bytes, Error> {
    Ok(body
        .collect()
        .await
        .map_err(|error| Error::transport("the answer broke off", error))?
        .to_bytes())
}

struct Shared(Arc<Https>);

#[async_trait::async_trait]
impl Transport for Shared {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Body>, Error> {
        self.0.send(request).await
    }
}
