"""Scripts that start a recipe on several nodes, from its plan: a batch job for Slurm, and a plain one for each node.

They name no machine and no place of one: what is different everywhere comes from the scheduler, from arguments, or is
relative to the working directory, which all nodes must share.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence

from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import RunPlan

_WIDTH = 116
_SHARED = """\
# The working directory must be on a file system that all nodes share: the run directory, the data and, for a recipe
# that is a file, the recipe lie there. megacpp-stp must be on the PATH of each node, in the same version."""
_SLURM_HEAD = """\
# Ranks end within seconds of a signal; what is left of the run is told in its receipt, and it goes on from its last
# checkpoint: by itself where Slurm requeues the job, else with the same script and the run's directory:
#   sbatch --export=ALL,RUN_DIR=... FILE --resume
#
# Give account, partition, time limit and whatever else your site asks for on the command line of sbatch."""
_SLURM_BODY = """\
# Node 0 of the job is where the launchers meet. Jobs that share a node get ports of their own.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint="${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))"
"""
_SLURM_RUN_DIR = 'run_dir="${RUN_DIR:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}"\n'
_SLURM_END = """\
# Requeued: go on with what the earlier start left, if it came so far as to make the directory.
if [[ "${SLURM_RESTART_COUNT:-0}" -gt 0 && -e "$run_dir" ]]; then
  command+=(--resume)
fi

# One launcher a node; torchrun starts the ranks. Slurm must not end the others when one fails: they tell each other,
# and the receipt says which was first.
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --label \\
  bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' launcher "${command[@]}"
"""
_SHELL_USAGE = """\
if [[ $# -lt 3 ]]; then
  echo "usage: $0 NODE_RANK HOST_OF_NODE_0:PORT RUN_DIR [OPTION ...]" >&2
  exit 2
fi
node_rank="$1"
endpoint="$2"
run_dir="$3"
shift 3
"""


def slurm_script(plan: RunPlan, *, recipe: str, overrides: Sequence[str] = ()) -> str:
    """A batch job for ``sbatch``.

    Args:
        plan: What runs.
        recipe: As the command line named it.
        overrides: What ``--set`` changed.
    """
    launch = plan.recipe.launch
    gpus = () if plan.device == "cpu" else (f"#SBATCH --gpus-per-node={launch.processes_per_node}",)
    head = (
        f"#SBATCH --job-name={plan.recipe.name}",
        f"#SBATCH --nodes={launch.nodes}",
        "#SBATCH --ntasks-per-node=1",
        *gpus,
        "#SBATCH --exclusive",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=%x-%j.out",
    )
    places = ('--rdzv-endpoint "$endpoint"', '--rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"')
    body = (_SLURM_BODY if launch.nodes > 1 else "") + _SLURM_RUN_DIR
    return _script(plan, recipe, overrides, head=head, places=places, notes=_SLURM_HEAD, body=body, end=_SLURM_END)


def shell_script(plan: RunPlan, *, recipe: str, overrides: Sequence[str] = ()) -> str:
    """A script that is started on each node, with the node's rank.

    Args:
        plan: What runs.
        recipe: As the command line named it.
        overrides: What ``--set`` changed.

    Raises:
        UserError: The plan has one node, which needs no script.
    """
    if plan.recipe.launch.nodes == 1:
        fix = "use megacpp-stp launch itself, or add --nnodes with how many there are"
        raise UserError("is for several nodes, and the plan has one", field="--script", value="shell", fix=fix)
    places = ('--rdzv-endpoint "$endpoint"', '--node-rank "$node_rank"')
    notes = (
        f"# Start it on each of the {plan.recipe.launch.nodes} nodes with the same arguments but the first, 0, 1, ..."
    )
    end = 'exec "${command[@]}"\n'
    return _script(plan, recipe, overrides, head=(), places=places, notes=notes, body=_SHELL_USAGE, end=end)


def _script(
    plan: RunPlan,
    recipe: str,
    overrides: Sequence[str],
    *,
    head: Sequence[str],
    places: Sequence[str],
    notes: str,
    body: str,
    end: str,
) -> str:
    launch = plan.recipe.launch
    several = places if launch.nodes > 1 else ()
    command = [
        f"megacpp-stp launch {shlex.quote(recipe)}",
        f"--device {plan.device}",
        *(f"--set {shlex.quote(override)}" for override in overrides),
        f"--nnodes {launch.nodes}",
        f"--nproc {launch.processes_per_node}",
        *several,
        '--run-dir "$run_dir"',
        '"$@"',
    ]
    nodes = "1 node" if launch.nodes == 1 else f"{launch.nodes} nodes"
    lines = [
        "#!/usr/bin/env bash",
        *head,
        f"# {plan.recipe.title}",
        f"# {nodes} of {launch.processes_per_node} processes.",
        *_comment_of_environment(plan),
        "#",
        _SHARED,
        notes,
        "set -euo pipefail",
        "",
        body,
        "command=(",
        *(f"  {part}" for part in command),
        ")",
        "",
        end,
    ]
    return "\n".join(lines)


def _comment_of_environment(plan: RunPlan) -> Iterator[str]:
    """The launcher sets them on each node, so that their values are in one place only."""
    text = "The launcher sets for the ranks: " + ", ".join(variable.name for variable in plan.env) + "."
    yield from (f"# {line}" for line in textwrap.wrap(text, width=_WIDTH, break_on_hyphens=False))
