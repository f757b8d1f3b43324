"""Builds the optional extensions `thl_engine._native` (C++) and `thl_engine._cuda`; the rest is in pyproject.toml.

They take raw tensor memory (DLPack), so they need pybind11 but not torch at build time and one build serves every
torch version. Where one cannot be built the package installs without it.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

try:
    import pybind11
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
except ImportError:
    build_ext = None

sys.path.insert(0, str(Path(__file__).parent / "csrc" / "cuda"))
import nvcc  # noqa: E402

FLAGS = [
    "-O3",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wno-psabi",  # vectors stay within one translation unit, so how they are passed does not matter
    # Every instruction set must round alike, so a*b+c is never fused behind our back.
    "-ffp-contract=off",
]
WITHOUT = {"thl_engine._native": "native kernels", "thl_engine._cuda": "CUDA kernels"}


def extensions():
    """The extensions with their command class, or nothing where pybind11 is missing."""
    if build_ext is None:
        print("thl_engine: installing without native and CUDA kernels: pybind11 is not installed")
        return [], {}

    class OptionalBuild(build_ext):
        """Reports a failed build in one line and lets the installation go on."""

        def build_extension(self, ext):
            try:
                if ext.name == "thl_engine._cuda":
                    self.build_cuda(ext)
                else:
                    super().build_extension(ext)
            except Exception as error:  # whatever a missing or failing compiler raises
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"thl_engine: installing without {WITHOUT[ext.name]}: {reason}")

        def build_cuda(self, ext):
            compiler = nvcc.find()
            if compiler is None:
                raise FileNotFoundError("nvcc is neither in $CUDA_HOME/bin nor on the PATH nor in /usr/local/cuda/bin")
            objects = nvcc.compile_all(compiler, Path(self.build_temp), [*self.include_dirs, pybind11.get_include()])
            nvcc.link(compiler, objects, Path(self.get_ext_fullpath(ext.name)))

    ParallelCompile().install()
    native = Pybind11Extension(
        "thl_engine._native",
        sorted(str(path) for folder in ("bind", "cpu", "io") for path in Path("csrc", folder).glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*/*.[hi]*")),
        include_dirs=["csrc"],
        cxx_std=20,
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
        optional=True,
    )
    cuda = Extension("thl_engine._cuda", [], optional=True)  # nvcc.sources()
    return [native, cuda], {"build_ext": OptionalBuild}


ext_modules, cmdclass = extensions()

setup(
    packages=[
        *find_packages(include=["thl_engine", "thl_engine.*"]),
        "thl_engine.kernels",
        "thl_engine.kernels.triton",
        "thl_engine.kernels.tuned",
    ],
    package_dir={
        "thl_engine.kernels": "kernels",
        "thl_engine.kernels.triton": "kernels/triton",
        "thl_engine.kernels.tuned": "kernels/tuned",
    },
    package_data={"thl_engine": ["*.pyi", "py.typed"], "thl_engine.kernels.tuned": ["*.json"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
