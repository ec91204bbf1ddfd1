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
case "${SSH_ORIGINAL_COMMAND:-worker}" in
  control-plane) ;;
  *) exec orchctl token create --ttl 10m --description vagrant ;;
esac
# The same one for all that come within half an hour: each new one locks out who still holds the last one.
umask 077
exec 9>/run/orch-join.lock
flock 9
if [ -z "$(find /run/orch-join -mmin -30 2>/dev/null)" ]; then
  orchctl token create --ttl 1h --description vagrant --control-plane >/run/orch-join.new
  mv /run/orch-join.new /run/orch-join
fi
cat /run/orch-join
SCRIPT
chmod 755 /usr/local/sbin/orch-join-command
mkdir -p -m 700 /root/.ssh
line="restrict,command=\"/usr/local/sbin/orch-join-command\" $key"
grep -qxF "$line" /root/.ssh/authorized_keys 2>/dev/null || echo "$line" >>/root/.ssh/authorized_keys
chmod 600 /root/.ssh/authorized_keys
