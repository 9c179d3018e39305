"""The recipe, as frozen dataclasses: what a run is, with a unit under every field.

A YAML recipe maps onto `RunConfig`; `load.py` reads it, `validate.py` checks what spans fields,
`mcore.py` turns it into megatron-core's own configs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from chiar_megatron.config.schema_files import CheckpointConfig as CheckpointConfig
from chiar_megatron.config.schema_files import DataConfig as DataConfig
from chiar_megatron.config.schema_process import LoggingConfig as LoggingConfig
from chiar_megatron.config.schema_process import RuntimeConfig as RuntimeConfig

RouterKind = Literal["entropy", "learned", "entropy_gated", "soft", "hard", "random"]


@dataclass(frozen=True)
class RouterConfig:
    """How a routed ("R") layer sends each token to attention or to spectral mixing."""

    kind: RouterKind = "entropy"
    """The score: spectral entropy, a learned linear one, entropy with a trained gate, a soft or a hard
    (straight-through) softmax over operators, or a hash (the chance baseline)."""

    threshold: Optional[float] = None
    """A token goes to attention iff its score is strictly above it. null: 0 for `learned`,
    `1 - random_fraction` for `random`, and for entropy routers 0.8954 at hidden size 1024 (the paper's
    midpoint), elsewhere the entropy of noise at that size. Unused by soft and hard."""

    dc_power_weight: float = 1.0
    """Weight of the DC power in the spectral entropy: 1 is exact, 2 is what the authors' code computes."""

    random_fraction: float = 0.5
    """Share of tokens that `random` sends to attention, in [0, 1]."""

    operators: Literal["spectral_attention", "spectral_attention_rbf"] = "spectral_attention"
    """What soft and hard blend: two operators, or three with RBF mixing (the paper's ablation)."""

    collapse_weight: float = 0.0
    """λ of the collapse regulariser of soft and hard routers: `loss -= λ Σ_layers U` (paper: 0.01)."""

    keys_values: Literal["all", "routed"] = "all"
    """Whose keys and values a routed layer's attention sees: every token's, or only light tokens'."""

    target: Optional[float] = None
    """ρ, the share of tokens that each routed layer sends to attention while training: a controller moves
    every layer's threshold to hold it. null (or none): thresholds stay as they are, as published."""

    controller_gain: float = 0.5
    """How far the controller moves a threshold a step: gain · (share - ρ) standard deviations of scores."""

    capacity: Literal["auto", "none"] = "auto"
    """Rows that a routed layer's attention has in training. auto: ρ(1 + slack) of a micro-batch's tokens,
    rounded up to 64, where there is a target (equal shapes each step; what overflows goes to spectral
    mixing, counted). none: as many as there are light tokens, exactly (one host synchronisation a layer)."""

    slack: float = 0.05
    """Share of rows beyond ρ that `capacity: auto` keeps for fluctuations."""

    dispatch: Literal["skip", "dense"] = "skip"
    """skip: attention computes light tokens only, mixing dark ones. dense: both compute every token and one
    result is kept, the reference that skipping is measured against."""


@dataclass(frozen=True)
class MetaRouterConfig:
    """The gate g over layer 1: `g·layer1(x) + (1-g)·x`."""

    enabled: bool = True
    """false removes the gate (g = 1)."""

    pooling: Literal["running", "batch", "causal"] = "running"
    """What g reads: a running average over steps (sees no future), the mean of one micro-batch (the
    paper's; sees the future), or the prefix mean."""

    decay: float = 0.99
    """Decay per step of the running average."""

    bias_init: float = 2.0
    """Initial bias of the gate; g starts at its sigmoid (2.0: 0.88, as described in the paper)."""


@dataclass(frozen=True)
class RotaryScalingConfig:
    """Rotary positions stretched beyond the length that a model was first trained on."""

    rope_type: Literal["none", "linear", "llama3"] = "none"
    """none; linear divides every frequency by `factor`; llama3 the low ones only, by Llama 3.1's rule."""

    factor: float = 1.0
    """By how much."""

    low_freq_factor: float = 1.0
    """llama3: wavelengths above original length / this are divided whole."""

    high_freq_factor: float = 4.0
    """llama3: wavelengths below original length / this stay; those between are interpolated."""

    original_max_position_embeddings: int = 8192
    """llama3: the original length, in tokens."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and kinds of the CHIAR-Former (paper, section 3)."""

    preset: Optional[str] = None
    """Start from a named preset (`tiny`, `17m`, `400m`, and `tiny-twin`, `17m-twin`, `400m-twin`);
    other fields given in the recipe overrule it."""

    schedule: str = "D R*2 A"
    """Layers in order: D spectral, R routed, A attention; `"D R*26 A"`, `"A*28"`, `"(D A)*14"`."""

    hidden_size: int = 128
    """Hidden size h."""

    num_attention_heads: int = 4
    """Query heads."""

    num_query_groups: Optional[int] = None
    """Key and value heads (GQA). null: as many as query heads."""

    kv_channels: Optional[int] = None
    """Size of one head. null: hidden_size / num_attention_heads."""

    ffn_hidden_size: Optional[int] = None
    """Width of the feed-forward layer. null: 4·hidden_size, or for SwiGLU 8/3 of it rounded up to 64."""

    seq_length: int = 256
    """Tokens in one training sequence."""

    vocab_size: Optional[int] = None
    """Entries of the vocabulary. null: the tokenizer's."""

    activation: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward activation: exact GELU (paper) or SwiGLU."""

    norm: Literal["post", "pre"] = "post"
    """Where normalisation stands: after the residual sum (paper) or before the operator."""

    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of normalisation."""

    norm_epsilon: float = 1e-5
    """Epsilon of every normalisation."""

    add_bias: bool = True
    """Biases in linear layers (paper: yes)."""

    add_qkv_bias: Optional[bool] = None
    """Biases of queries, keys and values (Qwen2 has no others). null: add_bias."""

    tie_embeddings: bool = True
    """Share the token embedding with the output head (paper: yes)."""

    rotary_base: float = 10000.0
    """Base of the rotary position embedding."""

    rotary_scaling: RotaryScalingConfig = field(default_factory=RotaryScalingConfig)
    """Stretching of rotary positions."""

    dropout: float = 0.0
    """Dropout probability on embeddings, on the feed-forward layer and on attention probabilities."""

    init_std: float = 0.02
    """Standard deviation of initial weights; biases start at 0, norms and filters at 1."""

    mup_base_hidden_size: Optional[int] = None
    """Base width of µP (`model/initialize.py`): one rate for all widths, untied head. null: no µP."""

    rbf_features: int = 64
    """R, the random features of RBF mixing."""

    rbf_gamma: float = 1.0
    """γ of RBF mixing; Ω has standard deviation √(2γ)."""

    mask_documents: bool = False
    """Packed sequences: tokens attend only within their own document."""

    router: RouterConfig = field(default_factory=RouterConfig)
    """Routing of R layers."""

    meta_router: MetaRouterConfig = field(default_factory=MetaRouterConfig)
    """Gate over layer 1."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over processes."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices."""

    sequence_parallel: bool = False
    """Also split the sequence over those processes between layers."""

    pipeline_model_parallel_size: int = 1
    """Pipeline stages (1F1B)."""

    virtual_pipeline_model_parallel_size: int = 1
    """Chunks of layers that each stage holds: above 1 the schedule is interleaved, with a smaller bubble and
    more transfers; micro-batches of a replica must then come in multiples of the stages."""

    layout: str = "auto"
    """Where the pipeline is cut. auto: by FLOPs, so that the heaviest stage is as light as whole layers let
    it be; even: as many layers in every chunk; or megatron-core's own text, chunks in the order of layers, E
    the embedding, t a layer, L the loss: "Et*8|t*8|t*8|t*4L"."""

    context_parallel_size: int = 1
    """Processes that share each sequence, in contiguous parts; in attention they swap tokens for heads."""

    data_parallel_size: Optional[int] = None
    """Model replicas. null: what the number of processes leaves; 1 when `chiar` starts them itself."""

    distributed_optimizer: bool = False
    """Shard the optimizer's state over replicas (ZeRO-1)."""

    overlap_grad_reduce: bool = False
    """Sum gradients over replicas bucket by bucket while backward goes on."""

    overlap_param_gather: bool = False
    """Gather the weights that the distributed optimizer has updated layer by layer while forward goes on;
    needs `distributed_optimizer` and `overlap_grad_reduce`."""

    @property
    def processes_per_replica(self) -> int:
        """Processes that hold one model together: tensor × pipeline × context parallel size."""
        tensor, pipeline = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        return tensor * pipeline * self.context_parallel_size


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the learning-rate schedule. Norms, biases and filters are never decayed."""

    lr: float = 3e-4
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""

    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay of the learning rate."""

    warmup_steps: int = 0
    """Steps of linear warmup from 0."""

    decay_steps: Optional[int] = None
    """Step at which `min_lr` is reached. null: `training.steps`."""

    wsd_decay_steps: Optional[int] = None
    """Steps of the final decay of `wsd`. null: a tenth of `decay_steps`."""

    beta1: float = 0.9
    """AdamW's first moment decay."""

    beta2: float = 0.95
    """AdamW's second moment decay."""

    eps: float = 1e-8
    """AdamW's epsilon."""

    weight_decay: float = 0.01
    """Decoupled weight decay of matrices."""

    clip_grad: float = 1.0
    """Limit of the global gradient norm; 0 for none."""


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch, precision and validation."""

    steps: int = 100
    """Optimizer steps of the whole run."""

    global_batch_size: int = 8
    """Sequences in one step, over all replicas."""

    micro_batch_size: int = 8
    """Sequences in one forward pass of one replica."""

    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Of weights and activations; bf16 keeps float32 master weights. fp8 is refused until it exists."""

    seed: int = 1234
    """Of initial weights, data order and dropout."""

    z_loss: float = 0.0
    """Weight of the z-loss, `z_loss · (ln Σ exp logits)²` per token; 0 for none."""

    eval_interval_steps: int = 0
    """Validate every so many steps; 0 only at the end."""

    eval_steps: int = 10
    """Batches of one validation, per component; 0 skips validation."""

    recompute: Literal["none", "full"] = "none"
    """Activations that backward computes again instead of keeping them: none, or all inside each layer."""

    deterministic: bool = False
    """Only deterministic kernels (CUDA); on a CPU every run is."""

    max_bad_steps: int = 10
    """Stop after so many steps in a row with a non-finite loss or gradient."""

    init_from: Optional[str] = None
    """Checkpoint whose weights (only) start this run."""

    exit_after_steps: Optional[int] = None
    """Save and stop, resumable, at this step although the schedule is longer."""

    exit_after_minutes: Optional[float] = None
    """Save and stop, resumable, after so many minutes."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    run_dir: str = "runs/default"
    """The run folder: resolved config, metrics, checkpoints, exit reason."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout."""

    data: DataConfig = field(default_factory=DataConfig)
    """The text."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length and batch."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""

    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Reporting."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Launching."""
