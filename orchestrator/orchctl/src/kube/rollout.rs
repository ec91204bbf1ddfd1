//! `orchctl scale` and `orchctl rollout status`.

use std::time::Duration;

use anyhow::{Context as _, bail};
use orch_client::Client;
use serde_json::{Value, json};

use super::resource::{self, Resources};
use super::wire;
use crate::output;

#[derive(clap::Args)]
pub(crate) struct ScaleFlags {
    /// KIND/NAME, for example deployment/web
    what: String,
    #[arg(long)]
    replicas: u32,
    #[command(flatten)]
    namespace: super::NamespaceFlag,
}

#[derive(clap::Args)]
pub(crate) struct RolloutFlags {
    #[command(subcommand)]
    command: RolloutCommand,
}

#[derive(clap::Subcommand)]
enum RolloutCommand {
    /// Wait until all replicas run the newest version
    #[command(after_help = "Example: orchctl rollout status deployment/web --timeout 60s")]
    Status {
        /// Name, or deployment/NAME
        what: String,
        /// How long to wait, for example 60s or 10m
        #[arg(long, default_value = "10m", value_parser = super::exec::parse_duration)]
        timeout: Duration,
        #[command(flatten)]
        namespace: super::NamespaceFlag,
    },
}

pub(crate) async fn scale(client: &Client, flags: ScaleFlags) -> anyhow::Result<()> {
    let resources = Resources::discover(client).await?;
    let (kind, name) = resource::kind_and_name(&flags.what, None)?;
    let resource = resources.find(kind)?;
    let path = format!("{}/scale", resource.object_path(&flags.namespace.namespace, name));
    let patch = json!({ "spec": { "replicas": flags.replicas } });
    wire::send(client, http::Method::PATCH, &path, wire::MERGE_PATCH, &patch)
        .await
        .with_context(|| format!("scale {}/{name}", resource.qualified()))?;
    output::line(&format!("{}/{name} scaled to {}", resource.qualified(), flags.replicas))
}

pub(crate) async fn run(client: &Client, flags: RolloutFlags) -> anyhow::Result<()> {
    let RolloutCommand::Status { what, timeout, namespace } = flags.command;
    let name = what.rsplit('/').next().unwrap_or(&what);
    wait(client, &namespace.namespace, name, timeout).await?;
    output::line(&format!("deployment {name:?} successfully rolled out"))
}

/// Waits until a deployment is rolled out; shows what it waits for.
pub(crate) async fn wait(
    client: &Client,
    namespace: &str,
    name: &str,
    limit: Duration,
) -> anyhow::Result<()> {
    let path = format!("/apis/apps/v1/namespaces/{namespace}/deployments/{name}");
    crate::progress::wait(&format!("rollout of {name}"), limit, || async {
        let deployment = wire::get(client, &path).await?;
        match missing(&deployment) {
            Progress::Done(text) => Ok(Ok(text)),
            Progress::Waiting(what) => Ok(Err(what)),
            Progress::Failed(why) => bail!("{why}"),
        }
    })
    .await
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Done(String),
    Waiting(String),
    Failed(String),
}

/// What a rollout still waits for, by the rules of `kubectl rollout status`.
fn missing(deployment: &Value) -> Progress {
    let number = |value: &Value| value.as_i64().unwrap_or(0);
    let status = &deployment["status"];
    if number(&status["observedGeneration"]) < number(&deployment["metadata"]["generation"]) {
        return Progress::Waiting("the controller to see the change".to_owned());
    }
    let overdue = status["conditions"].as_array().into_iter().flatten().find(|condition| {
        condition["type"] == "Progressing" && condition["reason"] == "ProgressDeadlineExceeded"
    });
    if let Some(condition) = overdue {
        let message = condition["message"].as_str().unwrap_or_default();
        return Progress::Failed(format!("the rollout exceeded its progress deadline: {message}"));
    }
    let wanted = deployment["spec"]["replicas"].as_i64().unwrap_or(1);
    let (updated, all, available) = (
        number(&status["updatedReplicas"]),
        number(&status["replicas"]),
        number(&status["availableReplicas"]),
    );
    if updated < wanted {
        Progress::Waiting(format!("{updated} of {wanted} replicas to be updated"))
    } else if all > updated {
        Progress::Waiting(format!("{} old replicas to end", all - updated))
    } else if available < updated {
        Progress::Waiting(format!("{available} of {updated} updated replicas to be available"))
    } else {
        Progress::Done(format!("{wanted} replicas"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollout_waits_for_update_then_old_pods_then_availability() {
        let deployment = |updated: i64, all: i64, available: i64| {
            json!({
                "metadata": { "generation": 2 }, "spec": { "replicas": 3 },
                "status": { "observedGeneration": 2, "updatedReplicas": updated, "replicas": all,
                            "availableReplicas": available },
            })
        };
        assert_eq!(
            missing(&deployment(1, 3, 3)),
            Progress::Waiting("1 of 3 replicas to be updated".to_owned())
        );
        assert_eq!(
            missing(&deployment(3, 4, 3)),
            Progress::Waiting("1 old replicas to end".to_owned())
        );
        assert_eq!(
            missing(&deployment(3, 3, 2)),
            Progress::Waiting("2 of 3 updated replicas to be available".to_owned())
        );
        assert_eq!(missing(&deployment(3, 3, 3)), Progress::Done("3 replicas".to_owned()));
    }

    #[test]
    fn a_deadline_that_passed_is_a_failure() {
        let deployment = json!({
            "metadata": { "generation": 1 }, "spec": {},
            "status": { "observedGeneration": 1, "conditions": [
                { "type": "Progressing", "reason": "ProgressDeadlineExceeded", "message": "too slow" } ] },
        });
        assert!(matches!(missing(&deployment), Progress::Failed(why) if why.contains("too slow")));
    }
}
