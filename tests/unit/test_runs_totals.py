"""Speed and sums of a run, by hand."""

from __future__ import annotations

import pytest

from megacpp_stp.runs.totals import Totals, Work, peak_flops

STARTED = "1970-01-01T00:01:40+00:00"  # second 100


def test_speed_is_of_one_process_and_of_its_peak():
    found = Work(flops_per_token=6_000_000_000, processes=8, peak_flops=1e13).speed(4000.0)
    assert found == {"tflops_per_gpu": pytest.approx(3.0), "mfu": pytest.approx(0.3)}


def test_no_known_peak_is_no_mfu():
    assert Work(flops_per_token=1, processes=1, peak_flops=None).speed(1.0)["mfu"] is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", None),
        (None, None),
    ],
)
def test_peak_by_name(name, peak):
    assert peak_flops(name) == peak


def test_goodput_counts_finished_unskipped_iterations_of_all_attempts():
    earlier = [{"step_time_s": 10.0, "skipped": False}, {"step_time_s": 7.0, "skipped": True}]
    totals = Totals(started=STARTED, records=earlier)
    assert totals.after({"step_time_s": 15.0, "skipped": False}, now=200.0) == {
        "skipped_iterations": 1,
        "nonfinite_iterations": 0,
        "goodput": 0.25,
    }
    found = totals.after({"step_time_s": 5.0, "skipped": True}, now=225.0)
    assert (found["skipped_iterations"], found["goodput"]) == (2, 0.2)


def test_goodput_is_no_more_than_all():
    assert Totals(started=STARTED).after({"step_time_s": 0.9, "skipped": False}, now=100.5)["goodput"] == 1.0
