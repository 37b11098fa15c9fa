#!/bin/bash
# A SLURM of two nodes on this host, for tests: tests/start_slurm.sh DIR  starts it (as root), tests/start_slurm.sh DIR stop  ends it.
# Needs Debian's slurm-wlm and munge. Afterwards: export SLURM_CONF=DIR/slurm.conf
set -euo pipefail
dir=$(realpath -m "${1:?usage: tests/start_slurm.sh DIR [stop]}")
if [ "${2:-}" = stop ]; then
  for file in "$dir"/*.pid; do [ -e "$file" ] && kill "$(cat "$file")" 2>/dev/null || true; done
  for _ in $(seq 40); do ls "$dir"/*.pid >/dev/null 2>&1 || exit 0; sleep 0.25; done
  exit 0
fi
for program in munged slurmctld slurmd sbatch; do
  command -v $program >/dev/null || { echo "start_slurm.sh: no $program: apt-get install slurm-wlm munge" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "start_slurm.sh: it must run as root" >&2; exit 1; }
mkdir -p "$dir/state" "$dir/munge"
host=$(hostname -s)
port=$((17000 + RANDOM % 4000))
head -c 128 /dev/urandom > "$dir/munge/key"
chmod 0755 "$dir" "$dir/munge"
chmod 0600 "$dir/munge/key"
munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munged.pid" \
  --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
cat > "$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2
MpiDefault=none
KillWait=3
ReturnToService=2
JobRequeue=1
NodeName=n0 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 RealMemory=2000
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 RealMemory=2000
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$dir/slurm.conf"
slurmctld
slurmd -N n0
slurmd -N n1
for _ in $(seq 60); do
  [ "$(sinfo --noheader --Node --format=%T 2>/dev/null | grep -c idle)" = 2 ] && exit 0
  sleep 0.25
done
echo "start_slurm.sh: the nodes did not come up: see $dir/*.log" >&2
exit 1
