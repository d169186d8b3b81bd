"""A run that asks for the Gluon kernel on a GPU that cannot run it is refused in one sentence when the model is
built."""

from types import SimpleNamespace

import pytest
import torch

from llm_parallel.config.tree import KernelsConfig
from llm_parallel.errors import UserError
from llm_parallel.model.attention import CoreAttention


def build(choice: str) -> CoreAttention:
    config = SimpleNamespace(
        kv_channels=64,
        kernels=KernelsConfig(attention=choice),
        num_query_groups=2,
        tensor_model_parallel_size=1,
        attention_scale=None,
        attention_softcap=0.0,
        keys_to_the_left=-1,
        qk_layernorm=False,
        qk_norm_over_heads=False,
        layers_without_rope=(),
    )
    return CoreAttention(config, 1, pg_collection=SimpleNamespace(cp=None))


def test_gluon_is_for_compute_capability_9(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UserError, match=r"kernels.attention = gluon needs .* this one has 8.0; use .*=auto"):
        build("gluon")
    build("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert build("gluon").kernels.attention == "gluon"
