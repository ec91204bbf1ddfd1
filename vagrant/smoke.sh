#!/usr/bin/env bash
# Deploys the example on the machines of the Vagrantfile and checks it across hosts, kills a worker, and checks again.
set -euo pipefail
cd "$(dirname "$0")"
network=${NETWORK:-192.168.77}
workers=${WORKERS:-2}
# What knows the machines; scripts/test-hosts has another one with the same verbs.
vagrant=${VAGRANT:-vagrant}

control() { "$vagrant" ssh control-1 -c "sudo $*" -- -q -T; }
fail() { echo "FAILED: $*" >&2; exit 1; }
eventually() {
  local what=$1 limit=$2 end; shift 2
  end=$((SECONDS + limit))
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || fail "$what (not within $limit s)"
    sleep 2
  done
  echo "ok: $what"
}

nodes_ready() { [ "$(control orchctl get nodes | grep -c ' Ready')" -ge "$1" ]; }
# How many nodes the pods are on that answered twenty requests to the node port of one host.
seen_from() {
  local pods
  pods=$(for _ in $(seq 20); do curl -s -m 2 "http://$1:30080/" || true; done | sed -n 's/^Container Hostname: //p' | sort -u)
  [ -n "$pods" ] || { echo 0; return; }
  control orchctl get pods -o wide | grep -F "$pods" | grep -oE '(worker|control)-[0-9]+' | sort -u | wc -l
}
across() { [ "$(seen_from "$1")" -ge "$2" ]; }

planes=${CONTROL_PLANES:-1}
all=$((planes + workers))
eventually "all $all nodes are Ready" 120 nodes_ready "$all"

echo "==> build the example's image on every machine"
for host in $(seq -f 'control-%g' "$planes") $(seq -f 'worker-%g' "$workers"); do
  "$vagrant" ssh "$host" -c "sudo orchctl image build /usr/lib/orch/nodeinfo --tag nodeinfo:v1" -- -q -T >/dev/null
done
control orchctl apply -f /usr/share/orch/nodeinfo.yaml
control orchctl scale deployment/nodeinfo --replicas $((2 * all))
eventually "the example answers from two hosts, asked at the control plane" 120 across "$network.11" 2
if [ "$workers" -gt 0 ]; then
  eventually "the example answers from two hosts, asked at a worker" 60 across "$network.101" 2
  echo "==> kill worker-1"
  "$vagrant" halt --force worker-1
  eventually "worker-1 is missed" 90 bash -c "! '$vagrant' ssh control-1 -c 'sudo orchctl get nodes' -- -q -T | grep -q 'worker-1 *Ready'"
  eventually "the example still answers" 60 across "$network.11" 1
  "$vagrant" up worker-1
  eventually "all $all nodes are Ready again" 180 nodes_ready "$all"
fi
control orchctl doctor || fail "doctor"
echo "the cluster works"
