"""What an installation holds: every sub-package, the kernels below dsv3_megatron, no top-level `kernels`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_kernels_are_installed_below_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib",
               str(tmp_path / "lib")]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
    built = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*.py")}
    sources = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "dsv3_megatron").rglob("*.py")}
    kernels = {f"dsv3_megatron/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "kernels").rglob("*.py")}
    assert built == sources | kernels
    assert "dsv3_megatron/kernels/__init__.py" in built


def test_a_checkout_on_the_path_finds_its_own_kernels(tmp_path: Path) -> None:
    """Another checkout may be the one that is installed, and on a machine that is lent for minutes none is."""
    shutil.copytree(REPOSITORY / "dsv3_megatron", tmp_path / "dsv3_megatron", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copytree(REPOSITORY / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("*.pyc"))
    code = "import dsv3_megatron.kernels as kernels; print(kernels.__file__)"
    for flags in ([], ["-S"]):  # with and without what is installed
        done = subprocess.run([sys.executable, *flags, "-c", code], cwd=tmp_path, check=True, capture_output=True,
                              text=True, timeout=60, env={"PYTHONPATH": str(tmp_path)})
        assert done.stdout.strip() == str(tmp_path.resolve() / "kernels" / "__init__.py")


def test_every_dependency_is_pinned_within_its_range() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line) for line in lines)
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    for line in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), line
