"""The Llama-style decoder: megatron-core's embedding, layers and output projection around our modules and loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from llm_kernels.cross_entropy.op import cross_entropy
from llm_kernels.linear_cross_entropy.op import linear_cross_entropy, weighted_linear_cross_entropy
from llm_parallel.config.tree import RunConfig
from llm_parallel.model.init import initialize
from llm_parallel.model.layer_spec import block_spec
from llm_parallel.model.mcore_config import padded_vocab_size, transformer_config
from llm_parallel.model.sequence import Angles, KVCache, frequencies, sequence_info
from llm_parallel.parallel.groups import Groups


class LlamaModel(LanguageModule):
    """One model chunk: the layers of one virtual pipeline stage, with embedding or output where they belong."""

    def __init__(self, config: RunConfig, groups: Groups, virtual_stage: int = 0) -> None:
        layout, model = groups.layout, config.model
        assert model.vocab_size is not None, "the vocabulary is taken from the tokenizer before the model is built"
        layers = layout.layers(groups.at.pp, virtual_stage)
        super().__init__(transformer_config(config, layout, groups.platform), groups.collection)
        self.run_config, self.groups = config, groups
        self.vocab_size = padded_vocab_size(model.vocab_size, layout.tp)
        self.pre_process, self.post_process = layers.start == 0, layers.stop == model.num_layers
        self.share_embeddings_and_output_weights = model.tie_embeddings
        # megatron-core's schedules and optimizer look for these two.
        self.vp_stage = virtual_stage if layout.vpp > 1 else None
        self.model_type = ModelType.encoder_or_decoder
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                self.config,
                self.vocab_size,
                config.data.seq_length_tokens,
                position_embedding_type="none",  # positions enter in CoreAttention
                tp_group=groups.collection.tp,
            )
        self.decoder = TransformerBlock(
            self.config,
            block_spec(len(layers)),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups.collection,
            vp_stage=self.vp_stage,
        )
        if self.post_process:
            self.output_layer = ColumnParallelLinear(
                model.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and model.tie_embeddings,
                tp_group=groups.collection.tp,
            )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        shard = self.vocab_size // layout.tp
        self.num_valid_words = min(max(model.vocab_size - groups.at.tp * shard, 0), shard)
        self.angles = Angles(frequencies(model, groups.platform.device))
        initialize(self, model, groups, config.seed)

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Takes the hidden states of the stage before, as megatron-core's schedules hand them over."""
        self.decoder.set_input_tensor(tensors[0])

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
        embedded_SBH = self.embedding(tokens, None) if self.pre_process else None
        hidden_SBH = self.decoder(embedded_SBH, None, packed_seq_params=info)
        if not self.post_process:
            return hidden_SBH
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        if labels is not None and self.run_config.kernels.output_loss != "separate":
            return self._projection_and_loss(hidden_SBH, weight, labels, loss_mask)
        logits_SBV, _bias = self.output_layer(hidden_SBH, weight=weight)
        return logits_SBV.transpose(0, 1).contiguous() if labels is None else self._loss(logits_SBV, labels)

    def _projection_and_loss(
        self, hidden_SBH: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Output projection and loss in one operator, which never holds all logits."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # The loss sums the gradient over the group, so every process takes its tokens' part of it.
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=group
            )
        options: dict[str, Any] = {
            "num_valid": self.num_valid_words,
            "group": group if self.groups.layout.tp > 1 else None,
            "backend": self.run_config.kernels.cross_entropy,
        }
        if self.run_config.kernels.output_loss == "fused" and loss_mask is not None:
            mask = loss_mask.t().contiguous()
            total, losses_SB = weighted_linear_cross_entropy(hidden_SBH, weight, labels.t(), mask, **options)
            return total, losses_SB.t()
        return linear_cross_entropy(hidden_SBH, weight, labels.t(), **options).t()

    def _loss(self, logits_SBV: Tensor, labels: Tensor) -> Tensor:
        """logits [S, B, V/tp], labels [B, S] → fp32 losses [B, S]; padding of the vocabulary takes no part."""
        losses_SB: Any = cross_entropy(
            logits_SBV,
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
