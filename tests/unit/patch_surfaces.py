"""Surfaces of the tests' own, on the real megatron-core."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megacpp_stp.patches.contract import Hits, Plan, Probe, ProbeFailed, Replacement, Surface
from megacpp_stp.patches.fingerprint import fingerprint
from megacpp_stp.patches.ledger import Entry
from megacpp_stp.patches.registry import Activation, Registry
from megacpp_stp.patches.upstream import Core, open_core

CORE = open_core()
CROSS_ENTROPY = "megatron.core.tensor_parallel.cross_entropy:vocab_parallel_cross_entropy"
LOSS = "megatron.core.models.common.language_module.language_module:LanguageModule.compute_language_model_loss"
REEXPORT = "megatron.core.tensor_parallel:vocab_parallel_cross_entropy"
CROSS_ENTROPY_CONSUMER = {
    "function": LOSS,
    "through": "tensor_parallel.vocab_parallel_cross_entropy",
    "called_on": "some",
}
HELPERS = "megatron.core.datasets.utils:compile_helpers"
HELPERS_CONSUMER = {
    "function": "megatron.training.initialize:_compile_dependencies",
    "through": "from megatron.core.datasets.utils import compile_helpers",
    "called_on": "some",
}
NORMALIZE = "megatron.core.datasets.utils:normalize"


def entry(id: str, *replaces: dict[str, Any], **more: Any) -> Entry:
    """An entry that is reviewed at the installed version, unless `more` says something else."""
    content = {
        "id": id,
        "title": "a surface of the tests",
        "code": "megacpp_stp.patches.contract",
        "what": "x",
        "why_not_by_argument_or_spec": "x",
        "upstream_reference": "x",
        "upstream": "supported",
        "needed_by": "x",
        "replaces": replaces,
        "relies_on": (),
        "conflicts": (),
        "after": (),
        "retire": {"when": [{"version": ">=9"}], "says": "never."},
        "claim": {"what": "x", "measured": "x"},
        "reviewed": {},
        **more,
    }
    unreviewed = Entry.model_validate(content)
    if "reviewed" in more:
        return unreviewed
    found = {name: fingerprint(CORE, name) for name in unreviewed.watched}
    return Entry.model_validate({**content, "reviewed": {CORE.version: found}})


def replaces(name: str, *consumers: dict[str, str], also_bound: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"name": name, "consumers": consumers, "also_bound": also_bound}


def surface(
    id: str,
    *,
    replace: Callable[[Mapping[str, Any], Hits], Mapping[str, Replacement]] | None = None,
    probe: Callable[[Probe], str] | None = None,
    unneeded: str | None = None,
    **more: Any,
) -> Surface:
    """A surface that passes calls through to the original, unless told otherwise."""

    def pass_through(originals: Mapping[str, Any], hits: Hits) -> Mapping[str, Replacement]:
        def stand_in(original: Any) -> Any:
            return lambda *args, **kwargs: (id, original)

        return {name: Replacement(value=stand_in(original)) for name, original in originals.items()}

    def call_all(probe: Probe) -> str:
        for target, consumers in probe.through.items():
            for function in consumers.values():
                name, original = function()
                if name != id or original is not probe.originals[target]:
                    raise ProbeFailed(f"got {name}")
        return "every consumer calls it"

    return Surface(
        id=id, unneeded=lambda plan: unneeded, replace=replace or pass_through, probe=probe or call_all, **more
    )


class OnceParsed(Registry):
    """A registry whose megatron-core is read once for all tests."""

    def activate(self, plan: Plan, *, core: Core | None = None, allow_unreviewed: Sequence[str] = ()) -> Activation:
        return super().activate(plan, core=core or CORE, allow_unreviewed=allow_unreviewed)


def registry(*surfaces: tuple[Entry, Surface]) -> Registry:
    return OnceParsed({entry.id: entry for entry, _ in surfaces}, {surface.id: surface for _, surface in surfaces})


def plan(*ids: str) -> dict[str, Any]:
    return {"patches": list(ids)}


def copied_core(directory: Path, *modules: str) -> Core:
    """The installed megatron-core's sources of some modules, as files of their own."""
    core = open_core()
    for module in ("megatron.core.package_info", *modules):
        path = core.path_of(module)
        assert path is not None, module
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(core.place) / path, directory / path)
    return open_core(directory)
