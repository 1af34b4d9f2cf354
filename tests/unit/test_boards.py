"""TensorBoard and W&B: the same numbers under names that Megatron does not use itself."""

import ast
import importlib.util
from pathlib import Path

import pytest

from megacpp_stp.training.writers import OF_THE_RUN, write_scalars

RECORD = {
    "iteration": 6,
    "lm_loss": 2.0,
    "bits_per_byte": 1.5,
    "stp_loss": 0.5,
    "stp_active": True,
    "stp_loss_by_tap": {"6": 0.25, "final-norm": None},
    "tokens_per_s": 100.0,
    "mfu": None,
    "goodput": 0.5,
    "skipped_iterations": 3,
    "nonfinite": None,
}
WRITTEN = {
    "bits-per-byte": 1.5,
    "stp active": 1.0,
    "stp loss/6": 0.25,
    "tokens-per-second": 100.0,
    "goodput": 0.5,
    "skipped-iterations": 3.0,
}


class Board:
    def __init__(self):
        self.scalars, self.logged = {}, []

    def add_scalar(self, name, value, iteration):
        assert (name, iteration) not in self.scalars
        self.scalars[name, iteration] = value

    def log(self, values, iteration):
        self.logged.append((values, iteration))


@pytest.fixture
def boards(monkeypatch):
    from megatron.training import global_vars

    board, wandb = Board(), Board()
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", board)
    monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", wandb)
    return board, wandb


def test_both_boards_get_the_same(boards):
    board, wandb = boards
    write_scalars(RECORD, interval=3)
    assert board.scalars == {(name, 6): value for name, value in WRITTEN.items()}
    assert wandb.logged == [(WRITTEN, 6)]
    write_scalars({**RECORD, "iteration": 7}, interval=3)
    assert len(board.scalars) == len(WRITTEN)
    assert len(wandb.logged) == 1


def test_where_the_loss_dictionary_has_no_stp_loss_it_is_written_here(boards):
    write_scalars(RECORD, interval=1, with_loss=True)
    assert boards[0].scalars["stp loss", 6] == 0.5


def names_of_megatron():
    """Of scalars, in all of its sources: what is written out there, formats without what is put into them."""
    spec = importlib.util.find_spec("megatron.training")
    for path in Path(spec.submodule_search_locations[0]).parent.rglob("*.py"):
        text = path.read_text()
        if "add_scalar(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_scalar":
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    yield first.value


def test_no_name_is_megatrons():
    theirs = set(names_of_megatron())
    assert {"learning-rate", "iteration-time", "throughput", "indexer loss"} <= theirs
    assert not theirs & set(OF_THE_RUN.values())
    assert not any(name.startswith("stp") for name in theirs)
