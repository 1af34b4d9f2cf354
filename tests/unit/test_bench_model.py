"""What ``bench model`` builds, counts and adds up, and one run of it; how long things take is no test's business."""

import json
from subprocess import CompletedProcess

import pytest
from typer.testing import CliRunner

from megacpp_stp.bench import model
from megacpp_stp.bench.model import Estimate, Row, as_dict, case_of, measure
from megacpp_stp.bench.model_piece import REFUSED
from megacpp_stp.bench.model_recipe import HEAD, Share, alone, chosen, on_one_device, shares
from megacpp_stp.cli.app import run
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan, flops
from megacpp_stp.plan.parameters import count, parts
from megacpp_stp.recipe import list_recipes, load_recipe

PREDICTION = "model.mtp={depths: 2, pattern: AE, loss_coeff: 0.3}"
VARIANTS = [*((name, ()) for name in list_recipes()), ("nam56r-tiny", (PREDICTION,))]


def whole_of(name, overrides=(), **more):
    recipe = load_recipe(name, overrides)
    return on_one_device(recipe, **{"device": "cpu", "backend": "torch", **more})


# --- what is built and counted -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_the_pieces_are_the_whole_model(name, overrides):
    whole, _ = whole_of(name, overrides, sequence=320)
    layout = build_plan(whole, device="cpu").layout
    every = parts(whole, layout)
    found, left_out = shares(whole, layout)
    assert found[-1].piece == HEAD
    assert sum(share.count for share in found[:-1]) == len(layout.layers) + layout.mtp_depths * len(layout.mtp)
    assert sum(share.count * share.flops for share in found) + left_out == flops.total(whole, every).training
    prediction = tuple(part for part in every if part.kind == "mtp")
    assert left_out == flops.total(whole, prediction).training
    parameters = sum(share.count * share.parameters for share in found)
    assert parameters == count(every).total - count(prediction).total
    assert bool(left_out) == bool(overrides)


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
@pytest.mark.parametrize(("device", "backend"), [("cpu", "torch"), ("cuda", None)])
def test_a_layer_alone_is_what_it_is_in_the_model(name, overrides, device, backend):
    whole, _ = whole_of(name, overrides, device=device, backend=backend)
    found, _ = shares(whole, build_plan(whole, device=device).layout)
    for share in found:
        recipe = alone(whole, share.piece)
        plan = build_plan(recipe, device=device)
        (layer,) = plan.layout.layers
        assert plan.world_size == 1 and plan.layout.mtp_depths == 0 and recipe.stp is None
        assert recipe.model.backend == whole.model.backend and recipe.model.hidden_size == whole.model.hidden_size
        if share.piece == HEAD:
            mine = tuple(part for part in parts(recipe, plan.layout) if not part.symbol)
        else:
            assert layer.kind == share.piece
            mine = tuple(part for part in parts(recipe, plan.layout) if part.symbol)
        assert flops.total(recipe, mine).training == share.flops
        assert count(mine).total == share.parameters


def test_recomputation_stays_where_it_has_something_to_compute_again():
    whole, _ = whole_of("nam56r", device="cuda", backend=None)
    modules = {piece: alone(whole, piece).training.recompute.modules for piece in ("mla", "moe", "m2rnn")}
    assert modules == {
        "mla": ("core_attn", "mla_up_proj", "layernorm"),
        "moe": ("core_attn", "moe_act", "layernorm"),
        "m2rnn": ("core_attn", "layernorm"),
    }
    full = load_recipe("nam56r-tiny", ["training.recompute={granularity: full, modules: []}"])
    whole, _ = on_one_device(full, device="cpu")
    assert alone(whole, "dsa").training.recompute == full.training.recompute
    only = load_recipe("nam56r-tiny", ["training.recompute={granularity: selective, modules: [mla_up_proj]}"])
    whole, _ = on_one_device(only, device="cpu")
    assert alone(whole, "mla").training.recompute == only.training.recompute
    assert alone(whole, "moe").training.recompute is None


def test_what_differs_from_the_recipe_is_said():
    recipe = load_recipe("nam56r")
    same, notes = on_one_device(recipe, device="cuda", sequence=4096, micro_batch=2, backend="te")
    assert notes == () and same.model == recipe.model and same.training.recompute == recipe.training.recompute
    _, notes = whole_of("nam56r", sequence=64, micro_batch=1)
    assert notes[:5] == (
        "sequences of 64 tokens, not 4096",
        "micro-batches of 1, not 2",
        "backend torch, not te",
        "experts one at a time, not grouped",
        "no recomputation of layernorm and moe_act, which needs Transformer Engine",
    )


def test_pieces_are_chosen_by_letter_and_by_name():
    whole, _ = whole_of("nam56r-tiny")
    every, _ = shares(whole, build_plan(whole, device="cpu").layout)
    names = [share.piece for share in every]
    assert names == ["mla", "moe", "mamba3", "dsa", "m2rnn", HEAD]
    for wanted, expected in (
        (["A"], ["mla", "dsa"]),
        (["head", "R"], ["m2rnn", HEAD]),
        (["dsa"], ["dsa"]),
        ([], names),
    ):
        assert [share.piece for share in chosen(every, wanted)] == expected


# --- what is made of the times -------------------------------------------------------------------------


def row(piece, seconds, *, number, work):
    share = Share(piece=piece, families=("A",), count=number, flops=work, parameters=3)
    return Row(share=share, tokens=100, seconds=seconds, peak_bytes=7, parameters=3, weight_bytes=6, gradient_bytes=12)


def test_times_add_up():
    case = case_of("nam56r-tiny", device="cpu", sequence=50)
    assert case.tokens == 100
    one, two = row("mla", (0.5, 0.1, 0.2), number=3, work=4 * 10**9), row("moe", (0.4,), number=1, work=10**9)
    assert (one.median, one.in_model, one.tokens_per_second) == pytest.approx((0.2, 0.6, 500))
    assert one.spread == pytest.approx(2.0) and one.tflops == pytest.approx(2.0)
    both = Estimate(case=case, rows=(one, two))
    assert both.seconds == pytest.approx(1.0) and both.tokens_per_second == pytest.approx(100)
    assert both.flops == 13 * 10**9 and both.tflops == pytest.approx(1.3)
    assert both.largest is one
    assert (both.time_share(one), both.flops_share(one)) == pytest.approx((0.6, 12 / 13))
    assert both.coverage == pytest.approx(13 * 10**9 / case.flops)
    told = as_dict(both, {}, "command")
    assert told["model"]["largest"] == "mla" and told["pieces"][0]["share"]["count"] == 3
    assert told["pieces"][1]["time_share"] == pytest.approx(0.4)


def test_all_pieces_are_all_of_the_flops_but_for_prediction():
    case = case_of("nam56r-tiny", [PREDICTION], device="cpu")
    rows = tuple(
        Row(share=share, tokens=1, seconds=(1.0,), peak_bytes=0, parameters=0, weight_bytes=0, gradient_bytes=0)
        for share in case.timed
    )
    assert Estimate(case=case, rows=rows).coverage == pytest.approx(1 - case.left_out / case.flops)
    assert 0 < case.left_out < case.flops


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nam56r-tiny", "--family", "G"], "--family: is no part of this model (got 'G')"),
        (["nam56r-tiny", "--family", "mamba2"], "fix: use one of A, E, M, R, mla, moe, mamba3, dsa, m2rnn, head"),
        (["nam56r", "--sequence", "64"], "--backend: Transformer Engine's modules run on GPUs only (got 'te')"),
        (["nam57"], "RECIPE: unknown recipe"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_starts(capfd, monkeypatch, arguments, said):
    monkeypatch.setattr(model, "_run", None)
    assert run(["bench", "model", *arguments]) == 2
    assert said in capfd.readouterr().err


def test_transformer_engine_and_a_gpu_must_be_there(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        case_of("nam56r-tiny", device="cuda")
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Transformer Engine, which is not installed"):
        case_of("nam56r", device="cuda")


@pytest.mark.parametrize(
    ("status", "stderr", "said"),
    [
        (2, f"noise\n{REFUSED}--x: no\n  fix: y\n", "moe: cannot be built: --x: no\n  fix: y"),
        (1, "Traceback\nRuntimeError: not enough\n", "moe: failed: RuntimeError: not enough"),
        (-9, "", "moe: failed: was ended by signal 9"),
    ],
)
def test_a_piece_that_fails_says_why(monkeypatch, status, stderr, said):
    ended = CompletedProcess([], status, stdout="", stderr=stderr)
    monkeypatch.setattr(model.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(UserError) as raised:
        list(measure(case_of("nam56r-tiny", device="cpu", families=["E"]), repeats=1))
    assert str(raised.value).startswith(said)


# --- one run -------------------------------------------------------------------------------------------


def test_one_run():
    """In bf16: a layer that keeps some parameters in fp32, and the head with its fused loss."""
    from megacpp_stp.cli.bench import app

    settings = "--family R --family head --sequence 32 --repeats 2 --threads 1 --set training.precision=bf16"
    done = CliRunner().invoke(app, ["model", "nam56r-tiny", *settings.split(), "--format", "json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    layer, head = answer["pieces"]
    assert (layer["share"]["piece"], head["share"]["piece"]) == ("m2rnn", HEAD)
    for piece in (layer, head):
        assert piece["parameters"] == piece["share"]["parameters"]
        assert piece["gradient_bytes"] == 4 * piece["parameters"]
        assert len(piece["seconds"]) == 2 and min(piece["seconds"]) > 0 and piece["peak_bytes"] > 0
    # M2RNN keeps A_log and dt_bias of its 4 heads in fp32.
    assert layer["weight_bytes"] == 2 * layer["parameters"] + 2 * 8
    assert head["weight_bytes"] == 2 * head["parameters"]
    assert answer["machine"]["hardware"]["cpu"] and answer["machine"]["packages"]["megatron-core"]
    assert answer["command"].endswith("--repeats 2 --threads 1 --set training.precision=bf16")
    assert answer["model"]["flops_timed"] < 1


@pytest.mark.slow
def test_layers_that_are_computed_again_in_the_backward_pass():
    """Sparse attention then asks for its device in the backward pass only, where a torch function mode may be off."""
    from megacpp_stp.cli.bench import app

    again = "training.recompute={granularity: selective, modules: [core_attn, mla_up_proj]}"
    settings = ["--family", "A", "--sequence", "32", "--repeats", "1", "--threads", "1", "--set", again]
    done = CliRunner().invoke(app, ["model", "nam56r-tiny", *settings, "--format", "json"])
    assert done.exit_code == 0, done.output
    assert [piece["share"]["piece"] for piece in json.loads(done.stdout)["pieces"]] == ["mla", "dsa"]
