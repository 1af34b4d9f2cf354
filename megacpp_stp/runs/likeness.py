"""Whether two runs may be compared: what differs between them, of which kind, and what that allows to conclude."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megacpp_stp.plan.diff import Difference, compare
from megacpp_stp.plan.facts import STAGES, same, value_at
from megacpp_stp.runs.files import shown
from megacpp_stp.runs.recorded import RecordedRun

# What two runs must share, or a difference of their losses has more than one reason.
KINDS = ("substrate", "code", "pattern", "data", "tokenizer", "parallelism", "batch")
SEEDS = ("training.seed", "stp.seed")
_BATCH = ("training.global_batch_size", "training.micro_batch_size", "training.sequence_length", "micro_batches")
_PATTERN = ("model.pattern", "model.depth", "layout.source_pattern")
_MEGATRON_PATTERN = "layout.megatron_pattern"
# Where Megatron's writers put the numbers, and under what name: nothing that is computed.
_WRITTEN_TO = tuple(
    f"megatron.{name}"
    for name in ("tensorboard-dir", "wandb-project", "wandb-entity", "wandb-exp-name", "wandb-save-dir")
)
_MOST_NAMED = 6
_KIND_OF_GROUP = {"substrate": "substrate", "environment": "substrate", "parallelism": "parallelism"}


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """What differs between two runs.

    Attributes:
        differences: All of it, leaf by leaf.
        unlike: The kinds of `KINDS` that differ, each with what it is that does.
        complete: Whether both plans were there to compare.
        changed: Names of runs that went on with another plan than they began with.
    """

    differences: tuple[Difference, ...]
    unlike: dict[str, tuple[str, ...]]
    complete: bool
    changed: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """What differs, by path."""
        return tuple(item.path for item in self.differences)

    @property
    def in_seeds_alone(self) -> bool:
        """Whether nothing differs, or only seeds."""
        return self.is_controlled and not self.in_stp

    @property
    def in_stp(self) -> bool:
        """Whether STP differs, its seed left out."""
        return any(_is_stp(path) for path in self.paths if path not in SEEDS)

    @property
    def besides(self) -> tuple[str, ...]:
        """What differs besides STP and the seeds."""
        return tuple(path for path in self.paths if not _is_stp(path) and path not in SEEDS)

    @property
    def is_controlled(self) -> bool:
        """Whether the plans are known to differ in ``stp.*`` or seeds alone, with the same machine, code and data."""
        return self.complete and not (self.unlike or self.besides or self.changed)


def _is_stp(path: str) -> bool:
    return path == "stp" or path.startswith("stp.")


def likeness(a: RecordedRun, b: RecordedRun) -> Likeness:
    """Compare what two runs were."""
    found = compare(a.side, b.side)
    data_known = all(run.receipt.get("data") is not None for run in (a, b))
    differences = tuple(
        # Where the data lies does not matter once its content is known: that is compared.
        item
        for item in found.differences
        if not (item.path in _WRITTEN_TO or (item.path == "data.path" and data_known))
    )
    unlike: dict[str, list[str]] = {}
    for kind, what in (*_differing_kinds(differences), *_codes(a, b), *_unknown(a, b)):
        unlike.setdefault(kind, []).append(what)
    return Likeness(
        differences=differences,
        unlike={kind: tuple(unlike[kind]) for kind in KINDS if kind in unlike},
        complete=found.complete,
        changed=tuple(run.name for run in (a, b) if run.plan_changed),
    )


def arm_likeness(base: Sequence[RecordedRun], other: Sequence[RecordedRun]) -> Likeness:
    """Compare what two arms were: the first runs of both, and what any other run of either adds to what speaks against.

    One seed that ran elsewhere, or went on with another plan, spoils its arm.
    """
    first = likeness(base[0], other[0])
    rest = [likeness(base[0], run) for run in (*base[1:], *other[1:])]
    unlike = {
        kind: tuple(dict.fromkeys(what for each in (first, *rest) for what in each.unlike.get(kind, ())))
        for kind in KINDS
    }
    return replace(
        first,
        unlike={kind: what for kind, what in unlike.items() if what},
        complete=all(each.complete for each in (first, *rest)),
        changed=tuple(dict.fromkeys(name for each in (first, *rest) for name in each.changed)),
    )


def _differing_kinds(differences: tuple[Difference, ...]) -> Iterator[tuple[str, str]]:
    for item in differences:
        kind = _kind_of(item)
        if kind is not None:
            yield kind, item.path


def _kind_of(item: Difference) -> str | None:
    path = item.path
    if path in _BATCH:
        return "batch"
    if path in _PATTERN:
        return "pattern"
    if path == _MEGATRON_PATTERN:
        layers = [str(side).replace("|", "") for side in (item.a, item.b)]
        return "parallelism" if layers[0] == layers[1] else "pattern"
    if path == ".".join(STAGES) or path.startswith("layout.stages"):
        return "parallelism"
    if path.startswith("data.tokenizer"):
        return "tokenizer"
    if path.startswith(("data.splits", "data.source")) or path == "data.path":
        return "data"
    return _KIND_OF_GROUP.get(item.group)


def _codes(a: RecordedRun, b: RecordedRun) -> Iterator[tuple[str, str]]:
    """Other code of ours may compute something else under an equal plan."""
    for run in (a, b):
        if run.codes[0] is None:
            yield "code", f"{run.name} does not say"
        if len(run.codes) > 1:
            yield "code", f"{run.name} changed it on the way"
    if None not in (a.codes[0], b.codes[0]) and a.codes[0] != b.codes[0]:
        yield "code", f"{_code_words(a)}, {_code_words(b)}"


def _code_words(run: RecordedRun) -> str:
    content, commit, modified = (value_at(run.receipt, ["code", name]) for name in ("sha256", "commit", "modified"))
    if not isinstance(commit, str):
        return f"{run.name} {shown(str(content))[:12]}"
    return f"{run.name} commit {shown(commit)[:12]}{' and changes' if modified else ''}"


def _unknown(a: RecordedRun, b: RecordedRun) -> Iterator[tuple[str, str]]:
    """What cannot be said to be alike."""
    for run in (a, b):
        for part in ("substrate", "data"):
            if run.receipt.get(part) is None:
                yield part, f"{run.name} does not say"
        if value_at(run.receipt, ["data", "tokenizer"]) is None and run.receipt.get("data") is not None:
            yield "tokenizer", f"{run.name} does not say"
        if len(run.substrates) > 1:
            yield "substrate", f"{run.name} changed it on the way"
        if len(run.environments) > 1:
            yield "substrate", f"{run.name} changed its environment on the way"


def same_arm(a: RecordedRun, b: RecordedRun) -> bool:
    """Whether two runs are one experiment with two seeds: nothing known differs but those."""
    if not same(a.side.plan is None, b.side.plan is None):
        return False
    found = likeness(a, b)
    return all(path in SEEDS for path in found.paths)


def standing(likes: Sequence[Likeness], *, same_seeds: bool = True) -> str:
    """What a comparison of all these pairs stands on, in words: ``controlled`` or not, and what differs.

    Args:
        likes: Of each pair.
        same_seeds: Whether partners have the same training seed.
    """
    if unlike := _each_once(kind for like in likes for kind in like.unlike):
        return f"not controlled, unlike {', '.join(unlike)}"
    if not all(like.complete for like in likes):
        return "not controlled: a plan.json is missing, so that not all could be compared"
    if changed := _each_once(name for like in likes for name in like.changed):
        return f"not controlled: {some(changed)} went on with another plan"
    in_stp = any(like.in_stp for like in likes)
    if besides := _each_once(path for like in likes for path in like.besides):
        return f"not controlled: {some(besides)} {_differ(besides)}{' too' if in_stp else ''}"
    paths = _each_once(path for like in likes for path in _stp_paths(like))
    if not paths:
        return "controlled: the plans are equal, so that the difference is not theirs"
    if not same_seeds:
        why = "training.seed differs too" if in_stp else "only seeds differ; this is what a seed makes"
        return f"not controlled: {why}"
    return f"controlled: only {some(paths)} {_differ(paths)}"


def some(names: Sequence[str]) -> str:
    """Names in a sentence, the first few of many."""
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _each_once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _differ(names: Sequence[str]) -> str:
    return "differs" if len(names) == 1 else "differ"


def _stp_paths(like: Likeness) -> Sequence[str]:
    """A run without STP lacks all of its keys: then STP as a whole differs."""
    lacks_stp = any(item.path == "stp.weight" and None in (item.a, item.b) for item in like.differences)
    return ["stp"] if lacks_stp else like.paths
