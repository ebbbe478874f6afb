#!/bin/bash
# launch/tpu_vm.sh NAME ZONE --config=configs/dit_cifar.py --workdir=/shared/runs/cifar
#
# Copies this checkout to every host of a TPU VM that is there, installs it, and gives
# all of them the same command; they find each other by themselves. The workdir must be
# one directory for all hosts (Filestore or another NFS mount); on a TPU of one host, any.
# After a preemption: make the TPU anew, and the same line goes on where the run stopped.
set -euo pipefail
[ "$#" -ge 3 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
name="$1" zone="$2"
shift 2
printf -v words '%q ' "$@"

on_all() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

archive="$(mktemp --suffix=.tgz)"
trap 'rm -f "$archive"' EXIT
git -C "${0%/*}/.." archive --format=tgz -o "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:memsep_jax.tgz" --zone="$zone" --worker=all
on_all 'mkdir -p memsep_jax && tar -xzf memsep_jax.tgz -C memsep_jax && cd memsep_jax &&
  { [ -d .venv ] || python3 -m venv .venv; } && .venv/bin/pip install -q -e ".[tpu]"'
on_all "cd memsep_jax && exec .venv/bin/python -m memsep_jax.main --distributed=auto $words"
