"""Recipe to RunPlan: everything that a launch needs, and nothing that a machine decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from megacpp_stp.errors import UserError
from megacpp_stp.plan.argv import Argument, emit
from megacpp_stp.plan.checks import check, data_parallel_size, micro_batches
from megacpp_stp.plan.env import EnvVar, environment
from megacpp_stp.plan.gaps import Gap, find_gaps
from megacpp_stp.plan.kernels import check_kernels
from megacpp_stp.plan.layers import sparse_of
from megacpp_stp.plan.lowering import HybridPlan, lower
from megacpp_stp.plan.stages import choose_stages
from megacpp_stp.recipe.schema import Recipe

PLAN_FORMAT = 1
ENTRY_MODULE = "megacpp_stp.training.entry"
# The wheel's compile_helpers() would exit on every machine; see patches/dataset-helpers.yaml.
_ALWAYS = ("dataset-helpers",)

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class RunPlan:
    """What will be launched.

    Attributes:
        recipe: The resolved recipe.
        device: ``cpu`` or ``cuda``.
        layout: Source blocks, Megatron layers, stages, taps.
        arguments: Megatron's and our arguments with their provenance.
        env: Environment variables with their reasons.
        patches: Ids of the patch surfaces that the run applies.
        gaps: What this version can plan and not run; a launch with any is refused.
        data_parallel: Data-parallel size.
        micro_batches: Microbatches an iteration and data-parallel rank.
    """

    recipe: Recipe
    device: Device
    layout: HybridPlan
    arguments: tuple[Argument, ...]
    env: tuple[EnvVar, ...]
    patches: tuple[str, ...]
    gaps: tuple[Gap, ...]
    data_parallel: int
    micro_batches: int

    @property
    def argv(self) -> list[str]:
        """The arguments as a process gets them."""
        return [token for argument in self.arguments for token in argument.tokens]

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.recipe.launch.nodes * self.recipe.launch.processes_per_node

    @cached_property
    def digest(self) -> str:
        """sha256 over the canonical JSON of the plan: equal for equal plans on any machine."""
        return plan_digest(self._content())

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data: what ``plan.json`` holds."""
        return {"digest": self.digest, **self._content()}

    def _content(self) -> dict[str, Any]:
        return {
            "plan_format": PLAN_FORMAT,
            "recipe": self.recipe.model_dump(mode="json"),
            "device": self.device,
            "layout": {
                "source_pattern": self.layout.source,
                "megatron_pattern": self.layout.megatron_pattern,
                "pipeline": self.layout.pipeline,
                "virtual": self.layout.virtual,
                "stages": list(self.layout.stages),
                "layers": [asdict(layer) for layer in self.layout.layers],
            },
            "world_size": self.world_size,
            "data_parallel": self.data_parallel,
            "micro_batches": self.micro_batches,
            "patches": list(self.patches),
            "env": {variable.name: variable.value for variable in self.env},
            "argv": self.argv,
        }


def _patches(recipe: Recipe, layout: HybridPlan) -> Iterator[str]:
    """Surfaces that the run needs; each module of `megacpp_stp.patches` says the same of a plan."""
    yield from _ALWAYS
    if layout.numbers("dsa") and sparse_of(recipe.model).kernel == "chunked":
        yield "dsa-memory"
    if recipe.training.precision != "fp32" and layout.keeps_fp32:
        yield "fp32-groups"


def plan_digest(content: Mapping[str, Any]) -> str:
    """The digest of a plan as plain data; its own ``digest`` entry, if it has one, is left out."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def build_plan(recipe: Recipe, *, device: Device = "cuda") -> RunPlan:
    """Plan a recipe.

    Args:
        recipe: From `megacpp_stp.load_recipe`.
        device: What the ranks run on. Never guessed here: a plan is the same on a laptop and on a node.

    Raises:
        UserError: Anything that could not run as the recipe says; before anything is launched.
    """
    if device not in ("cpu", "cuda"):
        raise UserError("is no device", field="--device", value=device, fix="use cpu or cuda")
    if device == "cpu" and recipe.model.backend == "te":
        raise UserError(
            "Transformer Engine's modules run on GPUs only",
            field="model.backend",
            value="te",
            fix="use --device cuda, or backend torch",
        )
    if device == "cpu" and recipe.training.fused_cross_entropy == "cut-cross-entropy":
        raise UserError(
            "its kernels run on GPUs only",
            field="training.fused_cross_entropy",
            value="cut-cross-entropy",
            fix="use --device cuda, or torch",
        )
    layout = lower(recipe, stages=choose_stages(recipe))
    check(recipe, layout)
    check_kernels(recipe, device=device)
    return RunPlan(
        recipe=recipe,
        device=device,
        layout=layout,
        arguments=emit(recipe, layout, device=device),
        env=environment(recipe, device=device),
        patches=tuple(_patches(recipe, layout)),
        gaps=find_gaps(recipe, layout),
        data_parallel=data_parallel_size(recipe),
        micro_batches=micro_batches(recipe),
    )
