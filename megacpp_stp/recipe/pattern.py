"""The block notation of the NAM family: ``AEMEAEMEAEMR``, tiled to a depth.

A letter is a *block* and names its *family*: A attention, M Mamba, E expert (MoE), R recurrent. C is reserved.
What a block becomes in Megatron is not decided here: see `megacpp_stp.plan.lowering`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from megacpp_stp.errors import UserError

FAMILIES = {"A": "attention", "M": "Mamba", "E": "expert (MoE)", "R": "recurrent"}
RESERVED = "C"


class PatternError(UserError):
    """A pattern that is not one; the message shows a caret under the character."""

    def __init__(self, problem: str, *, pattern: str, position: int, fix: str, field: str = "model.pattern") -> None:
        self.pattern = pattern
        self.position = position
        shown = pattern.translate(dict.fromkeys((*range(32), 127), "�"))
        caret = f"\n    {shown}\n    {' ' * position}^"
        super().__init__(problem + caret, field=field, fix=fix)


@dataclass(frozen=True, slots=True)
class Block:
    """One source letter at its place.

    Attributes:
        number: 1-based place in the tiled pattern.
        family: One of `FAMILIES`.
    """

    number: int
    family: str


@dataclass(frozen=True)
class Pattern:
    """A validated pattern, tiled to its depth.

    Attributes:
        source: The period as written.
        depth: Number of blocks after tiling.
    """

    source: str
    depth: int

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in order; the period is repeated and cut off at `depth`."""
        return tuple(Block(i + 1, self.source[i % len(self.source)]) for i in range(self.depth))

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of blocks of each family, zero included."""
        found = Counter(block.family for block in self.blocks)
        return {family: found[family] for family in FAMILIES}

    def positions(self, family: str) -> tuple[int, ...]:
        """1-based numbers of the blocks of one family."""
        return tuple(block.number for block in self.blocks if block.family == family)

    def __str__(self) -> str:
        return "".join(block.family for block in self.blocks)


def parse_pattern(text: str, *, depth: int) -> Pattern:
    """Validate `text` and tile it to `depth` blocks.

    Args:
        text: Letters of `FAMILIES`, upper case.
        depth: Number of blocks wanted. The last period may be cut off.

    Raises:
        PatternError: An empty pattern, a letter that is no family, or a depth below one period.
    """
    if not text:
        raise PatternError("is empty", pattern=text, position=0, fix='write letters of A M E R, such as "AEME"')
    for position, letter in enumerate(text):
        if letter in FAMILIES:
            continue
        if letter == RESERVED:
            raise PatternError(
                "C is reserved and has no meaning yet",
                pattern=text,
                position=position,
                fix="use A, M, E or R",
            )
        if letter.upper() in FAMILIES:
            fix = f"write {letter.upper()!r} in upper case"
        elif letter == "|":
            fix = "leave cuts out of the pattern and put the number of blocks a stage in parallel.stages"
        elif letter in "*+D-G/":
            fix = "this is a Megatron symbol; write source letters (A M E R), the plan lowers them"
        else:
            fix = "use " + ", ".join(f"{key} ({name})" for key, name in FAMILIES.items())
        raise PatternError(f"{letter!r} is no block family", pattern=text, position=position, fix=fix)
    if depth < len(text):
        raise PatternError(
            f"depth {depth} is shorter than the pattern, which would drop its end",
            pattern=text,
            position=max(depth, 0),
            fix=f"set model.depth to at least {len(text)}, or shorten the pattern",
        )
    return Pattern(source=text, depth=depth)
