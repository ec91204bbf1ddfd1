//! What the plugin asks, and when it is answered: an ADD once the endpoint's row is in force.

use std::time::Duration;

use orch_config::Paths;
use orch_ebpf_loader::{Announcement, Answer, Request};
use orch_ebpf_maps::state;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::engine::Report;
use super::explain;
use super::socket::Asked;

/// The plugin waits for 10 s; a reason is better than silence.
const ANSWER_WITHIN: Duration = Duration::from_secs(9);

/// An ADD that waits.
pub(super) struct Waiting {
    made: Announcement,
    answer: oneshot::Sender<Answer>,
    pub(super) until: Instant,
}

/// Takes a request: answers at once, or gives what has to wait for a look.
pub(super) fn take(
    asked: Asked,
    paths: &Paths,
    known: bool,
    complaint: Option<&str>,
    report: Option<&Report>,
) -> Option<Waiting> {
    let answer = match asked.request {
        Request::Add(made) => {
            let until = Instant::now() + ANSWER_WITHIN;
            return Some(Waiting { made, answer: asked.answer, until });
        }
        Request::Explain(about) => {
            let paths = paths.clone();
            // Programs are loaded for it; nothing else waits for that, and whoever gave up needs no answer.
            tokio::task::spawn_blocking(move || {
                let said = explain::explain(&paths, &about);
                drop(asked.answer.send(said.map_or_else(Answer::Refused, Answer::Explained)));
            });
            return None;
        }
        // The maps are the plugin's work; the look that follows sees what is left.
        Request::Del { .. } => Answer::Done { revision: revision(report) },
        Request::Status => match (complaint, known) {
            (Some(why), _) => Answer::Refused(why.to_owned()),
            (None, false) => Answer::Refused(UNKNOWN.to_owned()),
            (None, true) => Answer::Done { revision: revision(report) },
        },
    };
    // One that gave up needs no answer.
    let _ = asked.answer.send(answer);
    None
}

const UNKNOWN: &str =
    "pods and policies are not known yet; see whether the node reaches the API server";

fn revision(report: Option<&Report>) -> u64 {
    report.map_or(0, |report| report.revision)
}

/// Answers what can be answered; gives the rest.
pub(super) fn answer(
    waiting: Vec<Waiting>,
    report: Option<&Report>,
    complaint: Option<&str>,
) -> Vec<Waiting> {
    let mut rest = Vec::new();
    for one in waiting {
        let row = report.and_then(|report| report.endpoints.get(&one.made.ifindex));
        let row = row.filter(|row| row.uid == one.made.uid);
        let late = Instant::now() >= one.until;
        let said = match (row.map(|row| row.state), report) {
            (Some(state::READY), Some(report)) => Answer::Done { revision: report.revision },
            (Some(state::LOCKED), _) => {
                Answer::Refused("the pod's policies do not fit into the kernel's maps".to_owned())
            }
            (None, Some(_)) => Answer::Refused("the endpoint is gone".to_owned()),
            _ if !late => {
                rest.push(one);
                continue;
            }
            (Some(_), _) => Answer::Refused(format!(
                "the API server has not told of the pod {} yet",
                one.made
                    .pod
                    .as_ref()
                    .map_or_else(String::new, |pod| format!("{}/{}", pod.namespace, pod.name))
            )),
            (None, None) => Answer::Refused(complaint.unwrap_or(UNKNOWN).to_owned()),
        };
        let _ = one.answer.send(said);
    }
    rest
}
