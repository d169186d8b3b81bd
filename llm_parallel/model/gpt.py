"""The Llama-style decoder: megatron-core's GPTModel with our modules, loss and sequence information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from llm_kernels.cross_entropy.op import cross_entropy
from llm_kernels.linear_cross_entropy.op import linear_cross_entropy, weighted_linear_cross_entropy
from llm_parallel.config.tree import RunConfig
from llm_parallel.model.init import initialize
from llm_parallel.model.layer_spec import block_spec
from llm_parallel.model.mcore_config import padded_vocab_size, transformer_config
from llm_parallel.model.sequence import Angles, KVCache, frequencies, sequence_info
from llm_parallel.parallel.groups import Groups


class LlamaModel(GPTModel):
    """One model chunk: the layers of one virtual pipeline stage, with embedding or output where they belong."""

    def __init__(self, config: RunConfig, groups: Groups, virtual_stage: int = 0) -> None:
        layout, model = groups.layout, config.model
        assert model.vocab_size is not None, "the vocabulary is taken from the tokenizer before the model is built"
        layers = layout.layers(groups.at.pp, virtual_stage)
        super().__init__(
            config=transformer_config(config, layout, groups.platform),
            transformer_layer_spec=block_spec(len(layers)),
            vocab_size=padded_vocab_size(model.vocab_size, layout.tp),
            max_sequence_length=config.data.seq_length_tokens,
            pre_process=layers.start == 0,
            post_process=layers.stop == model.num_layers,
            parallel_output=True,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="none",  # positions enter in CoreAttention
            pg_collection=groups.collection,
            vp_stage=virtual_stage if layout.vpp > 1 else None,
        )
        self.run_config, self.groups = config, groups
        shard = self.vocab_size // layout.tp
        self.num_valid_words = min(max(model.vocab_size - groups.at.tp * shard, 0), shard)
        self.angles = Angles(frequencies(model, groups.platform.device))
        initialize(self, model, groups, config.seed)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        document_starts: Sequence[Tensor] | None = None,
        cache: KVCache | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens, labels: int64 [B, S] of this process's part of each sample (zigzag under context parallelism).

        Last stage: fp32 losses [B, S] if labels are given, else this process's columns of the logits [B, S, V/tp]. With
        ``kernels.output_loss: fused`` and a loss_mask fp32 [B, S]: (sum of masked losses, losses without gradient).
        Other stages: hidden states for the next one.
        """
        layout = self.groups.layout
        if cache is None:
            ranges = layout.token_ranges(tokens.shape[1] * layout.cp, self.groups.at.cp)
        else:
            ranges = (range(cache.length, cache.length + tokens.shape[1]),)
        shape = tokens.shape[0], tokens.shape[1] * layout.cp
        info = sequence_info(ranges, document_starts, self.angles, shape, cache)
        return super().forward(tokens, None, None, labels=labels, loss_mask=loss_mask, packed_seq_params=info)

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **rest: Any,
    ) -> Any:
        """megatron-core's, or output projection and loss in one where that is configured."""
        how = self.run_config.kernels.output_loss
        if not self.post_process or labels is None or how == "separate":
            return super()._postprocess(hidden_states, *args, labels=labels, loss_mask=loss_mask, **rest)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # The loss sums the gradient over the group, so every process takes its tokens' part of it.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=group
            )
        options: dict[str, Any] = {
            "num_valid": self.num_valid_words,
            "group": group if self.groups.layout.tp > 1 else None,
            "backend": self.run_config.kernels.cross_entropy,
        }
        if how == "fused" and loss_mask is not None:
            mask = loss_mask.t().contiguous()
            total, losses_SB = weighted_linear_cross_entropy(hidden_states, weight, labels.t(), mask, **options)
            return total, losses_SB.t()
        return linear_cross_entropy(hidden_states, weight, labels.t(), **options).t()

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [B, S], logits [S, B, V/tp] → fp32 losses [B, S]; padding of the vocabulary takes no part."""
        losses_SB: Any = cross_entropy(
            logits,
            labels.t(),
            num_valid=self.num_valid_words,
            group=self.pg_collection.tp if self.groups.layout.tp > 1 else None,
            inplace_backward=True,  # nothing else reads the logits
            backend=self.run_config.kernels.cross_entropy,
        )
        return losses_SB.t()


def build_chunks(config: RunConfig, groups: Groups) -> list[LlamaModel]:
    """All model chunks of this process, in the order of their virtual stages, with initial weights."""
    return [LlamaModel(config, groups, stage) for stage in range(groups.layout.vpp)]
