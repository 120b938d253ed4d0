#!/bin/bash
# PID 1 of an emulated node, in network, host-name, mount, IPC and PID namespaces of its own.
# node_init.sh FOLDER NAME SHARED...: SHARED are the paths that all nodes see, the cluster's shared file system.
set -euo pipefail
folder=$1 name=$2
shift 2
hostname "$name"
mount --make-rprivate /
# /tmp, /run and /dev/shm are the node's own. What is shared may lie below them, so it is held aside meanwhile.
aside=$(mktemp -d /var/tmp/slurm-node.XXXXXX)
for place in $(seq $#); do
  mkdir "$aside/$place"
  mount --rbind "${!place}" "$aside/$place"
done
mount -t tmpfs -o mode=1777,size=4g tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm
for place in $(seq $#); do
  mkdir -p "${!place}"
  mount --move "$aside/$place" "${!place}"
  rmdir "$aside/$place"
done
rmdir "$aside"
mount --bind "$folder/hosts" /etc/hosts
ip link set lo up
mkdir -m 755 /run/vespo-slurm
munged --key-file="$folder/munge.key" --socket=/run/vespo-slurm/munge --pid-file=/run/vespo-slurm/munged.pid \
  --seed-file=/run/vespo-slurm/seed --log-file="$folder/log/munged.$name.log" --num-threads=1
export SLURM_CONF=$folder/slurm.conf
slurmd -N "$name" -D -L "$folder/log/slurmd.$name.log" </dev/null >"$folder/log/slurmd.$name.out" 2>&1 &
trap 'exit 0' TERM
while :; do  # stays, as init; bash reaps orphans
  sleep 3600 &
  wait $! || true
done
