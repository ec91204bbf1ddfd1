#!/bin/sh
# Installs the orch packages of a folder, and with them what they depend on. Safe to repeat.
# Usage: packages.sh FOLDER control-plane|worker
set -eu
folder=$1
case "$2" in
  control-plane) etcd="etcd-server etcd-client" ;;
  worker) etcd="" ;;
  *) echo "usage: packages.sh FOLDER control-plane|worker" >&2; exit 2 ;;
esac
export DEBIAN_FRONTEND=noninteractive

# Pods survive a restart of the engine only so; written before the engine starts for the first time.
if [ ! -e /etc/docker/daemon.json ]; then
  mkdir -p /etc/docker
  echo '{"live-restore": true}' >/etc/docker/daemon.json
fi
# Debian's package starts an etcd of its own on the ports that the cluster's needs.
if [ ! -e /etc/systemd/system/etcd.service ] && [ -d /run/systemd/system ]; then
  systemctl mask etcd.service >/dev/null 2>&1 || true
fi
apt-get update -qq
# apt installs local files with their dependencies only when they are named with a path. $etcd is none or two words.
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends "$folder"/orch_*.deb "$folder"/orch-cni_*.deb openssh-client curl $etcd >/dev/null
if [ -d /run/systemd/system ]; then
  systemctl enable --now docker >/dev/null 2>&1
fi
orchctl version --client
