"""The arithmetic of ``bench flce``, and one run of it."""

import json

import pytest
from typer.testing import CliRunner

from megacpp_stp.bench.flce import LARGEST_MEMORY, TARGET, Case, Cost, Found
from megacpp_stp.bench.peak import CpuPeak


def found(*, fused_bytes, seconds, tokens=TARGET[0]):
    case = Case(tokens=tokens, hidden=TARGET[1], vocabulary=TARGET[2], precision="bf16")

    def cost(added, times):
        return Cost(peak_bytes=case.gradient_bytes + added, seconds=times, processor_seconds=times)

    return Found(case=case, megatron=cost(2400, (1.0, 2.0, 4.0)), fused=cost(fused_bytes, seconds))


def test_shares_and_targets():
    good = found(fused_bytes=200, seconds=(1.0, 1.0, 4.0))
    assert good.case.gradient_bytes == (4096 + 131072) * 1024 * 2
    assert good.memory == LARGEST_MEMORY and good.time == good.processor_time == 1.0 and good.missed == ()
    bad = found(fused_bytes=201, seconds=(1.1, 2.2, 4.4))
    assert [complaint.split()[1] for complaint in bad.missed] == ["memory", "time"]
    assert found(fused_bytes=201, seconds=(9.0,) * 3, tokens=10).missed == ()


def test_a_peak_is_seen_after_it_is_gone():
    peak = CpuPeak()
    block = bytearray(64 * 2**20)
    for start in range(0, len(block), 4096):
        block[start] = 1
    del block
    assert 60 * 2**20 <= peak.added_bytes() <= 100 * 2**20


@pytest.mark.slow
def test_one_run():
    from megacpp_stp.cli.bench import app

    arguments = "--vocabulary 20000 --tokens 700 --hidden 64 --precision fp32 --rounds 2 --threads 1 --format json"
    done = CliRunner().invoke(app, ["flce", *arguments.split()])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    (case,) = answer["cases"]
    assert case["memory_share"] < 1 / 3 and len(case["fused"]["seconds"]) == 2
    assert answer["missed"] == [] and answer["machine"]["megatron-core"]
