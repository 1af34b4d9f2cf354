"""What ran, in words: a receipt's four questions and its substrate, for a terminal and for a page.

Whatever comes from a file is made printable and short here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.facts import value_at
from megacpp_stp.runs.files import shown
from megacpp_stp.runs.gate import gate_of

NONE = "\N{EN DASH}"
_LONGEST = 160
_SIZES = {"tensor": "TP", "pipeline": "PP", "virtual": "VPP", "context": "CP", "expert": "EP", "data_parallel": "DP"}


def what_ran(receipt: Mapping[str, Any], plan: Mapping[str, Any] | None) -> dict[str, str]:
    """A run's facts by name, the same names for all runs.

    Args:
        receipt: From `read_receipt`.
        plan: Of the run; None where it does not lie beside the receipt.
    """

    def at(*path: str) -> Any:
        return value_at(receipt, path)

    sizes = [f"{short}{cell(at('topology', name))}" for name, short in _SIZES.items() if at("topology", name) != 1]
    batch = [value_at(plan, ["recipe", "training", name]) for name in ("global_batch_size", "sequence_length")]
    return {
        "recipe": cell(at("recipe", "name")),
        "spec": f"{cell(at('spec', 'name'))} of {cell(at('spec', 'module'))}, backend {cell(at('spec', 'backend'))}",
        "pattern": cell(at("pattern", "source")),
        "Megatron's pattern": cell(at("pattern", "megatron")),
        "stand-ins": cell(_inline(at("pattern", "stand_ins")) or None),
        "patches": _patches(at("patches")),
        "STP": _stp(receipt),
        "STP taps": f"asked for {_listed(at('auxiliary_losses', 'stp', 'taps'))}; fed {_listed(_fed(receipt))}",
        "other losses": f"asked for {_others(at('auxiliary_losses'))}; "
        f"not 0 at the start: {_listed(at('collected', 'auxiliary'))}",
        "parameters": _many(at("parameters", "total")),
        "layout": f"{cell(at('topology', 'world_size'))} ranks: {' '.join(sizes) or 'all sizes 1'}",
        "batch": " x ".join(map(cell, batch)) + " tokens",
        "iterations planned": _many(at("iterations_planned")),
        "seeds": f"training {cell(at('seeds', 'training'))}, STP {cell(at('seeds', 'stp'))}",
        "hardware": cell(_inline(at("substrate", "hardware"))),
        "software": cell(_inline(at("substrate", "packages"), quoted=False)),
        "Python, megacpp-stp": f"{cell(at('substrate', 'python'))}, {cell(at('substrate', 'megacpp_stp'))}",
        "code": f"commit {_digest(at('code', 'commit'))}{' and changes' if at('code', 'modified') else ''}, "
        f"sha256 {_digest(at('code', 'sha256'))}",
        "training data": f"{_many(at('data', 'splits', 'train', 'tokens'))} tokens, "
        f"sha256 {_digest(at('data', 'splits', 'train', 'bin_sha256'))}",
        "tokenizer": f"{_many(at('data', 'tokenizer', 'vocab_size'))} tokens, "
        f"sha256 {_digest(at('data', 'tokenizer', 'sha256'))}",
        "plan digest": _digest(at("plan_digest")),
    }


def _stp(receipt: Mapping[str, Any]) -> str:
    try:
        gate = gate_of(receipt, field="")
    except UserError:
        return "(cannot be read)"
    if gate is None:
        return "none"
    if not gate.acts:
        return "measured, weight 0"
    ramp = f", on a ramp of {gate.ramp_steps}" if gate.ramp_steps > 1 else ""
    spans = cell(value_at(receipt, ["auxiliary_losses", "stp", "n_spans"]))
    return f"weight {gate.weight:g} from iteration {gate.first_live}{ramp}, {spans} spans a sequence"


def _fed(receipt: Mapping[str, Any]) -> Any:
    """Version 1 of the receipt has it elsewhere."""
    found = value_at(receipt, ["collected", "taps"])
    return receipt.get("taps_fed") if found is None else found


def _others(losses: Any) -> str:
    found = losses if isinstance(losses, Mapping) else {}
    return cell(_inline({name: loss for name, loss in found.items() if name != "stp" and loss}) or None)


def _patches(patches: Any) -> str:
    found = [each for each in patches if isinstance(each, Mapping)] if isinstance(patches, list) else []
    return cell(", ".join(f"{each.get('id')} {each.get('state')}" for each in found) or None)


def _listed(values: Any) -> str:
    return cell(", ".join(map(str, values)) or None) if isinstance(values, (list, Mapping)) else cell(values)


def _many(value: Any) -> str:
    return f"{value:,}" if type(value) is int and abs(value) < 2**63 else cell(value)


def _digest(value: Any) -> str:
    return cell(value)[:12]


def _inline(value: Any, *, quoted: bool = True) -> Any:
    return ", ".join(_items(value, quoted=quoted)) if isinstance(value, Mapping) else value


def _items(value: Mapping[str, Any], *, quoted: bool) -> Iterator[str]:
    for name, item in value.items():
        yield f"{name} {json.dumps(item) if quoted and not isinstance(item, str) else item}"


def cell(value: Any) -> str:
    """Any value of a file, printable and not too long."""
    if value is None:
        return NONE
    text = shown(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
