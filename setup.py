"""Maps `kernels/sora_kernels` to the package `sora_kernels` and builds csrc where it can.

The native library is optional: without torch, a C++ compiler or the right platform it is left out
with a message, and the other backends serve. Its CUDA kernels are built where there are nvcc and a
CUDA build of torch of the same major version (SORA_CUDA=0 leaves them out, SORA_CUDA=1 builds them
for any torch). Nothing here probes a GPU. All else is in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# One object for each instruction set; csrc/cpu/dispatch.cpp picks at run time.
PER_ISA = [
    "csrc/cpu/norm.cpp",
    "csrc/cpu/rope.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/causal.cpp",
    "csrc/cpu/group_norm.cpp",
    "csrc/cpu/winograd.cpp",
    "csrc/cpu/lora.cpp",
    "csrc/cpu/quant_linear.cpp",
    "csrc/cpu/quantise.cpp",
]
ONCE = ["csrc/cpu/dispatch.cpp"]
ONCE += [f"csrc/{name}bindings.cpp" for name in ("", "quant_", "vae_")]
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
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]
CUDA = ["csrc/cuda/norm.cu", "csrc/cuda/rope.cu"]
CUDA_BINDINGS = "csrc/cuda/bindings.cpp"
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Machine code of these, and PTX of the first for what is between and after them.
CUDA_ARCHITECTURES = ("80", "90a", "100")


def torch_folder() -> Path | None:
    """Where torch lies, found without importing it (its C++ extension helpers look for a GPU)."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


class Toolkit(NamedTuple):
    """Where CUDA's compiler is, and its headers and libraries."""

    nvcc: str
    home: Path


def toolkit(torch: Path) -> Toolkit | str:
    """The CUDA toolkit to build with, or why there is none."""
    wanted = os.environ.get("SORA_CUDA")
    if wanted == "0":
        return "SORA_CUDA=0"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        homes.insert(2, str(Path(on_path).resolve().parents[1]))
    for home in map(Path, filter(None, homes)):
        nvcc = shutil.which("nvcc", path=str(home / "bin"))
        if nvcc is not None and (home / "include/cuda_runtime_api.h").exists():
            break
    else:
        return "no nvcc with its headers; CUDA_HOME names the toolkit's folder"
    if wanted != "1":
        of_torch = re.search(r"^cuda\b.*= '(\d+)\.", (torch / "version.py").read_text(), re.M)
        if of_torch is None:
            return "torch is a CPU build"
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
        release = re.search(r"release (\d+)\.", said.stdout)
        if release is None or release[1] != of_torch[1]:
            return f"nvcc is of CUDA {release and release[1]}, torch of CUDA {of_torch[1]}"
    return Toolkit(nvcc, home)


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
        digest = runpy.run_path(str(ROOT / "kernels/sora_kernels/sources.py"))["digest"]
        defines = [("SORA_SOURCES", f'"{digest(ROOT / "csrc")}"')]
        defines += [("SORA_X86", "1")] if len(ISAS) > 1 else []
        objects: list[str] = []
        for isa, flags in ISAS.items():
            objects += self.compiler.compile(
                PER_ISA,
                output_dir=str(Path(self.build_temp) / isa),
                macros=[("SORA_ISA", isa)],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )
        once, libraries, folders = [*ONCE], ["c10", "torch_cpu"], [torch / "lib"]
        cuda = toolkit(torch)
        if isinstance(cuda, Toolkit):
            try:
                objects += self.compile_cuda(cuda)
            except Exception as error:
                cuda = str(error)
        if isinstance(cuda, Toolkit):
            once.append(CUDA_BINDINGS)
            includes.append(str(cuda.home / "include"))
            libraries.append("cudart")
            folders.append(cuda.home / "lib64")
        elif os.environ.get("SORA_CUDA") == "1":
            return self.leave_out(cuda)
        else:
            print(f"sora_kernels: without CUDA kernels ({cuda})", file=sys.stderr)
        objects += self.compiler.compile(
            once,
            output_dir=self.build_temp,
            macros=defines,
            include_dirs=includes,
            # The headers are most of the time; the kernels are elsewhere, so do not optimise long.
            extra_postargs=[*FLAGS, *self.threads(), "-O1", "-g0"],
            depends=ext.depends,
        )
        rpath = [] if sys.platform == "darwin" else [f"-Wl,-rpath,{folder}" for folder in folders]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=libraries,
            library_dirs=[str(folder) for folder in folders],
            extra_postargs=rpath,
            target_lang="c++",
        )
        return None

    def threads(self) -> list[str]:
        """What makes `at::parallel_for` run on several threads: PyTorch has it in a header, as
        OpenMP. GCC's runtime is PyTorch's own on Linux, through which it is found on loading;
        Clang's is another, so that Clang's code stays on one thread."""
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        said = subprocess.run([compiler[0], "--version"], capture_output=True, text=True)
        if sys.platform.startswith("linux") and "clang" not in said.stdout.lower():
            return ["-fopenmp"]
        print("sora_kernels: the C++ kernels will run on one thread", file=sys.stderr)
        return []

    def compile_cuda(self, cuda: Toolkit) -> list[str]:
        """Objects of csrc/cuda's kernels. These files see no header of PyTorch."""
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES]
        oldest = CUDA_ARCHITECTURES[0]
        codes.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
        objects = []
        for source in CUDA:
            target = Path(self.build_temp) / "cuda" / f"{Path(source).stem}.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([cuda.nvcc, *CUDA_FLAGS, *codes, "-c", source, "-o", str(target)])
            objects.append(str(target))
        return objects


setup(
    packages=[
        *find_packages(include=["sora_engine", "sora_engine.*"]),
        *find_packages("kernels", include=["sora_kernels", "sora_kernels.*"]),
    ],
    package_dir={"sora_engine": "sora_engine", "sora_kernels": "kernels/sora_kernels"},
    ext_modules=[
        Extension(
            "sora_kernels._native",
            sources=[*PER_ISA, *ONCE, CUDA_BINDINGS],
            depends=sorted(
                str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix != ".cpp"
            ),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
