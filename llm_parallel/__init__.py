"""LLM Parallel: 3D-parallel training of large language models on megatron-core."""

from llm_parallel import lean_import

__version__ = "0.1.0"
lean_import.install()
