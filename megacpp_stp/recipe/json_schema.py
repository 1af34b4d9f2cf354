"""The recipe format for editors and for the documentation, from the pydantic model and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megacpp_stp.recipe.base import KEY, OWN_KEYS
from megacpp_stp.recipe.docstrings import field_docstrings
from megacpp_stp.recipe.schema import Recipe

SCHEMA_FILE = "recipe.schema.json"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_COMPLETE, _CHANGES = "Recipe", "ChangesOf"
_REFERENCE = "#/$defs/"
_NO_KEY_OF_A_FILE = "overrides"  # the loader records what --set changed
# What a key means whose name says nearly all of it, by section. A docstring in schema.py comes first.
_MEANINGS = {
    "Recipe.schema_version": "Version of this format.",
    "Recipe.name": "Name of the recipe: lower case letters, digits, `.`, `_` and `-`.",
    "Recipe.title": "What the recipe is, in one line.",
    "Moe.experts": "Routed experts a layer.",
    "Moe.topk": "Routed experts that a token goes to.",
    "Router.score_function": "How router logits become scores.",
    "Rope.base": "Base of the rotary frequencies.",
    "Model.hidden_size": "Width of the hidden states.",
    "Model.norm_epsilon": "Epsilon of the RMS norms.",
    "Model.init_std": "Standard deviation of the initial weights.",
    "Model.tie_embeddings": "Whether the output head shares the embedding's weights.",
    "Parallel.tensor": "Ranks that share each matrix.",
    "Parallel.pipeline": "Pipeline ranks.",
    "Parallel.context": "Ranks that share each sequence.",
    "Parallel.expert": "Ranks that share the experts of a layer.",
    "Parallel.sequence_parallel": "Split norms and residuals over the tensor-parallel ranks too.",
    "Training.iterations": "Optimizer steps.",
    "Training.sequence_length": "Tokens a sequence.",
    "Training.micro_batch_size": "Sequences a forward pass and data-parallel rank.",
    "Training.global_batch_size": "Sequences an optimizer step, over all ranks.",
    "Training.seed": "Seed of the initial weights and of the data order.",
    "Training.precision": "Number format of weights and activations.",
    "Training.log_interval": "Iterations between two lines on the console.",
    "Training.eval_interval": "Iterations between two evaluations.",
    "Optimizer.lr": "Largest learning rate.",
    "Optimizer.min_lr": "Learning rate at the end of the decay.",
    "Optimizer.decay": "Shape of the learning rate after the warm-up.",
    "Optimizer.warmup_iterations": "Iterations over which the learning rate rises from 0.",
    "Optimizer.weight_decay": "Decoupled weight decay.",
    "Optimizer.beta1": "Decay of Adam's first moment.",
    "Optimizer.beta2": "Decay of Adam's second moment.",
    "Optimizer.epsilon": "Epsilon in Adam's denominator.",
    "Launch.nodes": "Machines.",
    "Launch.processes_per_node": "Processes a machine, one for each GPU.",
}
_BLOCK = "Which block the family is."


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a recipe.

    Attributes:
        path: As ``--set`` writes it.
        block: The block that has it, where a family can be one of several; else empty.
        kind: Type and range, or the allowed values.
        meaning: What it is.
    """

    path: str
    block: str
    kind: str
    meaning: str


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file."""
    schema = Recipe.model_json_schema()
    sections = {**schema.pop("$defs"), _COMPLETE: schema}
    schema.pop("title", None)
    schema["properties"].pop(_NO_KEY_OF_A_FILE)
    docstrings = field_docstrings()
    for name, section in sections.items():
        for key, node in section.get("properties", {}).items():
            # pydantic's own titles only say "Q Lora Rank" for q_lora_rank, above the description.
            node.pop("title", None)
            place = f"{name}.{key}"
            meaning = docstrings.get(place) or _MEANINGS.get(place) or (_BLOCK if key == "block" else "")
            if meaning:
                node["description"] = meaning
            _strip_discriminators(node)
            if "patternProperties" in node:
                node["additionalProperties"] = False
        section["description"] = section.get("description", "").replace("``", "`")
        for node in section.get("properties", {}).values():
            if "description" in node:
                node["description"] = node["description"].replace("``", "`")
    return {
        "$schema": _DIALECT,
        # Relative: the file means the same wherever a checkout lies.
        "$id": SCHEMA_FILE,
        "title": "megacpp-stp recipe",
        "type": "object",
        "if": {"required": [KEY]},
        "then": {"$ref": f"#/$defs/{_CHANGES}{_COMPLETE}"},
        "else": {"$ref": f"#/$defs/{_COMPLETE}"},
        "$defs": {**sections, **_changes_only(sections)},
    }


def _changes_only(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections once more for a file with a base, which may leave out any key but its names."""
    changed = json.loads(json.dumps(sections).replace(_REFERENCE, _REFERENCE + _CHANGES))
    for section in changed.values():
        section.pop("required", None)
        for node in section.get("properties", {}).values():
            _any_of(node)
    root = changed[_COMPLETE]
    root["properties"][KEY] = {"type": "string", "description": "The complete recipe that this file changes."}
    root["required"] = [KEY, *OWN_KEYS]
    return {f"{_CHANGES}{name}": section for name, section in changed.items()}


def _any_of(node: dict[str, Any]) -> None:
    """A few keys of a block may fit several kinds of block."""
    if "oneOf" in node:
        node["anyOf"] = node.pop("oneOf")
    for option in node.get("anyOf", ()):
        _any_of(option)


def _strip_discriminators(node: dict[str, Any]) -> None:
    """OpenAPI's word, which JSON Schema does not know and strict validators refuse."""
    node.pop("discriminator", None)
    for option in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        _strip_discriminators(option)


def recipe_keys() -> tuple[Key, ...]:
    """Every key that a recipe can have, in the order of the format."""
    schema = recipe_json_schema()
    sections = schema["$defs"]
    return tuple(_keys(sections[_COMPLETE], sections, path="", block=""))


def _keys(node: Mapping[str, Any], sections: Mapping[str, Any], *, path: str, block: str) -> Iterator[Key]:
    for name, entry in node["properties"].items():
        here = f"{path}{name}"
        options = list(_options(entry))
        chosen = [sections[option["$ref"].rsplit("/", 1)[1]] for option in options if "$ref" in option]
        meaning = entry.get("description", "")
        if meaning or not chosen:
            kind = " or ".join(_kind(option) for option in options)
            yield Key(path=here, block=block, kind=kind, meaning=meaning)
        for section in chosen:
            # The same key means another thing in another block.
            inside = section["properties"].get("block", {}).get("const", "") if len(chosen) > 1 else block
            yield from _keys(section, sections, path=f"{here}.", block=inside)


def _options(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The alternatives of a key, flat."""
    inner = (*entry.get("anyOf", ()), *entry.get("oneOf", ()))
    if not inner:
        yield entry
    for option in inner:
        yield from _options(option)


def _kind(node: Mapping[str, Any]) -> str:
    if "$ref" in node:
        return "section"
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "patternProperties" in node:
        return "mapping of names to values"
    if node.get("type") == "array":
        return f"list of {' or '.join(_kind(option) for option in _options(node.get('items', {})))}"
    bounds = (
        (">=", node.get("minimum")),
        (">", node.get("exclusiveMinimum")),
        ("<=", node.get("maximum")),
        ("<", node.get("exclusiveMaximum")),
    )
    limits = ", ".join(
        f"{sign} {bound:g}" if bound < 1e6 else f"{sign} {bound}" for sign, bound in bounds if bound is not None
    )
    name = {"boolean": "true or false", "string": "text", "null": "`null`"}.get(
        node.get("type", ""), node.get("type", "any")
    )
    return f"{name} {limits}".rstrip()


def key_table() -> str:
    """All keys as a Markdown table: what docs/recipes.md holds."""
    rows = ["| key | value | meaning |", "|---|---|---|"]
    for key in recipe_keys():
        where = f" ({key.block})" if key.block else ""
        cells = (f"`{key.path}`{where}", key.kind, " ".join(key.meaning.split()))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)
