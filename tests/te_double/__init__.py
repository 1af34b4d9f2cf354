"""A double of Transformer Engine for tests: the constructors of its modules, and their formulas in plain torch.

Transformer Engine needs a GPU and a build of many minutes; Megatron's wrappers of it, its layers and our spec do not.
With `PATH` on ``sys.path`` of a process before Megatron is imported there, Megatron finds this package under the name
``transformer_engine`` and builds its real layers on it, so that a CPU can say which class sits in which place, which
parameters there are and what the whole computes on one tensor-parallel rank.

What a module takes is what the real one takes, by name, so that an argument which that would refuse is refused here.
It stands for release 2.20.2; `tests/gpu/test_te_backend.py` holds its names against the release that is installed.
"""

from pathlib import Path

PATH = str(Path(__file__).parent)
