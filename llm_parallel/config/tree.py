"""The configuration of a run: one frozen, typed tree. A field's unit is in its name and its meaning in its docstring.

Each node checks its own fields here; rules between fields are in rules.py. ``load.py`` builds the tree from a YAML file
and ``section.field=value`` overrides.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from llm_parallel.config.node import Node
from llm_parallel.config.tree_evaluate import EvaluateConfig
from llm_parallel.config.tree_online import ONLINE
from llm_parallel.config.tree_tune import PREFERENCES, AdapterConfig, ChatConfig, MethodConfig

__all__ = ["AdapterConfig", "ChatConfig", "MethodConfig", "Node", "RunConfig"]


class RopeScaling(Node):
    """How rotary frequencies were changed for a longer context; the parameters are those of config.json."""

    kind: Literal["llama3", "linear", "dynamic", "yarn", "longrope"] = "llama3"
    """``llama3`` (Grattafiori et al. 2024, arXiv 2407.21783); ``linear``: all positions divided by ``factor`` (Chen et
    al. 2023, arXiv 2306.15595); ``dynamic``: a base that grows with samples longer than the original context; ``yarn``
    (Peng et al. 2023, arXiv 2309.00071); ``longrope`` (Ding et al. 2024, arXiv 2402.13753)."""
    factor: PositiveFloat = 8.0
    """How many times longer the context became."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above ``original_max_position / low_freq_factor`` tokens are stretched by ``factor``."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below ``original_max_position / high_freq_factor`` tokens stay as they are."""
    original_max_position: PositiveInt = 8192
    """Context length in tokens before the extension."""
    beta_fast: PositiveFloat = 32.0
    """``yarn``: pairs that turn more often than this within the original context keep their frequency."""
    beta_slow: PositiveFloat = 1.0
    """``yarn``: pairs that turn less often than this have their frequency divided by ``factor``."""
    attention_factor: PositiveFloat | None = None
    """``yarn`` and ``longrope``: factor of the cosines and sines; the formula of their papers if not given."""
    short_factors: tuple[PositiveFloat, ...] | None = None
    """``longrope``: divisor of each pair's frequency in samples up to the original context."""
    long_factors: tuple[PositiveFloat, ...] | None = None
    """``longrope``: the same in longer samples."""


class ModelConfig(Node):
    """A Llama-style decoder (RMSNorm, RoPE, SwiGLU, grouped-query attention; no biases by default)."""

    preset: str | None = None
    """Name of a preset (``llama2-7b`` … ``debug``) whose values fill every field not given here."""
    num_layers: PositiveInt = 4
    """Number of transformer layers."""
    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt = 704
    """Width of the SwiGLU hidden layer."""
    num_attention_heads: PositiveInt = 8
    """Number of query heads."""
    num_query_groups: PositiveInt = 4
    """Number of key/value heads; equal to ``num_attention_heads`` for multi-head attention."""
    head_dim: PositiveInt | None = None
    """Width of one head; ``hidden_size / num_attention_heads`` if not given."""
    vocab_size: PositiveInt | None = None
    """Tokens of the vocabulary, without padding; taken from the tokenizer if not given."""
    max_seq_length_tokens: PositiveInt = 4096
    """Longest context that the model is meant for; written into the Hugging Face export."""
    norm_epsilon: PositiveFloat = 1e-5
    """Epsilon inside RMSNorm's root."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Change of the rotary frequencies for a longer context, or none."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values, as Qwen2 does."""
    attention_output_bias: bool = False
    """Add a bias to attention's output projection too."""
    mlp_bias: bool = False
    """Add biases in the MLP."""
    qk_norm: bool = False
    """Normalize each head's queries and keys by an RMSNorm before the rotary embedding, as Qwen3 does."""
    qk_norm_over_heads: bool = False
    """The same with one RMSNorm over the queries of all heads together and one over the keys, as OLMo 2 does."""
    norm_outputs: bool = False
    """Normalize the outputs of attention and MLP instead of their inputs, as OLMo 2 does."""
    layers_without_rope: tuple[NonNegativeInt, ...] = ()
    """Layers, counted from 0, whose queries and keys are not rotated; in SmolLM3 every fourth one (3, 7, 11, …)."""
    window_tokens: PositiveInt | None = None
    """Number of tokens that a query attends to, itself and those right before it, as in Mistral 7B; all before it if
    not given."""
    attention_softcap: float = Field(0.0, ge=0.0)
    """Attention scores x become ``cap · tanh(x / cap)``, as in Gemma 2; 0: they stay as they are."""
    output_softcap: float = Field(0.0, ge=0.0)
    """The same for the logits over the vocabulary."""
    tie_embeddings: bool = False
    """Use one matrix for the input embedding and the output projection."""
    value_head: bool = False
    """One number for every token in place of the output projection, as critics and reward models have; set by
    ``method.kind: reward``."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; output projections of a layer get it divided by sqrt(2 num_layers)."""

    @property
    def kv_channels(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class Source(Node):
    """One token file of a mixture."""

    path: str
    """Prefix of a megatron ``.bin``/``.idx`` pair, as ``prepare`` writes it (without the ending)."""
    weight: PositiveFloat = 1.0
    """Share of this source in the mixture; weights are normalised to sum to one."""


class DataConfig(Node):
    """Token files and how samples are cut from them."""

    train: tuple[Source, ...] = ()
    """Sources of the training mixture."""
    eval: tuple[Source, ...] = ()
    """Held-out sources; if empty, ``eval_fraction`` of the documents of every training source is held out."""
    eval_fraction: float = Field(0.01, ge=0.0, lt=1.0)
    """Share of each training source's documents that is held out when ``eval`` is empty; 0 for none."""
    tokenizer: str | None = None
    """Folder or file of the tokenizer (SentencePiece ``.model`` or Hugging Face ``tokenizer.json``)."""
    seq_length_tokens: PositiveInt = 256
    """Tokens of one sample."""
    packing: Literal["concatenate", "isolate"] = "concatenate"
    """``concatenate``: documents follow each other and attention crosses their boundaries; ``isolate``: attention and
    positions start anew at every document and no token is predicted across a boundary."""
    prefetch_batches: PositiveInt = 2
    """Micro batches read ahead by a background thread."""


class ParallelConfig(Node):
    """How the model and the batch are divided over processes."""

    dp: PositiveInt | None = None
    """Data-parallel replicas; if not given, the number of processes divided by tp*pp*cp (1 where the command starts the
    processes itself)."""
    tp: PositiveInt = 1
    """Tensor-parallel size (Shoeybi et al. 2019, arXiv 1909.08053)."""
    pp: PositiveInt = 1
    """Pipeline-parallel size (1F1B; Narayanan et al. 2021, arXiv 2104.04473)."""
    vpp: PositiveInt = 1
    """Model chunks per pipeline stage; over 1 means the interleaved schedule."""
    cp: PositiveInt = 1
    """Context-parallel size: each sample's tokens are divided over this many processes in zigzag order."""
    sequence_parallel: bool | None = None
    """Divide norms and residuals along the sequence within a tensor-parallel group; on by default when tp > 1."""
    stage_layers: tuple[PositiveInt, ...] | None = None
    """Layers of each of the pp*vpp model chunks in the order of the layers, for uneven pipelines; even if not given."""
    distributed_optimizer: bool = True
    """Divide optimizer state over the data-parallel group (ZeRO stage 1; Rajbhandari et al. 2019, arXiv 1910.02054)."""
    overlap: bool | None = None
    """Overlap gradient reduction, parameter gathering and pipeline sends with compute; on by default with NCCL."""
    bucket_size: PositiveInt | None = None
    """Parameters in one gradient bucket; megatron-core's choice if not given."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in backward: none, those of ``recompute_modules``, or whole layers."""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)
    """Modules recomputed when ``recompute`` is ``selective``."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With ``full``: ``uniform`` checkpoints every group of ``recompute_num_layers`` layers; ``block`` recomputes the
    first ``recompute_num_layers`` layers of each chunk and stores the others whole."""
    recompute_num_layers: PositiveInt = 1
    """See ``recompute_method``."""

    @property
    def divides_sequence(self) -> bool:
        """``sequence_parallel``, or its default if it is not given."""
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel

    @property
    def sequence_unit(self) -> int:
        """Number that the tokens of a sample must be a multiple of."""
        return math.lcm(2 * self.cp if self.cp > 1 else 1, self.cp * self.tp if self.divides_sequence else 1)


KernelChoice = Literal["auto", "triton", "torch"]


class KernelsConfig(Node):
    """Which implementation every operator runs. ``auto``: Triton on CUDA, plain torch on CPU; ``triton`` on CPU is
    Triton's interpreter, for checks only (needs TRITON_INTERPRET=1 in the environment)."""

    rms_norm: KernelChoice = "auto"
    """RMSNorm and its fused addition to the residual stream."""
    rope: KernelChoice = "auto"
    """Rotary position embedding; Triton rotates queries and keys in place in the packed projection."""
    attention: Literal["auto", "triton", "torch", "gluon"] = "auto"
    """Attention; ``torch`` is scaled dot product attention per document, ``gluon`` kernels for H100 and H200 that no
    GPU has run yet."""
    swiglu: KernelChoice = "auto"
    """SwiGLU; Triton writes the gradient over the saved input."""
    cross_entropy: KernelChoice = "auto"
    """Vocabulary-parallel loss; Triton writes the gradient over the logits."""
    output_loss: Literal["separate", "fused", "fused-recompute"] = "separate"
    """``fused``: output projection and loss are computed together, some tokens at a time, so that the logits of a whole
    micro batch are never in memory. Gradients are computed in forward, without additional matrix products; that of the
    output matrix is held in fp32 until backward (less memory than logits where a micro batch has over 2 hidden_size
    tokens). ``fused-recompute``: holds no gradients, for the least memory, and computes the logits a second time in
    backward."""
    deterministic: bool = False
    """What a token gets in forward depends neither on the tokens computed with it nor on the layout, to the last bit,
    so that log-probabilities are the same in generation and in training. On CPU only, and slower."""


class RampUp(Node):
    """Linear growth of the global batch size at the start of a run (as in GPT-3 and Megatron-LM)."""

    start: PositiveInt
    """Global batch size in samples at the first step."""
    increment: PositiveInt
    """Samples added at each stage."""
    samples: PositiveInt
    """Samples over which the size grows to ``train.global_batch_size``."""


class GuardConfig(Node):
    """When a training step is not applied."""

    spike_zscore: PositiveFloat | None = 6.0
    """A step whose loss or gradient norm lies this many robust standard deviations (1.4826 MAD) over the median of the
    window is skipped, one deviation being at least 2 % of the median loss and 25 % of the median norm; none switches
    spike detection off. NaN and infinity are always skipped."""
    spike_window_steps: PositiveInt = 128
    """Applied steps that the median and deviation are taken over."""
    spike_min_steps: PositiveInt = 32
    """Applied steps before spike detection begins."""
    max_spike_skips: PositiveInt = 3
    """At most this many steps in a row are skipped for a spike. A spike that lasts longer comes from the weights and
    not from one batch, and skipping would not change the weights: the step is then applied, clipped as usual
    (optim.clip_grad)."""
    max_consecutive_skips: PositiveInt = 10
    """This many skipped steps in a row stop the run with exit status 1."""


class TrainConfig(Node):
    """Batch, length and precision of the run."""

    global_batch_size: PositiveInt = 8
    """Samples of one optimizer step."""
    micro_batch_size: PositiveInt = 1
    """Samples of one forward pass of one data-parallel replica."""
    steps: PositiveInt = 100
    """Optimizer steps of the run."""
    epochs: PositiveFloat | None = None
    """Passes over the conversations of ``chat.train``, from which ``sft`` finds ``steps``; none: ``steps`` counts."""
    early_stop_evaluations: PositiveInt | None = None
    """The run ends when this many evaluations in a row have found no lower held-out loss; none: it makes all steps."""
    rampup: RampUp | None = None
    """Growth of the global batch size at the start."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """``bf16``: bf16 compute with fp32 main gradients, master weights and moments; ``fp32``: everything in fp32."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of a label's probability that is spread over the whole vocabulary. The training loss contains it, the
    held-out loss does not."""
    z_loss: float = Field(0.0, ge=0.0)
    """Weight of the squared logarithm of the softmax's denominator in the training loss, which keeps logits small
    (PaLM takes 1e-4); the held-out loss does not contain it."""
    eval_interval_steps: PositiveInt | None = None
    """Steps between evaluations on held-out data; none: only after the last step."""
    eval_samples: PositiveInt = 64
    """Held-out samples of one evaluation."""
    deterministic: bool = False
    """Bitwise repeatable steps (slower on GPUs)."""
    time_limit_s: PositiveFloat | None = None
    """Wall seconds after which the run saves a checkpoint and exits, with status 3 if steps are left."""
    threads_per_process: PositiveInt | None = None
    """CPU compute threads of a process when training on CPU; cores divided by processes if not given."""
    guard: GuardConfig = GuardConfig()
    """When a step is skipped, and when the run is stopped."""


class OptimConfig(Node):
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) and its learning-rate schedule."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: float = Field(3e-5, ge=0.0)
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape after warm-up; ``wsd`` is warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    warmup_fraction: float | None = Field(None, ge=0.0, lt=1.0)
    """Share of the run's steps that warm-up takes, in place of ``warmup_steps``; none: ``warmup_steps`` counts."""
    decay_steps: PositiveInt | None = None
    """Last step of cosine and linear decay (``train.steps`` if not given); for ``wsd`` the length of the final decay
    (a tenth of ``train.steps`` if not given)."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Epsilon added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0.0)
    """Decoupled weight decay of matrices; norm weights have none."""
    clip_grad: float = Field(1.0, ge=0.0)
    """Largest global gradient norm; 0 for no clipping."""
    implementation: Literal["auto", "triton", "torch", "apex"] = "auto"
    """``triton``: our fused AdamW; ``torch``: fused AdamW of torch; ``apex``: FusedAdam of NVIDIA's apex; ``auto``:
    Triton on CUDA where it is installed, else torch."""
    moment_bits: Literal[8, 32] = 32
    """Bits of AdamW's moments. 8: two codes and a scale for each block of 256 numbers, as in bitsandbytes' AdamW8bit
    (Dettmers et al. 2021, arXiv 2110.02861), except in the embedding and in tensors of fewer than 4,096 numbers."""

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of ``total_steps``."""
        return self.warmup_steps if self.warmup_fraction is None else round(self.warmup_fraction * total_steps)


class CheckpointConfig(Node):
    """Saving and loading of training state."""

    interval_steps: PositiveInt | None = None
    """Steps between checkpoints; none: only at the end, on SIGTERM and at the time limit."""
    keep_last: PositiveInt = 3
    """Newest checkpoints kept; an old one is deleted only after a new one is complete."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this step are kept for ever."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    load: str | None = None
    """What to start from when the run folder has no checkpoint of its own: a run's folder, its ``checkpoints`` folder
    or one ``iter_…`` in it, of any layout, or a Hugging Face folder. Sizes of the model and the tokenizer that the run
    file leaves out are taken from there."""
    load_optimizer: bool = True
    """Take optimizer state and the sample counter from ``load`` too; false starts a new schedule from its weights."""
    verify: bool = True
    """Compare every file's checksum before a checkpoint is loaded, for which the processes together read it once more.
    If one of the run's own checkpoints is damaged, it is renamed and the one before it is loaded."""


class LogConfig(Node):
    """What is recorded, and how often."""

    interval_steps: PositiveInt = 1
    """Steps between console lines and metrics records."""
    line_interval_s: NonNegativeFloat = 0.0
    """Least time between two lines of steps where the output is no terminal; every record is in metrics.jsonl. 10 in a
    job that ``submit`` makes."""
    tensorboard: bool = True
    """Write event files for TensorBoard."""
    wandb_project: str | None = None
    """Weights & Biases project to report to; none: not used."""
    prometheus_host: str = "127.0.0.1"
    """Address of rank 0's machine at which ``prometheus_port`` answers; the default answers to that machine alone,
    0.0.0.0 to everyone who reaches it."""
    prometheus_port: int | None = Field(None, ge=1, le=65535)
    """Port on which rank 0 serves metrics for Prometheus; none: not served."""
    peak_tflops: PositiveFloat | None = None
    """Dense bf16 peak of one device in TFLOP/s that MFU divides by; the device's data sheet if not given."""
    plots: bool = True
    """Draw plots (PNG) at the end of the run."""
    comm_time: bool = True
    """Split each step's time by what it was spent on: communication by axis, pipeline bubble, optimizer, data."""


class ElasticConfig(Node):
    """How a run started by ``llm-parallel launch`` or ``submit`` survives failures."""

    replicate_every_steps: int = Field(1, ge=0)
    """Steps between copies of the training state into the memory of this and another node; 0: disk checkpoints only."""
    replica_dir: str = "/dev/shm"
    """Memory file system (or local disk) of every node that holds the copies."""
    min_devices: PositiveInt = 1
    """With fewer devices left the run waits for more."""
    wait_s: PositiveFloat = 600.0
    """Longest wait for devices; after it the run ends (under SLURM: goes back to the queue)."""
    spare_nodes: int = Field(0, ge=0)
    """Nodes held back at the start to replace failing ones."""
    strikes: PositiveInt = 2
    """Faults after which a device that passes its test is removed for good; hard evidence removes at once."""
    strike_hours: PositiveFloat = 24.0
    """Time after which a fault no longer counts towards ``strikes``."""
    heartbeat_s: PositiveFloat = 0.25
    """Time between signs of life of an agent; at least a millisecond per node of the run."""
    lost_after_s: PositiveFloat = 2.0
    """Silence after which a node counts as lost; an agent cut off that long ends its workers. Grows with heartbeat_s in
    runs of more than 250 nodes."""
    hang_deviations: PositiveFloat = 8.0
    """A step that takes the median plus this many robust deviations (1.4826 MAD), and at least three medians, plus a
    second, is a hang; of the only process of a run, which may be paused by a busy machine, at least 30 seconds."""
    first_step_limit_s: PositiveFloat = 600.0
    """Longest time for building the model and the first steps, which compile and allocate."""
    checksum_every_steps: int = Field(50, ge=0)
    """Steps between comparisons of the replicas' weights, which find silent data corruption; 0: never."""
    probe_every_steps: int = Field(10, ge=0)
    """Steps between short matmuls with a known answer on every device, which find slow and miscalculating ones; 0:
    never."""
    slow_ratio: float = Field(2.0, gt=1.0)
    """A device whose probe takes this many times the median of all devices, three times in a row, is slow."""
    max_fruitless: PositiveInt = 5
    """Recoveries without a finished step in between after which the run is given up."""
    on_event: str | None = None
    """Shell command run at every event of the launcher, which it gets as JSON on its standard input."""
    drills: bool = False
    """Accept injected faults (``llm-parallel drill``)."""


class RunConfig(Node):
    """Everything that defines a run."""

    run_dir: str = "runs/default"
    """Folder for everything that the run writes."""
    seed: int = Field(1234, ge=0)
    """Seed of weights and sample order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where there is a GPU, else CPU."""
    method: MethodConfig = MethodConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    chat: ChatConfig = ChatConfig()
    adapter: AdapterConfig | None = None
    """Low-rank matrices that are trained in place of the model's weights; none: the weights themselves are trained."""
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    kernels: KernelsConfig = KernelsConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    elastic: ElasticConfig = ElasticConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def trains(self) -> Literal["pretrain", "sft", "dpo", "kto", "rrhf", "reward", "reject", "grpo", "ppo"]:
        """``method.kind``, or what the given data are for."""
        return self.method.kind or ("sft" if self.chat.train and not self.data.train else "pretrain")

    @property
    def prefers(self) -> bool:
        """Whether the run learns from answers that are compared or judged."""
        return self.trains in PREFERENCES

    @property
    def collects(self) -> bool:
        """Whether the run learns from answers that its model gives in rounds."""
        return self.trains in ONLINE

    @property
    def reads_chat(self) -> bool:
        """Whether the run's data are ``chat.train`` and not token files."""
        return self.trains != "pretrain"
