"""On each rank, before the first collective: compare with all others what must be the same.

Through the key-value store that torchrun keeps for its ranks, so that no communicator is built for it: a rank of other
software may not even be able to take part in one.  Each rank writes what it is; rank 0 reads all, and writes what
follows; the rest wait for that.  Then each reads its clock, between two readings of rank 0's.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import megacpp_stp
from megacpp_stp.errors import UserError
from megacpp_stp.patches.agreement import digest
from megacpp_stp.plan.health import meeting_seconds
from megacpp_stp.preflight.ranks import clock_skew, clock_warning, device_warning, disagreement, missing
from megacpp_stp.training.facts import data_digest, driver_version, nccl_version, package_versions

_GRACE_S = 15.0  # the others wait longer than rank 0, so that its word comes first
_AGENT = "TORCHELASTIC_USE_AGENT_STORE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Met:
    """All ranks agreed.

    Attributes:
        by_rank: What each said of itself; on rank 0 alone, empty elsewhere.
        clock_skew_s: Of each node, as `megacpp_stp.preflight.ranks.clock_skew`; on rank 0 alone.
        store: Kept for as long as the run may use its server, where that is in this process.
    """

    by_rank: tuple[Mapping[str, Any], ...] = ()
    clock_skew_s: Mapping[str, float] = field(default_factory=dict)
    store: Any = field(default=None, compare=False, repr=False)


def compare_ranks(plan: Mapping[str, Any], patches: Sequence[Mapping[str, Any]], *, rank: int) -> Met:
    """What a rank of a run calls; see `own_facts`, `open_store` and `meet_ranks`."""
    facts = own_facts(plan, patches, device=plan["device"])
    seconds = meeting_seconds(plan["recipe"]["training"]["health"]["hang_minutes"])
    store = open_store(rank=rank, timeout_s=seconds)
    return meet_ranks(facts, rank=rank, world_size=plan["world_size"], store=store, timeout_s=seconds)


def own_facts(plan: Mapping[str, Any], patches: Sequence[Mapping[str, Any]], *, device: str) -> dict[str, Any]:
    """What this rank says of itself.

    Args:
        plan: The verified plan, as plain data.
        patches: The records of its patch surfaces.
        device: ``cpu`` or ``cuda``.
    """
    code = next((record["code"] for record in patches if record["code"]), None)
    name, gpu = _device(device)
    return {
        "node": socket.gethostname(),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "device": name,
        "same": {
            "Python": platform.python_version(),
            **package_versions(),
            **gpu,
            "megacpp-stp": megacpp_stp.__version__,
            "code": code,
            "plan": plan["digest"],
            "patches": digest(patches),
            "data": data_digest(Path(plan["recipe"]["data"]["path"])),
        },
    }


def meet_ranks(facts: Mapping[str, Any], *, rank: int, world_size: int, store: Any, timeout_s: float) -> Met:
    """Compare with all other ranks. No collective.

    Args:
        facts: From `own_facts`.
        rank: Of this process.
        world_size: How many there are.
        store: From `open_store`; nobody else uses its keys.
        timeout_s: How long to wait for the others, as `megacpp_stp.plan.health.meeting_seconds`.

    Raises:
        UserError: A rank differs, or did not come; the same on every rank that came.
    """
    store.set(f"facts/{rank}", json.dumps(facts))
    if rank:
        answer = _wait(store, "answer", timeout_s + _GRACE_S)
        if answer is None:
            raise missing(_absent(store, world_size) or [0], world_size=world_size, seconds=timeout_s)
        _raise(json.loads(answer))
        store.set(f"clock/{rank}", repr(time.time()))
        return Met(store=store)
    error, by_rank = _judge(store, world_size, timeout_s)
    before = time.time()
    store.set("answer", json.dumps(None if error is None else {"problem": error.problem, "fix": error.fix}))
    if error is not None:
        raise error
    skew = clock_skew(_clocks(store, by_rank, before, timeout_s))
    for text in (device_warning(by_rank), clock_warning(skew)):
        if text is not None:
            print(f"megacpp-stp: {text}", file=sys.stderr, flush=True)
    return Met(by_rank=tuple(by_rank), clock_skew_s=skew, store=store)


def open_store(*, rank: int, timeout_s: float) -> Any:
    """The store that torchrun keeps at MASTER_ADDR:MASTER_PORT; without torchrun's, rank 0 opens one there.

    Megatron opens it once more for its process groups.  The keys here have a prefix of their own, with the restart in
    it: torchrun's store outlives its ranks.

    Raises:
        UserError: This process was not started by torchrun, or the store cannot be reached.
    """
    from torch.distributed import DistError, PrefixStore, TCPStore

    fix = "start runs with `megacpp-stp launch`"
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError("is not set: this is no rank of torchrun", field="MASTER_ADDR", fix=fix) from None
    try:
        store = TCPStore(
            host,
            port,
            is_master=rank == 0 and os.environ.get(_AGENT) != "True",
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (DistError, RuntimeError) as error:
        problem = f"rank {rank} cannot reach the store of torchrun: {str(error).splitlines()[0]}"
        raise UserError(
            problem, field="MASTER_ADDR", fix="is the first node up, and its port open to this one?"
        ) from None
    return PrefixStore(f"megacpp-stp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def placement(met: Met) -> dict[str, Any]:
    """Where the ranks run, for a receipt: nodes by number in the order of their ranks, without host names."""
    nodes: dict[str, dict[str, Any]] = {}
    for rank, facts in enumerate(met.by_rank):
        node = nodes.setdefault(facts["node"], {"ranks": [], "devices": []})
        node["ranks"].append(rank)
        node["devices"].append(facts["device"])
    for name, node in nodes.items():
        node["clock_skew_s"] = round(met.clock_skew_s.get(name, 0.0), 3)
    return {"nodes": list(nodes.values())}


def _judge(store: Any, world_size: int, timeout_s: float) -> tuple[UserError | None, list[Mapping[str, Any]]]:
    deadline = time.monotonic() + timeout_s
    by_rank = []
    for rank in range(world_size):
        found = _wait(store, f"facts/{rank}", deadline - time.monotonic())
        if found is None:
            return missing(_absent(store, world_size) or [rank], world_size=world_size, seconds=timeout_s), []
        by_rank.append(json.loads(found))
    return disagreement(by_rank), by_rank


def _clocks(
    store: Any, by_rank: Sequence[Mapping[str, Any]], before: float, timeout_s: float
) -> dict[str, list[tuple[float, float, float]]]:
    """By node the readings of its ranks' clocks; of a rank that does not answer there is none."""
    found: dict[str, list[tuple[float, float, float]]] = {facts["node"]: [] for facts in by_rank}
    deadline = time.monotonic() + timeout_s
    for rank, facts in enumerate(by_rank[1:], start=1):
        own = _wait(store, f"clock/{rank}", deadline - time.monotonic())
        if own is not None:
            found[facts["node"]].append((before, float(own), time.time()))
    return found


def _wait(store: Any, key: str, seconds: float) -> str | None:
    """The value of a key once it is there; None when it is not in time."""
    from torch.distributed import DistStoreError

    try:
        store.wait([key], timedelta(seconds=max(seconds, 0.001)))
    except DistStoreError:
        return None
    return str(store.get(key).decode())


def _absent(store: Any, world_size: int) -> list[int]:
    return [rank for rank in range(world_size) if not store.check([f"facts/{rank}"])]


def _raise(answer: Mapping[str, str] | None) -> None:
    if answer is not None:
        raise UserError(answer["problem"], field="ranks", fix=answer["fix"])


def _device(device: str) -> tuple[str, dict[str, str | None]]:
    """Name of what this rank computes on, and the versions of what drives it."""
    if device == "cpu":
        return "cpu", {}
    import torch

    name = torch.cuda.get_device_name(int(os.environ["LOCAL_RANK"]))
    cudnn = torch.backends.cudnn.version()
    return name, {
        "driver": driver_version(),
        "CUDA": torch.version.cuda,
        "NCCL": nccl_version(),
        "cuDNN": None if cudnn is None else str(cudnn),
    }
