#!/usr/bin/env bash
# A sweep as a Slurm job: one Ray for the job, on all its nodes. From a login node, in a folder that all nodes share:
#
#   llmft fetch rte_hans                                    # where compute nodes have no network
#   sbatch sweeps/clusters/slurm.sh rte_hans --out "$PWD/results/rte_hans"
#   llmft plan rte_hans --out "$PWD/results/rte_hans"       # how far it is
#
# The arguments are those of `llmft sweep`. Two minutes before its time is up, and when it is told to end (scancel --batch
# --signal=TERM), the job stops its trials and Ray and queues again; it then goes on where it was. Plain scancel ends it for good.
#SBATCH --job-name=llmft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=llmft-%j.log
set -euo pipefail
set -m # background processes get a group of their own, and do not ignore SIGINT

# Here goes what puts llmft and ray into PATH, for example: source "$HOME/llmft-venv/bin/activate"

nodes=${SLURM_JOB_NUM_NODES:?this is a job: sbatch sweeps/clusters/slurm.sh PLAN --out FOLDER}
gpus=${SLURM_GPUS_ON_NODE:-0}
head_address=$(hostname -I | cut -d' ' -f1) # of the job's first node, where this runs; if the nodes meet on another network, its there
head_port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine must not meet
export head_address head_port gpus
export scratch=/tmp/llmft-$SLURM_JOB_ID # short: sockets lie in it, and their paths may have 107 characters
# Without a token anyone on these machines could run code as you.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

# shellcheck disable=SC2329 # srun runs it, on every node, until it is told to end
ray_node() {
    local options=("--num-cpus=$SLURM_CPUS_PER_TASK" "--num-gpus=$gpus" --disable-usage-stats --block)
    if [ "$SLURM_PROCID" = 0 ]; then
        options+=(--head "--node-ip-address=$head_address" "--port=$head_port" "--temp-dir=$scratch" --include-dashboard=false)
    else
        until (: <"/dev/tcp/$head_address/$head_port") 2>/dev/null; do sleep 1; done
        options+=("--address=$head_address:$head_port")
    fi
    ray start "${options[@]}" &
    local ray=$!
    trap 'kill "$ray"' TERM
    while kill -0 "$ray" 2>/dev/null; do wait "$ray"; done # a signal ends a wait, not Ray
    rm -rf "$scratch"
}

# Ends when all nodes have joined, or after five minutes with those that have; fails where there is no Ray.
wait_for_nodes() {
    python - <<'PYTHON'
import os, time
import ray
end = time.monotonic() + 300
ray.init(address=f"{os.environ['head_address']}:{os.environ['head_port']}", logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(os.environ["SLURM_JOB_NUM_NODES"]) and time.monotonic() < end:
    time.sleep(1)
PYTHON
}

end() { # Ray, on all nodes
    trap - EXIT
    kill "$ray_step" 2>/dev/null || true
    wait "$ray_step" || true
}

again='' sweep=''
trap 'again=1; [ -z "$sweep" ] || kill -INT "$sweep" 2>/dev/null || true' TERM
srun --export=ALL --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 bash -c "$(declare -f ray_node); ray_node" &
ray_step=$!
trap end EXIT
until (: <"/dev/tcp/$head_address/$head_port") 2>/dev/null; do
    kill -0 "$ray_step" 2>/dev/null || { echo "llmft: Ray could not be started; see above." >&2; exit 1; }
    sleep 1
done
wait_for_nodes

code=130 # as llmft's own, where it is stopped before the sweep is done
if [ -z "$again" ]; then
    llmft sweep "$@" --address "$head_address:$head_port" &
    sweep=$! code=0
    wait "$sweep" || code=$?
    while kill -0 "$sweep" 2>/dev/null; do # a signal ended the wait, not the sweep
        code=0
        wait "$sweep" || code=$?
    done
fi
end
if [ -n "$again" ] && [ "$code" = 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
