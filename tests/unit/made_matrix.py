"""A matrix file and its runs for tests, without any training."""

from pathlib import Path

import yaml

from megacpp_stp.ablate.cells import plan_runs
from megacpp_stp.ablate.matrix import read_matrix
from tests.unit.made_runs import GATE, ITERATIONS, loss_of, make_run

CONTENT = {
    "schema_version": 1,
    "recipe": "nam56r-tiny",
    "set": [
        f"training.iterations={ITERATIONS}",
        "training.eval_interval=20",
        "optimizer.warmup_iterations=2",
        f"stp.start_step={GATE}",
    ],
    "factors": {
        "spans": {"1": ["stp.n_spans=1"], "3": ["stp.n_spans=3"]},
        "gate": {"early": [], "late": [f"stp.start_step={GATE + 10}"]},
    },
    "seeds": [1, 2, 3],
    "baseline": {"spans": "1", "gate": "early"},
    "metric": "lm_loss",
    "window": None,
}


def write_matrix(path, **changes):
    """A matrix file like `CONTENT`, with some keys replaced; those that are `...` are left out."""
    content = {key: value for key, value in {**CONTENT, **changes}.items() if value is not ...}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def planned(directory, **changes):
    """A matrix, and the runs that it plans in DIRECTORY/runs."""
    file = write_matrix(directory / "matrix.yaml", **changes)
    matrix = read_matrix(file)
    return matrix, plan_runs(matrix, file=file, device="cpu", directory=directory / "runs")


def leave(run, *, better=0.0, **more):
    """What a run would leave: `better` is what its loss is less than another's with the same seed."""
    settings = run.plan.recipe.overrides[len(CONTENT["set"]) :]
    more.setdefault("loss", lambda iteration: loss_of(iteration, run.seed) - better)
    Path(run.directory).parent.mkdir(parents=True, exist_ok=True)
    return make_run(run.directory, *settings, **more)
