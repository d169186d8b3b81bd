"""What every rank of a test needs; loaded once by the fork server (importing megatron-core takes five seconds)."""

import logging
import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)

import torch  # noqa: E402
import torch._dynamo  # noqa: E402

import llm_parallel  # noqa: E402, F401  (before megatron-core, as everywhere)

torch.set_num_threads(1)

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: E402, F401
