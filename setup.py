"""The part of the packaging that pyproject.toml cannot say: `kernels/` is installed as `dsv3_megatron.kernels`.

Another project on PyPI owns the top-level name `kernels`, so ours is mapped below the package. Everything else is in
pyproject.toml.
"""

from setuptools import find_packages, setup

kernel_packages = ["dsv3_megatron.kernels"] + [f"dsv3_megatron.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=find_packages(include=["dsv3_megatron", "dsv3_megatron.*"]) + kernel_packages,
    package_dir={"dsv3_megatron.kernels": "kernels"},
)
