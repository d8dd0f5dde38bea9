"""Maps `kernels/sora_kernels` to the package `sora_kernels`; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["sora_engine", "sora_engine.*"]),
        *find_packages("kernels", include=["sora_kernels", "sora_kernels.*"]),
    ],
    package_dir={"sora_engine": "sora_engine", "sora_kernels": "kernels/sora_kernels"},
)
