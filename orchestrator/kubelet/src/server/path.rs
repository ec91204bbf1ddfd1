//! Paths and queries of the kubelet's API, parsed at the edge.

use http::StatusCode;
use jiff::Timestamp;
use orch_cri::ExecSpec;

/// One container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Which {
    pub(crate) pod: WhichPod,
    pub(crate) container: String,
}

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WhichPod {
    pub(crate) namespace: String,
    pub(crate) pod: String,
    pub(crate) uid: Option<String>,
}

/// What of a log is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LogOptions {
    pub(crate) follow: bool,
    pub(crate) previous: bool,
    pub(crate) timestamps: bool,
    pub(crate) tail_lines: Option<u64>,
    pub(crate) limit_bytes: Option<u64>,
    pub(crate) since: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    Healthz,
    Metrics,
    Pods,
    Logs(Which, LogOptions),
    Exec(Which, ExecSpec),
    Attach(Which, ExecSpec),
    PortForward(WhichPod),
}

fn bad(message: impl Into<String>) -> (StatusCode, String) {
    (StatusCode::BAD_REQUEST, message.into())
}

/// # Errors
/// Code and text of the answer.
pub(crate) fn parse(path: &str, query: &str) -> Result<Route, (StatusCode, String)> {
    let parts: Vec<String> = path.split('/').filter(|part| !part.is_empty()).map(decode).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let query = parse_query(query);
    let which_pod = |namespace: &str, pod: &str, uid: Option<&str>| WhichPod {
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        uid: uid.map(str::to_owned),
    };
    let which = |namespace: &str, pod: &str, uid: Option<&str>, container: &str| Which {
        pod: which_pod(namespace, pod, uid),
        container: container.to_owned(),
    };
    match parts.as_slice() {
        ["healthz"] => Ok(Route::Healthz),
        ["metrics"] => Ok(Route::Metrics),
        ["pods"] => Ok(Route::Pods),
        ["containerLogs", namespace, pod, container] => {
            Ok(Route::Logs(which(namespace, pod, None, container), log_options(&query)?))
        }
        ["exec", namespace, pod, container] => {
            Ok(Route::Exec(which(namespace, pod, None, container), exec(&query)?))
        }
        ["exec", namespace, pod, uid, container] => {
            Ok(Route::Exec(which(namespace, pod, Some(uid), container), exec(&query)?))
        }
        ["attach", namespace, pod, container] => {
            Ok(Route::Attach(which(namespace, pod, None, container), streams(&query)))
        }
        ["attach", namespace, pod, uid, container] => {
            Ok(Route::Attach(which(namespace, pod, Some(uid), container), streams(&query)))
        }
        ["portForward", namespace, pod] => Ok(Route::PortForward(which_pod(namespace, pod, None))),
        ["portForward", namespace, pod, uid] => {
            Ok(Route::PortForward(which_pod(namespace, pod, Some(uid))))
        }
        _ => Err((StatusCode::NOT_FOUND, "404 page not found".to_owned())),
    }
}

type Query = Vec<(String, String)>;

fn get<'a>(query: &'a Query, key: &str) -> Option<&'a str> {
    query
        .iter()
        .find(|(name, _)| name == key)
        .map(|(_, value)| value.as_str())
        .filter(|value| !value.is_empty())
}

fn flag(query: &Query, key: &str) -> bool {
    matches!(get(query, key), Some("1" | "true" | "True" | "t"))
}

fn number(query: &Query, key: &str) -> Result<Option<u64>, (StatusCode, String)> {
    match get(query, key) {
        None => Ok(None),
        Some(text) => {
            text.parse().map(Some).map_err(|_| bad(format!("{key} must be a number, not {text:?}")))
        }
    }
}

fn log_options(query: &Query) -> Result<LogOptions, (StatusCode, String)> {
    let since_seconds = number(query, "sinceSeconds")?;
    let since = match get(query, "sinceTime") {
        Some(text) => Some(
            text.parse::<Timestamp>()
                .map_err(|_| bad(format!("sinceTime must be a time, not {text:?}")))?,
        ),
        None => since_seconds.map(|seconds| {
            let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
            let from = Timestamp::now().as_second().saturating_sub(seconds).max(0);
            Timestamp::from_second(from).unwrap_or(Timestamp::UNIX_EPOCH)
        }),
    };
    Ok(LogOptions {
        follow: flag(query, "follow"),
        previous: flag(query, "previous"),
        timestamps: flag(query, "timestamps"),
        tail_lines: number(query, "tailLines")?,
        limit_bytes: number(query, "limitBytes")?,
        since,
    })
}

/// The kubelet's own names are `input`, `output`, `error`; the API server's are accepted too.
fn streams(query: &Query) -> ExecSpec {
    let either = |one: &str, other: &str| flag(query, one) || flag(query, other);
    let command =
        query.iter().filter(|(key, _)| key == "command").map(|(_, value)| value.clone()).collect();
    ExecSpec {
        command,
        stdin: either("input", "stdin"),
        stdout: either("output", "stdout"),
        stderr: either("error", "stderr"),
        tty: flag(query, "tty"),
    }
}

fn exec(query: &Query) -> Result<ExecSpec, (StatusCode, String)> {
    let spec = streams(query);
    if spec.command.is_empty() {
        return Err(bad("you must specify at least 1 command"));
    }
    if !(spec.stdin || spec.stdout || spec.stderr) {
        return Err(bad("you must specify at least 1 of stdin, stdout, stderr"));
    }
    Ok(spec)
}

fn parse_query(query: &str) -> Query {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(&key.replace('+', " ")), decode(&value.replace('+', " ")))
        })
        .collect()
}

/// Percent decoding (RFC 3986 §2.1); what is no escape stays.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = (bytes[at] == b'%').then(|| bytes.get(at + 1..at + 3)).flatten();
        let value =
            escape.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match value {
            Some(value) => {
                out.push(value);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_has_its_words_in_order() {
        let query = "command=sh&command=-c&command=echo%20a%2Bb+c&stdout=true&input=1&tty=0";
        let Ok(Route::Exec(which, spec)) = parse("/exec/shop/web/a", query) else {
            panic!("an exec")
        };
        assert_eq!((which.pod.namespace.as_str(), which.container.as_str()), ("shop", "a"));
        assert_eq!(spec.command, ["sh", "-c", "echo a+b c"]);
        assert!(spec.stdin && spec.stdout && !spec.stderr && !spec.tty);
    }

    #[test]
    fn a_port_forward_is_to_a_pod() {
        let Ok(Route::PortForward(pod)) = parse("/portForward/shop/web", "ports=80") else {
            panic!("a port-forward")
        };
        assert_eq!((pod.pod.as_str(), pod.uid), ("web", None));
        assert!(parse("/portForward/shop", "").is_err());
    }

    #[test]
    fn wrong_requests_are_refused() {
        for (path, query, code) in [
            ("/exec/shop/web/a", "stdout=1", 400),
            ("/exec/shop/web/a", "command=x", 400),
            ("/containerLogs/shop/web/a", "tailLines=x", 400),
            ("/containerLogs/shop/web", "", 404),
            ("/", "", 404),
        ] {
            assert_eq!(
                parse(path, query).map_err(|(code, _)| code.as_u16()),
                Err(code),
                "{path}?{query}"
            );
        }
    }

    #[test]
    fn log_options_are_read() {
        let query =
            "follow=true&tailLines=5&limitBytes=10&sinceTime=2026-01-01T00:00:00Z&timestamps=true";
        let Ok(Route::Logs(_, options)) = parse("/containerLogs/shop/web/a", query) else {
            panic!("logs")
        };
        assert_eq!((options.tail_lines, options.limit_bytes), (Some(5), Some(10)));
        assert!(
            options.follow && options.timestamps && !options.previous && options.since.is_some()
        );
    }
}
