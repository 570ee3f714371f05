#!/bin/bash
# sbatch configs/slurm.sh train.py my_run.yaml
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8   # one for each GPU: trainer.devices in slurm.yaml
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@90   # 90 seconds before the time is up: save, and back into the queue
#SBATCH --requeue             # and back into the queue when preempted
#SBATCH --open-mode=append    # one log for all runs of the job
set -euo pipefail
exec srun --kill-on-bad-exit=1 python "$1" fit \
  --config configs/slurm.yaml \
  --config "$2" \
  --trainer.callbacks+=callbacks/lora.yaml \
  --trainer.callbacks+=callbacks/preemption.yaml \
  --trainer.callbacks.dirpath="checkpoints/$SLURM_JOB_ID" \
  --ckpt_path last
