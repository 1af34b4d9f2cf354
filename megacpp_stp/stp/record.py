"""One iteration's STP under the names of metrics.jsonl; docs/runs.md lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacpp_stp.stp.config import StpConfig, tap_name
from megacpp_stp.stp.diagnosis import TapDiagnosis
from megacpp_stp.stp.meter import StpReading


def stp_record(config: StpConfig, reading: StpReading, iteration: int) -> dict[str, Any]:
    """What every iteration says.

    Args:
        config: The run's STP policy.
        reading: The iteration's, over all ranks.
        iteration: Iterations completed before it.
    """
    weight = config.weight_at(iteration)
    record = {
        "stp_loss": reading.loss,
        "stp_weight": weight,
        "stp_weighted": None if reading.loss is None else weight * reading.loss,
        "stp_active": config.is_active(iteration),
        "stp_loss_by_tap": _by_name(reading.loss_by_tap),
        "stp_straightness_by_tap": _by_name(reading.straightness_by_tap),
        "stp_valid_fraction": reading.valid_fraction,
        "stp_valid_fraction_by_tap": _by_name(reading.valid_by_tap),
    }
    if config.families:
        families = dict(zip(config.taps, config.families, strict=True))
        record["stp_straightness_by_family"] = reading.straightness_by_family(families)
    return record


def diagnosis_record(found: Mapping[int, TapDiagnosis]) -> dict[str, Any]:
    """What a diagnosed iteration says besides; null for what cannot be said."""
    return {
        f"stp_{name}_by_tap": _by_name({tap: getattr(each, name) for tap, each in found.items()})
        for name in ("effective_rank", "clock_share", "gradient_share")
    }


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under names as Megatron writes them to TensorBoard: ``stp loss/6``.

    A name that ends in ``_by_...`` spreads over its parts; what is no number is left out.
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if not name.startswith("stp_"):
            continue
        head, _, kind = name.partition("_by_")
        tag = head.replace("_", " ")
        if isinstance(value, Mapping):
            prefix = f"{tag} by {kind}" if kind == "family" else tag
            found |= {f"{prefix}/{part}": number for part, number in value.items() if number is not None}
        elif value is not None:
            found[tag] = float(value)
    return found


def _by_name(values: Mapping[int, Any]) -> dict[str, Any]:
    return {tap_name(tap): value for tap, value in values.items()}
