//! `/healthz`, `/livez`, `/readyz`, `/metrics`.

use std::fmt::Write as _;
use std::time::Duration;

use http::{Response, StatusCode};
use orch_client::Body;

use crate::respond;
use crate::state::Shared;

/// How long etcd may take to answer a check.
const ETCD_LIMIT: Duration = Duration::from_secs(2);

async fn checks(shared: &Shared, path: &str) -> Vec<(String, bool)> {
    let mut checks = vec![("ping".to_owned(), true)];
    if path == "/readyz" {
        let answers = tokio::time::timeout(ETCD_LIMIT, shared.store.healthy()).await;
        checks.push(("etcd".to_owned(), matches!(answers, Ok(Ok(())))));
        for stored in shared.stored.values() {
            checks.push((format!("cache-{}", stored.resource.plural), stored.cache.is_ready()));
        }
        let roles = *shared.has_default_roles.borrow();
        checks.push(("default-roles".to_owned(), roles));
        checks.push(("not-shutting-down".to_owned(), !shared.stop.is_cancelled()));
    }
    checks
}

/// One check by its name: `/readyz/etcd`. None: there is no such check.
pub(crate) async fn one(shared: &Shared, path: &str) -> Option<Response<Body>> {
    let (base, name) = path.rsplit_once('/')?;
    let (_, good) = checks(shared, base).await.into_iter().find(|(known, _)| known == name)?;
    Some(if good {
        respond::text(StatusCode::OK, "ok")
    } else {
        respond::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{name} check failed\n"))
    })
}

/// One line per check with `verbose`, `ok` or the failures otherwise.
pub(crate) async fn check(shared: &Shared, path: &str, verbose: bool) -> Response<Body> {
    let checks = checks(shared, path).await;
    let good = checks.iter().all(|(_, good)| *good);
    if good && !verbose {
        return respond::text(StatusCode::OK, "ok");
    }
    let mut text = String::new();
    for (name, good) in &checks {
        let _ = if *good {
            writeln!(text, "[+]{name} ok")
        } else {
            let why = match name.as_str() {
                "etcd" => "it does not answer",
                "default-roles" => "not looked at yet",
                "not-shutting-down" => "the server is stopping",
                _ => "still filling from etcd",
            };
            writeln!(text, "[-]{name} failed: {why}")
        };
    }
    let verdict = if good { "passed" } else { "failed" };
    let _ = writeln!(text, "{} check {verdict}", path.trim_start_matches('/'));
    respond::text(if good { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR }, text)
}

/// Prometheus text format: objects per resource and how far the caches are.
pub(crate) fn metrics(shared: &Shared) -> Response<Body> {
    let mut text = String::from(
        "# HELP apiserver_storage_objects Number of stored objects.\n# TYPE apiserver_storage_objects gauge\n",
    );
    for stored in shared.stored.values() {
        let resource = stored.resource;
        let name = if resource.group.is_empty() {
            resource.plural.to_owned()
        } else {
            format!("{}.{}", resource.plural, resource.group)
        };
        let _ = writeln!(
            text,
            "apiserver_storage_objects{{resource=\"{name}\"}} {}",
            stored.cache.snapshot().len()
        );
    }
    let _ = writeln!(
        text,
        "# HELP orch_apiserver_cache_revision Revision of the store that all caches have seen.\n# TYPE orch_apiserver_cache_revision gauge\norch_apiserver_cache_revision {}",
        shared.feed.revision()
    );
    respond::text(StatusCode::OK, text)
}
