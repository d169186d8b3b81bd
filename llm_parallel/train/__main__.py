"""The former name of ``python -m llm_parallel.worker``, for scripts that use it with torchrun or srun."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("llm_parallel.worker", run_name="__main__", alter_sys=True)
