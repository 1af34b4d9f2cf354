"""The environment of a run: derived with reasons, changed only where the recipe says so, and never behind its back."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.env import environment, run_environment
from megacpp_stp.plan.env_guard import check_environment, recorded_environment, replaced, shown_environment
from megacpp_stp.recipe import find_recipe, list_recipes, load_recipe
from megacpp_stp.recipe.yaml_loader import read_yaml
from tests.recipes import STAND_INS

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def variables(*overrides, recipe="nam56r-tiny", device="cuda"):
    return {variable.name: variable for variable in environment(load_recipe(recipe, overrides), device=device)}


def given(**names):
    return tuple(f"launch.environment.{name}={value}" for name, value in names.items())


@pytest.mark.parametrize("name", list_recipes())
def test_every_variable_of_a_shipped_recipe_has_a_reason(name):
    found = build_plan(load_recipe(name)).env
    assert [variable.name for variable in found] == sorted({variable.name for variable in found})
    assert all(len(variable.why) > 10 for variable in found)


def test_megatron_gets_one_connection_where_it_asks_for_it_and_nowhere_else():
    assert CONNECTIONS not in variables()
    tensor = ("parallel.tensor=2", "parallel.sequence_parallel=true", "launch.processes_per_node=4")
    assert variables(*tensor)[CONNECTIONS].value == "1"
    assert variables(recipe="nam56r-cp4-12k")[CONNECTIONS].value == "1"


def test_deterministic_mode_is_in_the_plan():
    """The values are Megatron's own, read from its file: importing it takes seconds."""
    root = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0]).parent
    tree = ast.parse((root / "training" / "determinism.py").read_text())
    (wanted,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and node.target.id == "DETERMINISM_ENV_VAR_DEFAULTS"
    )
    found = variables("megatron.deterministic-mode=true")
    assert {name: found[name].value for name in wanted} == wanted
    assert "NCCL_ALGO" not in variables()


def test_a_gpu_has_its_own_variables():
    cuda, cpu = variables(), variables(device="cpu")
    assert cuda["PYTORCH_ALLOC_CONF"].value == "expandable_segments:True"
    assert cuda["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"].value == "0"
    assert {"CUDA_VISIBLE_DEVICES", "TORCHDYNAMO_DISABLE"} == cpu.keys() - cuda.keys()


def test_the_recipe_sets_changes_and_leaves_variables():
    found = variables(*given(NCCL_NVLS_ENABLE=0, OMP_NUM_THREADS=4, PYTORCH_ALLOC_CONF="null"))
    assert (found["NCCL_NVLS_ENABLE"].value, found["NCCL_NVLS_ENABLE"].why) == ("0", "launch.environment")
    assert (found["OMP_NUM_THREADS"].value, "in place of '1'" in found["OMP_NUM_THREADS"].why) == ("4", True)
    assert "PYTORCH_ALLOC_CONF" not in found


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("HF_HUB_OFFLINE", 0, "must not look anything up"),
        ("HF_HUB_OFFLINE", "null", "must not look anything up"),
        ("RANK", 0, "torchrun"),
        ("PET_NNODES", 3, "torchrun"),
        ("PYTHONOPTIMIZE", 1, "torchrun"),
        ("WANDB_API_KEY", "abc", "for everybody to read"),
        ("HF_TOKEN", "abc", "for everybody to read"),
    ],
)
def test_what_contradicts_the_plan_is_refused_with_the_reason(name, value, says):
    with pytest.raises(UserError, match=says) as caught:
        variables(*given(**{name: value}))
    assert caught.value.field == f"launch.environment.{name}"


def test_a_secret_may_stay_in_the_shell():
    assert "HF_TOKEN" not in variables(*given(HF_TOKEN="null"))


@pytest.mark.parametrize(
    "setting", ["launch.environment.lower=1", "launch.environment.NAME=[1]", "launch.environment=7"]
)
def test_what_is_no_variable_is_refused(setting):
    with pytest.raises(UserError, match="launch.environment"):
        load_recipe("nam56r-tiny", [setting])


def check(found, *overrides):
    recipe = load_recipe("nam56r-tiny", overrides)
    check_environment(environment(recipe, device="cuda"), recipe, found)


@pytest.mark.parametrize(
    "name",
    [
        *("NVTE_FLASH_ATTN", "NCCL_ALGO", "NCCL_NVLS_ENABLE", "TORCH_NCCL_BLOCKING_WAIT", "CUDA_LAUNCH_BLOCKING"),
        *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING", "NVIDIA_TF32_OVERRIDE", "TRITON_INTERPRET"),
        *("ATEN_CPU_CAPABILITY", "DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA"),
        *(CONNECTIONS, "MAMBA_DETERMINISTIC", "PYTHONOPTIMIZE", "PET_NNODES", "CUBLAS_WORKSPACE_CONFIG"),
    ],
)
def test_what_changes_a_run_behind_its_plan_is_refused(name):
    with pytest.raises(UserError, match="not in the plan") as caught:
        check({name: "7"})
    assert caught.value.field == name
    assert f"{name}: VALUE" in caught.value.fix
    if name not in ("PYTHONOPTIMIZE", "PET_NNODES"):
        check({name: "7"}, *given(**{name: "null"}))  # allowed, whatever it is
        check({name: "7"}, *given(**{name: 7}))
        with pytest.raises(UserError, match="needs '8'"):
            check({name: "7"}, *given(**{name: 8}))


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "HOME", "SLURM_JOB_ID", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NCCL_VERSION", "PYTORCH_VERSION"),
        *("TORCH_CUDA_ARCH_LIST", "TRITON_PTXAS_PATH", "TORCH_HOME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_DEBUG"),
    ],
)
def test_what_machines_and_containers_set_is_no_mistake(name):
    check({name: "1"})


@pytest.mark.parametrize(
    "name", ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TRITON_CACHE_DIR", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
)
def test_a_value_against_the_runs_own_is_refused_unless_the_recipe_leaves_it(name):
    def check_run(*overrides):
        recipe = load_recipe("nam56r-tiny", overrides)
        of_run = run_environment(recipe, device="cuda", run_dir=Path("runs/x"), logs=Path("runs/x/logs"), node=0)
        check_environment((*environment(recipe, device="cuda"), *of_run), recipe, {name: "1"})

    with pytest.raises(UserError, match=f"{name}: is set to '1', but the run needs "):
        check_run()
    check_run(*given(**{name: "null"}))


def test_what_an_image_was_built_with_is_no_mistake_and_another_value_is():
    for name in ("TORCH_NCCL_USE_COMM_NONBLOCKING", "TORCHINDUCTOR_LOOP_ORDERING_AFTER_FUSION"):
        check({name: "0"})
        with pytest.raises(UserError, match="is not in the plan"):
            check({name: "1"})


def test_all_findings_are_told_at_once():
    with pytest.raises(UserError) as caught:
        check({"OMP_NUM_THREADS": "8", "NCCL_ALGO": "Tree", "HF_HUB_OFFLINE": "0"})
    text = str(caught.value)
    assert all(name in text for name in ("OMP_NUM_THREADS", "NCCL_ALGO", "HF_HUB_OFFLINE"))
    assert "HF_HUB_OFFLINE: null" not in text  # no recipe can allow that


def test_what_a_run_replaces_of_a_shell_is_said_and_nothing_else():
    plan = build_plan(load_recipe("nam56r-tiny"), device="cpu")
    assert list(replaced(plan.env, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "8", "HOME": "x"})) == []
    (told,) = replaced(plan.env, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert "CUDA_VISIBLE_DEVICES: is set to '0,1'; the ranks get ''" in told


def test_the_places_of_a_run_are_its_own():
    def places(*overrides):
        recipe = load_recipe("nam56r-tiny", overrides)
        run, logs = Path("runs/x"), Path("runs/x/logs/attempt-1/node-3")
        found = run_environment(recipe, device="cuda", run_dir=run, logs=logs, node=3)
        return {variable.name: variable.value for variable in found}

    assert places()["TRITON_CACHE_DIR"] == "runs/x/cache/triton-3"
    assert places()["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == "runs/x/logs/attempt-1/node-3/collectives-"
    assert "TRITON_CACHE_DIR" not in places(*given(TRITON_CACHE_DIR="null"))
    assert places()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "15"


def test_what_is_recorded_is_an_allow_list_without_places():
    plan = build_plan(load_recipe("nam56r-tiny", given(NCCL_CONF_FILE="null", NVTE_DEBUG="null"))).as_dict()
    found = {
        **plan["env"],
        **{"WORLD_SIZE": "16", "NCCL_IB_HCA": "mlx5_0", "NCCL_CONF_FILE": "/etc/a", "NVTE_DEBUG": "1"},
        **{"HOME": "/somewhere", "WANDB_API_KEY": "secret", "TRITON_CACHE_DIR": "/tmp/x"},
    }
    kept = recorded_environment(plan, found)
    assert kept["NCCL_CONF_FILE"] == "(a place)"
    assert {"HOME", "WANDB_API_KEY", "TRITON_CACHE_DIR"}.isdisjoint(kept)
    assert kept.items() >= {**plan["env"], "WORLD_SIZE": "16", "NCCL_IB_HCA": "mlx5_0", "NVTE_DEBUG": "1"}.items()


def test_a_secret_that_stays_in_the_shell_is_not_recorded():
    plan = build_plan(load_recipe("nam56r-tiny", given(HF_TOKEN="null", WANDB_API_KEY="null"))).as_dict()
    assert recorded_environment(plan, {"HF_TOKEN": "abc", "WANDB_API_KEY": "def"}) == {}


def test_a_receipt_shows_what_changes_a_run_and_nothing_of_the_machine():
    names = {
        **{"NCCL_COMM_ID": "node-a:29500", "NCCL_HOSTID": "node-a", "MASTER_ADDR": "node-a", "HTTP_PROXY": "proxy"},
        **{"MY_SETTING": "what I like", "NCCL_TOPO_FILE": "/etc/topo", "WORLD_SIZE": "16"},
    }
    shown = {
        **{"NCCL_IB_HCA": "mlx5_0", "NCCL_ALGO": "Ring", "NVTE_DEBUG": "1", "NCCL_NET": "IB", "NCCL_DEBUG": "INFO"},
        **{"CUDA_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    }
    allowed = given(**dict.fromkeys(("NVTE_DEBUG", "NCCL_ALGO", "NCCL_COMM_ID", "NCCL_HOSTID", "MY_SETTING"), "null"))
    plan = build_plan(load_recipe("nam56r-tiny", allowed)).as_dict()
    kept = shown_environment(recorded_environment(plan, {**names, **shown}))
    assert kept == {**shown, "NCCL_TOPO_FILE": "(a place)"}
    for value in ("10.1.2.3:80", "tcp://node-a", "me@node-a", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"):
        assert shown_environment({"CUDA_VISIBLE_DEVICES": value}) == {"CUDA_VISIBLE_DEVICES": "(an address)"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_receipt_shows_all_that_a_plan_derives(device):
    """None of these names may fall out of the allow-list."""
    parallel = ("parallel.tensor=2", "parallel.sequence_parallel=true", "launch.processes_per_node=4")
    plan = build_plan(load_recipe("nam56r-tiny", (*parallel, "megatron.deterministic-mode=true")), device=device)
    assert shown_environment(plan.as_dict()["env"]) == plan.as_dict()["env"]


@pytest.mark.parametrize("path", [*list_recipes().values(), STAND_INS], ids=str)
def test_no_recipe_names_a_place_of_a_machine(path):
    def texts(node):
        for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from texts(item)
        if isinstance(node, str):
            yield node

    recipe = read_yaml(find_recipe(str(path)))
    assert [text for text in texts(recipe) if re.search(r"(^|[\s:=])[/~]|\$", text)] == []
