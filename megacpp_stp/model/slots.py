"""What Megatron's Mamba slots hold: Mamba-3 or M2RNN, by global layer number.

megatron-core has one symbol, ``M``, for all recurrent layers, and one spec for all of them.  The mixer in that spec is
`SlotMixer`, which becomes the one that the layer's number asks for.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from megacpp_stp.model.errors import BuildError
from megacpp_stp.model.m2rnn.mixer import M2RNNMixer
from megacpp_stp.model.mamba3.mixer import Mamba3Mixer

MAMBA3_LAYERS, RECURRENT_LAYERS = "--nam-mamba3-layers", "--nam-recurrent-layers"
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
class Slots:
    """Which mixer each Mamba slot of the decoder holds, and its sizes beside those in Megatron's configuration.

    Attributes:
        mamba3: Global numbers of the Mamba-3 layers, from 1.
        m2rnn: Those of the M2RNN layers.
        mamba3_options: Keyword arguments of `Mamba3Mixer`: ``chunk_size``, ``rope_fraction``.
        m2rnn_options: Keyword arguments of `M2RNNMixer`: its sizes.
    """

    mamba3: frozenset[int]
    m2rnn: frozenset[int]
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
        mamba3 = frozenset(getattr(args, _attribute(MAMBA3_LAYERS)) or ())
        m2rnn = frozenset(getattr(args, _attribute(RECURRENT_LAYERS)) or ())
        _compare_with_pattern(args.hybrid_layer_pattern, {MAMBA3_LAYERS: mamba3, RECURRENT_LAYERS: m2rnn})
        rotated = args.nam_mamba3_complex_rotation
        return cls(
            mamba3=mamba3,
            m2rnn=m2rnn,
            mamba3_options={
                "chunk_size": _needed(args, "--nam-mamba3-chunk-size"),
                "rope_fraction": _ROTATED_FRACTION if rotated else 0.0,
            }
            if mamba3
            else {},
            m2rnn_options={name: _needed(args, option) for option, name in _M2RNN_SIZES.items()} if m2rnn else {},
        )

    def spec(self, layer_number: int) -> ModuleSpec:
        """The mixer of one layer.

        Args:
            layer_number: Global, from 1.

        Raises:
            BuildError: The layer is in neither list, or in both.
        """
        if (layer_number in self.mamba3) == (layer_number in self.m2rnn):
            both = layer_number in self.mamba3
            raise BuildError(
                f"layer {layer_number} is a Mamba slot and in {'both lists' if both else 'neither list'}",
                field=f"{MAMBA3_LAYERS}, {RECURRENT_LAYERS}",
                fix=f"name layer {layer_number} in one of them",
            )
        if layer_number in self.mamba3:
            return ModuleSpec(
                module=Mamba3Mixer,
                params=dict(self.mamba3_options),
                submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
            )
        return ModuleSpec(
            module=M2RNNMixer,
            params=dict(self.m2rnn_options),
            submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
        )


class SlotMixer:
    """The mixer in the spec of Megatron's MambaLayer; building it builds the layer's own mixer in its place.

    Args:
        config: Megatron's configuration.
        slots: What the slots hold; None for what Megatron's parsed arguments say.
        layer_number: Global, from 1.
        name: Of the mixer in the model, as HybridModel gives it; says whether it is in the decoder.
        kwargs: The rest of what MambaLayer passes to a mixer.

    Raises:
        BuildError: See `Slots`; or a slot in multi-token prediction.
    """

    def __new__(
        cls, config: Any, *, slots: Slots | None = None, layer_number: int, name: str | None, **kwargs: Any
    ) -> Any:
        """Not an instance of this class, but the mixer."""
        if name is None or not name.startswith("decoder."):
            # Layers of a depth of prediction are numbered from 1 again, so a number would find another layer's mixer.
            raise BuildError(
                "a recurrent layer cannot be in multi-token prediction",
                field="--hybrid-layer-pattern",
                value=name,
                fix="leave M out after the /",
            )
        slots = Slots.from_arguments(_parsed_arguments()) if slots is None else slots
        return build_module(slots.spec(layer_number), config, layer_number=layer_number, name=name, **kwargs)


def add_slot_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Options that say what the Mamba slots hold; Megatron's ``extra_args_provider`` for a training script."""
    group = parser.add_argument_group("megacpp_stp mixers")
    group.add_argument(MAMBA3_LAYERS, type=_numbers, help="layers whose Mamba slot holds a Mamba-3 mixer")
    group.add_argument("--nam-mamba3-chunk-size", type=int, help="steps that a Mamba-3 mixer computes together")
    group.add_argument("--nam-mamba3-complex-rotation", action="store_true", help="the complex form of Mamba-3")
    group.add_argument(RECURRENT_LAYERS, type=_numbers, help="layers whose Mamba slot holds an M2RNN mixer")
    group.add_argument("--nam-m2rnn-heads", type=int, help="heads of an M2RNN mixer")
    group.add_argument("--nam-m2rnn-key-dim", type=int, help="rows of a head's state")
    group.add_argument("--nam-m2rnn-value-dim", type=int, help="columns of a head's state")
    group.add_argument("--nam-m2rnn-conv-kernel", type=int, help="steps that its causal convolution sees")
    group.add_argument("--nam-m2rnn-checkpoint-every", type=int, help="steps between two kept states")
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
        field=f"{MAMBA3_LAYERS}, {RECURRENT_LAYERS}",
        fix="parse with extra_args_provider=megacpp_stp.model.slots.add_slot_arguments, "
        "or build the spec with megacpp_stp.model.specs.torch_stack_spec(slots)",
    )
