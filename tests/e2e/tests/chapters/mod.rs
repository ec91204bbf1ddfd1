//! The chapters of the story, in order. A chapter leaves the lab as the next one expects it: three nodes Ready and
//! `nodeinfo` with three replicas.

mod connect_time;
mod data_plane;
mod deploy;
mod faults;
pub(crate) mod leftovers;
mod mistakes;
mod network;
mod overlay;
mod policy;
mod rights;
mod rollout;
mod streams;

use std::time::Duration;

use anyhow::bail;
use tests_e2e::eventually;
use tests_e2e::testlab::{Pod, TestLab};

/// What a chapter is told with.
#[derive(Clone, Copy)]
pub(crate) enum Needs {
    /// kubectl or orchctl.
    AnyClient,
    /// A stock kubectl.
    Kubectl,
    /// `ORCH_CHAOS=1`: long, and hard on the lab (`make test` is everything but the long chaos).
    Chaos,
}

/// One chapter.
pub(crate) struct Chapter {
    pub name: &'static str,
    pub needs: Needs,
    pub run: fn(&TestLab) -> anyhow::Result<()>,
}

const fn told(name: &'static str, run: fn(&TestLab) -> anyhow::Result<()>) -> Chapter {
    Chapter { name, needs: Needs::AnyClient, run }
}

const fn with_kubectl(name: &'static str, run: fn(&TestLab) -> anyhow::Result<()>) -> Chapter {
    Chapter { name, needs: Needs::Kubectl, run }
}

pub(crate) const CHAPTERS: &[Chapter] = &[
    told(
        "three_nodes_are_ready_with_a_subnet_each",
        network::three_nodes_are_ready_with_a_subnet_each,
    ),
    told("the_demo_answers_from_several_nodes_and_is_done_at_once_the_second_time", deploy::demo),
    told("lab_up_again_finds_everything_there", deploy::up_again),
    told("get_describe_and_logs_show_the_app", deploy::get_describe_and_logs),
    told("exec_passes_megabytes_and_the_exit_code", deploy::exec),
    with_kubectl("kubectl_apply_label_patch_explain_wait_cp_and_delete_work", deploy::kubectl_tour),
    with_kubectl(
        "exec_cp_and_port_forward_work_with_the_newest_and_the_oldest_kubectl",
        streams::streams,
    ),
    told(
        "pods_reach_pods_on_other_nodes_through_vxlan_without_fragments",
        network::pods_reach_pods,
    ),
    told("a_pod_resolves_and_reaches_the_service_and_itself_through_it", network::services_and_dns),
    told("a_pod_reaches_the_api_server_by_its_service", network::kubernetes_service),
    told("config_maps_secrets_and_tokens_are_mounted", deploy::volumes),
    with_kubectl("a_user_or_account_may_what_roles_give", rights::roles),
    with_kubectl("a_node_reads_and_writes_what_is_its_own", rights::node_credentials),
    told("probes_restart_a_container_and_keep_a_pod_out_of_the_service", deploy::probes),
    told("scale_to_six_and_to_two", rollout::scale),
    told("a_rollout_loses_no_request", rollout::rollout_loses_no_request),
    told("mistakes_get_one_clear_message", mistakes::mistakes),
    told("a_killed_agent_leaves_its_pods_alone", faults::agent_killed),
    told("a_killed_server_stops_no_traffic", faults::server_killed),
    told("a_killed_etcd_stops_no_traffic", faults::etcd_killed),
    told(
        "the_doctor_is_silent_in_a_healthy_lab_and_finds_each_of_seventeen_faults",
        overlay::doctor,
    ),
    told("a_trace_follows_a_packet_and_says_where_it_is_lost", overlay::trace),
    Chapter {
        name: "streams_survive_what_happens_to_the_overlay_and_the_kernel_converges",
        needs: Needs::Chaos,
        run: overlay::chaos,
    },
    told("a_policy_is_enforced_on_every_node_and_outlives_its_agent", policy::policies),
    told("a_pod_that_sends_at_once_sends_nothing_that_policy_forbids", policy::closed_before_open),
    told("maps_of_another_layout_are_taken_over_without_a_gap", data_plane::another_layout),
    told("a_full_conntrack_table_opens_nothing_and_is_told", data_plane::conntrack_full),
    told("with_the_fast_path_policies_and_services_are_the_same", data_plane::fast_path),
    told(
        "a_socket_gets_its_endpoint_at_connect_and_keeps_it_whatever_the_agent_does",
        connect_time::connect_time,
    ),
    told("pods_of_a_killed_node_run_elsewhere_and_the_node_keeps_its_subnet", faults::node_killed),
    with_kubectl("secrets_and_tokens_are_in_no_log", rights::secrets_are_in_no_log),
];

/// The pods of the demo, once `count` are ready and none is leaving.
fn nodeinfo(lab: &TestLab, count: usize, limit: Duration) -> anyhow::Result<Vec<Pod>> {
    ready_pods(lab, "app=nodeinfo", count, limit)
}

fn ready_pods(
    lab: &TestLab,
    selector: &str,
    count: usize,
    limit: Duration,
) -> anyhow::Result<Vec<Pod>> {
    eventually(&format!("{count} ready pods with {selector}"), limit, || {
        let pods = lab.pods(selector)?;
        if pods.len() != count || pods.iter().any(|pod| !pod.ready || pod.leaving) {
            bail!("{pods:#?}");
        }
        Ok(pods)
    })
}
