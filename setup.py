"""Only the C++ extensions; everything else stands in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup


def extension(name: str, folder: str, **more: bool) -> Pybind11Extension:
    """All C++ files of a folder."""
    return Pybind11Extension(
        f"llm_parallel.{name}",
        sorted(map(str, Path(folder).glob("*.cpp"))),
        depends=sorted(map(str, Path(folder).glob("*.h"))),
        cxx_std=17,
        extra_compile_args=["-O3"],
        **more,
    )


# Generation works without its extension, by torch's operators, so a compiler that cannot build it stops nothing.
setup(ext_modules=[extension("_C", "csrc"), extension("_decode", "csrc/decode", optional=True)])
