#!/bin/bash
# gear-lightning slurm --config configs/quickstart.yaml --config configs/strategy/fsdp.yaml --cluster configs/slurm/gpu_nodes.yaml --partition gpu --data.tasks_per_iteration 32 --trainer.strategy.replicas 4 --trainer.default_root_dir /scratch/me/runs/quickstart --setup 'module load cuda' --python /home/me/gear_lightning/.venv/bin/python
#SBATCH --job-name=quickstart
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --chdir=/home/me/gear_lightning
#SBATCH --export=ALL
#SBATCH --partition=gpu
#SBATCH --exclusive
# 600 s before the limit every process gets USR1 (no B:, which would signal only this shell);
# the job saves one checkpoint, is requeued, and appends to the same files.
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/scratch/me/runs/quickstart/slurm/%j.out

module load cuda
export OMP_NUM_THREADS=8 PYTHONUNBUFFERED=1
# a failed collective ends its process; the heartbeat gives the watchdog time to report the stuck rank
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=3600

# exec: a signal to the batch script also reaches the processes. If one has ended, the others have
# 30 s to write their reports; kill-on-bad-exit would end them at once.
exec srun --kill-on-bad-exit=0 --wait=30 --cpus-per-task=8 --open-mode=append \
  --output=/scratch/me/runs/quickstart/slurm/%j_%t.log \
  /home/me/gear_lightning/.venv/bin/python -m gear_lightning fit \
  --config configs/quickstart.yaml \
  --config configs/strategy/fsdp.yaml \
  --data.tasks_per_iteration 32 \
  --trainer.strategy.replicas 4 \
  --trainer.accelerator=gpu \
  --trainer.num_nodes=4 \
  --trainer.devices=8 \
  --trainer.default_root_dir=/scratch/me/runs/quickstart \
  --watchdog.seconds=1800 \
  --trainer.strategy.init_args.timeout=1:00:00 \
  --ckpt_path=last
