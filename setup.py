"""Only the C++ extension; everything else stands in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "llm_parallel._C",
            sorted(map(str, Path("csrc").glob("*.cpp"))),
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
    ]
)
