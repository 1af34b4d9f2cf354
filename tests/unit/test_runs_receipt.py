"""What grows in a receipt while a run goes on, what of it a later version still reads, and the weights' digest."""

import json
import subprocess

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import read_json, write_json
from megacpp_stp.runs.gate import Gate
from megacpp_stp.runs.metrics import read_metrics
from megacpp_stp.runs.receipt import Receipt, read_receipt
from megacpp_stp.runs.tally import Tally, tally_of
from megacpp_stp.training.code import code_facts
from megacpp_stp.training.collected import ranks_by_loss
from megacpp_stp.training.weights import digest_of_parts, part_digest
from tests.unit.made_runs import ITERATIONS, answer, compare, make_run, refused, runs

STARTED = "2026-11-20T10:00:00+00:00"
AT = 1795168800.0  # the same in seconds


@pytest.mark.parametrize("iterations", [1, 5, 6, 9, 20])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize(("start", "ramp"), [(0, 0), (0, 4), (5, 0), (5, 1), (5, 4), (30, 2)])
def test_windows_are_where_the_regimes_are(iterations, weight, start, ramp):
    gate = Gate(weight=weight, start_step=start, ramp_steps=ramp)
    by_regime = {"dormant": [], "warming": [], "active": []}
    for iteration in range(1, iterations + 1):
        by_regime[gate.regime_at(iteration)].append(iteration)
    assert gate.windows(iterations) == {name: [i[0], i[-1]] if i else None for name, i in by_regime.items()}


def record(iteration, *, weight=0.0, **more):
    stp = {"stp_active": weight > 0, "stp_weight": weight, "stp_loss": 1.0}
    return {"iteration": iteration, "tokens": 8, "loss_tokens": 7, "step_time_s": 2.0, "skipped": False, **stp, **more}


RECORDS = [
    record(1),
    record(2, weight=0.1),
    record(3, weight=0.2, skipped=True),
    record(4, weight=0.2, stp_loss=None),
    record(5, weight=0.2, skipped=True, nonfinite="gradient", stp_loss=None, loss_tokens="x"),
]


def test_totals_are_of_all_iterations_however_they_came():
    whole = Tally(started=STARTED, weight=0.2, records=RECORDS)
    parts = Tally(started=STARTED, weight=0.2, records=RECORDS[:2])
    for one in RECORDS[2:]:
        parts.add(one)
    facts = whole.facts(now=AT + 20)
    assert facts == parts.facts(now=AT + 20)
    assert facts["totals"] == {
        **{"iterations": 5, "tokens": 40, "loss_tokens": 28, "skipped_iterations": 2, "nonfinite_iterations": 1},
        **{"training_time_s": 10.0, "wall_time_s": 20.0, "goodput": 0.3},
    }
    assert facts["stp_iterations"] == {"dormant": 1, "warming": 1, "active": 3, "without_a_span": 1}
    assert (facts["iterations_done"], facts["last"]["iteration"]) == (5, 5)


def test_nothing_is_total_before_the_first_iteration():
    facts = Tally(started=STARTED, weight=None).facts(now=AT - 5)
    assert (facts["iterations_done"], facts["last"], facts["stp_iterations"]) == (0, None, None)
    assert facts["totals"]["goodput"] == facts["totals"]["wall_time_s"] == 0.0


def test_a_tally_follows_a_run_from_its_own_files(tmp_path):
    run = make_run(tmp_path / "run")
    facts = tally_of(read_receipt(run), read_metrics(run / "metrics.jsonl")).facts()
    assert facts["stp_iterations"] == {"dormant": 10, "warming": 0, "active": 30, "without_a_span": 0}
    assert facts["totals"]["iterations"] == ITERATIONS
    assert read_receipt(run)["windows"] == {"dormant": [1, 10], "warming": None, "active": [11, 40]}


def test_a_receipt_is_whole_from_the_first_and_says_when_it_was_written(tmp_path):
    run = make_run(tmp_path / "run")
    receipt = Receipt(run)
    before = read_json(run / "receipt.json")
    receipt.update(status="incomplete")
    assert receipt.content.keys() == before.keys() == read_json(run / "receipt.json").keys()
    assert receipt.content["updated"] >= before["updated"] >= before["started"]


def older(run):
    """As version 1 wrote it."""
    receipt = read_json(run / "receipt.json")
    new = ("updated", "windows", "code", "collected", "totals", "stp_iterations", "exit", "weights_sha256")
    kept = {name: value for name, value in receipt.items() if name not in new}
    write_json(run / "receipt.json", {**kept, "receipt_version": 1, "taps_fed": [6, 12]})
    return run


def test_version_1_is_read(tmp_path):
    a, b = make_run(tmp_path / "a"), older(make_run(tmp_path / "b", "stp.weight=0.1"))
    assert "nam56r-tiny: complete" in answer("show", b)
    assert "unlike in code (b does not say)" in refused("compare", a, b).problem
    assert compare(a, b, "--allow-unlike")["title"].startswith("UNLIKE RUNS (code)")
    assert runs("compare", a, older(make_run(tmp_path / "c")), "--assert-equal").exit_code == 0
    Receipt(b).begin_attempt(from_iteration=4, plan_digest="x")
    assert read_receipt(b)["receipt_version"] == 2
    assert "taps_fed" not in read_receipt(b)


def test_version_1_from_before_the_ramp_is_an_error_that_says_so(tmp_path):
    run = older(make_run(tmp_path / "run"))
    receipt = read_json(run / "receipt.json")
    del receipt["auxiliary_losses"]["stp"]["ramp_steps"]
    write_json(run / "receipt.json", receipt)
    assert "ramp_steps as this version writes it" in str(runs("compare", run, make_run(tmp_path / "b")).exception)


@pytest.mark.parametrize("version", [0, 3, True, None, "2", 10**400])
def test_another_version_is_an_error(tmp_path, version):
    run = make_run(tmp_path / "run")
    receipt = read_json(run / "receipt.json")
    (run / "receipt.json").write_text(json.dumps({**receipt, "receipt_version": version}))
    with pytest.raises(UserError, match="version"):
        read_receipt(run)


# What only torch and git know


def model(seed=0):
    torch.manual_seed(seed)
    chunk = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2).bfloat16())
    chunk[0].register_buffer("scratch", torch.rand(2), persistent=False)
    return chunk


def test_a_part_is_its_weights_and_nothing_else():
    whole = part_digest([model(), model(1)])
    assert part_digest([model(), model(1)]) == whole
    other = model()
    other[0].scratch += 1
    other[0].weight.requires_grad_(False)
    assert part_digest([other, model(1)]) == whole
    assert part_digest([model(1), model()]) != whole
    for change in ("0.weight", "2.bias", "1.running_mean"):
        one = model()
        with torch.no_grad():
            value = one.state_dict()[change].view(-1)
            value[-1] = torch.nextafter(value[-1], torch.tensor(torch.inf, dtype=value.dtype))
        assert part_digest([one, model(1)]) != whole, change
    assert part_digest([model().double(), model(1)]) != whole


def test_shape_and_name_count_as_much_as_bytes():
    def named(name, *shape):
        module = torch.nn.Module()
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
        return module

    digests = [part_digest([one]) for one in (named("a", 2, 3), named("a", 3, 2), named("b", 2, 3), named("a", 0))]
    assert len(set(digests)) == 4
    both = named("a", 2)
    both.register_parameter("b", torch.nn.Parameter(torch.zeros(2)))
    assert part_digest([named("a", 2), named("b", 2)]) != part_digest([both])  # on one virtual stage, or two
    transposed = named("a", 3, 2)
    transposed.a = torch.nn.Parameter(torch.arange(6.0).view(2, 3).t())
    straight = named("a", 3, 2)
    straight.a = torch.nn.Parameter(torch.arange(6.0).view(2, 3).t().contiguous())
    assert part_digest([transposed]) == part_digest([straight])


def test_ranks_count_in_their_order_and_by_their_places():
    parts = [("pp0", "x"), ("pp1", "y")]
    assert digest_of_parts(parts) == digest_of_parts(list(parts))
    assert len({digest_of_parts(found) for found in (parts, parts[::-1], [("pp0", "x"), ("tp1", "y")])}) == 3


def test_losses_are_told_with_their_ranks():
    assert ranks_by_loss([["z_loss"], [], ["indexer loss", "z_loss"]]) == {"indexer loss": [2], "z_loss": [0, 2]}


def test_the_commit_is_of_the_work_tree_that_tracks_the_package(tmp_path):
    def git(*words):
        name = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "core.hooksPath=/dev/null")
        return subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    package = tmp_path / "inside" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert (code_facts(package)["commit"], code_facts(package)["modified"]) == (None, None)
    git("init")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-m", "x")
    assert code_facts(package)["commit"] is None  # somebody else's repository, an environment inside it
    git("add", "inside")
    git("commit", "-m", "y")
    assert (code_facts(package)["commit"], code_facts(package)["modified"]) == (git("rev-parse", "HEAD").strip(), False)
    (package / "new.py").write_text("")
    assert code_facts(package)["modified"] is True
    assert code_facts(package)["version"]
    assert len(code_facts(package)["sha256"]) == 64
