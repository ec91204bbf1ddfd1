//! What a user does wrong, and what is said about it.

use std::time::Duration;

use anyhow::ensure;
use tests_e2e::eventually;
use tests_e2e::testlab::TestLab;

const SOON: Duration = Duration::from_secs(30);

pub(super) fn mistakes(lab: &TestLab) -> anyhow::Result<()> {
    let pod = |name: &str, spec: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{terminationGracePeriodSeconds: 0, containers: [{spec}]}}\n"
        )
    };
    for (manifest, words) in [
        ("apiVersion: v1\nkind: Pod\n  metadata: broken\n".to_owned(), vec!["yaml", "line"]),
        ("apiVersion: v1\nkind: Gadget\nmetadata: {name: x}\n".to_owned(), vec!["Gadget"]),
        (
            pod("typo", "{name: main, image: 'tools:v1', comand: [sleep]}"),
            vec!["unknown field", "comand"],
        ),
        (pod("Upper_Case", "{name: main, image: 'tools:v1'}"), vec!["metadata.name"]),
        (pod("no-image", "{name: main}"), vec!["image"]),
    ] {
        let said = lab.fails(&["apply", "-f", "-"], &manifest)?;
        for word in words {
            ensure!(
                said.to_lowercase().contains(&word.to_lowercase()),
                "{word:?} is not in:\n{said}\nfor\n{manifest}"
            );
        }
    }
    let said = lab.fails(&["get", "pod", "absent"], "")?;
    ensure!(said.contains("absent"), "{said}");

    // Things that only turn out later are in an event and in the pod's status.
    lab.apply(&pod(
        "too-large",
        "{name: main, image: 'tools:v1', resources: {requests: {cpu: '1000'}}}",
    ))?;
    lab.apply(&pod(
        "no-such-image",
        "{name: main, image: 'absent.invalid/app:v1', imagePullPolicy: IfNotPresent}",
    ))?;
    lab.apply(&pod("no-such-program", "{name: main, image: 'tools:v1', command: [/absent]}"))?;
    for (name, words) in [
        ("too-large", vec!["FailedScheduling", "Insufficient cpu", "0/3 nodes"]),
        ("no-such-image", vec!["ErrImagePull", "absent.invalid/app:v1"]),
        ("no-such-program", vec!["/absent"]),
    ] {
        eventually(&format!("word about {name}"), SOON, || {
            let described = lab.ok(&["describe", "pod", name])?;
            for word in &words {
                ensure!(described.contains(word), "{word:?} is not in:\n{described}");
            }
            Ok(())
        })?;
        lab.ok(&["delete", "pod", name])?;
    }

    let said = lab.orchctl(&["lab", "kill", "node-9"], SOON)?.failed()?;
    ensure!(said.contains("node-9") && said.contains("node-1"), "{said}");
    let said = lab.orchctl(&["--kubeconfig", "/absent", "get", "pods"], SOON)?.failed()?;
    ensure!(said.contains("/absent"), "{said}");
    Ok(())
}
