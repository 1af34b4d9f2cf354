"""What rank 0 writes into the run directory while the run goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megacpp_stp.data.manifest import data_facts, load_manifest
from megacpp_stp.patches.agreement import digest
from megacpp_stp.plan.env_guard import shown_environment
from megacpp_stp.preflight.inputs import require_same_data
from megacpp_stp.runs.failures import kind_of, text_of
from megacpp_stp.runs.files import ENV, METRICS, PATCHES, RANKS, RECEIPT, write_json
from megacpp_stp.runs.metrics import MetricsWriter, Record, read_metrics
from megacpp_stp.runs.receipt import Receipt, patch_facts, plan_facts
from megacpp_stp.runs.tally import tally_of
from megacpp_stp.training.code import code_facts
from megacpp_stp.training.facts import allowed_environment, substrate
from megacpp_stp.training.preflight_ranks import Met, placement

UPDATE_EVERY_S = 10.0
"""How old the receipt's last iteration and totals may get while the run goes on."""


class Journal:
    """Receipt, metrics, environment and patches of one run.

    Args:
        directory: The run directory; it exists and holds plan.json.
        plan: The verified plan.
    """

    def __init__(self, directory: Path, plan: dict[str, Any]) -> None:
        self._directory = directory
        self._wanted = plan["recipe"]["training"]["iterations"]
        # Under plain torchrun nobody has written it yet.
        known = (directory / RECEIPT).exists()
        self._receipt = Receipt(directory) if known else Receipt.create(directory, plan_facts(plan))
        data = data_facts(load_manifest(Path(plan["recipe"]["data"]["path"]), field="data.path"))
        require_same_data(self._receipt.data, data)
        path = directory / METRICS
        goes_on = self._receipt.attempts > 1
        self._tally = tally_of(self._receipt.content, read_metrics(path) if goes_on and path.exists() else ())
        self._validations: list[Record] = self._receipt.validation
        self._metrics = MetricsWriter(path, append=goes_on)
        self._is_first = True
        self._updated = 0.0
        self._patches: list[list[dict[str, Any]]] = []
        environment = allowed_environment(plan)
        write_json(directory / ENV, environment)
        self._receipt.update(
            substrate=substrate(plan["device"]),
            code=code_facts(),
            data=data,
            environment=shown_environment(environment),
        )

    def ranks_met(self, met: Met) -> None:
        """All ranks have agreed, before the first collective; host names go into a file of their own."""
        write_json(self._directory / RANKS, {str(rank): facts for rank, facts in enumerate(met.by_rank)})
        self._receipt.update(placement=placement(met))

    def model_built(self, parameters_by_stage: list[int], *, stack: str, patches: list[list[dict[str, Any]]]) -> None:
        """The model exists.

        Args:
            parameters_by_stage: Parameters of each pipeline rank.
            stack: The class that the spec built as decoder.
            patches: The records of the patch surfaces on each rank.
        """
        self._patches = patches
        self._write_patches()
        parameters = {"total": sum(parameters_by_stage), "by_pipeline_rank": parameters_by_stage}
        self._receipt.update(
            parameters=parameters, stack=stack, patches=patch_facts(patches), patches_digest=digest(patches[0])
        )

    def patches_called(self, calls: list[dict[str, dict[str, int]]], *, cpu_backend: list[str] | None) -> None:
        """The first iteration has shown what the run calls.

        Args:
            calls: On each rank, by surface and calling function.
            cpu_backend: What was asked of the CPU backend on rank 0; None on a GPU.
        """
        for states, found in zip(self._patches, calls, strict=True):
            for state in states:
                state["calls"] = found[state["id"]]
        self._write_patches()
        self._receipt.update(patches=patch_facts(self._patches, calls), cpu_backend=cpu_backend)

    def collected(self, auxiliary: dict[str, list[int]]) -> None:
        """The first iteration has shown which auxiliary losses there are, on which ranks; STP's taps follow."""
        self._receipt.update(collected={"taps": None, "auxiliary": auxiliary})

    def loss_fused(self, backend: str, losses: int) -> None:
        """The first iteration has computed that many losses, over all ranks, without logits."""
        self._receipt.update(fused_cross_entropy={"backend": backend, "losses_in_first_iteration": losses})

    def _write_patches(self) -> None:
        write_json(self._directory / PATCHES, {str(rank): states for rank, states in enumerate(self._patches)})

    def record(self, record: Record) -> None:
        """One iteration ended.

        Raises:
            RuntimeError: It is the first, and not the one after the checkpoint: Megatron has loaded another, or none.
        """
        first, self._is_first = self._is_first, False
        loaded = self._receipt.from_iteration
        if first and record["iteration"] != loaded + 1:
            raise RuntimeError(
                f"iteration {record['iteration']} came first, but the run goes on from iteration {loaded}"
            )
        self._metrics.write(record)
        self._tally.add(record)
        if first and "stp_loss_by_tap" in record:
            taps = [int(tap) if tap.isdigit() else tap for tap in record["stp_loss_by_tap"]]
            self._receipt.update(collected={**(self._receipt.content["collected"] or {"auxiliary": {}}), "taps": taps})
        if time.monotonic() - self._updated >= UPDATE_EVERY_S:
            self._update()

    def validation(self, record: Record) -> None:
        """One evaluation ended."""
        self._validations.append(record)
        self._update()

    def saving(self) -> None:
        """A checkpoint is about to be written, with all that is recorded so far behind it."""
        self._metrics.sync()

    def completed(self, *, weights_sha256: str) -> None:
        """`pretrain` returned, and left these weights."""
        self._metrics.close()
        done, outcome = self._tally.iterations_done, {**self._outcome(), "weights_sha256": weights_sha256}
        if done < self._wanted:
            self._receipt.fail(f"ended after iteration {done} of {self._wanted}", kind="crash", **outcome)
        else:
            self._receipt.complete(**outcome)

    def failed(self, error: BaseException) -> None:
        """`pretrain` raised."""
        self._metrics.close()
        self._receipt.fail(text_of(error), kind=kind_of(error), **self._outcome())

    def _update(self) -> None:
        """Bring the receipt up to date: whoever is killed leaves what was true a moment ago."""
        self._receipt.update(**self._outcome())
        self._updated = time.monotonic()

    def _outcome(self) -> dict[str, Any]:
        """How far the run is. `best` is of validation: the lowest loss of one training batch is chance."""
        best = min(self._validations, key=lambda record: record["lm_loss"], default=None)
        return {**self._tally.facts(), "validation": self._validations, "best": best}
