"""Real runs of a NAM with every letter's own mixer, sparse attention and multi-token prediction; no stand-in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megacpp_stp.runs.metrics import read_metrics

MODEL = (
    "model.families.A.sparse={ranks: [1, 2], indexer_heads: 2, indexer_head_dim: 16, topk: 16, "
    "kernel: chunked, loss: sparse, loss_coeff: 1.0e-2}",
    "model.families.M={block: mamba3, heads: 4, head_dim: 64, state_dim: 16, groups: 2, chunk_size: 32, "
    "complex_rotation: true, mimo_rank: 1, kernel: torch}",
    "model.families.R={block: m2rnn, heads: 4, key_dim: 16, value_dim: 16, conv_kernel: 4, checkpoint_every: 32, "
    "kernel: torch}",
    "model.mtp={depths: 1, pattern: AE, loss_coeff: 0.1}",
    "parallel.stages=[6, 6]",
)


def launch(cli, short_run, directory: Path, *overrides: str, timeout: float = 240) -> Path:
    settings = [token for override in (*MODEL, *overrides) for token in ("--set", override)]
    done = cli(*short_run, *settings, "--run-dir", str(directory), timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (directory / "console.txt").write_text(done.stdout)
    return directory


def losses(directory: Path) -> list[float]:
    return [record["lm_loss"] for record in read_metrics(directory / "metrics.jsonl")]


def test_every_letter_trains_with_its_own_mixer(cli, short_run, tmp_path):
    run = launch(cli, short_run, tmp_path / "run")
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["status"] == "complete"
    assert receipt["pattern"]["megatron"] == "+EMEDE|MEDEMM/+E"
    assert receipt["pattern"]["stand_ins"] == {}
    assert receipt["pattern"]["seams"] == {
        **dict.fromkeys(("3", "7", "11"), "mamba3 in a Mamba slot"),
        "12": "m2rnn in a Mamba slot",
    }
    console = (run / "console.txt").read_text()
    for logged in ("mtp_1 loss:", "indexer loss:", "load_balancing_loss:", "stp loss:"):
        assert console.count(f"| {logged}") == 6, logged
    found = losses(run)
    assert found[0] == pytest.approx(math.log(512), abs=0.5)
    assert found[-1] < found[0]


@pytest.mark.slow
def test_bf16_learns_as_fp32_does(cli, short_run, tmp_path):
    """200 iterations; the mean of the last twenty, which swing less than one."""
    long = (
        "training.iterations=200",
        "training.log_interval=50",
        "training.eval_interval=100",
        "training.checkpoint=null",  # Megatron's plain optimizer could not save bf16 beside fp32 parameters
        "optimizer.warmup_iterations=20",
        "stp.start_step=100",
    )
    curves = {
        precision: losses(
            launch(cli, short_run, tmp_path / precision, *long, f"training.precision={precision}", timeout=900)
        )
        for precision in ("fp32", "bf16")
    }
    assert all(math.isfinite(loss) for curve in curves.values() for loss in curve)
    assert [len(curve) for curve in curves.values()] == [200, 200]
    ends = {precision: sum(curve[-20:]) / 20 for precision, curve in curves.items()}
    assert ends["fp32"] < 0.75 * curves["fp32"][0]
    assert ends["bf16"] == pytest.approx(ends["fp32"], rel=0.02)
    # Not the same numbers: it is bf16 that was compared.
    assert curves["bf16"] != curves["fp32"]


@pytest.mark.slow
def test_fp16_finds_its_loss_scale_by_skipping_steps(cli, short_run, tmp_path):
    """From a scale far too large it halves until gradients fit; then the weights begin to move."""
    keys = (
        "training.precision=fp16",
        "training.loss_scale={initial: 33554432.0, minimum: 1.0, window: 3, hysteresis: 1}",
        "training.iterations=16",
        "training.checkpoint=null",
        "stp.start_step=0",
    )
    overrides = [token for key in keys for token in ("--set", key)]
    done = cli(*short_run, *overrides, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    scales = [record["loss_scale"] for record in records]
    skipped = [record["skipped"] for record in records]
    assert skipped[0]
    assert not skipped[-1]
    for before, after, overflow in zip(scales, scales[1:], skipped[1:], strict=False):
        assert after == before / 2 if overflow else after in (before, 2 * before)
    assert records[-1]["lm_loss"] < records[0]["lm_loss"]
    assert all(0 < record["stp_loss"] < 2 for record in records)
