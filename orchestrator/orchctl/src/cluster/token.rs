//! `orchctl token`: bootstrap tokens, with which a new host introduces itself (Kubernetes, "Authenticating with Bootstrap
//! Tokens"). They are Secrets in `kube-system`, so kubeadm's and ours know each other.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use jiff::Timestamp;
use orch_api::bootstrap_token::{NODE, SINGLE_USE, TYPE, USED_BY, secret_name};
use orch_client::Client;
use serde_json::{Value, json};

use super::handover;
use super::host::Host;
use crate::kube::wire;
use crate::output;

pub(super) const SECRETS: &str = "/api/v1/namespaces/kube-system/secrets";
/// How long a token is good for.
const TTL: Duration = Duration::from_secs(24 * 3600);
/// The same for one that makes control planes, and the most that it may be: who has it has the cluster.
const CONTROL_PLANE_TTL: Duration = Duration::from_secs(2 * 3600);
/// Where the cluster tells everybody who it is (kubeadm's discovery).
pub(crate) const CLUSTER_INFO: &str = "/api/v1/namespaces/kube-public/configmaps/cluster-info";

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Make a token and print the command with which a host joins
    #[command(
        after_help = "Example: orchctl token create --ttl 2h\n         orchctl token create --single-use\n         \
                      orchctl token create --control-plane"
    )]
    Create {
        /// How long it is good for: 30m, 24h, 7d; 0 = for ever [default: 24h; with --control-plane 2h, and no longer]
        #[arg(long, value_parser = parse_ttl)]
        ttl: Option<Duration>,
        /// What it is for
        #[arg(long, default_value = "")]
        description: String,
        /// Good for one host: the first that joins with it uses it up
        #[arg(long)]
        single_use: bool,
        /// Good for this node only, also when there is a Node of that name already, unless that is Ready
        #[arg(long, value_name = "NAME", conflicts_with = "control_plane")]
        node: Option<String>,
        /// For further control planes: also hand over the authorities' keys, encrypted
        #[arg(long)]
        control_plane: bool,
        /// Prefix of every path, as given to init: whose authorities are handed over and whose kubeconfig is used
        #[arg(long, value_name = "DIR")]
        root: Option<PathBuf>,
        #[command(flatten)]
        format: super::Format,
    },
    /// All tokens; their secrets are not shown
    #[command(after_help = "Example: orchctl token list -o json")]
    List {
        #[command(flatten)]
        format: super::Format,
    },
    /// Make tokens worthless
    #[command(after_help = "Example: orchctl token delete abcdef")]
    Delete {
        /// Ids (the part before the dot), or whole tokens
        #[arg(required = true)]
        tokens: Vec<String>,
    },
}

/// `0`, `90s`, `30m`, `24h`, `7d`.
fn parse_ttl(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let wrong = || format!("{text:?} is no duration; write 90s, 30m, 24h or 7d");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let number: u64 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| wrong())?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let seconds = number.checked_mul(seconds).ok_or_else(wrong)?;
    if seconds == 0 {
        return Err("a token has to live for at least a second; 0 means for ever".to_owned());
    }
    Ok(Duration::from_secs(seconds))
}

/// Random characters of `[a-z0-9]`, without bias.
fn random(length: usize) -> anyhow::Result<String> {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut source = std::fs::File::open("/dev/urandom").context("open /dev/urandom")?;
    let mut text = String::with_capacity(length);
    let mut byte = [0_u8];
    while text.len() < length {
        source.read_exact(&mut byte).context("read /dev/urandom")?;
        // 252 = 7 · 36: the bytes above it would favour the first letters.
        if byte[0] < 252 {
            text.push(char::from(ALPHABET[usize::from(byte[0]) % ALPHABET.len()]));
        }
    }
    Ok(text)
}

/// A token to be made.
#[derive(Debug, Default)]
pub(super) struct Wanted<'a> {
    /// Zero: for ever.
    pub(super) ttl: Duration,
    pub(super) description: &'a str,
    pub(super) single_use: bool,
    pub(super) node: Option<&'a str>,
}

/// A token that was made.
pub(super) struct Made {
    pub(super) token: String,
    pub(super) id: String,
    /// UID of its Secret.
    pub(super) uid: String,
}

pub(super) async fn create(client: &Client, wanted: &Wanted<'_>) -> anyhow::Result<Made> {
    let ttl = wanted.ttl;
    let (id, secret) = (random(6)?, random(16)?);
    let mut data = json!({
        "token-id": id, "token-secret": secret, "description": wanted.description,
        "usage-bootstrap-authentication": "true", "usage-bootstrap-signing": "true",
        "auth-extra-groups": "system:bootstrappers:kubeadm:default-node-token",
    });
    if ttl > Duration::ZERO {
        let seconds = i64::try_from(ttl.as_secs()).context("--ttl is too long")?;
        let ends = Timestamp::now()
            .checked_add(jiff::SignedDuration::from_secs(seconds))
            .context("--ttl is too long")?;
        data["expiration"] = json!(ends.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
    }
    let mut notes = serde_json::Map::new();
    if wanted.single_use {
        notes.insert(SINGLE_USE.to_owned(), json!("true"));
    }
    if let Some(node) = wanted.node {
        notes.insert(NODE.to_owned(), json!(node));
    }
    let object = json!({ "apiVersion": "v1", "kind": "Secret", "type": TYPE, "stringData": data,
                         "metadata": { "name": secret_name(&id), "namespace": "kube-system", "annotations": notes } });
    let made = wire::send(client, http::Method::POST, SECRETS, wire::JSON, &object)
        .await
        .context("store the token")?;
    let uid = made["metadata"]["uid"].as_str().context("the token has no UID")?.to_owned();
    Ok(Made { token: format!("{id}.{secret}"), id, uid })
}

/// The lifetime of a token: what was asked for, if it may be that long.
fn lifetime(asked: Option<Duration>, control_plane: bool) -> anyhow::Result<Duration> {
    if !control_plane {
        return Ok(asked.unwrap_or(TTL));
    }
    let ttl = asked.unwrap_or(CONTROL_PLANE_TTL);
    if ttl.is_zero() || ttl > CONTROL_PLANE_TTL {
        return Err(output::usage(
            "a token with the authorities' keys is good for two hours at most: --ttl 2h or less",
        ));
    }
    Ok(ttl)
}

/// One token as it is stored, without its secret.
fn entry(secret: &Value, now: Timestamp) -> Value {
    let field = |name: &str| -> String {
        secret["data"][name]
            .as_str()
            .and_then(|text| base64::engine::general_purpose::STANDARD.decode(text).ok())
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .unwrap_or_default()
    };
    let expires = field("expiration");
    let left = match expires.parse::<Timestamp>() {
        Ok(ends) if ends <= now => "expired".to_owned(),
        Ok(ends) => {
            let seconds = ends.as_second() - now.as_second();
            match seconds {
                0..120 => format!("{seconds}s"),
                120..7200 => format!("{}m", seconds / 60),
                7200..172_800 => format!("{}h", seconds / 3600),
                _ => format!("{}d", seconds / 86_400),
            }
        }
        Err(_) if expires.is_empty() => "for ever".to_owned(),
        Err(_) => "unreadable".to_owned(),
    };
    let note = |key: &str| secret["metadata"]["annotations"][key].as_str();
    let single_use = note(SINGLE_USE) == Some("true");
    let good_for = match (note(USED_BY), note(NODE)) {
        (Some(_), _) => "used up".to_owned(),
        (None, Some(node)) => format!("node {node}"),
        (None, None) if single_use => "one host".to_owned(),
        (None, None) => "any host".to_owned(),
    };
    json!({ "id": field("token-id"), "left": left, "expires": expires, "goodFor": good_for,
            "singleUse": single_use, "description": field("description"), "groups": field("auth-extra-groups") })
}

async fn all(client: &Client) -> anyhow::Result<Vec<Value>> {
    let path = format!("{SECRETS}?fieldSelector=type%3D{}", wire::encode(TYPE));
    let list = wire::get(client, &path).await.context("list the tokens")?;
    let now = Timestamp::now();
    Ok(list["items"].as_array().into_iter().flatten().map(|secret| entry(secret, now)).collect())
}

async fn delete(client: &Client, id: &str) -> anyhow::Result<()> {
    let path = format!("{SECRETS}/{}", wire::encode(&secret_name(id)));
    wire::send(client, http::Method::DELETE, &path, wire::JSON, &json!({})).await?;
    Ok(())
}

/// The pin of the cluster's authority, as `join` wants it.
pub(crate) async fn pin(client: &Client) -> anyhow::Result<(String, String)> {
    let info = wire::get(client, CLUSTER_INFO).await.context("read kube-public/cluster-info")?;
    let (server, ca) = read_cluster_info(&info)?;
    let pin = orch_pki::Certificate::parse(&ca).context("kube-public/cluster-info")?.pin();
    Ok((server.trim_start_matches("https://").to_owned(), pin))
}

/// Server and authority that `kube-public/cluster-info` names.
pub(crate) fn read_cluster_info(info: &Value) -> anyhow::Result<(String, String)> {
    let text = info["data"]["kubeconfig"].as_str().context("cluster-info has no kubeconfig")?;
    let config: Value = serde_saphyr::from_str(text).context("cluster-info holds no kubeconfig")?;
    let cluster = &config["clusters"][0]["cluster"];
    let server = cluster["server"].as_str().context("cluster-info names no server")?;
    let ca = cluster["certificate-authority-data"]
        .as_str()
        .and_then(|text| base64::engine::general_purpose::STANDARD.decode(text).ok())
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .context("cluster-info has no certificate authority")?;
    Ok((server.to_owned(), ca))
}

/// The command with which a host joins.
pub(crate) fn join_command(server: &str, token: &str, pin: &str) -> String {
    format!("orchctl join {server} --token {token} --ca-hash {pin}")
}

pub(crate) async fn run(
    command: Command,
    connect: impl Fn() -> anyhow::Result<Client>,
) -> anyhow::Result<()> {
    match command {
        Command::Create { ttl, description, single_use, node, control_plane, root, format } => {
            let wanted = Wanted {
                ttl: lifetime(ttl, control_plane)?,
                description: &description,
                single_use,
                node: node.as_deref(),
            };
            let host = Host::new(root.as_deref().unwrap_or(Path::new("/")))?;
            let own = host.paths.pki().join("admin.conf");
            let client = &if root.is_some() && own.exists() {
                Client::from_kubeconfig(&own)?
            } else {
                connect()?
            };
            let (server, pin) = pin(client).await?;
            // Read before anything is made: only a control plane has them.
            let keys = if control_plane { Some(handover::read(&host)?) } else { None };
            let Made { token, id, uid } = create(client, &wanted).await?;
            let key = match keys {
                None => None,
                Some(keys) => match handover::upload(client, &keys, &id, &uid).await {
                    Ok(key) => Some(key),
                    Err(error) => {
                        // What it owns goes with it.
                        let _ = delete(client, &id).await;
                        return Err(error);
                    }
                },
            };
            let mut command = join_command(&server, &token, &pin);
            if let Some(key) = &key {
                command.push_str(&format!(" --control-plane --certificate-key {key}"));
            }
            format.print(
                &json!({ "token": token, "server": server, "caHash": pin, "certificateKey": key,
                         "command": command }),
                || output::line(&command),
            )
        }
        Command::List { format } => {
            let tokens = all(&connect()?).await?;
            format.print(&json!(tokens), || {
                let text = |token: &Value, key: &str| token[key].as_str().unwrap_or("").to_owned();
                output::table(
                    &["ID", "LEFT", "EXPIRES", "GOOD FOR", "DESCRIPTION"],
                    tokens.iter().map(|token| {
                        ["id", "left", "expires", "goodFor", "description"]
                            .map(|key| text(token, key))
                            .into()
                    }),
                )
            })
        }
        Command::Delete { tokens } => {
            let client = &connect()?;
            for token in tokens {
                let id = token.split('.').next().unwrap_or_default();
                if id.len() != 6 {
                    bail!("{token:?} is no token: its id has six characters");
                }
                delete(client, id).await.with_context(|| format!("delete token {id}"))?;
                eprintln!("token {id} is worthless now");
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_are_read_as_people_write_them() {
        assert_eq!(parse_ttl("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse_ttl("0"), Ok(Duration::ZERO));
        for wrong in ["", "h", "5", "-1h", "0s", "1w", "99999999999999999999d", "5é"] {
            assert!(parse_ttl(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn tokens_are_of_the_right_letters_and_differ() {
        let (one, two) = (random(16).expect("random"), random(16).expect("random"));
        assert_ne!(one, two);
        assert!(one.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()));
    }

    #[test]
    fn a_listed_token_shows_its_age_and_not_its_secret() {
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let secret = json!({ "data": { "token-id": encode("abcdef"), "token-secret": encode("0123456789abcdef"),
                                       "expiration": encode("2026-01-01T03:00:00Z") } });
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().expect("a time");
        let shown = entry(&secret, now);
        assert_eq!(shown["left"], "3h");
        assert!(!shown.to_string().contains("0123456789abcdef"));
        let later: Timestamp = "2026-01-02T00:00:00Z".parse().expect("a time");
        assert_eq!(entry(&secret, later)["left"], "expired");
        let good_for = |notes: Value| {
            let mut secret = secret.clone();
            secret["metadata"] = json!({ "annotations": notes });
            entry(&secret, now)["goodFor"].clone()
        };
        assert_eq!(good_for(json!({})), "any host");
        assert_eq!(good_for(json!({ "orch.dev/single-use": "true" })), "one host");
        assert_eq!(good_for(json!({ "orch.dev/node": "b" })), "node b");
        let used = json!({ "orch.dev/single-use": "true", "orch.dev/used-by": "1" });
        assert_eq!(good_for(used), "used up");
    }

    #[test]
    fn a_token_with_the_authorities_keys_is_not_good_for_long() {
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        assert_eq!(lifetime(None, false).expect("a day"), hours(24));
        assert_eq!(lifetime(None, true).expect("two hours"), hours(2));
        assert_eq!(lifetime(Some(hours(1)), true).expect("an hour"), hours(1));
        for wrong in [hours(3), Duration::ZERO] {
            assert_eq!(output::exit_code(&lifetime(Some(wrong), true).expect_err("refused")), 2);
        }
    }
}
