"""What Megatron's Mamba slots hold: Mamba-3, M2RNN or Mamba-2, by global layer number.

megatron-core has one symbol, ``M``, for all recurrent layers, and one spec for all of them.  The layer in that spec is
`SlotLayer`, which becomes Megatron's MambaLayer with the mixer that the layer's number asks for.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import HAVE_MAMBA_SSM, MambaMixer, MambaMixerSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import LayerNormBuilder

from megacpp_stp.model.errors import BuildError
from megacpp_stp.model.m2rnn.kernels import M2RNN_SCANS
from megacpp_stp.model.m2rnn.mixer import M2RNNMixer
from megacpp_stp.model.mamba3.kernels import MAMBA3_SCANS
from megacpp_stp.model.mamba3.mixer import Mamba3Mixer

MAMBA3_LAYERS, RECURRENT_LAYERS, MAMBA2_LAYERS = (
    "--nam-mamba3-layers",
    "--nam-recurrent-layers",
    "--nam-mamba2-layers",
)
_LISTS = f"{MAMBA3_LAYERS}, {RECURRENT_LAYERS}, {MAMBA2_LAYERS}"
_ROTATED_FRACTION = 0.5  # of the state, in the complex form (mamba_ssm's default)
# Option to the mixer's own name for it.
_M2RNN_SIZES = {
    "--nam-m2rnn-heads": "num_heads",
    "--nam-m2rnn-key-dim": "key_dim",
    "--nam-m2rnn-value-dim": "value_dim",
    "--nam-m2rnn-conv-kernel": "conv_kernel",
    "--nam-m2rnn-checkpoint-every": "checkpoint_every",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotModules:
    """What a backend builds the layer in a Mamba slot of.  Each layer has one norm, and it is here that it has.

    Attributes:
        norm: The layer's norm, before a mixer whose input projection has none.
        in_proj: A column-parallel linear layer.
        out_proj: A row-parallel linear layer.
        normed_in_proj: A column-parallel linear layer with the norm in it, for Megatron's Mamba-2 mixer; None where
            that mixer cannot run.
    """

    norm: LayerNormBuilder
    in_proj: type
    out_proj: type
    normed_in_proj: type | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Which mixer each Mamba slot of the decoder holds, and its sizes beside those in Megatron's configuration.

    Attributes:
        mamba3: Global numbers of the Mamba-3 layers, from 1.
        m2rnn: Those of the M2RNN layers.
        mamba2: Those of the Mamba-2 layers, of which Megatron's configuration has all sizes.
        mamba3_options: Keyword arguments of `Mamba3Mixer`: its sizes beside Megatron's, and its scan.
        m2rnn_options: Keyword arguments of `M2RNNMixer`: its sizes and its scan.
    """

    mamba3: frozenset[int]
    m2rnn: frozenset[int]
    mamba2: frozenset[int] = frozenset()
    mamba3_options: Mapping[str, Any]
    m2rnn_options: Mapping[str, Any]

    @classmethod
    def from_arguments(cls, args: Namespace) -> Self:
        """The slots that parsed arguments describe.

        Args:
            args: With what `add_slot_arguments` adds, and ``hybrid_layer_pattern``.

        Raises:
            BuildError: Arguments that were parsed without ours, a list that does not fit the pattern, or a size that
                is missing.
        """
        if not hasattr(args, _attribute(MAMBA3_LAYERS)):
            raise _unsaid()
        mamba3, m2rnn, mamba2 = (
            frozenset(getattr(args, _attribute(option)) or ())
            for option in (MAMBA3_LAYERS, RECURRENT_LAYERS, MAMBA2_LAYERS)
        )
        lists = {MAMBA3_LAYERS: mamba3, RECURRENT_LAYERS: m2rnn, MAMBA2_LAYERS: mamba2}
        _compare_with_pattern(args.hybrid_layer_pattern, lists)
        rotated = args.nam_mamba3_complex_rotation
        return cls(
            mamba3=mamba3,
            m2rnn=m2rnn,
            mamba2=mamba2,
            mamba3_options={
                "chunk_size": _needed(args, "--nam-mamba3-chunk-size"),
                "rope_fraction": _ROTATED_FRACTION if rotated else 0.0,
                "mimo_rank": _needed(args, "--nam-mamba3-mimo-rank"),
                "scan": MAMBA3_SCANS[_needed(args, "--nam-mamba3-kernel")],
            }
            if mamba3
            else {},
            m2rnn_options={
                **{name: _needed(args, option) for option, name in _M2RNN_SIZES.items()},
                "scan": M2RNN_SCANS[_needed(args, "--nam-m2rnn-kernel")],
            }
            if m2rnn
            else {},
        )

    def spec(self, layer_number: int, modules: SlotModules) -> ModuleSpec:
        """One layer, with its mixer.

        Args:
            layer_number: Global, from 1.
            modules: The backend's.

        Raises:
            BuildError: The layer is in none of the lists or in several; or its mixer cannot be built here.
        """
        kinds = sum(layer_number in numbers for numbers in (self.mamba3, self.m2rnn, self.mamba2))
        if kinds != 1:
            raise BuildError(
                f"layer {layer_number} is a Mamba slot and in {'no list' if kinds == 0 else f'{kinds} lists'}",
                field=_LISTS,
                fix=f"name layer {layer_number} in one of them",
            )
        if layer_number in self.mamba2:
            return _mamba2_layer(modules)
        mixer, options = (
            (Mamba3Mixer, self.mamba3_options) if layer_number in self.mamba3 else (M2RNNMixer, self.m2rnn_options)
        )
        # The norm is the layer's: Mamba-3 reads the normed hidden states a second time, for its angles.
        return _layer(mixer, modules.in_proj, modules.out_proj, norm=modules.norm, **options)


def _layer(mixer: type, in_proj: type, out_proj: type, *, norm: LayerNormBuilder, **options: Any) -> ModuleSpec:
    projections = MambaMixerSubmodules(in_proj=in_proj, out_proj=out_proj)
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=norm,
            mixer=ModuleSpec(module=mixer, params=options, submodules=projections),
            mamba_bda=get_bias_dropout_add,
        ),
    )


def _mamba2_layer(modules: SlotModules) -> ModuleSpec:
    """Megatron's own, as in its hybrid spec: the norm is in the projection, and the layer's is the identity."""
    if modules.normed_in_proj is None:
        raise BuildError(
            "Megatron's Mamba-2 mixer runs on GPUs only, and not in this backend",
            field=MAMBA2_LAYERS,
            fix="use model.backend te, or Mamba-3",
        )
    if not HAVE_MAMBA_SSM:
        raise BuildError(
            "Megatron's Mamba-2 mixer needs mamba-ssm, which is not installed",
            field=MAMBA2_LAYERS,
            fix="pip install 'megacpp-stp[ssm]', or use Mamba-3",
        )
    return _layer(MambaMixer, modules.normed_in_proj, modules.out_proj, norm=IdentityOp)


class SlotLayer:
    """The Mamba layer in a spec; building it builds the layer that its number asks for in its place.

    Args:
        config: Megatron's configuration.
        modules: The backend's.
        slots: What the slots hold, or what says it when the layer is built; None for what Megatron's parsed
            arguments say.
        layer_number: Global, from 1.
        name: Of the layer in the model, as HybridModel gives it; says whether it is in the decoder.
        kwargs: The rest of what HybridStack passes to a Mamba layer.

    Raises:
        BuildError: See `Slots`; or a slot in multi-token prediction.
    """

    def __new__(
        cls,
        config: Any,
        *,
        modules: SlotModules,
        slots: Slots | Callable[[], Slots] | None = None,
        layer_number: int,
        name: str | None,
        **kwargs: Any,
    ) -> Any:
        """Not an instance of this class, but the layer."""
        if name is None or not name.startswith("decoder."):
            # Layers of a depth of prediction are numbered from 1 again, so a number would find another layer's mixer.
            raise BuildError(
                "a recurrent layer cannot be in multi-token prediction",
                field="--hybrid-layer-pattern",
                value=name,
                fix="leave M out after the /",
            )
        if slots is None:
            slots = Slots.from_arguments(_parsed_arguments())
        elif not isinstance(slots, Slots):
            slots = slots()
        spec = slots.spec(layer_number, modules)
        return build_module(spec, config, layer_number=layer_number, name=name, **kwargs)


def add_slot_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Options that say what the Mamba slots hold; Megatron's ``extra_args_provider`` for a training script."""
    group = parser.add_argument_group("megacpp_stp mixers")
    group.add_argument(MAMBA3_LAYERS, type=_numbers, help="layers whose Mamba slot holds a Mamba-3 mixer")
    group.add_argument("--nam-mamba3-chunk-size", type=int, help="steps that a Mamba-3 mixer computes together")
    group.add_argument("--nam-mamba3-complex-rotation", action="store_true", help="the complex form of Mamba-3")
    group.add_argument("--nam-mamba3-mimo-rank", type=int, help="inputs and outputs of a head of a Mamba-3 mixer")
    group.add_argument("--nam-mamba3-kernel", choices=tuple(MAMBA3_SCANS), help="what computes Mamba-3's recurrence")
    group.add_argument(RECURRENT_LAYERS, type=_numbers, help="layers whose Mamba slot holds an M2RNN mixer")
    group.add_argument(MAMBA2_LAYERS, type=_numbers, help="layers whose Mamba slot holds Megatron's own mixer")
    group.add_argument("--nam-m2rnn-heads", type=int, help="heads of an M2RNN mixer")
    group.add_argument("--nam-m2rnn-key-dim", type=int, help="rows of a head's state")
    group.add_argument("--nam-m2rnn-value-dim", type=int, help="columns of a head's state")
    group.add_argument("--nam-m2rnn-conv-kernel", type=int, help="steps that its causal convolution sees")
    group.add_argument("--nam-m2rnn-checkpoint-every", type=int, help="steps between two kept states")
    group.add_argument("--nam-m2rnn-kernel", choices=tuple(M2RNN_SCANS), help="what computes M2RNN's recurrence")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _attribute(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _needed(args: Namespace, option: str) -> Any:
    value = getattr(args, _attribute(option))
    if value is None:
        raise BuildError("is needed by the layers that are listed", field=option, fix=f"pass {option}")
    return value


def _compare_with_pattern(pattern: str, lists: Mapping[str, frozenset[int]]) -> None:
    main = (parse_hybrid_pattern(pattern).main_pattern or "").replace(Symbols.PIPE, "")
    for option, numbers in lists.items():
        for number in sorted(numbers):
            if not 1 <= number <= len(main) or main[number - 1] != Symbols.MAMBA:
                what = f"'{main[number - 1]}' in the pattern" if 1 <= number <= len(main) else "not in the pattern"
                raise BuildError(
                    f"layer {number} is {what}, not a Mamba slot", field=option, fix=f"leave layer {number} out"
                )


def _parsed_arguments() -> Namespace:
    """Megatron's own, which its training scripts parse before they build a model."""
    from megatron.training import get_args

    try:
        return get_args()
    except AssertionError:
        raise _unsaid() from None


def _unsaid() -> BuildError:
    return BuildError(
        "nothing says which mixer the Mamba slots hold",
        field=_LISTS,
        fix="parse with extra_args_provider=megacpp_stp.model.slots.add_slot_arguments, "
        "or build the spec with megacpp_stp.model.specs.torch_stack_spec(slots)",
    )
