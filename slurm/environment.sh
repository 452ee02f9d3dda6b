# What your cluster needs: the one place to edit. Sourced in front of everything that the scripts of this folder start,
# on the first node of a job and on the login node. $LOCKSTEP is the folder of this repository.

# Modules. Examples:
# module purge
# module load cuda/12.8

# The Python environment: the one that `make install` made here, if there is one; else whatever `python` is.
if [ -x "$LOCKSTEP/.venv/bin/python" ]; then export PATH="$LOCKSTEP/.venv/bin:$PATH"; fi
# source "$HOME/venvs/lockstep/bin/activate"

# Containers. The repository, the data and the output folder must be visible inside under their own paths.
IN_CONTAINER=() # Apptainer: IN_CONTAINER=(apptainer exec --nv --bind "$LOCKSTEP" --bind "$PWD" image.sif)
SRUN_OPTIONS=() # pyxis: SRUN_OPTIONS=(--container-image=image.sqsh --container-mounts="$LOCKSTEP,$PWD" --container-workdir="$PWD")

# Folders that all nodes share, for models, data sets and encoded rows. Compute nodes often have no network:
# `python -m train CONFIG --prepare-data` on the login node fetches everything, then they need none.
# export HF_HOME=/shared/$USER/huggingface HF_HUB_OFFLINE=1

# Secrets (HF_TOKEN, WANDB_API_KEY) belong into the environment in which you call sbatch, which it hands on; never here.
