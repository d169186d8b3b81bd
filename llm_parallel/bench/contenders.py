"""One training step by our trainer and by its peers, with the same weights, tokens and AdamW, in one process on one
device.

Every step is forward and backward over the global batch in micro batches, the gradient's global norm clipped, and
AdamW with decay of matrices only; with ``train.precision: bf16`` all keep bf16 weights beside fp32 main weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.data.loader import Batch
from llm_parallel.errors import UserError
from llm_parallel.model.hf import hf_tensors
from llm_parallel.model.hf_config import model_to_hf_config
from llm_parallel.model.init import initial_rows, initialize
from llm_parallel.model.mcore_config import transformer_config
from llm_parallel.model.numerics import Numerics, dtype_of
from llm_parallel.model.tensors import Role, all_names, kind_of
from llm_parallel.parallel.cpu_products import as_torch_multiplies
from llm_parallel.parallel.groups import Groups, open_groups
from llm_parallel.parallel.layout import Layout
from llm_parallel.parallel.platform import open_platform


@dataclass(frozen=True)
class Contender:
    """Something that can train a step."""

    modules: Sequence[nn.Module]
    """Modules whose forward a clock may watch."""
    gradient: Callable[[], float]
    """Runs forward and backward and computes the gradient's norm; returns the loss in nats per token."""
    update: Callable[[], None]
    """Clips the gradient and updates the weights."""

    def step(self) -> float:
        """Runs one training step and returns the loss before it."""
        loss = self.gradient()
        self.update()
        return loss


def global_batch(config: RunConfig, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Micro batches of random (tokens, labels), int64 [micro_batch, seq], the same for every contender."""
    assert config.model.vocab_size is not None
    shape = config.train.global_batch_size, config.data.seq_length_tokens + 1
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(config.seed))
    parts = tokens.to(device).split(config.train.micro_batch_size)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]


def _groups(config: RunConfig) -> Groups:
    platform = open_platform(config.device, threads=config.train.threads_per_process)
    return open_groups(Layout.from_config(config, 1), 0, platform, config.seed)


def ours(config: RunConfig) -> Contender:
    """Our model, engine and step, as ``pretrain`` runs them."""
    from llm_parallel.train.open import likelihood, policy_engine
    from llm_parallel.train.step import StepOutcome, apply_gradient, forward_backward

    groups = _groups(config)
    engine = policy_engine(config, groups)
    batches = [
        Batch(tokens, labels, torch.ones(tokens.shape, device=tokens.device))
        for tokens, labels in global_batch(config, groups.platform.device)
    ]
    last: list[StepOutcome] = []

    def gradient() -> float:
        last[:] = [forward_backward(engine, likelihood(config), batches)]
        return last[0].loss

    return Contender(
        engine.models, gradient, lambda: apply_gradient(engine, last[0], config.optim.lr, config.optim.clip_grad)
    )


def ours_torch(config: RunConfig) -> Contender:
    """Our trainer with every operator in plain torch."""
    kernels = dict.fromkeys(("rms_norm", "rope", "attention", "swiglu", "cross_entropy"), "torch")
    plain = config.kernels.model_copy(update={**kernels, "output_loss": "separate"})
    optim = config.optim.model_copy(update={"implementation": "torch"})
    return ours(config.model_copy(update={"kernels": plain, "optim": optim}))


class WithLoss(nn.Module):
    """transformers' model and the mean loss of its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels: int64 [b, s]; → fp32 []."""
        logits = self.model(input_ids=tokens).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


@torch.no_grad()
def initial_hf_weights(config: RunConfig, model: nn.Module) -> None:
    """Gives a transformers model of this configuration the weights that ours starts from."""
    found = model.state_dict()
    for name in all_names(config.model):
        kind = kind_of(name)
        rows = kind.shape(config.model)[kind.piece_dim]
        if kind.role is Role.NORM:
            whole = torch.ones(rows)
        elif kind.role is Role.BIAS:
            whole = torch.zeros(rows)
        else:
            whole = initial_rows(name, [range(rows)], config.model, config.seed)
            whole = whole.t() if kind.piece_dim == 1 else whole
        for key, value in hf_tensors(name, whole, config.model).items():
            found[key].copy_(value)


def hugging_face_model(config: RunConfig, device: torch.device) -> WithLoss:
    """Hugging Face's model of the same family with SDPA, in fp32, and the weights that ours starts from."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = model_to_hf_config(config.model, "float32", {}) | {"use_cache": False}
    with torch.device(device):
        described = AutoConfig.for_model(settings.pop("model_type"), **settings)
        inner = AutoModelForCausalLM.from_config(described, attn_implementation="sdpa").float().train()
    initial_hf_weights(config, inner)
    return WithLoss(inner)


class MainWeights:
    """The weights that the optimizer updates: the model's own in fp32; with ``train.precision: bf16`` fp32 copies,
    while the model's own become bf16."""

    def __init__(self, config: RunConfig, model: nn.Module) -> None:
        self._of = {p: p for p in model.parameters()}
        if dtype_of(config.train.precision) is torch.bfloat16:
            fp32 = [p.detach().clone().requires_grad_() for p in model.parameters()]
            self._of = dict(zip(model.to(torch.bfloat16).parameters(), fp32))
        self.weights: list[Tensor] = list(self._of.values())

    def take_gradients(self) -> None:
        """Moves the model's gradients to the main weights."""
        for parameter, main in self._of.items():
            if main is not parameter:
                assert parameter.grad is not None
                main.grad, parameter.grad = parameter.grad.float(), None

    @torch.no_grad()
    def write_back(self) -> None:
        """Gives the model the updated weights."""
        if any(main is not parameter for parameter, main in self._of.items()):
            torch._foreach_copy_(list(self._of), self.weights)


def transformers(config: RunConfig, compiled: bool = False) -> Contender:
    """Hugging Face's LlamaForCausalLM with SDPA and torch's fused AdamW."""
    device = torch.device("cuda" if config.device == "cuda" else "cpu")
    if config.train.threads_per_process:
        torch.set_num_threads(config.train.threads_per_process)
    model = hugging_face_model(config, device)
    mains = MainWeights(config, model)
    optimizer = adamw(config, mains.weights)
    run: Any = torch.compile(model) if compiled else model
    batches = global_batch(config, device)

    @as_torch_multiplies()
    def gradient() -> float:
        total = torch.zeros((), device=device)
        for tokens, labels in batches:
            loss = run(tokens, labels) / len(batches)
            loss.backward()
            total += loss.detach()
        mains.take_gradients()
        return total.item()

    def update() -> None:
        nn.utils.clip_grad_norm_(mains.weights, config.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mains.write_back()

    return Contender([run], gradient, update)


def adamw(config: RunConfig, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """torch's fused AdamW with our settings: weight decay of matrices only."""
    optim = config.optim
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.epsilon, fused=True)


def megatron(config: RunConfig, engine: bool = False) -> Contender:
    """megatron-core's own layers, loss, DDP and distributed optimizer, which our platform makes run on a CPU too.
    ``engine``: with Transformer Engine's layers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    groups = _groups(config)
    theirs: Any = _megatron_config(config, groups, engine)
    make_spec = get_gpt_layer_with_transformer_engine_spec if engine else get_gpt_layer_local_spec
    assert config.model.vocab_size is not None
    model = GPTModel(
        theirs,
        make_spec() if engine else make_spec(normalization="RMSNorm"),
        vocab_size=config.model.vocab_size,  # its own loss would count padding as tokens
        max_sequence_length=config.data.seq_length_tokens,
        position_embedding_type="rope",
        rotary_base=int(config.model.rope_base),
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        pg_collection=groups.collection,
    )
    initialize(model, config.model, groups, config.seed)
    model = model.to(groups.platform.device)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    inner = Float16Module(theirs, model) if theirs.bf16 else model
    chunk = DistributedDataParallel(theirs, ddp, inner)
    optimizer = get_megatron_optimizer(
        _megatron_optimizer_config(config), [chunk], use_gloo_process_groups=groups.platform.is_cuda
    )
    theirs.finalize_model_grads_func = lambda models, count, **_: finalize_model_grads(
        models, count, pg_collection=groups.collection
    )
    gradient = as_torch_multiplies()(_megatron_gradient(config, chunk, optimizer, groups))
    return Contender([model], gradient, lambda: optimizer.step())


def _megatron_config(config: RunConfig, groups: Groups, engine: bool) -> Any:
    """megatron-core's configuration of the same model, without our operators."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    stages = Layout.from_config(config, 1).stages
    ours_: Any = transformer_config(config.model, Numerics.from_config(config), groups.mesh, stages, groups.platform)
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
             "layernorm_epsilon", "params_dtype", "pipeline_dtype", "bf16", "use_cpu_initialization")  # fmt: skip
    return TransformerConfig(
        **{name: getattr(ours_, name) for name in names},
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        bias_activation_fusion=groups.platform.is_cuda,
        apply_rope_fusion=engine,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        calculate_per_token_loss=True,
    )


def _megatron_optimizer_config(config: RunConfig) -> Any:
    from megatron.core.optimizer import OptimizerConfig

    optim = config.optim
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.epsilon,
        clip_grad=optim.clip_grad,
        bf16=config.train.precision == "bf16",
        params_dtype=dtype_of(config.train.precision),
        use_distributed_optimizer=True,
    )


def _megatron_gradient(config: RunConfig, chunk: Any, optimizer: Any, groups: Groups) -> Callable[[], float]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    device, seq = groups.platform.device, config.data.seq_length_tokens
    batches = global_batch(config, device)
    positions = torch.arange(seq, device=device).expand(config.train.micro_batch_size, -1)
    mask = ~torch.ones(1, 1, seq, seq, dtype=torch.bool, device=device).tril()

    def loss_sum(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = losses.sum()
        return total, torch.tensor(losses.numel(), dtype=torch.int32, device=device), {"loss": total.detach()}

    def forward(iterator: Any, model: Any) -> Any:
        tokens, labels = next(iterator)
        return model(tokens, positions[: len(tokens)], mask, labels=labels), loss_sum

    def gradient() -> float:
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=[chunk],
            num_microbatches=len(batches),
            seq_length=seq,
            micro_batch_size=config.train.micro_batch_size,
            forward_only=False,
        )
        return sum(float(part["loss"]) for part in found) / sum(labels.numel() for _, labels in batches)

    return gradient


CONTENDERS: dict[str, Callable[[RunConfig], Contender]] = {
    "ours": ours,
    "ours-torch": ours_torch,
    "megatron-core": megatron,
    "megatron-core-te": lambda config: megatron(config, engine=True),
    "transformers": transformers,
    "transformers-compile": lambda config: transformers(config, compiled=True),
}

_NEEDS = {
    "megatron-core-te": ("transformer_engine", "Transformer Engine"),
    "transformers": ("transformers", "transformers"),
    "transformers-compile": ("transformers", "transformers"),
}


def chosen(names: Sequence[str], config: RunConfig) -> list[str]:
    """The contenders asked for; if none is named, all that this machine and model can run, torch.compile on CUDA only.

    Raises UserError for one that is unknown, not installed, or can't run this model."""
    for name in names:
        if name not in CONTENDERS:
            raise UserError(f"--providers {name} is unknown; there are {', '.join(CONTENDERS)}")
    found = []
    for name in names or CONTENDERS:
        problem = _why_not(name, config)
        if problem and names:
            raise UserError(f"--providers {name} {problem}")
        if not problem and (names or name != "transformers-compile" or config.device == "cuda"):
            found.append(name)
    return found


MEGATRON_TAKES = {"preset", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                  "head_dim", "vocab_size", "max_seq_length_tokens", "norm_epsilon", "rope_base", "tie_embeddings",
                  "init_std"}  # fmt: skip
"""Fields of ``model`` that megatron-core's own model is built from, or that change nothing in a measured step. With any
other it would be another model than ours."""


def _why_not(name: str, config: RunConfig) -> str | None:
    module, title = _NEEDS.get(name, (None, ""))
    if module and importlib.util.find_spec(module) is None:
        return f"needs {title}, which is not installed here"
    if name.startswith("megatron-core"):
        for option, field in ModelConfig.model_fields.items():
            if option not in MEGATRON_TAKES and getattr(config.model, option) != field.default:
                return f"can't be given model.{option}; leave it out or set model.{option} to its default"
    if name == "megatron-core-te" and config.device != "cuda":
        return "needs a GPU; Transformer Engine has no CPU kernels"
    return None
