#!/usr/bin/env bash
# Prints the path of a Python that `make setup` can build its virtual environment from.
#
# Exit 0 with one path on stdout, or 2 with the reason on stderr. $PYTHON, when set, is the only one
# looked at: whoever names an interpreter wants that one or an error. Otherwise the places below are
# tried in order; a tested version (3.12, then 3.13) anywhere comes before a newer one.
#
# Uses bash builtins only (bash 3.2 is enough), so that it works on a bare PATH.
# FIND_PYTHON_OPT_ROOT moves the /opt that is searched; the tests set it.
set -euo pipefail

MINIMUM_MINOR=12 # of Python 3; tests/unit/test_setup.py holds it to pyproject.toml's requires-python
OPT_ROOT=${FIND_PYTHON_OPT_ROOT:-/opt}
if [[ -z ${HOME:-} ]]; then # bash then takes ~ from the password database
    unset HOME
    HOME=~
fi
PYENV_VERSIONS=${PYENV_ROOT:-$HOME/.pyenv}/versions

BEST=""
BEST_RANK=9999
REJECTED=""

# Runs on Python 2 too, so that an old interpreter can say how old it is. The base executable is
# printed, not the path it was called by: a pyenv shim depends on the current folder, and the python
# of a virtual environment goes when that environment is rebuilt.
PROBE='
import sys
state = "ok"
if getattr(sys, "implementation", None) is None or sys.implementation.name != "cpython":
    state = "not CPython"
elif sys.version_info[3] != "final":
    state = "a pre-release"
elif not getattr(sys, "_is_gil_enabled", lambda: True)():
    state = "a free-threaded build"
else:
    try:
        import ensurepip, venv
    except ImportError:
        state = "without the venv and ensurepip modules"
print("%d.%d.%d\t%s\t%s" % (sys.version_info[:3] + (state, getattr(sys, "_base_executable", sys.executable))))
'

# The interpreter's own line: version, state and executable between tabs. Nothing when it does not run.
probe() {
    local output
    output=$("$1" -E -c "$PROBE" 2>/dev/null </dev/null) || return 0
    printf '%s\n' "${output##*$'\n'}"
}

reject() {
    REJECTED+="    $1: $2"$'\n'
}

# Lower is better: the tested versions first, then newer ones from the nearest on.
rank() {
    case $1 in
        12) echo 0 ;;
        13) echo 1 ;;
        *) echo $((100 + $1)) ;;
    esac
}

# Takes a candidate's path; remembers it as the best so far, or why it can not be used.
consider() {
    local version state executable minor this_rank
    IFS=$'\t' read -r version state executable <<<"$(probe "$1")"
    if [[ ! $version =~ ^([0-9]+)\.([0-9]+) ]]; then
        reject "$1" "does not run"
        return 0
    fi
    minor=${BASH_REMATCH[2]}
    if [[ ${BASH_REMATCH[1]} -ne 3 || $minor -lt $MINIMUM_MINOR ]]; then
        reject "$1" "Python $version, too old"
    elif [[ $state != ok ]]; then
        reject "$1" "Python $version, $state"
    else
        this_rank=$(rank "$minor")
        if [[ $this_rank -lt $BEST_RANK ]]; then
            BEST=$1 BEST_RANK=$this_rank
            if [[ -x $executable ]]; then BEST=$executable; fi
        fi
    fi
}

# --- the places: each prints one candidate a line -------------------------------------------------

# All matches, not only the first: a pyenv shim that refuses to run may hide a system Python.
on_path() {
    local name
    for name in python3.{12..20} python3 python; do
        type -aP "$name" || true
    done
}

in_pyenv() {
    executables "$PYENV_VERSIONS"/*/bin/python
}

# --system leaves out virtual environments, or uv would offer the one that is about to be replaced.
from_uv() {
    local request
    type -P uv >/dev/null || return 0
    for request in 3.12 3.13 ">=3.$MINIMUM_MINOR"; do
        UV_PYTHON_DOWNLOADS=never uv python find --system "$request" 2>/dev/null || true
    done
}

from_conda() {
    local root name
    if [[ -n ${CONDA_PREFIX:-} ]]; then executables "$CONDA_PREFIX/bin/python"; fi
    for root in "$HOME" "$OPT_ROOT"; do
        for name in miniforge3 miniforge mambaforge miniconda3 miniconda anaconda3 conda micromamba; do
            executables "$root/$name/bin/python" "$root/$name"/envs/*/bin/python
        done
    done
    executables "$HOME"/.conda/envs/*/bin/python
}

executables() {
    local path
    for path in "$@"; do
        if [[ -x $path ]]; then printf '%s\n' "$path"; fi
    done
}

# --- the answers ----------------------------------------------------------------------------------

say_how_to_install() {
    printf '%s\n' \
        "  To get one, any of:" \
        "    Debian, Ubuntu:  apt install python3.12 python3.12-venv   (or your release's newer pair)" \
        "    Fedora, RHEL:    dnf install python3.12" \
        "    macOS:           brew install python@3.12" \
        "    without root:    uv python install 3.12, or pyenv install 3.12, or" \
        "                     conda create -n py312 python=3.12" \
        "  A Python that lacks venv or ensurepip needs its distribution's python3.x-venv package." \
        "  Then run make again, or name it: make PYTHON=/path/to/python3.12 setup"
}

refuse() {
    {
        printf '%s\n' "$1"
        if [[ -n $REJECTED ]]; then
            printf '  Found, but not usable:\n%s' "$REJECTED"
        fi
        say_how_to_install
    } >&2
    exit 2
}

use_named_python() {
    local path
    path=$(type -P "$PYTHON") || refuse "find_python: PYTHON=$PYTHON is not a program; Python >= 3.$MINIMUM_MINOR is needed."
    consider "$path"
    [[ -n $BEST ]] || refuse "find_python: PYTHON=$PYTHON can not be used; Python >= 3.$MINIMUM_MINOR is needed."
}

search() {
    local place candidate
    for place in on_path in_pyenv from_uv from_conda; do
        while IFS= read -r candidate; do
            consider "$candidate"
        done < <("$place")
        if [[ $BEST_RANK -lt 100 ]]; then return 0; fi # a tested version: no need to look further
    done
    [[ -n $BEST ]] || refuse "find_python: no usable Python >= 3.$MINIMUM_MINOR was found.
  Looked for: \$PYTHON (not set); python3.$MINIMUM_MINOR and up, python3 and python on PATH; $PYENV_VERSIONS;
  uv's Pythons; conda, miniforge and mambaforge folders in $HOME and $OPT_ROOT; \$CONDA_PREFIX (${CONDA_PREFIX:-not set})."
}

if [[ -n ${PYTHON:-} ]]; then
    use_named_python
else
    search
fi
printf '%s\n' "$BEST"
