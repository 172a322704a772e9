#!/usr/bin/env bash
# node.sh NAME FOLDER REPOSITORY: the first process of one node (cluster.py starts it in namespaces of its own).
# Gives the node its name and mounts, waits for a line on stdin until its network is there, starts its daemons, and
# reaps orphans as long as stdin is open: a test run that is killed takes its nodes with it.
set -euo pipefail
name=$1 folder=$2 repository=$3

hostname "$name"
# /tmp and /dev/shm are every node's own, as on a cluster; all other folders are shared.
mount -t tmpfs tmpfs /dev/shm
if [[ $repository = /tmp/* ]]; then
  mkdir -p "$folder/nodes/$name/aside"
  mount --rbind "$repository" "$folder/nodes/$name/aside"
  mount -t tmpfs tmpfs /tmp
  mkdir -p "$repository"
  mount --move "$folder/nodes/$name/aside" "$repository"
else
  mount -t tmpfs tmpfs /tmp
fi
chmod 1777 /tmp /dev/shm
mount --bind "$folder/etc/hosts" /etc/hosts
mount --bind "$folder/etc/nsswitch.conf" /etc/nsswitch.conf
mount --bind "$folder/etc/slurm" /etc/slurm

read -r _
if [ "$name" = login ]; then
  munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed"
  slurmctld -D </dev/null &
else
  slurmd -D </dev/null &
fi
while read -r _; do :; done
