"""What the chunks of sparse attention save: peak memory and time of one whole D layer, beside upstream's own path.

Each side of each case has processes of its own, so that no allocator remembers another one's peak: the layer as the
torch backend builds it (norm, absorbed MLA with its indexer and the indexer's loss, output projection), forward and
backward, once on a short sequence and then as often as asked.

Peak memory is what the pass adds: on a GPU what the allocator hands out, on a CPU the process's resident size, whose
highest value Linux keeps and lets one reset. There it is taken in another process than the time, in which freed
tensors leave the process at once; else it would be what the heap's gaps make of it.

Legend: s sequence, b batch.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

from megacpp_stp.bench.peak import CpuPeak, GpuPeak
from megacpp_stp.bench.world import one_process_world
from megacpp_stp.errors import UserError

Kernel = Literal["upstream", "chunked"]
Loss = Literal["dense", "sparse"]

TARGET_SEQUENCE = 4096
"""The case that the targets are for, with `HEADS` heads and a batch of one."""

HEADS = 32
LARGEST_MEMORY = 1 / 20
LARGEST_TIME: Mapping[str, float] = {"sparse": 0.7, "dense": 1.0}
"""Targets: the chunks' share of upstream's peak memory and, by form of the indexer's loss, of its time; at most."""

_WARM_UP = 64
_UPSTREAM_PEAK = 33
"""Bytes that upstream's path takes at its peak for each head, query and key, measured; to skip what does not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layer's sizes beside those of the recipe nam56r.

    Attributes:
        sequence: s.
        batch: b.
        heads: Attention heads; the indexer's are the recipe's.
        loss: Form of the indexer's loss.
        precision: ``fp32`` or ``bf16``.
        device: ``cpu`` or ``cuda``.
    """

    sequence: int
    batch: int = 1
    heads: int = HEADS
    loss: Loss = "dense"
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def upstream_bytes(self) -> int:
        """About what upstream's path takes."""
        return _UPSTREAM_PEAK * self.heads * self.batch * self.sequence**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one side takes for forward and backward.

    Attributes:
        seconds: One a round.
        peak_bytes: The highest of the rounds.
    """

    seconds: tuple[float, ...]
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One case.

    Attributes:
        case: Its sizes.
        chunked: The chunks.
        upstream: None where it does not fit.
    """

    case: Case
    chunked: Cost
    upstream: Cost | None

    @property
    def memory(self) -> float | None:
        """The chunks' share of upstream's peak."""
        return self.chunked.peak_bytes / self.upstream.peak_bytes if self.upstream else None

    @property
    def time(self) -> float | None:
        """The chunks' share of upstream's time: of the medians."""
        return median(self.chunked.seconds) / median(self.upstream.seconds) if self.upstream else None

    @property
    def within_targets(self) -> bool | None:
        """Whether both targets are met; None where there are none, or upstream does not fit."""
        case = self.case
        targeted = (case.sequence, case.batch, case.heads) == (TARGET_SEQUENCE, 1, HEADS)
        if not targeted or self.memory is None or self.time is None:
            return None
        return self.memory <= LARGEST_MEMORY and self.time <= LARGEST_TIME[case.loss]

    def as_text(self) -> str:
        """On one line."""
        case, mine, other = self.case, self.chunked, self.upstream
        start = f"s {case.sequence}, b {case.batch}, {case.heads} heads, {case.precision}, {case.loss} loss: "
        text = f"{start}{median(mine.seconds):.2f} s, {mine.peak_bytes / 2**20:.0f} MiB"
        if other is None:
            return f"{text}; upstream needs about {case.upstream_bytes / 2**30:.0f} GiB, which is not there"
        text += f"; upstream {median(other.seconds):.2f} s, {other.peak_bytes / 2**20:.0f} MiB"
        text += f"; time x {self.time:.3f}, memory 1/{other.peak_bytes / mine.peak_bytes:.1f}"
        return text + {None: "", True: "; targets met", False: "; target MISSED"}[self.within_targets]


def machine(device: str) -> dict[str, str | int]:
    """What it runs on: no host name, no path."""
    import torch

    versions = {"torch": torch.__version__, "megatron-core": version("megatron-core")}
    if device == "cuda":
        return {"gpu": torch.cuda.get_device_name(), **versions}
    return {"cpu": _cpu_name(), "threads": torch.get_num_threads(), **versions}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def measure(cases: Sequence[Case], *, rounds: int) -> Iterator[Found]:
    """Measure one case after the other, each side in a process of its own.

    Args:
        cases: What to measure.
        rounds: Counted passes a side.

    Raises:
        UserError: A side that fails.
    """
    for case in cases:
        fits = case.upstream_bytes < _free_bytes(case.device)
        upstream = _run(case, "upstream", rounds) if fits else None
        yield Found(case=case, chunked=_run(case, "chunked", rounds), upstream=upstream)


def _run(case: Case, kernel: Kernel, rounds: int) -> Cost:
    """Time with the allocator as it is; memory with one that gives back at once what is free, on a CPU."""
    times = _child(case, kernel, rounds, {})
    memory = _child(case, kernel, 1, {"MALLOC_MMAP_THRESHOLD_": "131072"}) if case.device == "cpu" else times
    return Cost(seconds=tuple(times["seconds"]), peak_bytes=memory["peak_bytes"])


def _child(case: Case, kernel: Kernel, rounds: int, environment: Mapping[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, json.dumps({**asdict(case), "kernel": kernel, "rounds": rounds})]
    wanted = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **wanted})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"failed: {reason}", field=f"{kernel}, {case}", fix="measure a shorter sequence")
    return json.loads(done.stdout.splitlines()[-1])


def _free_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    text = Path("/proc/meminfo").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable:"))


# --- in the process of one side --------------------------------------------------------------------


def main(arguments: str) -> None:
    """Measure one side and print what was found as one line of JSON."""
    settings = json.loads(arguments)
    kernel, rounds = settings.pop("kernel"), settings.pop("rounds")
    case = Case(**settings)
    with one_process_world(case.device):
        layer = _layer(case, kernel)
        _pass(layer, case, _WARM_UP)
        found = [_pass(layer, case, case.sequence) for _ in range(rounds)]
    print(json.dumps({"seconds": [one[0] for one in found], "peak_bytes": max(one[1] for one in found)}))


def _layer(case: Case, kernel: Kernel) -> Any:
    """The D layer of nam56r with the case's heads, as the torch backend builds it, its gradients there."""
    import torch
    from megatron.core.transformer.spec_utils import build_module

    from megacpp_stp.model.specs import nam_torch_stack_spec
    from megacpp_stp.patches.registry import Registry

    config = _config(case)
    if kernel == "chunked":
        sparse = {"kernel": "chunked"}
        plan = {
            "patches": ["dsa-memory"],
            "layout": {"layers": [{"kind": "dsa"}]},
            "recipe": {"model": {"families": {"A": {"sparse": sparse}}}},
        }
        Registry.load().activate(plan).configure(config)
    torch.manual_seed(1)
    layer = build_module(nam_torch_stack_spec.submodules.dsa_layer, config=config, layer_number=1)
    layer = layer.to(device=case.device, dtype=config.params_dtype).train()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return layer


def _config(case: Case) -> Any:
    import torch
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megacpp_stp.plan.layers import mla_of, sparse_of
    from megacpp_stp.recipe import load_recipe

    model = load_recipe("nam56r").model
    block, sparse = mla_of(model), sparse_of(model)
    return MLATransformerConfig(
        num_layers=1,
        hidden_size=model.hidden_size,
        num_attention_heads=case.heads,
        q_lora_rank=block.q_lora_rank,
        kv_lora_rank=block.kv_lora_rank,
        qk_head_dim=block.qk_head_dim,
        qk_pos_emb_head_dim=block.qk_pos_emb_head_dim,
        v_head_dim=block.v_head_dim,
        rope_type="rope",
        rotary_base=model.rope.base,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32 if case.precision == "fp32" else torch.bfloat16,
        bf16=case.precision == "bf16",
        use_cpu_initialization=case.device == "cpu",
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        experimental_attention_variant="dsa",
        dsa_indexer_n_heads=sparse.indexer_heads,
        dsa_indexer_head_dim=sparse.indexer_head_dim,
        dsa_indexer_topk=sparse.topk,
        dsa_indexer_loss_coeff=sparse.loss_coeff,
        dsa_indexer_use_sparse_loss=case.loss == "sparse",
        dsa_indexer_rotate_activation=False,
    )


def _pass(layer: Any, case: Case, s: int) -> tuple[float, int]:
    """Seconds and added bytes of one forward and backward."""
    import torch

    dtype, width = layer.config.params_dtype, layer.config.hidden_size
    random = torch.Generator().manual_seed(2)
    hidden, cotangent = (
        torch.randn(s, case.batch, width, generator=random).to(device=case.device, dtype=dtype) for _ in range(2)
    )
    hidden.requires_grad_()
    peak = GpuPeak() if case.device == "cuda" else CpuPeak()
    start = time.perf_counter()
    output, _ = layer(hidden, attention_mask=None)
    torch.autograd.backward(output, cotangent)
    added = peak.added_bytes()  # waits for the GPU
    return time.perf_counter() - start, added


if __name__ == "__main__":
    main(sys.argv[1])
