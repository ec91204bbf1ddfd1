#!/bin/sh
# Makes this host the first control plane, and lets the bearer of a key ask for the join command. Safe to repeat.
# Usage: init.sh ADDRESS PUBLIC-KEY-FILE
set -eu
address=$1
key=$(cat "$2")

orchctl init --address "$address" --timers fast

# The key opens one command and nothing else (sshd(8), AUTHORIZED_KEYS).
cat >/usr/local/sbin/orch-join-command <<'SCRIPT'
#!/bin/sh
set -eu
# Good for the one host that asks.
case "${SSH_ORIGINAL_COMMAND:-worker}" in
  control-plane) exec orchctl token create --ttl 10m --single-use --description vagrant --control-plane ;;
  *) exec orchctl token create --ttl 10m --single-use --description vagrant ;;
esac
SCRIPT
chmod 755 /usr/local/sbin/orch-join-command
mkdir -p -m 700 /root/.ssh
line="restrict,command=\"/usr/local/sbin/orch-join-command\" $key"
grep -qxF "$line" /root/.ssh/authorized_keys 2>/dev/null || echo "$line" >>/root/.ssh/authorized_keys
chmod 600 /root/.ssh/authorized_keys
