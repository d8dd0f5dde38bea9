"""Maps `kernels/sora_kernels` to the package `sora_kernels` and builds csrc where it can.

The native library is optional: without torch, a C++ compiler or the right platform it is left out
with a message, and the other backends serve. Nothing here probes a GPU. All else is in
pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# One object for each instruction set; csrc/cpu/dispatch.cpp picks at run time.
PER_ISA = [
    "csrc/cpu/norm.cpp",
    "csrc/cpu/rope.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/causal.cpp",
]
ONCE = ["csrc/cpu/dispatch.cpp", "csrc/bindings.cpp"]
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
FLAGS += ["-Wno-attributes", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [
        *ISAS["avx2"],
        *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")),
        "-mprefer-vector-width=512",
    ]


def torch_folder() -> Path | None:
    """Where torch lies, found without importing it (its C++ extension helpers look for a GPU)."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


class BuildNative(build_ext):
    """Compiles the kernels once for each instruction set and links one library."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self.leave_out(str(error))

    def leave_out(self, why: str) -> None:
        if os.environ.get("SORA_REQUIRE_NATIVE") == "1":
            raise RuntimeError(f"the native kernels cannot be built: {why}")
        print(
            f"sora_kernels: native kernels left out ({why}); other backends serve", file=sys.stderr
        )
        self.extensions = []

    def build_extension(self, ext: Any) -> None:
        torch = torch_folder()
        if torch is None:
            return self.leave_out("torch is not installed here; try --no-build-isolation")
        if sys.platform == "win32":
            return self.leave_out("the sources need GCC or Clang")
        includes = [str(torch / "include"), str(torch / "include/torch/csrc/api/include")]
        defines = [("SORA_X86", "1")] if len(ISAS) > 1 else []
        objects: list[str] = []
        for isa, flags in ISAS.items():
            objects += self.compiler.compile(
                PER_ISA,
                output_dir=str(Path(self.build_temp) / isa),
                macros=[("SORA_ISA", isa)],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )
        objects += self.compiler.compile(
            ONCE,
            output_dir=self.build_temp,
            macros=defines,
            include_dirs=includes,
            # The headers are most of the time; the kernels are elsewhere, so do not optimise long.
            extra_postargs=[*FLAGS, "-O1", "-g0"],
            depends=ext.depends,
        )
        rpath = [] if sys.platform == "darwin" else [f"-Wl,-rpath,{torch / 'lib'}"]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["c10", "torch_cpu"],
            library_dirs=[str(torch / "lib")],
            extra_postargs=rpath,
            target_lang="c++",
        )
        return None


setup(
    packages=[
        *find_packages(include=["sora_engine", "sora_engine.*"]),
        *find_packages("kernels", include=["sora_kernels", "sora_kernels.*"]),
    ],
    package_dir={"sora_engine": "sora_engine", "sora_kernels": "kernels/sora_kernels"},
    ext_modules=[
        Extension(
            "sora_kernels._native",
            sources=[*PER_ISA, *ONCE],
            depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.h")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
