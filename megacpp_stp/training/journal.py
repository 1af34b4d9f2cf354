"""What rank 0 writes into the run directory while the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megacpp_stp.data.manifest import load_manifest
from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import ENV, METRICS, PATCHES, write_json
from megacpp_stp.runs.metrics import MetricsWriter, Record
from megacpp_stp.runs.receipt import Receipt
from megacpp_stp.training.facts import allowed_environment, data_facts, plan_facts, substrate


class Journal:
    """Receipt, metrics, environment and patches of one run.

    Args:
        directory: The run directory; it exists and holds plan.json.
        plan: The verified plan.
    """

    def __init__(self, directory: Path, plan: dict[str, Any]) -> None:
        self._directory = directory
        self._plan = plan
        self._last: Record = {}
        self._best: Record = {}
        write_json(directory / ENV, allowed_environment())
        self._metrics = MetricsWriter(directory / METRICS)
        self._receipt = Receipt(
            directory,
            {
                **plan_facts(plan),
                "patches": None,
                "substrate": substrate(plan["device"]),
                "data": data_facts(load_manifest(Path(plan["recipe"]["data"]["path"]))),
                "parameters": None,
                "iterations_done": 0,
            },
        )

    def model_built(self, parameters_by_stage: list[int], *, stack: str, patches: list[list[dict[str, str]]]) -> None:
        """The model exists.

        Args:
            parameters_by_stage: Parameters of each pipeline rank.
            stack: The class that the spec built as decoder.
            patches: Patch surfaces and their state on each rank.
        """
        write_json(self._directory / PATCHES, {str(rank): states for rank, states in enumerate(patches)})
        parameters = {"total": sum(parameters_by_stage), "by_pipeline_rank": parameters_by_stage}
        self._receipt.update(parameters=parameters, stack=stack, patches=patches[0])

    def record(self, record: Record) -> None:
        """One iteration ended."""
        self._metrics.write(record)
        first = not self._last
        self._last = record
        if not self._best or record["lm_loss"] < self._best["lm_loss"]:
            self._best = record
        if first and "stp_loss_by_tap" in record:
            self._receipt.update(taps_fed=sorted(map(int, record["stp_loss_by_tap"])))

    def completed(self) -> None:
        """`pretrain` returned."""
        wanted, done = self._plan["recipe"]["training"]["iterations"], self._last.get("iteration", 0)
        self._metrics.close()
        if done < wanted:
            self._receipt.fail(f"ended after iteration {done} of {wanted}", kind="crash", **self._outcome())
        else:
            self._receipt.complete(**self._outcome())

    def failed(self, error: BaseException) -> None:
        """`pretrain` raised."""
        kind = "user" if isinstance(error, UserError) else "crash"
        self._metrics.close()
        self._receipt.fail(f"{type(error).__name__}: {error}", kind=kind, **self._outcome())

    def _outcome(self) -> dict[str, Any]:
        def summary(record: Record) -> dict[str, Any] | None:
            names = ("iteration", "lm_loss", "bits_per_byte", "stp_loss")
            return {name: record[name] for name in names if name in record} or None

        return {
            "iterations_done": self._last.get("iteration", 0),
            "last": summary(self._last),
            "best": summary(self._best),
            "peak_memory_bytes": self._last.get("peak_memory_bytes"),
        }
