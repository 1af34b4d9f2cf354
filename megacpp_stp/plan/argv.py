"""A recipe as Megatron arguments, each with the recipe field that asked for it.

Nothing is emitted that the recipe does not say, and nothing that differs between two machines. What only a run
knows (its directory, the plan file) is added by the launcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megacpp_stp.plan.health import health_options
from megacpp_stp.plan.lowering import HybridPlan
from megacpp_stp.plan.passthrough import passed_through
from megacpp_stp.plan.precision import fp8_options
from megacpp_stp.recipe.blocks import Attention, M2rnn, Mamba2, Mamba3, Mla
from megacpp_stp.recipe.schema import Recipe

_SPECS = {
    "torch": ("megacpp_stp.model.specs", "nam_torch_stack_spec"),
    "te": ("megacpp_stp.model.specs", "nam_te_stack_spec"),
}
_ACTIVATIONS = {"squared-relu": "--squared-relu", "swiglu": "--swiglu", "gelu": None}
_LAYERS = "model.pattern, model.depth, model.families"  # what says which layer is which
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True, slots=True)
class Argument:
    """One option with its values.

    Attributes:
        tokens: The option and its values, as separate process arguments.
        field: Recipe path that asked for it, or several, comma separated; in parentheses a reason beyond the recipe.
    """

    tokens: tuple[str, ...]
    field: str


def emit(recipe: Recipe, layout: HybridPlan, *, device: str) -> tuple[Argument, ...]:
    """Every argument of the run, in a fixed order.

    Args:
        recipe: The resolved recipe.
        layout: Its lowering.
        device: ``cpu`` or ``cuda``.
    """
    sections = (
        _model(recipe, layout),
        _attention(recipe, layout),
        _mamba(recipe),
        _experts(recipe),
        _backend(recipe),
        _parallel(recipe, device),
        _training(recipe, layout),
        _optimizer(recipe),
        _data(recipe),
        _nam(recipe, layout, device),
    )
    said = tuple(argument for section in sections for argument in section)
    return (*said, *(Argument(tokens, field) for tokens, field in passed_through(recipe)))


def _arg(option: str, value: object, field: str) -> Argument:
    text = repr(value) if isinstance(value, float) else str(value)
    if text.startswith("-"):  # a pattern may begin with an MLP; argparse would take it for an option
        return Argument((f"{option}={text}",), field)
    return Argument((option, text), field)


def _flag(option: str, field: str) -> Argument:
    return Argument((option,), field)


def _model(recipe: Recipe, layout: HybridPlan) -> Iterator[Argument]:
    model = recipe.model
    yield _arg(
        "--hybrid-layer-pattern",
        layout.megatron_pattern,
        f"{_LAYERS}, model.mtp, parallel",
    )
    yield Argument(("--spec", *_SPECS[model.backend]), "model.backend")
    yield _arg("--hidden-size", model.hidden_size, "model.hidden_size")
    yield _arg("--ffn-hidden-size", model.ffn_hidden_size, "model.ffn_hidden_size")
    yield _arg("--num-attention-heads", model.heads, "model.heads")
    if option := _ACTIVATIONS[model.activation]:
        yield _flag(option, "model.activation")
    yield _arg("--normalization", "RMSNorm", "model (NAM family)")
    yield _arg("--norm-epsilon", model.norm_epsilon, "model.norm_epsilon")
    yield _arg("--init-method-std", model.init_std, "model.init_std")
    yield _flag("--disable-bias-linear", "model (NAM family)")
    yield _arg("--attention-dropout", 0.0, "model (NAM family)")
    yield _arg("--hidden-dropout", 0.0, "model (NAM family)")
    if not model.tie_embeddings:
        yield _flag("--untie-embeddings-and-output-weights", "model.tie_embeddings")
    yield _arg("--position-embedding-type", "rope", "model.rope")
    yield _arg("--rotary-base", model.rope.base, "model.rope.base")
    yield _arg("--max-position-embeddings", recipe.training.sequence_length, "training.sequence_length")
    if model.mtp:
        yield _arg("--mtp-num-layers", model.mtp.depths, "model.mtp.depths")
        yield _arg("--mtp-loss-scaling-factor", model.mtp.loss_coeff, "model.mtp.loss_coeff")


def _attention(recipe: Recipe, layout: HybridPlan) -> Iterator[Argument]:
    block = recipe.model.families.A
    if isinstance(block, Mla):
        yield _flag("--multi-latent-attention", "model.families.A.block")
        yield _flag("--qk-layernorm", "model.families.A.block")  # norms on the query and key/value latents
        for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
            yield _arg("--" + name.replace("_", "-"), getattr(block, name), f"model.families.A.{name}")
        if layout.numbers("dsa"):
            yield from _sparse(recipe, block)
    elif isinstance(block, Attention):
        yield _flag("--group-query-attention", "model.families.A.block")
        yield _arg("--num-query-groups", block.kv_groups, "model.families.A.kv_groups")
        yield _arg("--kv-channels", block.head_dim, "model.families.A.head_dim")


def _sparse(recipe: Recipe, block: Mla) -> Iterator[Argument]:
    sparse, field = block.sparse, "model.families.A.sparse"
    assert sparse is not None
    yield _arg("--experimental-attention-variant", "dsa", field)
    yield _arg("--dsa-indexer-n-heads", sparse.indexer_heads, f"{field}.indexer_heads")
    yield _arg("--dsa-indexer-head-dim", sparse.indexer_head_dim, f"{field}.indexer_head_dim")
    yield _arg("--dsa-indexer-topk", sparse.topk, f"{field}.topk")
    if sparse.loss == "sparse":
        yield _flag("--dsa-indexer-use-sparse-loss", f"{field}.loss")
    yield _arg("--dsa-indexer-loss-coeff", sparse.loss_coeff, f"{field}.loss_coeff")
    # A rotation of query and key alike changes no score; it would need bf16 and a package for it.
    yield _flag("--no-dsa-indexer-rotate-activation", f"{field} (NAM family)")
    if recipe.parallel.context > 1:
        yield _arg("--cp-comm-type", "all_gather", f"{field}, parallel.context (sparse attention has no other)")


def _mamba(recipe: Recipe) -> Iterator[Argument]:
    block, field = recipe.model.families.M, "model.families.M"
    if isinstance(block, Mamba3 | Mamba2):
        yield _arg("--mamba-num-heads", block.heads, f"{field}.heads")
        yield _arg("--mamba-head-dim", block.head_dim, f"{field}.head_dim")
        yield _arg("--mamba-state-dim", block.state_dim, f"{field}.state_dim")
        yield _arg("--mamba-num-groups", block.groups, f"{field}.groups")


def _experts(recipe: Recipe) -> Iterator[Argument]:
    block = recipe.model.families.E
    if block is None:
        return
    field = "model.families.E"
    yield _arg("--num-experts", block.experts, f"{field}.experts")
    yield _arg("--moe-router-topk", block.topk, f"{field}.topk")
    yield _arg("--moe-ffn-hidden-size", block.ffn_hidden_size, f"{field}.ffn_hidden_size")
    if block.shared_ffn_hidden_size:
        yield _arg(
            "--moe-shared-expert-intermediate-size",
            block.shared_ffn_hidden_size,
            f"{field}.shared_ffn_hidden_size",
        )
    router = block.router
    yield _arg("--moe-router-score-function", router.score_function, f"{field}.router.score_function")
    if router.expert_bias:
        yield _flag("--moe-router-enable-expert-bias", f"{field}.router.expert_bias")
    balancing = "aux_loss" if router.aux_loss_coeff else "none"
    yield _arg("--moe-router-load-balancing-type", balancing, f"{field}.router.aux_loss_coeff")
    if router.aux_loss_coeff:
        yield _arg("--moe-aux-loss-coeff", router.aux_loss_coeff, f"{field}.router.aux_loss_coeff")
    if router.z_loss_coeff:
        yield _arg("--moe-z-loss-coeff", router.z_loss_coeff, f"{field}.router.z_loss_coeff")
    yield _arg("--moe-router-dtype", "fp32", f"{field} (NAM family)")
    yield _arg("--moe-token-dispatcher-type", block.dispatcher, f"{field}.dispatcher")
    if block.grouped_gemm:
        yield _flag("--moe-grouped-gemm", f"{field}.grouped_gemm")


def _backend(recipe: Recipe) -> Iterator[Argument]:
    field = "model.backend"
    if recipe.model.backend == "te":
        yield _arg("--transformer-impl", "transformer_engine", field)
        # Both need kernels of apex, or are refused by upstream beside MLA.
        yield _flag("--no-gradient-accumulation-fusion", field)
        yield _flag("--no-rope-fusion", field)
        return
    yield _arg("--transformer-impl", "local", field)
    # Fusions that need Transformer Engine or apex kernels; the torch backend has neither.
    for option in (
        "--no-persist-layer-norm",
        "--no-masked-softmax-fusion",
        "--no-bias-dropout-fusion",
        "--no-bias-swiglu-fusion",
        "--no-bias-gelu-fusion",
        "--no-rope-fusion",
        "--no-gradient-accumulation-fusion",
    ):
        yield _flag(option, field)
    # The same initial weights on every device.
    yield _flag("--use-cpu-initialization", field)


def _parallel(recipe: Recipe, device: str) -> Iterator[Argument]:
    parallel = recipe.parallel
    yield _arg("--tensor-model-parallel-size", parallel.tensor, "parallel.tensor")
    yield _arg("--pipeline-model-parallel-size", parallel.pipeline, "parallel.pipeline")
    yield _arg("--context-parallel-size", parallel.context, "parallel.context")
    yield _arg("--expert-model-parallel-size", parallel.expert, "parallel.expert")
    if parallel.sequence_parallel:
        yield _flag("--sequence-parallel", "parallel.sequence_parallel")
    yield _arg("--distributed-backend", _BACKENDS[device], "--device")


def _training(recipe: Recipe, layout: HybridPlan) -> Iterator[Argument]:
    training = recipe.training
    yield _arg("--seq-length", training.sequence_length, "training.sequence_length")
    yield _arg("--micro-batch-size", training.micro_batch_size, "training.micro_batch_size")
    yield _arg("--global-batch-size", training.global_batch_size, "training.global_batch_size")
    yield _arg("--train-iters", training.iterations, "training.iterations")
    yield _arg("--seed", training.seed, "training.seed")
    if training.precision == "bf16":
        yield _flag("--bf16", "training.precision")
    if training.precision == "fp16":
        yield _flag("--fp16", "training.precision")
        # As upstream itself decides for bf16.
        yield _flag("--accumulate-allreduce-grads-in-fp32", "training.precision")
    if scale := training.loss_scale:
        for option, name in (
            ("--initial-loss-scale", "initial"),
            ("--min-loss-scale", "minimum"),
            ("--loss-scale-window", "window"),
            ("--hysteresis", "hysteresis"),
        ):
            yield _arg(option, getattr(scale, name), f"training.loss_scale.{name}")
    yield from (Argument(tokens, field) for tokens, field in fp8_options(recipe, layout))
    # Upstream's default repeats a step whose loss is not finite, then wants to save and move to another GPU.
    # Here what is not finite ends the run, or the step is left out.
    yield _arg("--rerun-mode", "disabled", "training.health.nonfinite")
    yield from (Argument(tokens, field) for tokens, field in health_options(recipe))
    yield _arg("--log-interval", training.log_interval, "training.log_interval")
    yield _arg("--eval-interval", training.eval_interval, "training.eval_interval")
    yield _arg("--eval-iters", training.eval_iterations, "training.eval_iterations")
    if recompute := training.recompute:
        yield _arg("--recompute-granularity", recompute.granularity, "training.recompute.granularity")
        if recompute.granularity == "full":
            yield _arg("--recompute-method", "uniform", "training.recompute.granularity")
            yield _arg("--recompute-num-layers", 1, "training.recompute.granularity")
        else:
            yield Argument(("--recompute-modules", *recompute.modules), "training.recompute.modules")
    yield from _checkpoint(recipe)


def _checkpoint(recipe: Recipe) -> Iterator[Argument]:
    """How a run saves itself; where, only the launcher knows."""
    checkpoint, field = recipe.training.checkpoint, "training.checkpoint"
    if checkpoint is None:
        return
    yield _arg("--save-interval", checkpoint.interval, f"{field}.interval")
    if checkpoint.keep_every is not None:
        yield _arg("--save-retain-interval", checkpoint.keep_every, f"{field}.keep_every")
    yield _arg("--ckpt-format", "torch_dist", field)
    if recipe.optimizer.distributed:
        # Upstream's other form cannot be loaded where fp32 parameters have optimizer groups of their own.
        yield _flag("--dist-ckpt-optim-fully-reshardable", f"{field}, optimizer.distributed")


def _optimizer(recipe: Recipe) -> Iterator[Argument]:
    optimizer = recipe.optimizer
    yield _arg("--lr", optimizer.lr, "optimizer.lr")
    yield _arg("--min-lr", optimizer.min_lr, "optimizer.min_lr")
    yield _arg("--lr-decay-style", optimizer.decay, "optimizer.decay")
    yield _arg("--lr-decay-iters", recipe.training.iterations, "training.iterations")
    yield _arg("--lr-warmup-iters", optimizer.warmup_iterations, "optimizer.warmup_iterations")
    yield _arg("--weight-decay", optimizer.weight_decay, "optimizer.weight_decay")
    yield _arg("--adam-beta1", optimizer.beta1, "optimizer.beta1")
    yield _arg("--adam-beta2", optimizer.beta2, "optimizer.beta2")
    yield _arg("--adam-eps", optimizer.epsilon, "optimizer.epsilon")
    yield _arg("--clip-grad", optimizer.clip_grad, "optimizer.clip_grad")
    if optimizer.distributed:
        yield _flag("--use-distributed-optimizer", "optimizer.distributed")
    if optimizer.overlap_grad_reduce:
        yield _flag("--overlap-grad-reduce", "optimizer.overlap_grad_reduce")
    if optimizer.overlap_param_gather:
        yield _flag("--overlap-param-gather", "optimizer.overlap_param_gather")


def _data(recipe: Recipe) -> Iterator[Argument]:
    path = recipe.data.path.rstrip("/")
    yield _arg("--tokenizer-type", "HuggingFaceTokenizer", "data.path")
    yield _arg("--tokenizer-model", f"{path}/tokenizer", "data.path")
    yield _arg("--train-data-path", f"{path}/train", "data.path")
    yield _arg("--valid-data-path", f"{path}/valid", "data.path")
    yield _arg("--num-workers", recipe.data.workers, "data.workers")
    # Attention is causal inside the mixers; a dense mask would be [b, 1, s, s] for nothing.
    yield _flag("--no-create-attention-mask-in-dataloader", "data.path")


def _nam(recipe: Recipe, layout: HybridPlan, device: str) -> Iterator[Argument]:
    """Our own argument group, see `megacpp_stp.training.arguments`."""
    yield _arg("--nam-device", device, "--device")
    for family, numbers in layout.stand_ins().items():
        spec = getattr(recipe.model.families, family)
        where = _numbers(numbers)
        yield _arg("--nam-stand-in", f"{family}:{spec.instead_of}={spec.runs}@{where}", _LAYERS)
    yield from _slots(recipe, layout)
    if fused := recipe.training.fused_cross_entropy:
        yield _arg("--nam-fused-cross-entropy", fused, "training.fused_cross_entropy")
    stp = recipe.stp
    if stp is None:
        return
    yield _arg("--nam-stp-objective", stp.objective, "stp.objective")
    yield _arg("--nam-stp-weight", stp.weight, "stp.weight")
    yield _arg("--nam-stp-n-spans", stp.n_spans, "stp.n_spans")
    if stp.max_span is not None:
        yield _arg("--nam-stp-max-span", stp.max_span, "stp.max_span")
    if stp.within_documents:
        yield _flag("--nam-stp-within-documents", "stp.within_documents")
    yield _arg("--nam-stp-start-step", stp.start_step, "stp.start_step")
    yield _arg("--nam-stp-ramp-steps", stp.ramp_steps, "stp.ramp_steps")
    yield _arg("--nam-stp-taps", ",".join(layout.tap_names), f"stp.taps, {_LAYERS}")
    yield _arg("--nam-stp-seed", stp.seed, "stp.seed")
    yield _arg("--nam-stp-diagnose-every", stp.diagnose_every, "stp.diagnose_every")


def _slots(recipe: Recipe, layout: HybridPlan) -> Iterator[Argument]:
    """What runs in Megatron's Mamba slots, by layer number, and its sizes that Megatron has no option for."""
    families = recipe.model.families
    if isinstance(families.M, Mamba3):
        field = "model.families.M"
        yield _arg("--nam-mamba3-layers", _numbers(layout.numbers("mamba3")), _LAYERS)
        yield _arg("--nam-mamba3-chunk-size", families.M.chunk_size, f"{field}.chunk_size")
        if families.M.complex_rotation:
            yield _flag("--nam-mamba3-complex-rotation", f"{field}.complex_rotation")
        yield _arg("--nam-mamba3-mimo-rank", families.M.mimo_rank, f"{field}.mimo_rank")
        yield _arg("--nam-mamba3-kernel", families.M.kernel, f"{field}.kernel")
    if isinstance(families.M, Mamba2):
        yield _arg("--nam-mamba2-layers", _numbers(layout.numbers("mamba2")), _LAYERS)
    if isinstance(families.R, M2rnn):
        field = "model.families.R"
        yield _arg("--nam-recurrent-layers", _numbers(layout.numbers("m2rnn")), _LAYERS)
        for name in ("heads", "key_dim", "value_dim", "conv_kernel", "checkpoint_every", "kernel"):
            option = f"--nam-m2rnn-{name.replace('_', '-')}"
            yield _arg(option, getattr(families.R, name), f"{field}.{name}")


def _numbers(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
