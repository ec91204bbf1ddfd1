//! Logs, exec, attach and port-forward: handed to the agent of the pod's node, byte for byte, whatever protocol the
//! two ends agree on (WebSocket or SPDY/3.1).

pub(crate) mod http;

use ::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use bytes::Bytes;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use orch_api::ApiError;
use orch_client::{Body, Client, ClientConfig, empty_body};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::read;
use crate::request::Query;
use crate::resources;
use crate::state::Shared;
use crate::write::Call;

/// Query keys that the agent understands.
const FORWARDED: [&str; 13] = [
    "follow",
    "previous",
    "tailLines",
    "limitBytes",
    "sinceSeconds",
    "sinceTime",
    "timestamps",
    "command",
    "stdin",
    "stdout",
    "stderr",
    "tty",
    "insecureSkipTLSVerifyBackend",
];
/// Headers of an upgrade that pass through in both directions.
const UPGRADE_HEADERS: [&str; 8] = [
    "connection",
    "upgrade",
    "sec-websocket-key",
    "sec-websocket-version",
    "sec-websocket-protocol",
    "sec-websocket-accept",
    "sec-websocket-extensions",
    "x-stream-protocol-version",
];

/// Bytes carried at once in each direction of a session.
const COPY_BYTES: usize = 64 << 10;

/// How the server speaks to agents: with its own client certificate.
pub(crate) struct AgentClient {
    ca_pem: String,
    cert_pem: String,
    key_pem: String,
}

impl AgentClient {
    pub(crate) fn new(ca_pem: String, cert_pem: String, key_pem: String) -> Self {
        Self { ca_pem, cert_pem, key_pem }
    }

    fn to(&self, authority: &str) -> Result<Client, ApiError> {
        let config = ClientConfig {
            servers: vec![format!("https://{authority}")],
            ca_pem: Some(self.ca_pem.clone()),
            cert_pem: Some(self.cert_pem.clone()),
            key_pem: Some(self.key_pem.clone()),
            token: None,
        };
        Client::https(&config).map_err(ApiError::internal)
    }
}

/// What a call is about, and where.
struct Place {
    /// Authority of the agent.
    address: String,
    node: String,
    /// Path of the agent's API: the pod, and the container where there is one.
    path: String,
}

/// Finds the container that a call is about.
async fn locate_container(call: &Call<'_>) -> Result<Place, ApiError> {
    let pod = call.current().await?.object;
    let container = container_name(call, &pod)?;
    let mut place = locate(call, &pod)?;
    place.path.push('/');
    place.path.push_str(&container);
    Ok(place)
}

fn locate(call: &Call<'_>, pod: &Value) -> Result<Place, ApiError> {
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
    if node.is_empty() {
        return Err(ApiError::bad_request(format!(
            "pod {} does not have a host assigned",
            call.name
        )));
    }
    Ok(Place {
        address: agent_address(call.shared, node)?,
        node: node.to_owned(),
        path: format!("{}/{}", call.namespace, call.name),
    })
}

fn container_name(call: &Call<'_>, pod: &Value) -> Result<String, ApiError> {
    let containers: Vec<&str> = ["containers", "initContainers", "ephemeralContainers"]
        .iter()
        .flat_map(|list| pod["spec"][*list].as_array().into_iter().flatten())
        .filter_map(|container| container["name"].as_str())
        .collect();
    Ok(match call.query.get("container") {
        Some(name) if containers.contains(&name) => name.to_owned(),
        Some(name) => {
            return Err(ApiError::bad_request(format!(
                "container {name} is not valid for pod {}",
                call.name
            )));
        }
        None => {
            let main: Vec<&str> = pod["spec"]["containers"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|container| container["name"].as_str())
                .collect();
            let annotated =
                pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"].as_str();
            match (annotated.filter(|name| main.contains(name)), main.as_slice()) {
                (Some(name), _) => name.to_owned(),
                (None, [name]) => (*name).to_owned(),
                (None, many) => {
                    return Err(ApiError::bad_request(format!(
                        "a container name must be specified for pod {}, choose one of: [{}]",
                        call.name,
                        many.join(" ")
                    )));
                }
            }
        }
    })
}

fn agent_address(shared: &Shared, node: &str) -> Result<String, ApiError> {
    let missing = || {
        ApiError::service_unavailable(format!(
            "the address of node {node:?} is not known: its agent has not registered it"
        ))
    };
    let nodes = resources::find("", "v1", "nodes").ok_or_else(missing)?;
    let stored = shared.stored("", "nodes").ok_or_else(missing)?;
    let object = stored
        .cache
        .get(&nodes.key("", node))
        .ok_or_else(|| ApiError::not_found("", "nodes", node))?;
    let object: Value = read::parse(&object.bytes)?;
    let address = object["status"]["addresses"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|address| address["type"] == "InternalIP")
        .and_then(|address| address["address"].as_str())
        .ok_or_else(missing)?;
    let port =
        object["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64().unwrap_or(10250);
    Ok(if address.contains(':') {
        format!("[{address}]:{port}")
    } else {
        format!("{address}:{port}")
    })
}

fn agent_path(verb: &str, call: &Call<'_>, place: &Place) -> String {
    let mut path = format!("/{verb}/{}", place.path);
    let mut separator = '?';
    for key in FORWARDED {
        for value in call.query.all(key) {
            path.push(separator);
            separator = '&';
            path.push_str(key);
            path.push('=');
            for byte in value.bytes() {
                if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                    path.push(char::from(byte));
                } else {
                    path.push_str(&format!("%{byte:02X}"));
                }
            }
        }
    }
    path
}

fn unreachable(node: &str, error: &orch_client::Error) -> ApiError {
    match error {
        orch_client::Error::Api { code, message, .. } => {
            // The agent speaks plain text; the code is said by the answer itself.
            let said = message.strip_suffix(&format!(" ({code})")).unwrap_or(message);
            let mut answer = ApiError::bad_request(said.to_owned());
            answer.code = *code;
            if *code >= 500 {
                answer.reason = "InternalError";
            } else if *code == 404 {
                answer.reason = "NotFound";
            }
            answer
        }
        other => ApiError::service_unavailable(format!(
            "the agent of node {node:?} does not answer: {other}"
        )),
    }
}

/// GET of `pods/NAME/log`.
pub(crate) async fn log(call: &Call<'_>) -> Result<Response<Body>, ApiError> {
    let place = locate_container(call).await?;
    let request = Request::builder()
        .uri(agent_path("containerLogs", call, &place))
        .body(Bytes::new())
        .map_err(ApiError::internal)?;
    let answer = call
        .shared
        .agents
        .to(&place.address)?
        .stream_ok(request)
        .await
        .map_err(|error| unreachable(&place.node, &error))?;
    let mut response = Response::new(answer.into_body());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    Ok(response)
}

/// GET (WebSocket) or POST (SPDY/3.1) of `pods/NAME/exec`, `attach` and `portforward`: the client's connection and the
/// agent's are joined.
pub(crate) async fn stream(
    call: &Call<'_>,
    verb: &str,
    method: &Method,
    upgrade: Option<OnUpgrade>,
    stop: CancellationToken,
) -> Result<Response<Body>, ApiError> {
    let Some(upgrade) = upgrade.filter(|_| call.headers.contains_key(header::UPGRADE)) else {
        return Err(ApiError::bad_request(
            "you must specify an upgrade: to WebSocket or to SPDY/3.1",
        ));
    };
    if call.query.all("command").next().is_none() && verb == "exec" {
        return Err(ApiError::bad_request("you must specify at least 1 command for the container"));
    }
    let (place, verb) = if verb == "portforward" {
        (locate(call, &call.current().await?.object)?, "portForward")
    } else {
        (locate_container(call).await?, verb)
    };
    let mut headers = pass(call.headers);
    headers.remove(header::HOST);
    let agent = call
        .shared
        .agents
        .to(&place.address)?
        .upgrade(method.clone(), &agent_path(verb, call, &place), headers)
        .await
        .map_err(|error| unreachable(&place.node, &error))?;
    let mut response = Response::new(empty_body());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = pass(&agent.headers);
    // Lives as long as the session; ends with either side or with the server.
    tokio::spawn(async move {
        let mut agent = agent.io;
        match upgrade.await {
            Ok(client) => {
                let mut client = TokioIo::new(client);
                let copied = tokio::select! {
                    copied = tokio::io::copy_bidirectional_with_sizes(
                        &mut client, &mut agent, COPY_BYTES, COPY_BYTES,
                    ) => copied,
                    () = stop.cancelled() => return,
                };
                if let Err(error) = copied {
                    debug!(%error, "a streaming session broke");
                }
            }
            Err(error) => debug!(%error, "a client did not complete its upgrade"),
        }
    });
    Ok(response)
}

fn pass(headers: &HeaderMap) -> HeaderMap {
    let mut passed = HeaderMap::new();
    for name in UPGRADE_HEADERS {
        for value in headers.get_all(name) {
            if let Ok(name) = ::http::HeaderName::from_bytes(name.as_bytes()) {
                passed.append(name, value.clone());
            }
        }
    }
    passed
}

/// Whether a query names what only other servers have.
pub(crate) fn unsupported(query: &Query) -> Option<ApiError> {
    query
        .has("stream")
        .then(|| ApiError::bad_request("the query parameter \"stream\" is not supported"))
}
