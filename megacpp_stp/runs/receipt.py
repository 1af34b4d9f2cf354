"""receipt.json: what really ran. Incomplete until the run says otherwise.

It answers four questions - which exact spec, which hybrid pattern, which patches were installed, which auxiliary
losses were on or delayed - and names substrate, data and parameters. The launcher writes it before the first process
starts, rank 0 fills it while the run goes on, and the launcher closes it when rank 0 could not. All that it holds is
typed in `megacpp_stp.runs.receipt_model`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.places import without_place
from megacpp_stp.runs.files import RECEIPT, read_json, shown, write_json
from megacpp_stp.runs.gate import Gate
from megacpp_stp.runs.opening import require_regular

RECEIPT_VERSION = 2
"""Raised whenever a reader of the last one would misread or miss something."""
READABLE_VERSIONS = (1, 2)
"""Of version 1 the parts that version 2 kept; docs/runs.md says which it lacks."""
ALLOWED_UNREVIEWED = "allowed_unreviewed"  # ids of patch surfaces that the user let meet unreviewed code upstream
_LONGEST_REASON = 400
# What an attempt finds out for itself; null until then.
_OF_AN_ATTEMPT = (
    *("stack", "code", "patches_digest", "cpu_backend", "placement", "fused_cross_entropy", "collected"),
    *("last", "totals", "stp_iterations", "best", "failure_kind", "exit", "weights_sha256", "environment"),
)
_GOING_ON = "the run has not ended, or was killed together with its launcher"


class Receipt:
    """A receipt on disk that is being filled.

    Args:
        directory: The run directory; its receipt exists.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / RECEIPT
        self._content = read_json(self._path)

    @classmethod
    def create(cls, directory: Path, facts: Mapping[str, Any]) -> Receipt:
        """Write the receipt of a run that has not started."""
        content = {
            "receipt_version": RECEIPT_VERSION,
            "status": "incomplete",
            "reason": _GOING_ON,
            "started": now(),
            "ended": None,
            "updated": now(),
            "iterations_done": None,
            "attempts": [_attempt(from_iteration=0, plan_digest=facts["plan_digest"])],
            "validation": [],
            ALLOWED_UNREVIEWED: [],
            **dict.fromkeys(_OF_AN_ATTEMPT),
            **facts,
        }
        write_json(directory / RECEIPT, content)
        return cls(directory)

    @property
    def is_complete(self) -> bool:
        """Whether the run did all that its plan asked for."""
        return bool(self._content.get("status") == "complete")

    @property
    def failure_kind(self) -> str | None:
        """``user`` for a mistake that the user can mend, ``nonfinite``, ``hang`` and ``asked`` (docs/health.md),
        ``signal``, else ``crash``; None without a failure."""
        kind = self._content.get("failure_kind")
        return kind if isinstance(kind, str) else None

    @property
    def attempts(self) -> int:
        """How often the run was started."""
        return len(self._content.get("attempts", ()))

    @property
    def plan_digests(self) -> set[str]:
        """Of the plans that the run has had, a start each."""
        return {str(attempt.get("plan_digest")) for attempt in self._content.get("attempts", ())}

    @property
    def from_iteration(self) -> int:
        """Iteration of the checkpoint that this attempt started from; 0 for none."""
        return int(self._content["attempts"][-1]["from_iteration"])

    @property
    def data(self) -> dict[str, Any] | None:
        """What the run reads, by content; None before rank 0 has looked."""
        return self._content.get("data")

    @property
    def validation(self) -> list[dict[str, Any]]:
        """The evaluations so far."""
        return list(self._content.get("validation", ()))

    def begin_attempt(self, *, from_iteration: int, **facts: Any) -> None:
        """The run goes on.

        Args:
            from_iteration: Iteration of the checkpoint.
            **facts: The plan's, in the place of those that it had, and what is left of earlier results.
        """
        attempt = _attempt(from_iteration=from_iteration, plan_digest=facts["plan_digest"])
        self._content.pop("taps_fed", None)  # of version 1
        self.update(
            **dict.fromkeys(_OF_AN_ATTEMPT),
            **facts,
            receipt_version=RECEIPT_VERSION,
            status="incomplete",
            reason=_GOING_ON,
            ended=None,
            iterations_done=None,
            attempts=[*self._content.get("attempts", ()), attempt],
        )

    @property
    def content(self) -> Mapping[str, Any]:
        """All of it, as it is on disk."""
        return self._content

    def end_attempt(self, *, exit_status: int, **facts: Any) -> None:
        """The launcher's last word on this attempt.

        Args:
            exit_status: Of the launcher.
            **facts: More to record.
        """
        copied = {name: self._content[name] for name in ("status", "reason", "iterations_done")}
        self._content["attempts"][-1].update(copied, ended=self._content["ended"] or now(), exit_status=exit_status)
        self.update(**facts)

    def update(self, **facts: Any) -> None:
        """Add or replace facts."""
        self._content.update(facts, updated=now())
        write_json(self._path, self._content)

    def complete(self, **facts: Any) -> None:
        """The run did all that its plan asked for."""
        self.update(**facts, status="complete", reason=None, ended=now())

    def fail(self, reason: str, *, kind: str, **facts: Any) -> None:
        """The run ended early.

        Args:
            reason: In a sentence; paths, hosts and addresses are taken out of it.
            kind: See `failure_kind`.
            **facts: More to record.
        """
        self.update(**facts, status="incomplete", reason=without_places(reason), failure_kind=kind, ended=now())


def _attempt(*, from_iteration: int, plan_digest: str) -> dict[str, Any]:
    """One start of the run; the rest is null until its launcher ends."""
    return {
        "started": now(),
        "ended": None,
        "from_iteration": from_iteration,
        "status": "incomplete",
        "reason": _GOING_ON,
        "iterations_done": None,
        "exit_status": None,
        "plan_digest": plan_digest,
    }


def _runs(block: Mapping[str, Any] | None) -> bool:
    """Whether a family's block names the kernel that runs its recurrence."""
    return block is not None and block.get("kernel") is not None


def plan_facts(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe, spec, pattern, auxiliary losses and topology of a plan, as a receipt says them."""
    recipe, layout, argv = plan["recipe"], plan["layout"], plan["argv"]
    spec = argv.index("--spec")
    experts = recipe["model"]["families"]["E"]
    attention = recipe["model"]["families"]["A"]
    sparse = attention.get("sparse") if attention else None
    stand_ins = {str(layer["number"]): layer["seam"] for layer in layout["layers"] if _stands_in(layer)}
    seams = {str(layer["number"]): layer["seam"] for layer in layout["layers"] if layer["seam"]}
    return {
        "plan_digest": plan["digest"],
        "recipe": {
            "name": recipe["name"],
            "provenance": recipe["provenance"],
            "overrides": [without_place(override) for override in recipe["overrides"]],
        },
        "spec": {
            "module": argv[spec + 1],
            "name": argv[spec + 2],
            "backend": recipe["model"]["backend"],
            "kernels": {name: block["kernel"] for name, block in recipe["model"]["families"].items() if _runs(block)},
        },
        "pattern": {
            "source": layout["source_pattern"],
            "megatron": layout["megatron_pattern"],
            "stand_ins": stand_ins,
            "seams": {number: seam for number, seam in seams.items() if number not in stand_ins},
        },
        "auxiliary_losses": {
            "stp": recipe["stp"],
            "moe_load_balancing": experts["router"]["aux_loss_coeff"] if experts else None,
            "moe_z_loss": experts["router"]["z_loss_coeff"] if experts else None,
            "mtp": recipe["model"]["mtp"],
            "dsa_indexer": sparse["loss_coeff"] if sparse else None,
        },
        "windows": _windows(recipe["stp"], recipe["training"]["iterations"]),
        "topology": {
            "world_size": plan["world_size"],
            "data_parallel": plan["data_parallel"],
            **{key: recipe["parallel"][key] for key in ("tensor", "pipeline", "virtual", "context", "expert")},
            "micro_batches": plan["micro_batches"],
        },
        "seeds": {"training": recipe["training"]["seed"], "stp": recipe["stp"]["seed"] if recipe["stp"] else None},
        "iterations_planned": recipe["training"]["iterations"],
        "patches": None,
        "substrate": None,
        "data": None,
        "parameters": None,
    }


def _windows(stp: Mapping[str, Any] | None, iterations: int) -> dict[str, list[int] | None] | None:
    """First and last iteration of each of STP's regimes, as planned."""
    if stp is None:
        return None
    return Gate(**{name: stp[name] for name in ("weight", "start_step", "ramp_steps")}).windows(iterations)


def patch_facts(
    by_rank: Sequence[Sequence[Mapping[str, Any]]], calls: Sequence[Mapping[str, Mapping[str, int]]] | None = None
) -> list[dict[str, Any]]:
    """Patch surfaces as a receipt says them.

    Args:
        by_rank: Their records on each rank; they are equal.
        calls: By rank, surface and calling function upstream; None before the first iteration.
    """
    facts: list[dict[str, Any]] = []
    for record in by_rank[0]:
        fact = {name: record[name] for name in ("id", "state", "reviewed_at", "probe")}
        if record["unreviewed"]:
            fact |= {"state": f"{record['state']}, unreviewed", "unreviewed": record["unreviewed"]}
        if calls is not None:
            callers = sorted({caller for rank in calls for caller in rank[record["id"]]})
            fact["called_on_ranks"] = {
                caller: [rank for rank, found in enumerate(calls) if caller in found[record["id"]]]
                for caller in callers
            }
        facts.append(fact)
    return facts


def _stands_in(layer: Mapping[str, Any]) -> bool:
    """Whether a dense MLP runs there in another block's place."""
    return bool(layer["seam"]) and layer["kind"] == "mlp"


def read_receipt(directory: Path) -> dict[str, Any]:
    """A run's receipt, checked for what its readers use.

    Raises:
        UserError: No receipt, or a damaged one.
    """
    path = directory / RECEIPT
    require_regular(path)
    receipt = read_json(path)
    require_readable(receipt, path)
    parameters, validation = receipt.get("parameters"), receipt.get("validation", [])
    whole = (
        isinstance(receipt.get("recipe"), dict)
        and isinstance(receipt["recipe"].get("name"), str)
        and receipt.get("status") in ("complete", "incomplete")
        and isinstance(receipt.get("reason"), str | None)
        and {"reason", "substrate", "parameters"} <= receipt.keys()
        and (parameters is None or _are_counts(parameters))
        and isinstance(validation, list)
        and all(_is_validation(record) for record in validation)
        and _are_attempts(receipt.get("attempts", []))
    )
    if not whole:
        raise UserError(
            "is not a whole receipt", field=shown(path), fix="the file is damaged, or not of a run; use another run"
        )
    return receipt


def require_readable(receipt: Mapping[str, Any], path: Path) -> None:
    """Refuse a receipt of a version that is not read here.

    Raises:
        UserError: With its version.
    """
    version = receipt.get("receipt_version")
    if type(version) is not int:
        raise UserError("does not say its version: it is no receipt", field=shown(path), fix="use another run")
    if version not in READABLE_VERSIONS:
        raise UserError(
            f"is a receipt of another version than {' and '.join(map(str, READABLE_VERSIONS))}",
            field=shown(path),
            value=version,
            fix="use the megacpp-stp that wrote it",
        )


def _are_counts(parameters: Any) -> bool:
    if not isinstance(parameters, dict) or not isinstance(parameters.get("by_pipeline_rank"), list):
        return False
    return all(type(count) is int for count in (parameters.get("total"), *parameters["by_pipeline_rank"]))


def _are_attempts(attempts: Any) -> bool:
    return isinstance(attempts, list) and all(
        isinstance(attempt, dict) and type(attempt.get("from_iteration")) is int for attempt in attempts
    )


def _is_validation(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and type(record.get("iteration")) is int
        and all(isinstance(record.get(name), float) for name in ("lm_loss", "bits_per_byte"))
    )


def without_places(text: str) -> str:
    """One line of `text` without paths, host names and addresses: a receipt is for strangers."""
    line = " ".join(text.split())
    line = re.sub(r"(?<![\w.])(?:/[\w.+@-]+){2,}", lambda path: path[0].rsplit("/", 1)[1], line)
    line = re.sub(r"(?<![\w.)])/[A-Za-z_][\w.+@-]*", "(a path)", line)  # of one component, which may tell as much
    line = re.sub(r"\[?\b\d{1,3}(?:\.\d{1,3}){3}\b\]?(?::\d+)?", "(an address)", line)
    line = re.sub(r"\([^\s(),]+, \d{2,5}\)", "(an address)", line)  # as torch prints a host and its port
    line = re.sub(r"\bnode (?!\d+(?![\w-]|\.\w))\S+", "node (a host)", line)  # a number is no name; 10-a is one
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + "..."


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
