"""Effective rank, clock share and gradient share, against plain computations and cases with a known answer.

Letters: s sequence, b batch, h hidden.
"""

import math
from dataclasses import replace

import pytest
import torch

from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.diagnosis import (
    Diagnosis,
    TapDiagnosis,
    effective_rank,
    reference_effective_rank,
    without_direction,
)
from megacpp_stp.stp.microbatch import Facts
from megacpp_stp.stp.record import diagnosis_record
from megacpp_stp.stp.taps import Place, StpTaps

CPU = torch.device("cpu")
CONFIG = StpConfig(weight=0.5, n_spans=8, start_step=0, taps=(3, 7), seed=1, diagnose_every=2)
SECOND = 1  # the first diagnosed iteration


def taps_of(config=CONFIG, *, hidden_size=16, **settings):
    diagnosis = Diagnosis(config, hidden_size=hidden_size, **settings)
    taps = StpTaps(config, iteration=lambda: SECOND, data_rank=0, diagnosis=diagnosis)
    taps.scale.set(torch.tensor([1.0]))
    return taps


def diagnosed(taps, *microbatches, tap=3, iteration=SECOND):
    """One iteration of these hidden states at a tap; a plain sum of squares comes after it."""
    for number, hidden in enumerate(microbatches):
        hidden = hidden.detach().clone().requires_grad_()
        (0.5 * taps.read(hidden, tap=tap, place=Place(iteration, number)).square()).sum().backward()
    return taps.diagnosis.reduce(device=CPU, groups=[])[tap]


# --- effective rank ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(7, 3), (3, 7), (64, 33), (33, 64)])
def test_the_effective_rank_is_that_of_singular_values(count, width):
    states = torch.randn(count, width) * torch.linspace(0.01, 3, width) + 100.0
    assert effective_rank(states).item() == pytest.approx(reference_effective_rank(states).item(), rel=1e-6)


def test_the_effective_rank_of_known_shapes():
    line = torch.arange(9.0).unsqueeze(1) * torch.randn(1, 5)
    assert effective_rank(line).item() == pytest.approx(1.0, abs=1e-6)
    cross = torch.cat((torch.eye(4), -torch.eye(4)))
    assert effective_rank(cross).item() == pytest.approx(4.0)
    assert effective_rank(torch.ones(5, 3)).item() == 1.0


def test_the_effective_rank_is_of_evenly_spaced_states_of_the_first_microbatch():
    hidden, other = torch.randn(2, 600, 2, 16)
    taps = taps_of()
    even = taps.diagnosis.positions(length=600, batch=2, device=CPU)[:, 0, 0]
    assert (even[0], even[-1], len(even)) == (0, 599, 128)
    assert len(set(even.diff().tolist())) <= 2
    found = diagnosed(taps, hidden, other).effective_rank
    assert found == pytest.approx(effective_rank(hidden[even].flatten(0, 1)).item(), rel=1e-6)


# --- the clock --------------------------------------------------------------------------------------


def test_a_direction_is_projected_off_each_sequence():
    rows, direction = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    found = without_direction(rows, direction)
    for n in range(4):
        along = direction[n % 2] / direction[n % 2].norm()
        for m in range(3):
            expected = rows[m, n] - (rows[m, n] @ along) * along
            torch.testing.assert_close(found[m, n], expected)
    assert torch.equal(without_direction(rows, torch.zeros(2, 5, dtype=torch.float64)), rows)


def walk(drift, *, noise, batch=32, length=40, width=16):
    """A common drift by position, and noise that is each position's own: independent points but for the drift."""
    clock = torch.linspace(0, 1, length).view(-1, 1, 1) * torch.nn.functional.one_hot(torch.tensor(3), width)
    return drift * clock + noise * torch.randn(length, batch, width)


def test_a_clock_explains_all_straightness_of_states_that_have_nothing_else():
    torch.manual_seed(0)
    found = diagnosed(taps_of(replace(CONFIG, n_spans=64)), walk(40.0, noise=0.5))
    assert found.clock_share == pytest.approx(1.0, abs=0.05)


def test_a_clock_explains_nothing_where_each_sequence_has_a_direction_of_its_own():
    torch.manual_seed(0)
    straight = torch.linspace(0, 40, 40).view(-1, 1, 1) * torch.randn(1, 32, 16) + 0.1 * torch.randn(40, 32, 16)
    found = diagnosed(taps_of(), straight)
    assert abs(found.clock_share) < 0.1


def test_a_sequence_is_not_held_against_its_own_step():
    """Two, each along a direction of its own: the other's explains nothing, the sum of both would explain much."""
    torch.manual_seed(0)
    directions = torch.eye(16)[:2]
    drifting = torch.linspace(0, 40, 40).view(-1, 1, 1) * directions + 4.0 * torch.randn(40, 2, 16)
    assert abs(diagnosed(taps_of(replace(CONFIG, n_spans=256)), drifting).clock_share) < 0.08


def test_the_chord_objective_has_independent_points_of_its_own():
    torch.manual_seed(0)
    found = diagnosed(taps_of(replace(CONFIG, objective="chord", n_spans=64)), walk(40.0, noise=0.5))
    assert found.clock_share == pytest.approx(1.0, abs=0.08)


def test_microbatches_without_a_span_do_not_dilute_the_share():
    torch.manual_seed(0)
    config, states = replace(CONFIG, n_spans=64, within_documents=True), walk(40.0, noise=0.5)
    shares = []
    for empty in (0, 3):
        taps = taps_of(config)
        for number in range(1 + empty):
            documents = torch.zeros(32, 40, dtype=torch.int64) if number == 0 else torch.full((32, 40), -1)
            taps.read(states, tap=3, place=Place(SECOND, number, Facts(documents=documents)))
        shares.append(taps.diagnosis.reduce(device=CPU, groups=[])[3].clock_share)
    assert shares[1] == pytest.approx(shares[0], abs=0.02)


def test_near_independent_points_there_is_no_share():
    torch.manual_seed(0)
    assert diagnosed(taps_of(), torch.randn(40, 32, 16)).clock_share is None


def test_states_that_are_no_numbers_leave_the_word_to_the_loss():
    states = torch.randn(12, 2, 16)
    states[3] = torch.nan
    assert diagnosed(taps_of(), states).effective_rank is None


def test_without_straightness_or_other_sequences_there_is_no_share():
    torch.manual_seed(0)
    assert diagnosed(taps_of(), torch.randn(2, 1, 16).repeat(20, 1, 1)).clock_share is None  # to and fro: L is 2
    assert diagnosed(taps_of(), walk(40.0, noise=0.1, batch=1)).clock_share is None
    two = walk(40.0, noise=0.1, batch=2)
    assert diagnosed(taps_of(), two[:, :1], two[:, 1:]).clock_share is not None  # in two microbatches


# --- gradients --------------------------------------------------------------------------------------


def test_the_gradient_share_is_that_of_the_gradients_at_the_tap():
    hidden = torch.randn(12, 2, 16)
    with_stp, without = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    taps = taps_of()
    taps.scale.set(torch.tensor([3.0]))
    (0.5 * taps.read(with_stp, tap=3, place=Place(SECOND, 0)).square()).sum().backward()
    (0.5 * without.square()).sum().backward()
    expected = (with_stp.grad - without.grad).norm() / without.grad.norm()
    share = taps.diagnosis.reduce(device=CPU, groups=[])[3].gradient_share
    assert share == pytest.approx(expected.item(), rel=1e-5)


def test_before_the_gate_there_is_no_gradient_to_share():
    assert diagnosed(taps_of(replace(CONFIG, start_step=5)), torch.randn(12, 2, 16)).gradient_share is None


# --- when, and over ranks ---------------------------------------------------------------------------


def test_other_iterations_are_not_diagnosed_and_a_diagnosed_one_is_read_once():
    taps = taps_of()
    diagnosed(taps, torch.randn(12, 2, 16))
    assert diagnosed(taps, torch.randn(12, 2, 16), iteration=SECOND + 1) == TapDiagnosis(None, None, None)


def test_the_diagnosis_changes_no_gradient():
    hidden, grads = torch.randn(12, 2, 16), []
    for config in (CONFIG, replace(CONFIG, diagnose_every=0)):
        mine = hidden.clone().requires_grad_()
        taps_of(config).read(mine, tap=3, place=Place(SECOND, 0)).square().sum().backward()
        grads.append(mine.grad)
    assert torch.equal(*grads)


def test_ranks_are_put_together_in_fixed_shapes(monkeypatch):
    """A rank with no tap of its own takes part in the same collectives."""
    shapes = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: shapes.append((tensor.shape, group)))
    taps_of(shard_group="tp").diagnosis.reduce(device=CPU, groups=["dp", "pp"])
    empty, shapes[:] = list(shapes), []
    taps = taps_of(shard_group="tp")
    taps.read(torch.randn(12, 2, 16), tap=7, place=Place(SECOND, 0))
    taps.diagnosis.reduce(device=CPU, groups=["dp", "pp"])
    assert shapes == empty
    assert ((2, 2), "tp") in shapes


def test_context_ranks_hold_the_same_sequences(monkeypatch):
    """Two ranks of one sequence are not two sequences: still no others to compare with."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.mul_(2))
    taps = taps_of(copies=2)
    taps.read(walk(40.0, noise=0.1, batch=1), tap=3, place=Place(SECOND, 0))
    assert taps.diagnosis.reduce(device=CPU, groups=["cp"])[3].clock_share is None


def test_copies_of_a_sequence_count_once(monkeypatch):
    torch.manual_seed(0)
    states, found = walk(40.0, noise=0.5, batch=2), []
    for copies in (1, 2):
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group, n=copies: tensor.mul_(n))
        taps = taps_of(copies=copies)
        taps.read(states, tap=3, place=Place(SECOND, 0))
        found.append(taps.diagnosis.reduce(device=CPU, groups=["cp"])[3].clock_share)
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_the_record_names_the_taps():
    taps = taps_of()
    diagnosed_once = {3: diagnosed(taps, torch.randn(12, 2, 16))}
    record = diagnosis_record(diagnosed_once)
    assert record.keys() == {"stp_effective_rank_by_tap", "stp_clock_share_by_tap", "stp_gradient_share_by_tap"}
    assert record["stp_effective_rank_by_tap"].keys() == {"3"}
    assert math.isfinite(record["stp_gradient_share_by_tap"]["3"])
