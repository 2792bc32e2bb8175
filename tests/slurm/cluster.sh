#!/usr/bin/env bash
# A real Slurm on one machine: a controller and N nodes, each a "host" with a network namespace, a host name and a hosts
# file of its own. A bridge that lives in a namespace joins them; the machine's own interfaces stay as they are.
#
#   tests/slurm/cluster.sh up DIR [NODES]     boot; DIR gets configuration, state and logs
#   tests/slurm/cluster.sh on DIR HOST CMD... run a command on a host: ctl, node1, node2, ...
#   tests/slurm/cluster.sh start DIR HOST     start a node's daemon again after `kill`
#   tests/slurm/cluster.sh kill DIR HOST      SIGKILL everything on a node, as if its plug were pulled
#   tests/slurm/cluster.sh ranks DIR HOST     process ids of the trainer's ranks on a node
#   tests/slurm/cluster.sh left DIR           processes on the hosts that are not Slurm's own, one a line
#   tests/slurm/cluster.sh down DIR           end all of it
#
# Needs root, and the packages slurmctld, slurmd, slurm-client, munge, iproute2. Addresses are those that RFC 2544 sets
# aside for tests of networks; no packet leaves the namespaces.
set -euo pipefail

NET=198.18.7
command=${1:?usage: see the head of this file}
DIR=$(realpath -m "${2:?the directory of the cluster}")
# Two clusters may stand side by side: the names of their namespaces differ.
PREFIX=ts$(printf '%s' "$DIR" | cksum | cut -c1-6)
shift 2

space() { printf '%s-%s' "$PREFIX" "$1"; }

spaces() { ip netns list 2>/dev/null | awk -v p="$PREFIX-" 'index($1, p) == 1 { print $1 }'; }

# `ip netns exec` mounts a new /sys, in which slurmd finds no cgroups; nsenter leaves it alone.
on() {
    local host=$1
    shift
    # shellcheck disable=SC2016 # expanded by the inner shell
    SLURM_CONF=$DIR/slurm.conf nsenter --net="/run/netns/$(space "$host")" unshare --uts --mount sh -c \
        'h=$1; hosts=$2; shift 2; hostname "$h"; mount --bind "$hosts" /etc/hosts; exec "$@"' sh "$host" "$DIR/hosts" "$@"
}

join() { # join HOST ADDRESS
    ip netns add "$(space "$1")"
    ip -n "$(space "$1")" link set lo up
    ip -n "$(space sw)" link add "s-$1" type veth peer name eth0 netns "$(space "$1")"
    ip -n "$(space sw)" link set "s-$1" master br0 up
    ip -n "$(space "$1")" addr add "$2/24" dev eth0
    ip -n "$(space "$1")" link set eth0 up
}

# proctrack/cgroup is what clusters use, and it decides who gets a signal. It needs cgroup v1's freezer here.
tracking() {
    if [[ -d /sys/fs/cgroup/freezer ]]; then echo proctrack/cgroup; else echo proctrack/linuxproc; fi
}

# KillWait stays well below MessageTimeout: slurmd answers "end this job" only after KillWait, and an order that the
# controller believes unheard is sent again a minute later, to the next start of a job that keeps its id.
configure() { # configure NODES
    cat >"$DIR/slurm.conf" <<C
ClusterName=treepo
SlurmctldHost=ctl($NET.100)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
ProctrackType=$(tracking)
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
KillWait=5
MessageTimeout=30
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
MinJobAge=3600
SlurmdParameters=config_overrides
C
    for i in $(seq "$1"); do
        # Larger than the machine: the scripts ask for the shape of a GPU node.
        echo "NodeName=node$i NodeAddr=$NET.$i CPUs=64 RealMemory=900000 Gres=gpu:8 State=UNKNOWN"
    done >>"$DIR/slurm.conf"
    echo "PartitionName=gpu Nodes=node[1-$1] Default=YES MaxTime=INFINITE State=UP" >>"$DIR/slurm.conf"
    # A gpu without a device file is dropped; nothing opens these.
    echo "Name=gpu File=/dev/tty[0-7]" >"$DIR/gres.conf"
    printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=yes ConstrainDevices=no ConstrainCores=no \
        ConstrainRAMSpace=no >"$DIR/cgroup.conf"
}

up() { # up NODES
    local nodes=${1:-2} i
    for i in slurmctld slurmd sbatch munged ip nsenter; do
        command -v "$i" >/dev/null || { echo "no $i: apt-get install slurmctld slurmd slurm-client munge iproute2" >&2; exit 3; }
    done
    [[ $(id -u) = 0 ]] || { echo "network namespaces need root" >&2; exit 3; }
    [[ -z $(spaces) ]] || { echo "a cluster of $DIR is up already: 'down' it first" >&2; exit 2; }
    mkdir -p "$DIR"/{state,spool,log,run,munge}
    chmod 0711 "$DIR/munge"
    [[ -f $DIR/munge/key ]] || (umask 077 && head -c 128 /dev/urandom >"$DIR/munge/key")
    printf '127.0.0.1 localhost\n%s.100 ctl\n' "$NET" >"$DIR/hosts"
    for i in $(seq "$nodes"); do echo "$NET.$i node$i" >>"$DIR/hosts"; done
    ip netns add "$(space sw)" 2>"$DIR/log/netns" || { echo "no network namespaces here: $(cat "$DIR/log/netns")" >&2; exit 3; }
    ip -n "$(space sw)" link add br0 type bridge
    ip -n "$(space sw)" link set br0 up
    join ctl "$NET.100"
    for i in $(seq "$nodes"); do join "node$i" "$NET.$i"; done
    configure "$nodes"
    munged --key-file="$DIR/munge/key" --socket="$DIR/munge/sock" --pid-file="$DIR/munge/pid" \
        --log-file="$DIR/munge/log" --seed-file="$DIR/munge/seed" --num-threads=2
    on ctl slurmctld
    for i in $(seq "$nodes"); do on "node$i" slurmd -N "node$i"; done
    for _ in $(seq 600); do
        [[ $(on ctl sinfo -h -N -o %t 2>/dev/null | grep -c '^idle$') = "$nodes" ]] && return 0
        sleep 0.1
    done
    echo "the nodes are not idle after 60 s:" >&2
    on ctl sinfo -N -o '%N %t %E' >&2
    tail -n 5 "$DIR"/log/*.log >&2
    exit 1
}

# A zombie has ended, though `kill -0` still finds it.
alive() { case "$(cut -d' ' -f3 "/proc/$1/stat" 2>/dev/null)" in '' | Z) return 1 ;; esac; }

kill_host() { # kill_host HOST: until nothing is born any more
    local pids
    for _ in $(seq 50); do
        pids=$(ip netns pids "$(space "$1")")
        [[ -n $pids ]] || return 0
        # shellcheck disable=SC2086 # a list of numbers
        kill -KILL $pids 2>/dev/null || true
        sleep 0.1
    done
    echo "processes of $1 outlived SIGKILL: $pids" >&2
    exit 1
}

ranks() {
    local pid
    for pid in $(ip netns pids "$(space "$1")"); do
        alive "$pid" || continue
        case "$(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null)" in
        *torch.distributed.run* | *--dry-run*) ;; # the launcher, the check before it
        *"treepo_mega.cli train "*) echo "$pid" ;;
        esac
    done
}

left() {
    local name pid
    for name in $(spaces); do
        for pid in $(ip netns pids "$name"); do
            alive "$pid" || continue
            case "$(cat "/proc/$pid/comm" 2>/dev/null)" in
            slurmctld | slurmd | slurmscriptd | slurmstepd | '') ;;
            *) echo "${name#"$PREFIX"-} $pid $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | cut -c1-120)" ;;
            esac
        done
    done
}

down() {
    local name pid folder
    for name in $(spaces); do
        [[ $name = "$(space sw)" ]] || kill_host "${name#"$PREFIX"-}"
        ip netns del "$name"
    done
    if [[ -f $DIR/munge/pid ]]; then
        pid=$(cat "$DIR/munge/pid")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 100); do
            alive "$pid" || break
            sleep 0.1
        done
    fi
    for folder in /sys/fs/cgroup/freezer/slurm_node*; do
        [[ ! -d $folder ]] || find "$folder" -depth -type d -exec rmdir {} \; 2>/dev/null || true
    done
}

case $command in
up) up "$@" ;;
on) on "$@" ;;
start) on "$1" slurmd -N "$1" ;;
kill) kill_host "$1" ;;
ranks) ranks "$1" ;;
left) left ;;
down) down ;;
*)
    echo "unknown command $command: up, on, start, kill, ranks, left, down" >&2
    exit 2
    ;;
esac
