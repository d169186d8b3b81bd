"""What every rank of a test needs; loaded once by the fork server (importing it takes seven seconds)."""

import logging
import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)

import torch  # noqa: E402
import torch._dynamo  # noqa: E402

torch.set_num_threads(1)

import llm_parallel.checkpoint.store  # noqa: E402
import llm_parallel.config.load  # noqa: E402
import llm_parallel.model.gpt  # noqa: E402
import llm_parallel.train.loop  # noqa: E402, F401
