"""Builds the optional C++ extension `thl_engine._native`; everything else is in pyproject.toml.

The extension takes raw tensor memory (DLPack), so it needs pybind11 but not torch at build time and one
build serves every torch version. Where it cannot be built the package installs without it.
"""

from pathlib import Path

from setuptools import setup

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
except ImportError:
    build_ext = None

FLAGS = [
    "-O3",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wno-psabi",  # vectors stay within one translation unit, so how they are passed does not matter
    # Every instruction set must round alike, so a*b+c is never fused behind our back.
    "-ffp-contract=off",
]


def extensions():
    """The extension with its command class, or nothing where pybind11 is missing."""
    if build_ext is None:
        print("thl_engine: installing without native kernels: pybind11 is not installed")
        return [], {}

    class OptionalBuild(build_ext):
        """Reports a failed build in one line and lets the installation go on."""

        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except Exception as error:  # whatever a missing or failing compiler raises
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"thl_engine: installing without native kernels: {reason}")

    ParallelCompile().install()
    native = Pybind11Extension(
        "thl_engine._native",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*.[hi]*")),
        cxx_std=20,
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
        optional=True,
    )
    return [native], {"build_ext": OptionalBuild}


ext_modules, cmdclass = extensions()

setup(
    packages=["thl_engine", "thl_engine.cli", "thl_engine.models", "thl_engine.train", "thl_engine.kernels",
              "thl_engine.kernels.triton"],
    package_dir={"thl_engine.kernels": "kernels", "thl_engine.kernels.triton": "kernels/triton"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
