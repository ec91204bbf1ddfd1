#!/bin/sh
# Joins this host to the cluster of a control plane. Safe to repeat.
# Usage: join.sh CONTROL-PLANE ADDRESS control-plane|worker KEY-FILE
set -eu
control=$1 address=$2 role=$3
chmod 600 "$4"

if [ -e /etc/orch/config.yaml ]; then
  echo "this host has joined already"
  exit 0
fi
command=$(ssh -q -i "$4" -o IdentitiesOnly=yes -o BatchMode=yes -o StrictHostKeyChecking=accept-new \
  "root@$control" "$role")
case "$command" in
  "orchctl join "*) ;;
  *) echo "the control plane at $control gave no join command: $command" >&2; exit 1 ;;
esac
# Words of letters, digits, dots, colons and dashes only: nothing for the shell to expand.
# shellcheck disable=SC2086
$command --address "$address" --timers fast
