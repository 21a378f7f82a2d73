#!/usr/bin/env bash
# Finds or makes the Python environment of this repository and prints the path of its Python.
#
#   python=$(bash examples/setup_environment.sh)     progress on stderr, the path on stdout
#
#   --venv           always .venv, even if an active environment would do (make setup)
#   --extras test    an active environment must have the test tools as well; .venv always has them
#   --find           install nothing: print some Python >= 3.12, from a finished environment if there is one
#
# An active environment ($PYTHON, $VIRTUAL_ENV, $CONDA_PREFIX) that satisfies pyproject.toml is used as it is and
# nothing is installed into it. Otherwise .venv is made from the first Python >= 3.12 that runs ($PYTHON wins), with
# the versions of constraints.txt. A finished .venv carries a stamp, so the second run takes a fraction of a second and
# no network; a .venv without a valid stamp is checked file by file and repaired. One that is a link, or that another
# checkout's set-up made, is left alone: repaired for this checkout it would be broken for that one.
#
# Exit codes: 0; 1 an installation failed; 2 no suitable Python, another's .venv or bad usage; 130 interrupted.
# Runs under bash 3.2 and later.
set -uo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
real_repo=$(cd "$repo" && pwd -P) # a checkout reached through a link is the same checkout
venv="$repo/.venv"
stamp="$venv/.dsv3_ready"
log="$repo/.setup.log"
search_path="${DSV3_PYTHON_SEARCH_PATH:-$PATH}" # tests narrow it
min_free_gb=8                                   # torch with its CUDA libraries takes 5.5 GB, the download goes first

say() { printf '%s\n' "$*" >&2; }

usage() { sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | grep '^#' | sed 's/^# \{0,1\}//' >&2; }

# ---------------------------------------------------------------------------------------------- finding a Python

# What a candidate says about itself, one line: version, minor, usable venv, path. Only what runs is believed: a
# pyenv shim can be on PATH for a version that is not selected, and fails.
probe_source='
import sys
try:
    import ensurepip, venv
    has_venv = 1
except ImportError:
    has_venv = 0
ok = sys.implementation.name == "cpython" and sys.maxsize > 2**32 and sys.version_info >= (3, 12)
path = getattr(sys, "_base_executable", "") or sys.executable  # of a virtual environment: what it was made from
print("%d.%d.%d" % sys.version_info[:3], sys.version_info[1], int(ok), has_venv, path)
'
probe() { "$1" -I -c "$probe_source" 2>/dev/null </dev/null || "$1" -c "$probe_source" 2>/dev/null </dev/null; }

list_candidates() {
    local name root
    [ -z "${PYTHON:-}" ] || printf '%s\n' "$PYTHON"
    [ ! -x "$venv/bin/python" ] || printf '%s\n' "$venv/bin/python" # an unfinished .venv keeps its Python
    for name in python3.13 python3.12 python3; do PATH="$search_path" type -aP "$name" 2>/dev/null; done
    for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
        [ -n "$root" ] && [ -d "$root/versions" ] || continue
        # newest first: sort by the version, which is the folder's name
        for name in "$root"/versions/*/bin/python; do
            [ -x "$name" ] && printf '%s %s\n' "$(basename "$(dirname "$(dirname "$name")")")" "$name"
        done | sort -t. -k1,1nr -k2,2nr -k3,3nr | cut -d' ' -f2-
    done
}

# Sets python_path and python_version, or python_report (what was looked at) and fails. Versions beyond 3.13, which
# constraints.txt was not tested with, come last.
find_python() {
    local candidate fields version minor ok has_venv path later_path="" later_version="" seen=" "
    python_report=""
    while IFS= read -r candidate; do
        case "$seen" in *" $candidate "*) continue ;; esac
        seen="$seen$candidate "
        if ! fields=$(probe "$candidate") || [ -z "$fields" ]; then
            python_report="$python_report  $candidate: does not run (a shim of a version that is not selected?)"$'\n'
            continue
        fi
        read -r version minor ok has_venv path <<<"$fields"
        if [ "$ok" != 1 ]; then
            python_report="$python_report  $candidate: $version, not a 64-bit CPython >= 3.12"$'\n'
        elif [ "$has_venv" != 1 ]; then
            python_report="$python_report  $candidate: $version without venv and ensurepip;"
            python_report="$python_report Debian and Ubuntu: apt install python3.$minor-venv"$'\n'
        elif [ "$minor" -le 13 ] || [ "$candidate" = "${PYTHON:-}" ]; then
            python_path=$path python_version=$version
            return 0
        elif [ -z "$later_path" ]; then
            later_path=$path later_version=$version
        fi
    done < <(list_candidates)
    [ -n "$later_path" ] || return 1
    python_path=$later_path python_version=$later_version
}

no_python() {
    say "No Python >= 3.12 was found, which Megatron-Core needs. Looked at \$PYTHON, python3.13, python3.12 and python3"
    say "on PATH, and pyenv's versions:"
    [ -z "$python_report" ] || printf '%s' "$python_report" >&2
    [ -n "$python_report" ] || say "  (there is none of them)"
    say "Install one (Debian, Ubuntu: apt install python3.12 python3.12-venv; macOS: brew install python@3.12; pyenv:"
    say "pyenv install 3.12; conda: conda create -n dsv3 python=3.12), or name one: PYTHON=/path/to/python3.12"
    exit 2
}

# ---------------------------------------------------------------------------------------- an environment as it is

# Prints what the environment has, or, failing, what it lacks. Reads metadata only: importing torch takes seconds.
check_source='
import sys
if sys.version_info < (3, 12):
    sys.exit("Python %d.%d.%d is older than 3.12" % sys.version_info[:3])
import importlib.metadata as metadata, tomllib
try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit("packaging is not installed")
pyproject, extras = sys.argv[1], sys.argv[2].split()
with open(pyproject, "rb") as file:
    project = tomllib.load(file)["project"]
lines = list(project["dependencies"])
for extra in extras:
    lines += project["optional-dependencies"][extra]
lacking, versions = [], {}
for requirement in map(Requirement, lines):
    if requirement.marker and not requirement.marker.evaluate():
        continue
    try:
        version = versions[requirement.name] = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        lacking.append(str(requirement).split(";")[0] + " (not installed)")
        continue
    if not requirement.specifier.contains(version, prereleases=True):
        lacking.append(str(requirement).split(";")[0] + " (is " + version + ")")
if lacking:
    sys.exit("it lacks " + ", ".join(lacking))
print("Python %d.%d.%d, torch %s, megatron-core %s"
      % (*sys.version_info[:3], versions["torch"], versions["megatron-core"]))
'

# Sets python_path to the active environment's Python if there is one that satisfies the requirements.
use_active() {
    local candidate answer seen=" "
    for candidate in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}"; do
        [ -n "$candidate" ] || continue
        is_in_venv "$candidate" && [ ! -L "$venv" ] && continue
        candidate=$(type -P "$candidate") || continue
        case "$seen" in *" $candidate "*) continue ;; esac
        seen="$seen$candidate "
        if answer=$("$candidate" -c "$check_source" "$repo/pyproject.toml" "$extras" 2>&1 </dev/null); then
            say "environment: $candidate ($answer), used as it is"
            python_path=$candidate
            return 0
        fi
        say "environment: $candidate is not used: $(printf '%s' "$answer" | tail -n 1); .venv is"
    done
    return 1
}

# -------------------------------------------------------------------------------------------------- our own .venv

# What a finished .venv was made from; the Python's version is added by ready_key.
inputs_key() {
    local hash
    hash=$( (command -v sha256sum >/dev/null && exec sha256sum; command -v shasum >/dev/null && exec shasum -a 256; exec cksum) \
        < <(cat "$repo/constraints.txt" "$repo/pyproject.toml" "$repo/setup.py"; printf '%s' "$real_repo") )
    printf '%s' "${hash%% *}"
}
venv_version() { "$venv/bin/python" -I -c 'import platform; print(platform.python_version())' 2>/dev/null </dev/null; }

is_in_venv() { [ "$(dirname "$1")" -ef "$venv/bin" ]; }

# Stops before a .venv is touched that another checkout uses. The stamp's second line says whose set-up made it; a
# checkout that was moved since is no other one.
refuse_another_checkouts() {
    local owner target
    owner=$(sed -n '2s/^made by the set-up of //p' "$stamp" 2>/dev/null)
    [ "$owner" != "$real_repo" ] || return 0
    target=$(cd "$venv" 2>/dev/null && pwd -P)
    if [ -L "$venv" ]; then
        say "error: $venv is a link to $(readlink "$venv")${owner:+, which the set-up of $owner made}: it is not changed for this checkout."
    elif [ -n "$owner" ] && [ -e "$owner/examples/setup_environment.sh" ]; then
        say "error: $venv was made by the set-up of another checkout, $owner: it is not changed for this one."
    else
        return 0
    fi
    [ ! -x "$venv/bin/python" ] || say "To use that environment as it is: PYTHON=$target/bin/python"
    if [ -L "$venv" ]; then say "For one of this checkout's own: rm $venv"; else say "For one of this checkout's own: rm -r $venv"; fi
    exit 2
}

is_ready() {
    local version wanted
    [ -f "$stamp" ] || return 1
    version=$(venv_version) || return 1
    [ "$(head -n 1 "$stamp")" = "$(inputs_key) $version" ] || return 1
    [ -z "${PYTHON:-}" ] || is_in_venv "$PYTHON" && return 0
    wanted=$(probe "$PYTHON") || return 0 # a $PYTHON that does not run is reported when one is needed
    [ "${wanted%% *}" = "$version" ]
}

# Drops the metadata of every package with a missing or truncated file, so that pip installs it again: pip itself
# believes any metadata that it finds, even if it was killed half-way through the files.
repair_source='
import csv, pathlib, shutil, sysconfig
site = pathlib.Path(sysconfig.get_path("platlib"))
def is_whole(info):
    if not (info / "METADATA").is_file() or not (info / "RECORD").is_file():
        return False
    with open(info / "RECORD", newline="") as file:
        for row in csv.reader(file):
            if len(row) == 3 and row[2]:
                try:
                    if (site / row[0]).stat().st_size != int(row[2]):
                        return False
                except FileNotFoundError:
                    return False
    return True
for leftover in site.glob("~*"):
    shutil.rmtree(leftover, ignore_errors=True)
broken = [info for info in site.glob("*.dist-info") if not is_whole(info)]
for info in broken:
    shutil.rmtree(info)
    print("incomplete, will be installed again:", info.name.removesuffix(".dist-info"))
'

make_venv() {
    if [ -e "$venv" ]; then
        if [ "$(venv_version)" = "$python_version" ] && "$venv/bin/python" -I -c "$repair_source" \
            && "$venv/bin/python" -I -m pip --version; then
            return 0
        fi
        echo "$venv is not a working environment of Python $python_version: made anew"
        rm -rf "$venv"
    fi
    "$python_path" -I -m venv "$venv"
}
pip_install() { "$venv/bin/python" -I -m pip install --no-input --disable-pip-version-check -c "$repo/constraints.txt" "$@"; }
install_tools() { pip_install pip setuptools wheel; }
install_all() { cd "$repo" && pip_install --no-build-isolation -e '.[test]'; }
# A wheel can be installed and not load, for example with an old libstdc++.
check_imports() { cd / && "$venv/bin/python" -c 'import torch, megatron.core, dsv3_megatron.kernels, numpy, tokenizers'; }

job=""
interrupted() {
    [ -z "$job" ] || kill -- "-$job" 2>/dev/null # the whole group: pip is the job's child
    say ""
    say "set-up interrupted; run it again: it checks and completes what is there"
    exit 130
}

step=0
num_steps=5
run_step() { # run_step TITLE COMMAND...: one line, with the seconds; on failure the end of the log
    local title start=$SECONDS status
    step=$((step + 1))
    title="[$step/$num_steps] $1 ..."
    shift
    printf '%s' "$title" >&2
    printf '\n== %s %s\n' "$title" "$*" >>"$log"
    set -m # a process group of its own
    "$@" >>"$log" 2>&1 </dev/null 9>&- &
    job=$!
    set +m
    if [ -t 2 ]; then
        while kill -0 "$job" 2>/dev/null; do
            printf '\r%s %d s' "$title" $((SECONDS - start)) >&2
            sleep 0.2
        done
        printf '\r%s' "$title" >&2
    fi
    wait "$job"
    status=$?
    job=""
    if [ "$status" = 0 ]; then
        say " $((SECONDS - start)) s"
        return
    fi
    say " failed after $((SECONDS - start)) s. The end of $log:"
    tail -n 20 "$log" | sed 's/^/    /' >&2
    if grep -q 'No space left' "$log"; then
        say "The disk is full: the environment needs about $min_free_gb GB while it is installed."
    elif grep -qE 'NewConnectionError|NameResolutionError|Failed to establish|Could not find a version' "$log"; then
        say "A package could not be fetched: check the network, or the package index in pip's configuration."
    fi
    exit 1
}

use_venv() {
    local free_kb
    python_path="$venv/bin/python"
    ! is_ready || return 0
    refuse_another_checkouts

    # One set-up at a time: several nodes or terminals may share this folder.
    if command -v flock >/dev/null; then
        exec 9>"$repo/.setup.lock"
        flock -n 9 || { say "another set-up is running in $repo; waiting for it"; flock 9; }
        ! is_ready || return 0
    fi
    trap interrupted INT TERM HUP QUIT USR1 USR2 XCPU ALRM
    find_python || no_python
    : >"$log"
    step=1
    say "[1/$num_steps] Python $python_version ($python_path)"
    free_kb=$(df -Pk "$repo" 2>/dev/null | awk 'NR == 2 { print $4 }')
    if [ ! -e "$venv" ] && [ "${free_kb:-99999999}" -lt $((min_free_gb * 1024 * 1024)) ]; then
        say "      warning: $((free_kb / 1024 / 1024)) GB free at $repo; the environment needs about $min_free_gb GB"
    fi
    rm -f "$stamp"
    run_step ".venv" make_venv
    run_step "pip and setuptools" install_tools
    run_step "torch, Megatron-Core and the rest of constraints.txt (5.5 GB)" install_all
    run_step "import check" check_imports
    python_path="$venv/bin/python"
    printf '%s %s\nmade by the set-up of %s\n' "$(inputs_key)" "$(venv_version)" "$real_repo" >"$stamp.new" && mv "$stamp.new" "$stamp"
    say "environment: $venv"
}

# ------------------------------------------------------------------------------------------------------------ main

main() {
    extras="" own_venv=0 find_only=0
    while [ $# -gt 0 ]; do
        case "$1" in
            --venv) own_venv=1 ;;
            --find) find_only=1 ;;
            --extras)
                extras="${2:-}"
                [ "$extras" = test ] || { say "--extras $extras: the only group is test"; exit 2; }
                shift
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            *)
                say "$1 is not an option"
                usage
                exit 2
                ;;
        esac
        shift
    done

    if [ "$find_only" = 1 ]; then
        if is_ready; then python_path="$venv/bin/python"; else find_python || no_python; fi
    elif [ "$own_venv" = 1 ] || ! use_active; then
        use_venv
    fi
    printf '%s\n' "$python_path"
}

main "$@"; exit # one line: all of the script has been read before it starts, and may change on disk meanwhile
