"""What ``bench stp`` compares is equal, and what it counts is right; how long things take is no test's business."""

import json

import pytest
import torch

from megacpp_stp.bench.stp import (
    TARGET,
    Cost,
    Found,
    cases,
    default_cases,
    has_target,
    measure,
    missed,
    peak_bytes,
    saved_bytes,
)
from megacpp_stp.bench.stp_variants import AUTO_SCALER, INDEX_SELECT, NONE, SEAM, TEXTBOOK, Case, Stream, ways
from megacpp_stp.cli.app import run

CPU = torch.device("cpu")
WAYS = [SEAM, TEXTBOOK, INDEX_SELECT, AUTO_SCALER]


def gradients(case):
    stream, found = Stream(case, CPU), {}
    for name, way in ways(case, CPU).items():
        stream.backward(stream.forward(way))
        found[name] = stream.x.grad
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("length", "batch", "width", "n_spans"), [(33, 3, 5, 2), (3, 1, 7, 1), (9, 2, 4, 8)])
def test_all_ways_add_the_same_gradient(length, batch, width, n_spans, dtype, tolerance):
    case = Case(length=length, batch=batch, width=width, n_spans=n_spans, dtype=dtype)
    found = gradients(case)
    assert list(found) == [NONE, *WAYS]
    assert (found[TEXTBOOK] - found[NONE]).abs().max() > 1e-3
    for name in WAYS:
        torch.testing.assert_close(found[name], found[TEXTBOOK], rtol=0, atol=tolerance)


@pytest.mark.parametrize("n_spans", [1, 4])
@pytest.mark.parametrize(("dtype", "bytes_of_row"), [(torch.bfloat16, 4), (torch.float64, 8)])
def test_the_seam_saves_its_rows_and_indices_whatever_the_length(n_spans, dtype, bytes_of_row):
    saved = []
    for length in (32, 256):
        case = Case(length=length, batch=3, width=5, n_spans=n_spans, dtype=dtype)
        stream, by_name = Stream(case, CPU), ways(case, CPU)
        saved.append(saved_bytes(stream, by_name[SEAM]) - saved_bytes(stream, by_name[NONE]))
        assert case.seam_bytes == 3 * n_spans * 3 * (5 * bytes_of_row + 8)
    assert saved == [case.seam_bytes] * 2


def test_what_a_way_keeps_alive_is_counted_once_and_whole():
    case = Case(length=64, batch=2, width=16, n_spans=1, dtype=torch.float32)
    stream = Stream(case, CPU)
    nothing = saved_bytes(stream, lambda hidden: (hidden, None))
    whole = 64 * 2 * 16 * 4
    assert saved_bytes(stream, lambda hidden: (hidden * hidden, None)) - nothing == whole
    # One row of it pins all of it.
    assert saved_bytes(stream, lambda hidden: (hidden, lambda: hidden[0].square().sum())) - nothing == whole


def test_a_loss_at_the_end_holds_a_dense_gradient_all_the_way_back_and_the_seam_does_not():
    case = Case(length=512, batch=2, width=64, n_spans=2, dtype=torch.float32)
    stream, by_name = Stream(case, CPU), ways(case, CPU)
    dense = 512 * 2 * 64 * 4
    peak = {name: peak_bytes(stream, way, CPU) for name, way in by_name.items()}
    assert peak[NONE] >= 3 * dense
    assert peak[SEAM] - peak[NONE] < dense / 4
    for name in (TEXTBOOK, INDEX_SELECT):
        assert dense <= peak[name] - peak[NONE] < 1.25 * dense


def test_a_measurement_has_every_way_and_every_round():
    case = Case(length=16, batch=1, width=8, n_spans=1)
    found = measure(case, device=CPU, rounds=3)
    assert list(found.costs) == [NONE, *WAYS]
    assert all(len(cost.seconds) == 3 and min(cost.seconds) > 0 for cost in found.costs.values())
    assert found.costs[NONE].added_seconds == found.costs[NONE].saved_bytes == found.costs[NONE].added_peak_bytes == 0
    assert found.costs[SEAM].saved_bytes == case.seam_bytes
    assert missed([found]) == []


def found_with(added, case=TARGET, saved=None):
    added = dict(zip([NONE, *WAYS], (0.0, *added), strict=True))
    saved = case.seam_bytes if saved is None else saved
    return Found(
        case=case,
        costs={
            name: Cost(seconds=(1.0,), added_seconds=seconds, added_peak_bytes=0, saved_bytes=saved)
            for name, seconds in added.items()
        },
    )


@pytest.mark.parametrize(
    ("added", "complaints"),
    [
        ((1.0, 6.1, 1.5, 1.0), []),
        ((-1.0, 6.1, 1.5, 1.0), []),
        ((1.0, 5.9, 1.5, 1.0), ["textbook: 0.169"]),
        ((1.0, 6.1, 1.4, 1.0), ["index_select: 0.714"]),
        ((1.0, -1.0, 1.5, 1.0), ["textbook: lost in the noise"]),
    ],
)
def test_a_missed_target_of_time_is_told(added, complaints):
    told = missed([found_with(added)])
    assert len(told) == len(complaints)
    assert all(part in one for part, one in zip(complaints, told, strict=True))
    other = cases(lengths=(1024,))[0]
    assert missed([found_with(added, case=other)]) == []


def test_saved_bytes_that_depend_on_more_than_the_formula_are_told():
    assert missed([found_with((1.0, 9.0, 9.0, 9.0), saved=TARGET.seam_bytes + 1)]) != []


def test_the_default_cases_go_along_each_axis_through_the_target():
    wanted = default_cases(torch.float32)
    assert has_target(wanted)
    assert len(wanted) == len(set(wanted)) == 8
    assert {case.length for case in wanted} >= {1024, 32768}
    assert {case.n_spans for case in wanted} == {1, 4, 16}
    assert len({case.width for case in wanted}) == 3
    assert not has_target(cases(spans=(1, 16)))


def test_the_command_prints_json_alone(capfd):
    assert run(["bench", "stp", "--length", "16", "--width", "8", "--batch", "1", "--rounds", "2"]) == 0
    assert "[16, 1, 8] bfloat16, 4 spans" in capfd.readouterr().out
    asked = ["--length", "16", "--length", "24", "--width", "8", "--spans", "2", "--dtype", "fp32"]
    assert run(["bench", "stp", *asked, "--rounds", "2", "--format", "json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [(case["length"], case["dtype"], case["n_spans"]) for case in found["cases"]] == [
        (16, "float32", 2),
        (24, "float32", 2),
    ]
    assert found["cases"][0]["ways"][SEAM]["saved_bytes"] == 3 * 2 * 2 * (8 * 4 + 8)
    assert found["missed"] == []


@pytest.mark.parametrize(("textbook", "status"), [(7.0, 0), (5.0, 1)])
def test_check_measures_the_target_and_says_by_its_status_whether_it_was_met(monkeypatch, capsys, textbook, status):
    measured = []

    def fake(case, *, device, rounds):
        measured.append(case)
        return found_with((1.0, textbook, 2.0, 1.0), case=case)

    monkeypatch.setattr("megacpp_stp.bench.stp.measure", fake)
    assert run(["bench", "stp", "--length", "1024", "--check"]) == status
    assert measured == [TARGET, *cases(lengths=(1024,))]
    assert ("missed" in capsys.readouterr().out) == bool(status)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_a_users_mistake(capsys):
    assert run(["bench", "stp", "--device", "cuda"]) == 2
    assert "--device" in capsys.readouterr().err
