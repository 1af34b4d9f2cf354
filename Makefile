# Every target sets up what it needs: from a clean clone, `make demo` or `make test` is enough.
#
#   make VENV=.venv-other test            another folder for the virtual environment
#   make PYTHON=/path/to/python3 setup    the Python to make it from (default: scripts/find_python.sh)
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

# The environment is this project's own. These would mix in somebody else's packages or pins (NVIDIA's
# containers, for one, set PIP_CONSTRAINT to pins that conflict with ours).
unexport PYTHONPATH PYTHONHOME PIP_CONSTRAINT

VENV := .venv
ifeq ($(strip $(VENV)),)
$(error VENV must name the folder of the virtual environment)
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
SETUP_LOG := $(VENV)/setup.log
EXTRAS := .[train,dev]
DATASET := data/torch-headers/dataset.json

.PHONY: help setup demo test test-all lint parity golden format constraints clean FORCE

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# --- set-up ---------------------------------------------------------------------------------------

# A shell condition: $(VENV) is a virtual environment whose Python runs and is new enough.
VENV_RUNS = { [ -f "$(VENV)/pyvenv.cfg" ] && PYTHON="$(BIN)/python" bash scripts/find_python.sh >/dev/null 2>&1; }

# The stamp holds the environment's path: one that was moved or copied has scripts that start the old
# Python and an editable install that imports the old tree, so it is as good as broken.
VENV_PATH = CDPATH= cd "$(VENV)" && pwd -P
VENV_IS_HERE = { [ -e "$(STAMP)" ] && [ "$$(cat "$(STAMP)")" = "$$($(VENV_PATH))" ]; }

ifneq ($(shell $(VENV_IS_HERE) && $(VENV_RUNS) && echo yes),yes)
$(STAMP): FORCE
endif

setup: $(STAMP) ## Make the virtual environment; does nothing when it is up to date

# The stamp is written under another name first and gets its own only after pip has succeeded. Found at
# the start under that other name, it says that an earlier set-up was cut short: begin again. The lock is
# for a second make in another terminal, which would take a set-up in progress for one cut short.
$(STAMP): pyproject.toml constraints.txt scripts/find_python.sh
	@exec 9<Makefile; \
	if type -P flock >/dev/null && ! flock --nonblock 9; then \
	  echo "setup: waiting for another set-up of this checkout"; \
	  flock 9 || true; \
	  if $(VENV_IS_HERE) && $(VENV_RUNS); then exit 0; fi; \
	fi; \
	python="$$(bash scripts/find_python.sh)"; \
	if [ -e "$(VENV)" ] && { [ -e "$@.part" ] || ! $(VENV_RUNS) || { [ -e "$@" ] && ! $(VENV_IS_HERE); }; }; then \
	  $(REMOVE_VENV); \
	fi; \
	rm -f "$@"; \
	mkdir -p "$(VENV)"; \
	($(VENV_PATH)) >"$@.part"; \
	if [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
	  echo "setup: making $(VENV) with $$python ($$("$$python" -V 2>&1))"; \
	  "$$python" -m venv "$(VENV)"; \
	fi; \
	if ! "$(BIN)/python" -m pip --version >/dev/null 2>&1; then "$(BIN)/python" -m ensurepip; fi; \
	echo "setup: installing torch with its CUDA libraries, megatron-core and the development tools into $(VENV):"; \
	echo "setup: a 2.7 GB download, 6 GB on disk; two minutes on a fast connection, 15 on a slow one. Later runs skip it."; \
	echo "setup: pip writes to $(SETUP_LOG)"; \
	"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt -e '$(EXTRAS)' >"$(SETUP_LOG)" 2>&1 \
	  || { tail -n 50 "$(SETUP_LOG)" >&2; echo "setup: pip failed; all of its output is in $(SETUP_LOG)" >&2; exit 1; }; \
	mv "$@.part" "$@"; \
	echo "setup: done"

# Removes $(VENV), but never a folder that somebody named by mistake (VENV=/usr, VENV=data).
define REMOVE_VENV
{ case "$$(basename "$(VENV)")" in \
  .venv*) ;; \
  *) [ -f "$(VENV)/pyvenv.cfg" ] || { echo "$(VENV) is not a virtual environment: not touching it" >&2; exit 2; } ;; \
esac; \
echo "removing $(VENV)"; \
rm -rf "$(VENV)"; }
endef

# --- what it is for -------------------------------------------------------------------------------

demo: setup $(DATASET) ## Train the tiny model on torch's own C++ headers, on a GPU or a CPU
	@echo "demo: training nam56r-tiny"
	@"$(BIN)/megacpp-stp" launch nam56r-tiny --device auto

# The data is there once dataset.json is. Set-up only has to come first, not to be older.
$(DATASET): | $(STAMP)
	@echo "demo: preparing data/torch-headers from torch's C++ headers (up to 24 MB of text)"
	@include="$$("$(BIN)/python" -c "import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec('torch').origin).parent / 'include')")"; \
	"$(BIN)/megacpp-stp" data prepare "$$include" --output data/torch-headers \
	  --suffix .h --suffix .hpp --suffix .cuh --vocab-size 4096 --max-bytes 24000000

# One file at a time left almost half of two cores idle: 19 minutes of processor time took 17.
TEST_PROCESSES := 2

# pytest comes last in both, so that its closing line is the last one printed.
test: lint ## Lint, then the tests that need neither minutes nor a GPU
	@OMP_NUM_THREADS=1 "$(BIN)/pytest" -n $(TEST_PROCESSES) --dist loadfile -m "not slow and not gpu"

test-all: lint ## Lint, then all tests; those that need a GPU skip themselves where there is none
	@OMP_NUM_THREADS=1 "$(BIN)/pytest"

lint: setup ## ruff (rules and formatting) and mypy
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/mypy"

parity: setup ## Print the STP parity cells with the errors that they reach, as in docs/stp.md
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m tests.parity.table

golden: setup ## Rewrite the golden files and the generated tables of the documents; read the diff before you commit
	@"$(BIN)/pytest" -q -m "not slow and not gpu" tests/unit/test_plan.py tests/unit/test_family.py tests/unit/test_recipe_schema.py tests/unit/test_runs_schema.py tests/unit/test_launch_scripts.py --update-golden

format: setup ## Apply ruff's safe fixes and its formatting
	@"$(BIN)/ruff" check --fix .
	@"$(BIN)/ruff" format .

# --- housekeeping ---------------------------------------------------------------------------------

# Written from a fresh, unconstrained install. The scratch folder is under build/, which git ignores.
FRESH := build/constraints
constraints: ## Resolve all versions anew and rewrite constraints.txt (Python 3.12 on Linux x86_64)
	@trap 'rm -rf "$(FRESH)"' EXIT; \
	python="$$(bash scripts/find_python.sh)"; \
	"$$python" -c 'import platform as p, sys; sys.exit((p.system(), p.machine(), *sys.version_info[:2]) != ("Linux", "x86_64", 3, 12))' \
	  || { echo "constraints: needs Python 3.12 on Linux x86_64 (found $$python); name one: make PYTHON=... constraints" >&2; exit 2; }; \
	echo "constraints: installing the newest versions into a scratch environment (2.7 GB download, 6 GB on disk)"; \
	rm -rf "$(FRESH)"; mkdir -p "$(FRESH)"; \
	"$$python" -m venv "$(FRESH)/venv"; \
	"$(FRESH)/venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '$(EXTRAS)'; \
	"$(FRESH)/venv/bin/python" -m pip freeze --exclude-editable --disable-pip-version-check >"$(FRESH)/frozen"; \
	if grep -vE '^[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*$$' "$(FRESH)/frozen" >&2; then \
	  echo "constraints: the lines above are not plain public releases; constraints.txt is unchanged" >&2; exit 2; \
	fi; \
	{ \
	  echo "# The versions that the tests were run with: the newest that pip resolved for this project with its"; \
	  echo "# train and dev extras, frozen from an environment made for that ($$("$$python" -V), Linux x86_64):"; \
	  echo "#   pip install -e '$(EXTRAS)' && pip freeze --exclude-editable"; \
	  echo "# Names and versions only: where packages come from is for the reader's own pip to say."; \
	  echo "# To refresh: make constraints, then make test-all, and commit both together with what it took."; \
	  cat "$(FRESH)/frozen"; \
	} >"$(FRESH)/constraints.txt"; \
	mv "$(FRESH)/constraints.txt" constraints.txt
	@echo "constraints: constraints.txt rewritten; run make test-all before you commit it"

clean: ## Remove caches and the virtual environment; never data/ or runs/
	@if [ -e "$(VENV)" ]; then $(REMOVE_VENV); fi
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . \( -path ./data -o -path ./runs -o -path ./.git -o -path './.venv*' \) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
