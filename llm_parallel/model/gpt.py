"""The Llama-style decoder: megatron-core's embedding, layers and output projection around our modules and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from llm_kernels.cross_entropy.op import cross_entropy
from llm_kernels.linear_cross_entropy.op import linear_cross_entropy, weighted_linear_cross_entropy
from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.data.batch import Documents
from llm_parallel.model.adapters import add_adapters
from llm_parallel.model.deterministic import token_losses
from llm_parallel.model.entropy import entropy
from llm_parallel.model.heads import ValueHead
from llm_parallel.model.init import initialize
from llm_parallel.model.layer_spec import block_spec
from llm_parallel.model.mcore_config import padded_vocab_size, transformer_config
from llm_parallel.model.noise import add_embedding_noise
from llm_parallel.model.numerics import Numerics
from llm_parallel.model.observe import Seen, observe
from llm_parallel.model.sequence import Angles, sequence_info, whole_length
from llm_parallel.model.vocabulary_adapters import OutputLayer, add_vocabulary_adapters, trained_whole
from llm_parallel.parallel.engine import FrozenBase, Network
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.layout import Layout
from llm_parallel.parallel.stages import Stages

NO_OPTIONS: Mapping[str, float] = {}


class LlamaModel(LanguageModule):
    """One model chunk: the layers of one virtual pipeline stage, with embedding or output where they belong.

    model_config: the whole model; numerics: how it computes; groups, stages: where its parts live.
    """

    def __init__(
        self, model: ModelConfig, numerics: Numerics, groups: Groups, stages: Stages, seed: int, virtual_stage: int = 0
    ) -> None:
        mesh = groups.mesh
        assert model.vocab_size is not None, "the vocabulary is taken from the tokenizer before the model is built"
        assert stages.total_layers == model.num_layers and stages.pp == mesh.pp
        layers = stages.layers(groups.at.pp, virtual_stage)
        super().__init__(transformer_config(model, numerics, mesh, stages, groups.platform), groups.collection)
        self.model_config, self.numerics, self.groups, self.stages = model, numerics, groups, stages
        self.seed = seed
        self.vocab_size = padded_vocab_size(model.vocab_size, mesh.tp)
        self.pre_process, self.post_process = layers.start == 0, layers.stop == model.num_layers
        self.share_embeddings_and_output_weights = model.tie_embeddings and not model.value_head
        # megatron-core's schedules and optimizer look for these two.
        self.vp_stage = virtual_stage if stages.vpp > 1 else None
        self.model_type = ModelType.encoder_or_decoder
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                self.config,
                self.vocab_size,
                model.max_seq_length_tokens,
                position_embedding_type="none",  # positions enter in CoreAttention
                tp_group=groups.collection.tp,
            )
        self.decoder = TransformerBlock(
            self.config,
            block_spec(len(layers), model),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups.collection,
            vp_stage=self.vp_stage,
        )
        if self.post_process and model.value_head:
            self.value_head = ValueHead(self.config, groups.platform.device, groups.collection.tp)
        elif self.post_process:
            self.output_layer = OutputLayer(
                model.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and model.tie_embeddings,
                tp_group=groups.collection.tp,
            )
        if model.value_head:
            if self.pre_process:
                self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        elif self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        shard = self.vocab_size // mesh.tp
        self.num_valid_tokens = min(max(model.vocab_size - groups.at.tp * shard, 0), shard)
        self.angles = Angles(model, groups.platform.device)
        self.is_frozen = False
        """Whether adapters are trained in place of the weights."""
        initialize(self, model, groups, seed)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """For megatron-core's checkpoints; its language models would look for an output projection."""
        of = MegatronModule if self.model_config.value_head else LanguageModule
        return of.sharded_state_dict(self, prefix, sharded_offsets, metadata)

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Takes the hidden states of the stage before, as megatron-core's schedules hand them over."""
        self.decoder.set_input_tensor(tensors[0])

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        documents: Documents | None = None,
        weights: Tensor | None = None,
        loss_options: Mapping[str, float] = NO_OPTIONS,
        numbers: Tensor | None = None,
        seen: Seen | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens, labels: int64 [B, S] of this process's part of each sample (zigzag under context parallelism).

        Last stage: fp32 values [B, S] of a model with a value head; of others fp32 losses [B, S] if labels are given,
        else this process's columns of the logits [B, S, V/tp]. With ``kernels.output_loss: fused`` and weights fp32 [B,
        S]: (sum of weighted losses, losses without gradient). ``loss_options``: keyword arguments of the loss operator,
        such as label_smoothing; with ``entropy``: (losses, the entropies of the model's distributions, fp32 [B, S]),
        for which logits are held. Other stages: hidden states for the next one. ``numbers``: int64 [B] of the samples,
        which noise on the embeddings depends on. ``seen`` is filled in by the last stage if labels are given."""
        mesh = self.groups.mesh
        ranges = mesh.token_ranges(tokens.shape[1] * mesh.cp, self.groups.at.cp)
        shape = tokens.shape[0], tokens.shape[1] * mesh.cp
        info = sequence_info(ranges, documents, self.angles, shape)
        length = whole_length(documents, shape[1])
        embedded_SBH = self._embedded(tokens, ranges, numbers, length) if self.pre_process else None
        recomputes = self.numerics.recompute.granularity != "none"
        if embedded_SBH is not None and self.is_frozen and recomputes and torch.is_grad_enabled():
            # A recomputed layer has a gradient only if its input has one, and a frozen embedding's result has none.
            embedded_SBH.requires_grad_()
        hidden_SBH = self.decoder(embedded_SBH, None, packed_seq_params=info)
        if not self.post_process:
            return hidden_SBH
        if self.model_config.value_head:
            return self.value_head(hidden_SBH)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        wants_entropy = "entropy" in loss_options
        if labels is not None and self.numerics.kernels.output_loss != "separate" and not wants_entropy:
            if self.config.sequence_parallel:
                # The loss sums the gradient over the group, so every process takes its tokens' part of it.
                hidden_SBH = gather_from_sequence_parallel_region(
                    hidden_SBH, tensor_parallel_output_grad=False, group=self.pg_collection.tp
                )
            self._look(seen, lambda rows: hidden_SBH.flatten(0, 1)[rows] @ weight.t(), labels)
            return self._projection_and_loss(hidden_SBH, weight, labels, weights, loss_options)
        logits_SBV, _bias = self.output_layer(hidden_SBH, weight=weight)
        if labels is not None:
            self._look(seen, lambda rows: logits_SBV.flatten(0, 1)[rows], labels)
            if wants_entropy:
                return self._loss_and_entropy(logits_SBV, labels, loss_options)
            return self._loss(logits_SBV, labels, loss_options)
        cap = self.model_config.output_softcap
        return (cap * torch.tanh(logits_SBV / cap) if cap else logits_SBV).transpose(0, 1).contiguous()

    def _embedded(self, tokens: Tensor, ranges: Sequence[range], numbers: Tensor | None, length: int) -> Tensor:
        """Embeddings of the tokens [B, S] at the positions ``ranges`` of samples of ``length`` tokens, with noise in
        training where that is wanted."""
        embedded_SBH = self.embedding(tokens, None)
        adapter = getattr(self.embedding, "adapter", None)
        if adapter is not None and adapter.on:
            embedded_SBH = adapter(tokens, embedded_SBH)
        alpha, mesh = self.numerics.embedding_noise, self.groups.mesh
        if not alpha or not self.training or numbers is None:
            return embedded_SBH
        positions = torch.cat([torch.arange(part.start, part.stop) for part in ranges])
        if mesh.sequence_parallel:
            positions = positions.chunk(mesh.tp)[self.groups.at.tp]
        return add_embedding_noise(embedded_SBH, alpha, self.seed, numbers, positions, length)

    def _look(self, seen: Seen | None, logits_of: Callable[[slice], Tensor], labels: Tensor) -> None:
        """Fills in what is wanted beside the loss; ``logits_of`` gives those of some of the S·B positions."""
        if seen is None:
            return
        group = self._vocabulary_group
        with torch.no_grad():
            found = observe(
                logits_of,
                labels.t(),
                self.vocab_size // self.groups.mesh.tp,
                self.num_valid_tokens,
                self.model_config.output_softcap,
                group,
            )
        seen.hits, seen.entropies = found.hits, found.entropies

    def _projection_and_loss(
        self,
        hidden_SBH: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        loss_options: Mapping[str, float],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Output projection and loss in one operator, which never holds all logits; hidden_SBH has all tokens."""
        group = self.pg_collection.tp
        options: dict[str, Any] = {
            **loss_options,
            "softcap": self.model_config.output_softcap,
            "num_valid": self.num_valid_tokens,
            "group": group if self.groups.mesh.tp > 1 else None,
            "backend": self.numerics.kernels.cross_entropy,
        }
        if self.numerics.kernels.output_loss == "fused" and weights is not None:
            by_token = weights.t().contiguous()
            total, losses_SB = weighted_linear_cross_entropy(hidden_SBH, weight, labels.t(), by_token, **options)
            return total, losses_SB.t()
        return linear_cross_entropy(hidden_SBH, weight, labels.t(), **options).t()

    @property
    def _vocabulary_group(self) -> Any:
        """The processes that divide the vocabulary, if it is divided."""
        return self.pg_collection.tp if self.groups.mesh.tp > 1 else None

    def _loss_and_entropy(
        self, logits_SBV: Tensor, labels: Tensor, loss_options: Mapping[str, float]
    ) -> tuple[Tensor, Tensor]:
        """The same as ``_loss``, and the entropies of the distributions, fp32 [B, S]."""
        options = {name: value for name, value in loss_options.items() if name != "entropy"}
        cap = self.model_config.output_softcap
        entropies_SB = entropy(logits_SBV, self.num_valid_tokens, cap, self._vocabulary_group)
        return self._loss(logits_SBV, labels, options, keeps_logits=True), entropies_SB.t()

    def _loss(
        self, logits_SBV: Tensor, labels: Tensor, loss_options: Mapping[str, float], keeps_logits: bool = False
    ) -> Tensor:
        """logits [S, B, V/tp], labels [B, S] → fp32 losses [B, S]; padding of the vocabulary takes no part.
        ``keeps_logits``: backward must not write over them."""
        group = self._vocabulary_group
        if self.numerics.kernels.deterministic and not any(loss_options.values()):
            model = self.model_config
            assert model.vocab_size is not None
            shape = self.num_valid_tokens, model.vocab_size, model.output_softcap
            return token_losses(logits_SBV, labels.t(), *shape, group).t()
        options: dict[str, Any] = dict(loss_options)
        losses_SB: Any = cross_entropy(
            logits_SBV,
            labels.t(),
            num_valid=self.num_valid_tokens,
            group=group,
            softcap=self.model_config.output_softcap,
            inplace_backward=not keeps_logits,  # if nothing else reads the logits
            backend=self.numerics.kernels.cross_entropy,
            **options,
        )
        return losses_SB.t()


def build_network(
    model: ModelConfig,
    numerics: Numerics,
    groups: Groups,
    stages: Stages,
    seed: int,
    adapter: AdapterConfig | None = None,
) -> Network:
    """This process's chunks of a model, in the order of their virtual stages, with initial weights that ``seed``
    decides, and with adapters on frozen weights if they are given. A process may hold several networks."""
    models = [LlamaModel(model, numerics, groups, stages, seed, stage) for stage in range(stages.vpp)]
    if adapter is not None:
        for chunk in models:
            chunk.is_frozen = True
            add_adapters(chunk, adapter, groups, seed)
            add_vocabulary_adapters(chunk, adapter, groups, seed)
    base = None if adapter is None else FrozenBase(adapter, trained_whole(model, adapter))
    return Network.of(models, groups, stages, base)


def build_policy(config: RunConfig, groups: Groups) -> Network:
    """The model that a run configuration describes, with its adapters if it has them. The base that these change is
    not loaded yet."""
    stages = Layout.from_config(config, groups.mesh.world_size).stages
    return build_network(config.model, Numerics.from_config(config), groups, stages, config.seed, config.adapter)
