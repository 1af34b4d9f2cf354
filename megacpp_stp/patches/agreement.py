"""All ranks run the same replacements, and the run really calls them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megacpp_stp.patches.ledger import Entry
from megacpp_stp.patches.records import PatchRefused

_NOT_COMPARED = ("probe", "calls")  # numbers that depend on the processor; what a rank has called
Records = Sequence[Mapping[str, Any]]
Calls = Mapping[str, Mapping[str, int]]


def digest(records: Records) -> str:
    """sha256 over the records of all surfaces of one rank, what their probes showed and what was called left out."""
    compared = [{key: value for key, value in record.items() if key not in _NOT_COMPARED} for record in records]
    text = json.dumps(compared, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def require_agreement(by_rank: Sequence[Records]) -> None:
    """Compare what the ranks have.

    Args:
        by_rank: Each rank's records, as `megacpp_stp.patches.registry.Record.as_dict` gives them.

    Raises:
        PatchRefused: A rank differs; the same error on every rank.
    """
    digests = [digest(records) for records in by_rank]
    votes = Counter(digests)
    usual = max(digests, key=lambda found: (votes[found], -digests.index(found)))
    odd = [rank for rank, found in enumerate(digests) if found != usual]
    if odd:
        what = _difference(by_rank[odd[0]], by_rank[digests.index(usual)])
        ranks = f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}"
        raise PatchRefused(
            f"{ranks} of {len(by_rank)} differ{'' if len(odd) > 1 else 's'} from the others: {what}",
            field="patches",
            fix="install the same megacpp-stp and megatron-core on every node",
        )


def require_called(ledger: Mapping[str, Entry], by_rank: Sequence[Calls]) -> None:
    """Compare what the run has called with what each entry says that it calls.

    Args:
        ledger: Entries by id.
        by_rank: Each rank's calls by surface and consumer, after the first training iteration.

    Raises:
        PatchRefused: A consumer that never called the replacement; the same error on every rank.
    """
    for name in by_rank[0]:
        for consumer in (consumer for replaced in ledger[name].replaces for consumer in replaced.consumers):
            idle = [rank for rank, calls in enumerate(by_rank) if not calls[name].get(consumer.function)]
            some = consumer.called_on == "some" and len(idle) == len(by_rank)
            if some or (consumer.called_on == "every" and idle):
                ranks = "no rank" if len(idle) == len(by_rank) else f"not on rank {', '.join(map(str, idle))}"
                raise PatchRefused(
                    f"is in place, but {consumer.function} did not call it in the first iteration: {ranks}",
                    field=f"patch {name}",
                    fix="this is a defect of the patch or of its ledger entry: report it, with the plan",
                )


def gather(value: Any) -> list[Any]:
    """`value` of every rank, on every rank; a collective over plain data."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _difference(records: Records, others: Records) -> str:
    mine, usual = ({record["id"]: record for record in side} for side in (records, others))
    if mine.keys() != usual.keys():
        return f"it has {', '.join(mine) or 'none'}, they have {', '.join(usual) or 'none'}"
    for name, record in mine.items():
        for key, value in record.items():
            if key not in _NOT_COMPARED and value != usual[name][key]:
                return f"{key} of {name} is {_short(value)}, with them {_short(usual[name][key])}"
    return "the order of surfaces"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
