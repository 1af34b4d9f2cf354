"""Run directories for tests, written by the product's own writers without any training."""

import json
from functools import cache

from typer.testing import CliRunner

from megacpp_stp.cli.runs import app
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.files import create_run_directory, write_json
from megacpp_stp.runs.metrics import MetricsWriter, last_of
from megacpp_stp.runs.receipt import Receipt, plan_facts

SUBSTRATE = {
    "hardware": {"device": "cpu", "machine": "x86_64", "cpu_count": 2},
    "python": "3.12.1",
    "megacpp_stp": "0.1.0",
    "packages": {"torch": "2.15.0", "numpy": "2.5.5"},
}
DATA = {
    "splits": {"train": {"tokens": 7000, "documents": 3, "bin_sha256": "ab"}},
    "tokenizer": {"vocab_size": 512, "sha256": "cd"},
    "source_sha256": "ef",
}
CODE = {"version": "0.1.0", "sha256": "c" * 64, "commit": "b" * 40, "modified": False}
ITERATIONS = 40
GATE = 10  # iterations before it


@cache
def plan_of(*overrides):
    base = (f"training.iterations={ITERATIONS}", "training.eval_interval=20", "optimizer.warmup_iterations=2")
    stp = () if any(item == "stp=null" for item in overrides) else (f"stp.start_step={GATE}",)
    return build_plan(load_recipe("nam56r-tiny", (*base, *stp, *overrides)), device="cpu").as_dict()


def noise(iteration, seed=0):
    """Between -1 and 1, the same on any machine."""
    return ((iteration * 7919 + seed * 104729 + 13) % 2003) / 1001 - 1


def loss_of(iteration, seed=0):
    return 8.0 / (1 + 0.05 * iteration) + 0.01 * noise(iteration, seed)


def record_of(iteration, *, loss, speed, stp):
    """The record of an iteration; `stp` is the recipe's section."""
    record = {
        "iteration": iteration,
        "lm_loss": loss(iteration),
        "bits_per_byte": loss(iteration) / 3,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "skipped": False,
        "tokens_per_s": speed + iteration,
        "step_time_s": 1 / (speed + iteration),
        "peak_memory_bytes": int(speed) * 1000,
    }
    if stp is not None:
        active = stp["weight"] > 0 and iteration > stp["start_step"]
        ramp = min(1.0, (iteration - stp["start_step"]) / max(stp["ramp_steps"], 1))
        record |= {"stp_loss": 0.5, "stp_active": active, "stp_loss_by_tap": {"6": 0.25, "12": 0.75}}
        record["stp_weight"] = stp["weight"] * ramp if active else 0.0
    return record


def make_run(
    directory,
    *overrides,
    loss=loss_of,
    iterations=ITERATIONS,
    complete=True,
    substrate=SUBSTRATE,
    data=DATA,
    code=CODE,
    validation=None,
    speed=1000.0,
):
    """One run.

    Args:
        directory: To be created.
        overrides: As after ``--set``.
        loss: Of an iteration, counted from 1.
        iterations: That it came to.
        complete: Whether it says that it is.
        substrate: What it ran on.
        data: What it read.
        code: Which of ours ran.
        validation: Losses by iteration.
        speed: Tokens a second.
    """
    plan = plan_of(*overrides)
    stp = plan["recipe"]["stp"]
    create_run_directory(directory)
    write_json(directory / "plan.json", plan)
    receipt = Receipt.create(directory, plan_facts(plan))
    receipt.update(substrate=substrate, data=data, code=code, parameters={"total": 5, "by_pipeline_rank": [3, 2]})
    writer = MetricsWriter(directory / "metrics.jsonl")
    record = {}
    for iteration in range(1, iterations + 1):
        record = record_of(iteration, loss=loss, speed=speed, stp=stp)
        writer.write(record)
    writer.close()
    losses = {iterations: loss(iterations)} if validation is None else validation
    evaluations = [{"iteration": at, "lm_loss": value, "bits_per_byte": value / 3} for at, value in losses.items()]
    outcome = {"iterations_done": iterations, "validation": evaluations, "last": last_of(record)}
    if complete:
        receipt.complete(**outcome)
    else:
        receipt.fail("killed by a test", kind="signal", **outcome)
    return directory


def runs(*arguments):
    """`megacpp-stp runs ...` in this process; a user's mistake stays an exception."""
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(word) for word in arguments], catch_exceptions=True)


def refused(*arguments):
    """The user's mistake that the command ends in."""
    done = runs(*arguments)
    assert isinstance(done.exception, UserError), (done.exception, done.output)
    assert done.exception.field
    assert done.exception.fix
    return done.exception


def answer(*arguments):
    """What the command prints, once it has ended well."""
    done = runs(*arguments)
    assert done.exit_code == 0, (done.exception, done.output)
    return done.stdout


def compare(*arguments):
    """The answer of ``runs compare`` as plain data."""
    return json.loads(answer("compare", *arguments, "--format", "json"))


def changed(content, path, value):
    """A copy with another value at a path of keys."""
    head, *rest = path
    return {**content, head: changed(content[head], rest, value) if rest else value}
