"""The sections of a run's configuration that are about training after pretraining: conversations, preferences and
adapters."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from llm_parallel.config.node import Node
from llm_parallel.config.tree_online import CriticConfig, GRPOConfig, PPOConfig, RejectConfig, RolloutConfig


class Columns(Node):
    """Names that a file has for the fields of its records; a field that is not named here has its usual name."""

    messages: str | None = None
    """The list of turns: ``messages`` or ``conversations``."""
    role: str | None = None
    """Who speaks, within a turn: ``role`` or ``from``."""
    content: str | None = None
    """What is said, within a turn: ``content`` or ``value``."""
    system: str | None = None
    """The system message."""
    tools: str | None = None
    """Tools that the assistant may call."""
    instruction: str | None = None
    """Alpaca's instruction."""
    input: str | None = None
    """Alpaca's second part of the question."""
    output: str | None = None
    """Alpaca's answer."""
    history: str | None = None
    """Alpaca's earlier questions and answers."""
    prompt: str | None = None
    """The text or messages that a completion answers."""
    completion: str | None = None
    """The answer to ``prompt``."""
    chosen: str | None = None
    """The better answer of a pair."""
    rejected: str | None = None
    """The worse answer of a pair."""
    label: str | None = None
    """Whether an answer was liked: ``label`` or ``kto_tag``."""
    responses: str | None = None
    """Several answers to one prompt."""
    scores: str | None = None
    """A number for each of ``responses``, of which more is better."""
    ranks: str | None = None
    """A number for each of ``responses``, of which 1 is the best."""
    margin: str | None = None
    """By how much the better answer of a pair is better."""


class ChatSource(Node):
    """One file of conversations of a mixture, or a folder of such files."""

    path: str
    """JSON lines (also .gz, .zst, .xz, .bz2), a JSON array, or Parquet; a folder stands for all such files in it."""
    weight: PositiveFloat = 1.0
    """How often each conversation is seen in one epoch; with 0.5 every epoch takes another half of them."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "completion", "pair", "label", "scores", "arena"] = "auto"
    """Which fields a record has; ``auto``: found by their names, and said. ``pair``, ``label``, ``scores`` and
    ``arena`` are preferences."""
    columns: Columns = Columns()
    """Names of this file's fields where they are not the format's, such as ``{instruction: question}``."""
    dataset: str | None = None
    """Name of the data set, where ``path`` is the folder of a LLaMA-Factory ``dataset_info.json``."""


class ChatConfig(Node):
    """Conversations for supervised fine-tuning, and how they become tokens."""

    train: tuple[ChatSource, ...] = ()
    """Sources of the training conversations."""
    eval: tuple[ChatSource, ...] = ()
    """Held-out conversations; if empty, ``eval_fraction`` of the training conversations are held out."""
    eval_fraction: float = Field(0.02, ge=0.0, lt=1.0)
    """Share of each training source's conversations that is held out when ``eval`` is empty; 0 for none."""
    max_records: PositiveInt | None = None
    """Records of each source that are used, its first ones; none: all."""
    template: str | None = None
    """Jinja template (a file) that writes conversations as text, or ``chatml``; if not given, the tokenizer's own, or
    ChatML where it has none."""
    system: str | None = None
    """System message of conversations that have none; none: whatever the template does without one."""
    date: str | None = None
    """Date that the template is told, as 2026-01-31; if not given, templates that ask for one are told 1 January 2026,
    so that the same data become the same tokens every day."""
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    """Answers of a conversation whose tokens are trained."""
    packing: Literal["best_fit", "pad"] = "best_fit"
    """``best_fit``: several whole conversations share a sample, which do not see each other; ``pad``: one each, and the
    rows of a micro batch are as long as its longest conversation, with ``parallel.pp`` > 1 as the step's longest."""
    too_long: Literal["cut", "drop"] = "cut"
    """Conversations longer than ``data.seq_length_tokens``: ``cut`` removes the earliest turns, and of an answer that
    is too long alone its end together with its stop token; ``drop`` leaves the conversation out. Both are counted."""
    show_answers: int = Field(3, ge=0)
    """Held-out conversations whose last turn the model answers at every evaluation, to look at."""
    show_prompts: tuple[str, ...] = ()
    """Questions that the model answers at every evaluation besides."""
    answer_tokens: PositiveInt = 64
    """Most tokens of an answer that is shown."""
    prepared: str | None = None
    """Folder of the conversations' tokens; the command that starts a run makes it and fills this in."""
    neftune_alpha: float = Field(0.0, ge=0.0)
    """Size of uniform noise on the embeddings while training (Jain et al. 2023, arXiv 2310.05914); 0: none."""

    @field_validator("date", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        """YAML reads 2026-01-31 as a date."""
        return value.isoformat() if isinstance(value, date) else value


class DPOConfig(Node):
    """Losses over pairs of a chosen and a rejected answer (``objectives/dpo.py`` has the formulas)."""

    beta: PositiveFloat = 0.1
    """How strongly the model is held to its reference; the factor of the difference in ``simpo`` and of the odds in
    ``orpo``, where 2.0 and 0.1 are usual."""
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"] = "sigmoid"
    """``sigmoid``: DPO (Rafailov et al. 2023, arXiv 2305.18290); ``robust`` (arXiv 2403.00409), ``hinge`` (SLiC, arXiv
    2305.10425), ``ipo`` (arXiv 2310.12036); ``simpo`` (arXiv 2405.14734) and ``orpo`` (arXiv 2403.07691) have no
    reference model."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round, in ``sigmoid`` and ``robust``."""
    length_normalised: bool = False
    """Log-probabilities divided by the number of an answer's tokens, in ``sigmoid``, ``robust`` and ``hinge``."""
    sft_weight: float = Field(0.0, ge=0.0)
    """Weight of the loss per token of the chosen answer, which is added."""
    gamma: float = Field(0.5, ge=0.0)
    """``simpo``: by how much the chosen answer must be better."""


class KTOConfig(Node):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306)."""

    beta: PositiveFloat = 0.1
    """How strongly the model is held to its reference."""
    desirable_weight: PositiveFloat | None = None
    """Weight of answers that were liked. If neither weight is given, the rarer kind has the weight that lets both
    kinds weigh the same over the training data, and the other 1."""
    undesirable_weight: PositiveFloat | None = None
    """Weight of the other answers; 1 if only the other weight is given."""


class RRHFConfig(Node):
    """Ranking of answers (Yuan et al. 2023, arXiv 2304.05302)."""

    best_weight: float = Field(1.0, ge=0.0)
    """Weight of the likelihood of each prompt's best answer beside the ranking."""
    mean_best: bool = False
    """The best answer's loss is a mean over its tokens, in place of their sum."""


class RewardConfig(Node):
    """A model that gives an answer a value (Ouyang et al. 2022, arXiv 2203.02155)."""

    center_weight: float = Field(0.0, ge=0.0)
    """Weight of the squared sum of a pair's values, which keeps values around 0 (arXiv 2312.09244)."""
    margins: bool = False
    """Whether the records' ``margin`` is taken from the difference of a pair's values (arXiv 2307.09288)."""


class ReferenceConfig(Node):
    """The model that ``dpo``, ``kto``, ``grpo`` and ``ppo`` hold the trained one to."""

    load: str | None = None
    """Hugging Face folder or checkpoint; if not given, the model that training begins with."""
    keep: Literal["file", "memory"] = "file"
    """``file``: log-probabilities of all answers are computed once and written beside their tokens; ``memory``: they
    are computed in every step, by the model without its adapters, or else by a second model in the run's precision."""
    folder: str | None = None
    """Where files of log-probabilities are kept, for several runs over the same data; if not given, in the run folder,
    beside the data."""


class MethodConfig(Node):
    """What a run trains for."""

    kind: Literal["pretrain", "sft", "dpo", "kto", "rrhf", "reward", "reject", "grpo", "ppo"] | None = None
    """``pretrain``: the next token of token files (``data.train``); ``sft``: the answers of conversations
    (``chat.train``); ``dpo``: chosen answers over rejected ones; ``kto``: answers that were liked or not; ``rrhf``:
    answers in their order; ``reward``: a model that values answers, learned from pairs; ``reject``, ``grpo``, ``ppo``:
    answers that the model gives to prompts while it is trained, the best of which it is fine-tuned on, or which are
    compared with each other, or with what a critic expected of them. If not given, ``sft`` where there are
    conversations and no token files."""
    dpo: DPOConfig = DPOConfig()
    kto: KTOConfig = KTOConfig()
    rrhf: RRHFConfig = RRHFConfig()
    reward: RewardConfig = RewardConfig()
    reference: ReferenceConfig = ReferenceConfig()
    rollout: RolloutConfig = RolloutConfig()
    reject: RejectConfig = RejectConfig()
    grpo: GRPOConfig = GRPOConfig()
    ppo: PPOConfig = PPOConfig()
    critic: CriticConfig = CriticConfig()


PREFERENCES = ("dpo", "kto", "rrhf", "reward")
"""Kinds of methods that learn from answers that are compared or judged: ``llm-parallel prefer``."""

Target = Literal["q", "k", "v", "o", "gate", "up", "down", "embed_tokens", "lm_head"]
OfVocabulary = Literal["embed_tokens", "lm_head"]


class AdapterConfig(Node):
    """Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): W x + scale · B A x, with only A and B trained."""

    rank: PositiveInt = 16
    """Rank r of the product B A."""
    alpha: PositiveFloat = 32.0
    """The scale is ``alpha / rank``."""
    rank_stabilized: bool = False
    """The scale is ``alpha / sqrt(rank)`` (rsLoRA; Kalajdzievski 2023, arXiv 2312.03732)."""
    dora: bool = False
    """Train a magnitude for every row of the adapted matrices too (DoRA; Liu et al. 2024, arXiv 2402.09353)."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of an adapter's inputs that is dropped while training."""
    targets: tuple[Target, ...] = Field(("q", "k", "v", "o", "gate", "up", "down"), min_length=1)
    """Projections of every layer that have adapters, and ``embed_tokens`` and ``lm_head`` for the embedding and the
    output projection."""
    modules_to_save: tuple[OfVocabulary, ...] = ()
    """Weights that are trained whole beside the adapters, as new special tokens need: ``embed_tokens``, ``lm_head``."""
    base: Literal["full", "int8", "nf4"] = "full"
    """How the frozen weights of the layers are held: in the run's precision, in 8 bits with a scale for each row, or in
    4 bits with a scale for each block of 64 (NF4, QLoRA; Dettmers et al. 2023, arXiv 2305.14314)."""
    load: str | None = None
    """PEFT folder or checkpoint of adapters that training starts from; none: A is drawn at random and B is zero."""
