"""Trouble on purpose: what a rank of a run meets when this folder is on its PYTHONPATH and TEST_FAULT describes it.

    TEST_FAULT='{"what": "sleep", "rank": 1, "iteration": 3}'

Nothing of it is in the product: modules are changed as they are imported.
"""

import contextlib
import importlib.abc
import importlib.util
import json
import os
import sys
import time

FAULT = json.loads(os.environ.get("TEST_FAULT", "null"))


def here():
    """Whether this is the rank, or every rank is, and the iteration."""
    from megatron.training import get_args

    first = FAULT["iteration"]
    now = first <= get_args().curr_iteration + 1 < first + FAULT.get("times", 1)
    return now and FAULT["rank"] in (None, int(os.environ["RANK"]))


def fault_of_step(module):
    """Of `megacpp_stp.training.step`."""
    what, step = FAULT["what"], module.ForwardStep
    read, call, loss = module.next_batch, step.__call__, step._loss

    def next_batch(iterator, device):
        if here() and what == "sleep":
            time.sleep(1000)
        if here() and what == "keep the interpreter":
            import ctypes

            mutex = ctypes.create_string_buffer(64)  # zeros are one that is free
            for _ in range(2):  # the second waits for ever; PyDLL does not let go of the interpreter
                ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        return read(iterator, device)

    def forward(self, iterator, model):
        output, rest = call(self, iterator, model)
        if model.training and here() and what == "gradient":
            output.register_hook(lambda grad: grad * float("nan"))
        return output, rest

    def loss_of(self, mask, training, per_token):
        spoiled = training and here() and what == "lm_loss"
        return loss(self, mask, training, per_token * float("nan") if spoiled else per_token)

    module.next_batch, step.__call__, step._loss = next_batch, forward, loss_of


def fault_of_initialize(module):
    """Of Megatron's: how long torch will wait for other ranks."""
    if FAULT["what"] == "tell the limit":
        init = module.torch.distributed.init_process_group

        def telling(*args, **kwargs):
            print(f"torch waits for {kwargs['timeout'].days} days", flush=True)
            return init(*args, **kwargs)

        module.torch.distributed.init_process_group = telling


def fault_of_meter(module):
    """Of `megacpp_stp.stp.meter`: a loss of the first tap that a rank has."""
    add = module.Meter.add

    def spoiled(self, tap, *, loss, **rest):
        add(self, tap, loss=loss * float("nan") if here() and FAULT["what"] == "stp_loss" else loss, **rest)

    module.Meter.add = spoiled


def fault_of_finalize(module):
    """Of Megatron's end of backward: the truth of a step that never was, without any number that is not finite."""
    update = module._update_router_expert_bias

    def kept(*args, **kwargs):
        if not (FAULT["what"] == "no step" and here()):
            update(*args, **kwargs)

    module._update_router_expert_bias = kept


def fault_of_optimizer(module):
    """Likewise."""
    for kind in (module.FP32Optimizer, module.MixedPrecisionOptimizer, module.ChainedOptimizer):
        step = kind.step

        def refused(self, *args, step=step, **kwargs):
            if FAULT["what"] == "no step" and here():
                return False, None, None
            return step(self, *args, **kwargs)

        kind.step = refused


FAULTS = {
    "megacpp_stp.training.step": fault_of_step,
    "megacpp_stp.stp.meter": fault_of_meter,
    "megatron.core.distributed.finalize_model_grads": fault_of_finalize,
    "megatron.core.optimizer.optimizer": fault_of_optimizer,
    "megatron.training.initialize": fault_of_initialize,
}


class Loader(importlib.abc.Loader):
    def __init__(self, loader, change):
        self.loader, self.change = loader, change

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        self.change(module)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in FAULTS:
            return None
        change = FAULTS.pop(name)
        with contextlib.suppress(ValueError):
            spec = importlib.util.find_spec(name)
            spec.loader = Loader(spec.loader, change)
            return spec
        return None


if FAULT is not None and "RANK" in os.environ:
    sys.meta_path.insert(0, Finder())
