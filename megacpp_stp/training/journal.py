"""What rank 0 writes into the run directory while the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megacpp_stp.data.manifest import load_manifest
from megacpp_stp.runs.files import ENV, METRICS, PATCHES, RECEIPT, write_json
from megacpp_stp.runs.metrics import MetricsWriter, Record, last_of
from megacpp_stp.runs.receipt import Receipt, plan_facts
from megacpp_stp.training.facts import allowed_environment, data_facts, substrate


class Journal:
    """Receipt, metrics, environment and patches of one run.

    Args:
        directory: The run directory; it exists and holds plan.json.
        plan: The verified plan.
    """

    def __init__(self, directory: Path, plan: dict[str, Any]) -> None:
        self._directory = directory
        self._wanted = plan["recipe"]["training"]["iterations"]
        self._last: Record = {}
        self._validations: list[Record] = []
        # Under plain torchrun nobody has written it yet.
        known = (directory / RECEIPT).exists()
        self._receipt = Receipt(directory) if known else Receipt.create(directory, plan_facts(plan))
        self._metrics = MetricsWriter(directory / METRICS)
        write_json(directory / ENV, allowed_environment())
        data = data_facts(load_manifest(Path(plan["recipe"]["data"]["path"]), field="data.path"))
        self._receipt.update(substrate=substrate(plan["device"]), data=data)

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
        if first and "stp_loss_by_tap" in record:
            self._receipt.update(taps_fed=sorted(map(int, record["stp_loss_by_tap"])))

    def validation(self, record: Record) -> None:
        """One evaluation ended."""
        self._validations.append(record)
        self._receipt.update(validation=self._validations)

    def completed(self) -> None:
        """`pretrain` returned."""
        self._metrics.close()
        done = self._last.get("iteration", 0)
        if done < self._wanted:
            self._receipt.fail(f"ended after iteration {done} of {self._wanted}", kind="crash", **self._outcome())
        else:
            self._receipt.complete(**self._outcome())

    def failed(self, error: BaseException, *, kind: str) -> None:
        """`pretrain` raised."""
        self._metrics.close()
        self._receipt.fail(f"{type(error).__name__}: {error}", kind=kind, **self._outcome())

    def _outcome(self) -> dict[str, Any]:
        best = min(self._validations, key=lambda record: record["lm_loss"], default=None)
        return {"iterations_done": self._last.get("iteration", 0), "last": last_of(self._last), "best": best}
