#!/bin/bash
# Stages as jobs, each of which begins when the one before has ended well; if one fails, those after it are dropped.
# Run it on the login node:
#
#   slurm/stages.sh --nodes=2 --time=8:00:00 -- pretrain.yaml adapt.yaml classify.yaml [key=value] [NAME:key=value]
#   slurm/stages.sh --prepare-data ... -- ...      first fetches and encodes, here, what needs no earlier stage
#
# Job k is `train.sbatch` with the first k configs: those before are finished by then, and are not run again.

set -euo pipefail
LOCKSTEP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export LOCKSTEP PYTHONPATH="$LOCKSTEP${PYTHONPATH:+:$PYTHONPATH}"
source "$LOCKSTEP/slurm/environment.sh"

options=() configs=() assignments=() prepare=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if [ "$1" = --prepare-data ]; then prepare=yes; else options+=("$1"); fi
  shift
done
[ "${1:-}" = -- ] || { sed -n '2,8p' "${BASH_SOURCE[0]}"; exit 2; }
shift
for argument in "$@"; do
  case $argument in
    hub_token=* | *:hub_token=*) echo "hub_token: Slurm shows a job's command line to others; set HF_TOKEN instead"; exit 2 ;;
    *=*) assignments+=("$argument") ;;
    *) configs+=("$argument") ;;
  esac
done
[ ${#configs[@]} -gt 0 ] || { echo "name a config after --"; exit 2; }

# Mistakes are told here, not by a job tomorrow.
"${IN_CONTAINER[@]}" python -m train --unfinished "$@" >/dev/null
[ -z "$prepare" ] || "${IN_CONTAINER[@]}" python -m train --prepare-data "$@"

names=() after=()
for place in "${!configs[@]}"; do
  name=$(basename "${configs[$place]}" .yaml)
  names+=("$name")
  own=() # NAME:key=value of a stage that this job does not know yet would be refused
  for assignment in "${assignments[@]}"; do
    key=${assignment%%=*}
    if [[ $key != *:* || " ${names[*]} " == *" ${key%%:*} "* ]]; then own+=("$assignment"); fi
  done
  job=$(sbatch --parsable --job-name="$name" "${options[@]}" "${after[@]}" \
    "$LOCKSTEP/slurm/train.sbatch" "${configs[@]:0:$((place + 1))}" "${own[@]}")
  job=${job%%;*} # with several clusters: JOB;CLUSTER
  after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
  echo "$name: job $job"
done
