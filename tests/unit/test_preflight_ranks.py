"""Ranks compare themselves over torch's store: who differs, or does not come, is named on every rank."""

import ast
import json
import sys
import threading
import time
from datetime import timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

import megacpp_stp
from megacpp_stp.errors import UserError
from megacpp_stp.plan.health import meeting_seconds
from megacpp_stp.preflight.machine import PACKAGES
from megacpp_stp.preflight.ranks import clock_skew, clock_warning, device_warning, disagreement, missing, spans
from megacpp_stp.training import facts as training_facts
from megacpp_stp.training import preflight_ranks
from megacpp_stp.training.preflight_ranks import Met, meet_ranks, open_store, own_facts, placement
from megacpp_stp.training.watchdog import Limits

NEEDED = sorted({*PACKAGES} - {"torch", "apex", "triton"})  # what preflight asks for, where a recipe needs it
SAME = {"Python": "3.12.4", "torch": "2.15.0", "plan": "a" * 64, "patches": "b" * 64, "data": "c" * 64}


def facts(node="n0", device="cpu", **same):
    return {"node": node, "local_rank": 0, "device": device, "same": {**SAME, **same}}


def test_the_odd_one_out_is_named_against_the_rest():
    ranks = [facts(), facts(), facts(), facts("b", torch="2.12.0")]
    error = disagreement(ranks)
    assert str(error).startswith(
        "ranks: rank 3 on node b has torch 2.12.0, ranks 0-2 have 2.15.0\n  fix: install the same"
    )
    assert disagreement([facts(), facts("b")]) is None


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ([facts("b", torch="2.12"), facts(), facts()], "rank 0 on node b has torch 2.12, ranks 1-2 have 2.15.0"),
        ([facts(), facts("b", plan="f" * 64)], "rank 1 on node b has plan ffffffffffff..., rank 0 has aaaaaaaaaaaa..."),
        ([facts()] * 2 + [facts("b", patches=None)] * 2, "ranks 2-3 on node b have patches none, ranks 0-1 have"),
        ([facts()] * 3 + [facts("b", driver="570.86")], "rank 3 on node b has driver 570.86, ranks 0-2 have none"),
        ([facts(apex="0.1 (NVIDIA's)"), facts("b")], "rank 1 on node b has apex none, rank 0 has 0.1 (NVIDIA's)"),
        ([facts()] * 5 + [facts("b", NCCL="2.27")], "rank 5 on node b has NCCL 2.27, ranks 0-4 have none"),
        (
            [facts()] * 3 + [facts("b", torch="1"), facts("c", torch="1")],
            "ranks 3-4 on 2 nodes, the first node b have torch 1",
        ),
    ],
)
def test_what_differs_is_said_in_one_line(ranks, says):
    assert says in disagreement(ranks).problem


def test_all_differences_are_listed_and_the_fix_is_the_first_ones():
    error = disagreement([facts(), facts(), facts(Python="3.13.0", data="0" * 64)])
    assert error.problem == "rank 2 on node n0 has Python 3.13.0, ranks 0-1 have 3.12.4"
    assert "one container image" in error.fix
    assert "also: rank 2 on node n0 has data 000000000000..., ranks 0-1 have cccccccccccc..." in error.fix
    assert "prepared dataset" in disagreement([facts(), facts(), facts(data="0" * 64)]).fix


def test_ranks_in_words():
    assert [spans(ranks) for ranks in ([3], [0, 1, 2], [5, 0, 1, 7])] == ["rank 3", "ranks 0-2", "ranks 0-1, 5, 7"]
    assert missing([1, 2], world_size=8, seconds=300).problem.startswith("ranks 1-2 of 8 have not come")


def test_clocks_are_off_by_what_no_delay_explains():
    readings = {
        "in step": [(100.0, 100.5, 101.0)],
        "slow to answer": [(100.0, 190.0, 191.0)],
        "behind": [(100.0, 39.0, 101.0), (100.0, 40.0, 101.0)],
        "ahead": [(100.0, 171.0, 101.0)],
        "alone": [],
    }
    skew = clock_skew(readings)
    assert skew == {"in step": 0, "slow to answer": 0, "behind": 61.0, "ahead": 70.0, "alone": 0}
    warning = clock_warning(skew)
    assert "node ahead by 70 s, node behind by 61 s" in warning and "chronyd" in warning
    assert clock_warning({"a": 4.9}) is None


def test_unlike_gpus_are_said():
    assert device_warning([facts(device="H200")] * 2) is None
    text = device_warning([facts(device="H200"), facts(device="H200"), facts(device="H100")])
    assert "H200 (ranks 0-1), H100 (rank 2)" in text


# --- what a rank says of itself ---


def own(monkeypatch, versions, device="cpu"):
    """The facts of this rank, as if these packages, and no others, were installed."""

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(training_facts, "version", version)
    monkeypatch.setattr(training_facts, "apex_kind", lambda: "NVIDIA's" if "apex" in versions else None)
    monkeypatch.setattr(preflight_ranks, "data_digest", lambda path: "c" * 64)
    plan = {"digest": "a" * 64, "recipe": {"data": {"path": "data"}}}
    return own_facts(plan, [], device=device)


@pytest.mark.parametrize("package", [*NEEDED, "flash-attn", "flash-attn-3", "apex", "triton", "pytorch-triton"])
def test_a_rank_without_a_package_or_with_another_version_is_named(monkeypatch, package):
    """Of each that a layer, a kernel, Megatron or Transformer Engine may call."""
    base = own(monkeypatch, {"torch": "2.15.0"})
    one, other = (own(monkeypatch, {"torch": "2.15.0", package: version}) for version in ("1.0", "1.1"))
    with_kind = {"apex": "1.1 (NVIDIA's)"}.get(package, "1.1")
    error = disagreement([one, one, other])
    assert f"rank 2 on node {one['node']} has {package} {with_kind}, ranks 0-1 have 1.0" in error.problem
    assert f"{package} none" in disagreement([one, one, base]).problem


def test_every_package_that_we_import_is_compared():
    """But for those that only read recipes and print."""
    imported = set()
    for path in (Path(megacpp_stp.__file__).parent).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            imported |= {name.partition(".")[0] for name in names}
    ours = {"megacpp_stp", "megatron", "pydantic", "yaml", "rich", "typer", "click", "packaging", "tensorboard"}
    distributions = {"cut_cross_entropy": "cut-cross-entropy", "mamba_ssm": "mamba-ssm", "flash_mla": "flash-mla"}
    distributions |= {"transformer_engine": "transformer-engine", "xma": "accelerated-model-architectures"}
    names = {distributions.get(name, name) for name in imported - ours - sys.stdlib_module_names}
    assert names <= set(training_facts._PACKAGES), names - set(training_facts._PACKAGES)
    assert {"torch", "triton"} <= names


def test_on_gpus_the_driver_cuda_and_their_libraries_are_compared(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"H200 {index}")
    monkeypatch.setattr("torch.version.cuda", "13.2")
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 92100)
    monkeypatch.setattr(preflight_ranks, "nccl_version", lambda: "2.28.9")
    monkeypatch.setattr(preflight_ranks, "driver_version", lambda: "590.10")
    here = own(monkeypatch, {}, device="cuda")
    assert here["device"] == "H200 1"
    told = {"driver": "590.10", "CUDA": "13.2", "NCCL": "2.28.9", "cuDNN": "92100"}
    assert {name: here["same"].get(name) for name in told} == told
    monkeypatch.setattr(preflight_ranks, "driver_version", lambda: "570.86")
    error = disagreement([here, here, own(monkeypatch, {}, device="cuda")])
    assert "has driver 570.86, ranks 0-1 have 590.10" in error.problem and "container" in error.fix


def test_ranks_wait_for_each_other_as_long_as_the_recipe_lets_them():
    """Less than until the watchdog takes a rank that waits for one that hangs."""
    for minutes in (0.05, 10, 90):
        assert meeting_seconds(minutes) + preflight_ranks._GRACE_S < Limits.of(minutes).slow
    assert (meeting_seconds(10), meeting_seconds(90)) == (600, 1800)


def test_the_limit_of_the_recipe_is_the_one_that_is_used(monkeypatch):
    asked = {}
    monkeypatch.setattr(preflight_ranks, "own_facts", lambda plan, patches, device: facts())
    monkeypatch.setattr(preflight_ranks, "open_store", lambda **settings: asked.update(opened=settings["timeout_s"]))
    monkeypatch.setattr(preflight_ranks, "meet_ranks", lambda facts, **settings: asked.update(settings))
    plan = {"device": "cpu", "world_size": 2, "recipe": {"training": {"health": {"hang_minutes": 60}}}}
    preflight_ranks.compare_ranks(plan, [], rank=0)
    assert (asked["timeout_s"], asked["opened"]) == (1200, 1200)


# --- the meeting ---


@pytest.fixture
def server():
    """Torchrun's store, as its agent keeps it."""
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def meet(server, by_rank, *, timeout_s=20.0, absent=()):
    """Each rank in a thread with a connection of its own; what each returned or raised."""
    outcomes = {}

    def run(rank):
        client = TCPStore("localhost", server.port, wait_for_workers=False, timeout=timedelta(seconds=20))
        store = PrefixStore("megacpp-stp/0", client)
        try:
            outcomes[rank] = meet_ranks(
                by_rank[rank], rank=rank, world_size=len(by_rank), store=store, timeout_s=timeout_s
            )
        except UserError as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(by_rank)) if rank not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return outcomes


def test_ranks_that_agree_go_on_and_rank_0_knows_them(server):
    ranks = [facts("n0"), facts("n0"), facts("n1"), facts("n1")]
    outcomes = meet(server, ranks)
    assert outcomes[0].by_rank == tuple(ranks)
    assert outcomes[0].clock_skew_s == {"n0": 0.0, "n1": 0.0}
    assert [outcomes[rank].by_rank for rank in (1, 2, 3)] == [(), (), ()]


@pytest.mark.parametrize("odd", [0, 2])
def test_every_rank_raises_the_same_when_one_differs(server, odd):
    ranks = [facts("b", torch="2.12.0") if rank == odd else facts() for rank in range(3)]
    outcomes = meet(server, ranks)
    texts = {str(outcome) for outcome in outcomes.values()}
    (text,) = texts
    assert f"rank {odd} on node b has torch 2.12.0" in text
    assert len(outcomes) == 3


@pytest.mark.parametrize(("absent", "named"), [((2,), "rank 2 of 4 has"), ((1, 2), "ranks 1-2 of 4 have")])
def test_a_rank_that_does_not_come_is_named_by_all_others(server, monkeypatch, absent, named):
    monkeypatch.setattr(preflight_ranks, "_GRACE_S", 5.0)
    outcomes = meet(server, [facts()] * 4, timeout_s=0.4, absent=absent)
    texts = {str(outcome) for outcome in outcomes.values()}
    assert len(outcomes) == 4 - len(absent) and len(texts) == 1
    assert named in texts.pop()


def test_a_first_rank_that_does_not_come_is_named_too(server, monkeypatch):
    monkeypatch.setattr(preflight_ranks, "_GRACE_S", 0.1)
    outcomes = meet(server, [facts()] * 3, timeout_s=0.4, absent=(0,))
    assert all("rank 0 of 3 has not come" in str(outcome) for outcome in outcomes.values())


def test_a_clock_that_is_off_is_a_warning(monkeypatch, capsys):
    """Rank 1 answers with a clock of its own."""
    store = HashStore()
    ranks = [facts("n0"), facts("n1")]
    store.set("facts/1", json.dumps(ranks[1]))
    store.set("clock/1", repr(time.time() - 3600))
    met = meet_ranks(ranks[0], rank=0, world_size=2, store=store, timeout_s=20.0)
    assert met.clock_skew_s["n1"] == pytest.approx(3600, abs=5)
    assert "node n1 by 3600 s" in capsys.readouterr().err


def test_a_receipt_gets_places_without_host_names():
    ranks = (facts("secret-a", "H200"), facts("secret-a", "H200"), facts("secret-b", "H200"))
    found = placement(Met(by_rank=ranks, clock_skew_s={"secret-a": 0.0, "secret-b": 61.23456}))
    assert found == {
        "nodes": [
            {"ranks": [0, 1], "devices": ["H200", "H200"], "clock_skew_s": 0.0},
            {"ranks": [2], "devices": ["H200"], "clock_skew_s": 61.235},
        ]
    }
    assert "secret" not in json.dumps(found)


# --- the store ---


def test_the_store_is_torchruns_and_its_keys_are_our_own(server, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    open_store(rank=0, timeout_s=20.0).set("facts/0", "x")
    assert server.get("megacpp-stp/2/facts/0") == b"x"
    assert open_store(rank=1, timeout_s=20.0).get("facts/0") == b"x"


def test_without_torchruns_store_rank_0_opens_one_that_megatron_can_share(server, monkeypatch):
    from torch.distributed import rendezvous

    port = TCPStore("localhost", 0, is_master=True, wait_for_workers=False).port  # free once that is gone
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", str(port)), ("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    store = open_store(rank=0, timeout_s=20.0)
    assert open_store(rank=1, timeout_s=20.0).check(["facts/0"]) is False
    store.set("facts/0", "x")
    theirs, _, _ = next(rendezvous("env://"))
    assert theirs.get("megacpp-stp/0/facts/0") == b"x"


def test_a_process_of_nobody_is_told_so(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="no rank of torchrun"):
        open_store(rank=0, timeout_s=20.0)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match="rank 0 cannot reach the store"):
        open_store(rank=0, timeout_s=0.5)  # it is torchrun's to open one, not the first rank's


def test_the_others_wait_longer_than_rank_0_whose_word_names_who_is_missing(monkeypatch):
    asked = {}

    def wait(store, key, seconds):
        asked[key] = seconds
        return "null"

    monkeypatch.setattr(preflight_ranks, "_wait", wait)
    meet_ranks(facts(), rank=1, world_size=2, store=SimpleNamespace(set=lambda *pair: None), timeout_s=20.0)
    assert asked == {"answer": 35.0}
