#!/usr/bin/env bash
# Runs a command on each of two hosts that exist only here: two network namespaces with addresses of their own,
# 10.77.0.1 and fd77::1, 10.77.0.2 and fd77::2, and a cable between them.
#     tests/dist/two_hosts.sh 'COMMAND ON HOST 1' 'COMMAND ON HOST 2'
# The exit status is 0 if both commands succeed, and 77 if this machine does not allow namespaces. Nothing is left behind,
# because a namespace ends with its last process.
#
# "$REMOTE_SHELL" HOST COMMAND, on host 1, runs a command on host 2 as ssh would.
set -uo pipefail
skip() { echo "skipped: $1"; exit 77; }

[ "${1:-}" != --remote-shell ] || exec nsenter --target "$2" --net --uts bash -c "${*:4}"
if [ "${1:-}" != --inside ]; then
    command -v ip unshare nsenter >/dev/null || skip "ip, unshare or nsenter is not installed"
    user=()
    [ "$(id -u)" = 0 ] || user=(--user --map-root-user)
    unshare "${user[@]}" --net --uts ip link set lo up 2>/dev/null || skip "network namespaces are not allowed here"
    exec unshare "${user[@]}" --net --uts "$0" --inside "$@"
fi

# This shell is host 1. Host 2 lives as long as the process `cat`, which ends when this shell does.
exec {open}> >(exec unshare --net --uts cat)
second=$!
for _ in $(seq 100); do
    [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break
    sleep 0.02
done
on_second() { nsenter --target "$second" --net --uts "$@"; }
address() { # interface, number of the host
    ip link set lo up && ip address add "10.77.0.$2/24" dev "$1" && ip address add "fd77::$2/64" dev "$1" nodad &&
        ip link set "$1" up
}
export -f address
export REMOTE_SHELL="$(realpath "$0") --remote-shell $second"
{ ip link add cable1 type veth peer name cable2 netns "$second" && address cable1 1 &&
    on_second bash -c 'address cable2 2' && hostname host1 && on_second hostname host2; } 2>/dev/null ||
    skip "a cable between two namespaces is not allowed here"

bash -c "$2" {open}>&- &
first=$!
on_second bash -c "$3" {open}>&-
status=$?
wait "$first" && exit "$status"
