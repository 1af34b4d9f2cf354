"""Plans, receipts and runs of the command that the tests of `megacpp-stp diff` share."""

import hashlib
import json

import typer
from typer.testing import CliRunner

from megacpp_stp.cli.diff import diff_command
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.diff import DIFFERENT
from megacpp_stp.plan.facts import Side
from megacpp_stp.recipe import find_recipe, load_recipe

TINY = find_recipe("nam56r-tiny").read_text()
PLAN = build_plan(load_recipe("nam56r-tiny"), device="cpu").as_dict()


def run(*arguments):
    app = typer.Typer()
    app.command()(diff_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def diff(*arguments):
    """The JSON form, with the exit status checked against it."""
    done = run(*arguments, "--format", "json")
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    content = json.loads(done.stdout)
    assert done.exit_code == (1 if content["verdict"] == DIFFERENT else 0)
    return content


def refused(*arguments):
    done = run(*arguments)
    assert isinstance(done.exception, UserError), (done.exception, done.stdout)
    assert done.exception.field
    assert done.exception.fix
    return str(done.exception)


def side(*overrides, device="cpu", plan=None):
    plan = plan or build_plan(load_recipe("nam56r-tiny", overrides), device=device).as_dict()
    return Side(given="x", kind="plan", digest=plan["digest"], plan=plan)


def sealed(plan, **changes):
    """A plan with other content and a digest that fits it."""
    plan = {**plan, **changes}
    plan.pop("digest", None)
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return {"digest": hashlib.sha256(text.encode()).hexdigest(), **plan}


def receipt_of(plan, **changes):
    recipe, layout = plan["recipe"], plan["layout"]
    return {
        "receipt_version": 2,
        "status": "complete",
        "plan_digest": plan["digest"],
        "recipe": {key: recipe[key] for key in ("name", "provenance", "overrides")},
        "spec": {"module": "m", "name": "n", "backend": "torch"},
        "pattern": {"source": layout["source_pattern"], "megatron": layout["megatron_pattern"]},
        "auxiliary_losses": {"stp": recipe["stp"], "moe_load_balancing": 1e-4, "moe_z_loss": 0, "mtp": None},
        "topology": {
            "world_size": plan["world_size"],
            "data_parallel": plan["data_parallel"],
            "micro_batches": plan["micro_batches"],
            **{key: recipe["parallel"][key] for key in ("tensor", "pipeline", "virtual", "context", "expert")},
        },
        "seeds": {"training": recipe["training"]["seed"], "stp": recipe["stp"]["seed"]},
        "iterations_planned": recipe["training"]["iterations"],
        "substrate": {
            "hardware": {"device": plan["device"], "machine": "x86_64", "cpu_count": 2},
            "python": "3.12.1",
            "packages": {"torch": "2.15.0", "numpy": "2.5.5"},
        },
        "data": {"splits": {"train": {"tokens": 7, "bin_sha256": "ab"}}},
        "patches": [{"id": name, "state": "applied"} for name in plan["patches"]],
        "parameters": {"total": 5, "by_pipeline_rank": [3, 2]},
        "last": {"lm_loss": 5.0},
        **changes,
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def found(content):
    return {item["path"]: (item["group"], item["a"], item["b"]) for item in content["differences"]}
