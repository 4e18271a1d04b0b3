#!/bin/bash
# The models of a job on many machines: each task of the array trains its part, on the devices that the job names.
#
#     sbatch --array=0-7 slurm.sh job.toml 8
#
# 8 is the number of parts, no more than there are models. It stays the same where only some tasks are run again.
# The job's run.out is a folder that all of them see. Before its time ends, or as it gives way to another, a task writes
# a checkpoint and is queued again, and goes on.
#SBATCH --job-name=hydra
#SBATCH --gpus-per-task=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append

hydra train "$1" --resume auto --set "run.part=$SLURM_ARRAY_TASK_ID/$2" &
worker=$!
trap 'kill -TERM "$worker"' TERM
wait "$worker"
code=$?
# A signal ends the first wait.
while kill -0 "$worker" 2> /dev/null; do
    wait "$worker"
    code=$?
done
if [ "$code" = 75 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
