//! Who may do what: roles, accounts, acting as others, and what a node's credentials open.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use tests_e2e::eventually;
use tests_e2e::testlab::TestLab;

const SOON: Duration = Duration::from_secs(30);

/// What the client says when it has to fail, with all of `words` in it.
fn refused(lab: &TestLab, args: &[&str], words: &[&str]) -> anyhow::Result<()> {
    let said = lab.fails(args, "")?;
    for word in words {
        ensure!(said.contains(word), "{word:?} is not in what {args:?} says:\n{said}");
    }
    Ok(())
}

pub(super) fn roles(lab: &TestLab) -> anyhow::Result<()> {
    lab.ok(&["create", "namespace", "rights"])?;
    let here = ["-n", "rights"];
    let ok = |args: &[&str]| lab.ok(&[&here, args].concat());
    let as_jane = |args: &[&str]| lab.ok(&[&here, args, &["--as=jane"]].concat());
    let may = |args: &[&str]| -> anyhow::Result<bool> {
        let asked = [&here, &["auth", "can-i"], args].concat();
        let answer = lab.run(&asked, b"", SOON)?;
        Ok(answer.text().starts_with("yes"))
    };

    refused(
        lab,
        &["-n", "rights", "get", "pods", "--as=jane"],
        &[r#"User "jane" cannot list resource "pods" in API group "" in the namespace "rights""#],
    )?;
    ok(&["create", "role", "reader", "--verb=get,list", "--resource=pods,pods/log"])?;
    ok(&["create", "rolebinding", "readers", "--role=reader", "--user=jane"])?;
    eventually("jane reads pods", SOON, || as_jane(&["get", "pods"]))?;
    ensure!(may(&["list", "pods", "--as=jane"])?, "can-i list pods");
    ensure!(!may(&["delete", "pods", "--as=jane"])?, "can-i delete pods");
    ensure!(may(&["*", "*"])?, "the administrator may do all");
    let list = as_jane(&["auth", "can-i", "--list"])?;
    ensure!(list.contains("pods/log") && list.contains("selfsubjectaccessreviews"), "{list}");
    let who = lab.ok(&["auth", "whoami", "--as=jane", "--as-group=dev"])?;
    ensure!(who.contains("jane") && who.contains("dev"), "{who}");
    let table = ok(&["get", "rolebindings", "-o", "wide"])?;
    ensure!(table.contains("Role/reader") && table.contains("jane"), "{table}");
    let told = lab.ok(&["describe", "clusterrole", "view"])?;
    ensure!(told.contains("deployments.apps"), "the parts are in the whole:\n{told}");

    // An account has nothing until it is given something.
    ok(&["create", "serviceaccount", "till"])?;
    let token = ok(&["create", "token", "till"])?;
    let token = format!("--token={}", token.trim());
    let server =
        lab.ok(&["config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}"])?;
    let server = format!("--server={server}");
    // A kubeconfig of its own: beside a certificate, a token would not be asked.
    let with_token =
        ["--kubeconfig=/dev/null", &server, "--insecure-skip-tls-verify", &token, "-n", "rights"];
    let by_token = |args: &[&'static str]| [&with_token, args].concat();
    refused(lab, &by_token(&["get", "pods"]), &["system:serviceaccount:rights:till", "Forbidden"])?;
    ok(&["create", "rolebinding", "till", "--clusterrole=view", "--serviceaccount=rights:till"])?;
    eventually("the account reads pods", SOON, || lab.ok(&by_token(&["get", "pods"])))?;
    refused(lab, &by_token(&["get", "secrets"]), &["cannot list resource \"secrets\""])?;
    lab.ok(&["delete", "namespace", "rights"])?;
    Ok(())
}

/// What the Secret of the chapter holds, and how it looks in an object.
const HIDDEN: [&str; 2] = ["correct-horse-battery", "Y29ycmVjdC1ob3JzZS1iYXR0ZXJ5"];

pub(super) fn node_credentials(lab: &TestLab) -> anyhow::Result<()> {
    let literal = format!("--from-literal=k={}", HIDDEN[0]);
    lab.ok(&["create", "secret", "generic", "vault", &literal])?;
    lab.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: keeper}\nspec: {nodeName: node-2, terminationGracePeriodSeconds: 0, containers: [{name: main, image: 'tools:v1', command: [sleep, '3600'], env: [{name: K, valueFrom: {secretKeyRef: {name: vault, key: k}}}], volumeMounts: [{name: v, mountPath: /v}]}], volumes: [{name: v, secret: {secretName: vault}}]}\n",
    )?;
    lab.ok(&["wait", "pod/keeper", "--for=condition=Ready", "--timeout=60s"])?;
    let own = |node: &str| -> anyhow::Result<String> {
        let path = lab.dir.join(node).join("etc/orch/pki/kubelet.conf");
        let path = path.to_str().context("a path in UTF-8")?;
        Ok(format!("--kubeconfig={path}"))
    };
    let (one, two) = (own("node-1")?, own("node-2")?);
    lab.ok(&[&two, "get", "secret", "vault"])?;
    refused(
        lab,
        &[&one, "get", "secret", "vault"],
        &["Forbidden", "no pod of node \"node-1\" refers to it"],
    )?;
    refused(lab, &[&one, "get", "secrets"], &["Forbidden"])?;
    refused(
        lab,
        &[&one, "delete", "pod", "keeper", "--grace-period=0", "--force"],
        &["Forbidden"],
    )?;
    refused(
        lab,
        &[&one, "label", "node", "node-2", "a=b"],
        &["Forbidden", "only its own Node object"],
    )?;
    refused(
        lab,
        &[&one, "taint", "node", "node-1", "a=b:NoSchedule"],
        &["not allowed to modify taints"],
    )?;
    refused(lab, &[&one, "create", "token", "default"], &["forbidden"])?;
    lab.ok(&["get", "pod", "keeper"])?;
    lab.ok(&["delete", "pod", "keeper"])?;
    lab.ok(&["delete", "secret", "vault"])?;
    Ok(())
}

/// Secrets, tokens and keys that the story used are in no log of a daemon.
pub(super) fn secrets_are_in_no_log(lab: &TestLab) -> anyhow::Result<()> {
    let (id, key) = ("a1b2c3", "e2e0e2e0e2e0e2e0");
    lab.apply(&format!(
        "apiVersion: v1\nkind: Secret\ntype: bootstrap.kubernetes.io/token\nmetadata: {{name: bootstrap-token-{id}, namespace: kube-system}}\nstringData: {{token-id: {id}, token-secret: {key}, usage-bootstrap-authentication: 'true'}}\n"
    ))?;
    let account = lab.ok(&["create", "token", "default"])?;
    let signature = account.trim().rsplit('.').next().context("a token's signature")?.to_owned();
    // They are used, so that they go by whatever logs requests, and a wrong one too, which is refused.
    let server =
        lab.ok(&["config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}"])?;
    let (server, good) = (format!("--server={server}"), format!("--token={}", account.trim()));
    let (bad, bootstrap) = (format!("{good}x"), format!("--token={id}.{key}"));
    for (token, word) in [(&good, "orbidden"), (&bad, "nauthorized"), (&bootstrap, "orbidden")] {
        let words = ["--kubeconfig=/dev/null", &server, "--insecure-skip-tls-verify", token];
        refused(lab, &[&words[..], &["get", "secrets"]].concat(), &[word])?;
    }
    let hidden = [HIDDEN[0], HIDDEN[1], key, &signature];
    let files = lab.log_files();
    let mut bytes = 0;
    for path in &files {
        let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        bytes += text.len();
        for one in hidden {
            let found = text.windows(one.len()).any(|part| part == one.as_bytes());
            ensure!(!found, "{} holds {one:?}", path.display());
        }
    }
    ensure!(files.len() >= 5 && bytes > 1000, "{bytes} bytes in {files:?} are not all logs");
    Ok(())
}
