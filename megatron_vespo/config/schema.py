"""Every setting of a run, typed. One docstring a field; unknown keys are refused (config/load.py names the nearest).

A YAML file in ``model_configs/`` is one run. Relations between fields that need no model and no data are checked
here; what needs the checkpoint's own shape is checked in loop/preflight.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from megatron_vespo.config.problems import DataConfig, EvaluateConfig, RewardConfig
from megatron_vespo.config.section import Probability, Section

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"]


class ModelConfig(Section):
    path: Path
    """Folder of the HF checkpoint to start from: config.json, safetensors, tokenizer."""
    weights: Path | None = None
    """Megatron distributed checkpoint (converted, or of a run) that the trainer starts from instead of path's
    safetensors. Config and tokenizer are path's; engines start from path and are synced before the first rollout."""
    shape: Path | None = None
    """Folder with a config.json to plan with (--dry-run) on a machine that does not have the checkpoint."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the trainer's weights and activations; the optimizer keeps float32 masters."""
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Which of megatron-core's layer specs: auto takes Transformer Engine on CUDA and the local one on a CPU."""
    recompute: Literal["none", "full"] = "none"
    """Activation recomputation in the backward pass."""
    logprobs: Literal["fused", "plain"] = "fused"
    """Log-probs from hidden states tile by tile, or through the logits of a whole micro-batch (same numbers)."""
    router_dtype: Literal["fp32", "fp64"] | None = "fp32"
    """Precision of the MoE router's logits; None keeps the model's."""
    routing_replay: Literal["none", "r2", "r3", "both"] = "none"
    """Which experts tokens go to in the update: r2, those of the old-log-prob pass; r3, the engine's, in the
    old-log-prob pass too; both, the engine's where it gave them and r2's elsewhere (docs/routing_replay.md)."""
    router_z_loss: NonNegativeFloat = 0.0
    """Weight of the routers' z-loss: the square of the log-sum-exp of a token's router logits, added over the MoE
    layers, mean over the mini-batch's tokens (prompts too)."""
    router_balance_loss: NonNegativeFloat = 0.0
    """Weight of load balancing by sequence: number of experts times the sum over them of (share of the sequence's
    routed tokens) x (mean probability), 1 where even; added over the MoE layers, mean over the sequences."""

    @property
    def replays_engine_routing(self) -> bool:
        return self.routing_replay in ("r3", "both")

    @property
    def has_router_losses(self) -> bool:
        return self.router_z_loss > 0 or self.router_balance_loss > 0


class ParallelConfig(Section):
    tensor: PositiveInt = 1
    """Tensor-parallel size."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size."""
    context: PositiveInt = 1
    """Context-parallel size: each sequence is cut zigzag over this many ranks."""
    expert: PositiveInt | Literal["auto"] = "auto"
    """Expert-parallel size; auto: as many as divide both the experts and the ranks of a pipeline stage."""
    expert_tensor: PositiveInt = 1
    """Tensor-parallel size inside an expert."""
    virtual_pipeline: PositiveInt | None = None
    """Model chunks a pipeline rank holds (interleaved schedule); None: one, plain 1F1B."""
    sequence: bool = False
    """Sequence parallelism over the tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel ranks."""


class ObjectiveConfig(Section):
    name: str = "vespo"
    """One of available_objectives(), or a dotted path to a factory of one's own."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the objective; its file under objectives/ documents them. Empty: the paper's."""
    aggregation: Aggregation = "token-mean"
    """How token losses become one number, the same for every objective; denominators are the mini-batch's own."""
    correction: Literal["none", "trainer", "split", "tis", "icepop", "mis", "geometric", "opsm"] = "none"
    """What is done about the mismatch between engine and trainer; objectives/corrections.py says what each is."""
    correction_params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the correction, such as {level: sequence, cap: 2.0}; empty: the published ones."""
    advantage: Literal["group-mean", "group-mean-std", "group-soft-value"] = "group-mean-std"
    """Reward minus the group's mean, or that divided by the group's standard deviation, or minus OAPL's soft value."""


class OptimizerConfig(Section):
    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate decays after the warm-up."""
    warmup_updates: NonNegativeInt = 0
    """Optimizer updates of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay (not applied to norms and biases)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0: never."""
    ess_step: Literal["none", "w", "phi"] = "none"
    """Scale each update's rate by sqrt(ESS / n) of these sequence weights (VCPO)."""


class RolloutConfig(Section):
    engine: Literal["reference", "sglang"] = "sglang"
    """Which engine is launched."""
    engines: PositiveInt = 1
    """How many of it."""
    urls: tuple[str, ...] = ()
    """Engines that someone else started; none is launched then, and none restarted."""
    urls_key_env: str | None = None
    """Name of the environment variable that holds the key of the engines in urls; None: they want none."""
    precision: Literal["fp32", "bf16", "fp8", "fp8_kv"] = "bf16"
    """Precision the engine computes in. fp8: weights in blocks of 128 x 128, on a GPU activations too; fp8_kv: the KV
    cache alone. On a CPU the reference engine rounds to it (docs/precision.md)."""
    samples_per_prompt: PositiveInt = 8
    """Responses in a prompt group."""
    max_response_tokens: PositiveInt = 1024
    """A response is cut there, with finish_reason length."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer's log-probs are taken at the same one."""
    top_p: Probability = 1.0
    """Nucleus sampling; 1: off."""
    top_k: int = -1
    """Top-k sampling; -1: off."""
    function: str | None = None
    """Dotted path to a function that plays a response of several turns (rollout/episodes.py); None: one turn."""
    dynamic_sampling: bool = False
    """Drop prompt groups whose rewards are all equal, and sample further prompts until the batch is full (DAPO)."""
    over_sample: Annotated[float, Field(ge=1)] = 1.0
    """Under dynamic sampling: prompts asked for in a round, over those still missing."""
    max_rounds: PositiveInt = 8
    """Under dynamic sampling: rounds after which groups without spread fill what is still missing."""
    request_timeout_s: PositiveFloat = 1800
    """Seconds an engine may take over a request before it is cut there and continued, on whichever engine has room."""
    request_retries: NonNegativeInt = 3
    """How often a request is sent again, after its engine died, hung or took too long, before the run ends."""
    in_flight: PositiveInt = 512
    """Responses an engine is given at a time, where there are several; the rest wait for the first that has room."""
    launch_timeout_s: PositiveFloat = 600
    """Seconds an engine may take to load, compile and warm up; it is never ended for that before."""
    warmup_tokens: NonNegativeInt = 8
    """Tokens generated before an engine counts as launched, so that it has compiled its kernels by then; 0: none."""
    hang_timeout_s: PositiveFloat = 300
    """Seconds without a sign of life after which an engine with work counts as hung. Longer than its longest step."""
    max_restarts: NonNegativeInt = 3
    """Restarts in a row of an engine that died or hangs before the run ends; 0: none, the run ends at once."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further flags for the engine's command line, passed through: {tp-size: 2}. True: a bare flag; a list: several
    values; a mapping: JSON."""

    @property
    def engine_count(self) -> int:
        """Launched here or started by someone else."""
        return len(self.urls) or self.engines


class TrainConfig(Section):
    mode: Literal["synchronous", "asynchronous", "constant_lag"] = "synchronous"
    """synchronous: sample a batch, train on it, sync. asynchronous: sample and train side by side (docs/async.md and
    section asynchronous). constant_lag: as synchronous, on data exactly so many updates old (section constant_lag)."""
    steps: PositiveInt = 100
    """Rollout batches."""
    prompts_per_step: PositiveInt = 256
    """Prompts in a rollout batch; times rollout.samples_per_prompt sequences."""
    mini_batches: PositiveInt = 1
    """N: optimizer updates made from one rollout batch (synchronous: split staleness 0..N-1)."""
    old_logprobs: Literal["exact", "engine"] = "exact"
    """Where log pi_old comes from. exact: a forward pass of the trainer under the weights that sampled; asynchronously
    it keeps those, in host memory. engine: it is log mu, the engine's own (other trainers' "bypass"): no pass, and
    nothing is known of the engine's mismatch (docs/async.md)."""
    mask_truncated: bool = False
    """Leave responses cut at the length limit out of the loss and its denominators (overlong filtering); their reward
    still counts in their group's advantages."""
    tokens_per_micro_batch: PositiveInt = 16384
    """Token budget of one forward-backward of one rank (before context parallelism divides it)."""


class AsynchronousConfig(Section):
    """What goes with train.mode asynchronous."""

    sync_every: PositiveInt = 1
    """K: optimizer updates between weight syncs."""
    max_staleness: NonNegativeInt = 1
    """Updates that the oldest trained token of a response may be behind. Nothing is asked for that would be trained
    later than that. At least sync_every - 1."""
    too_stale: Literal["wait", "drop", "down_weight"] = "wait"
    """What becomes of a group that takes too long to be trained in time. wait: nothing, groups are trained in the order
    asked for, and training waits for it. drop: groups are trained in the order they are done; that one is left out
    whole. down_weight: likewise, but its responses are trained, by stale_weight."""
    stale_weight: Probability = 0.5
    """Under too_stale down_weight: factor on a response's advantage for each update beyond max_staleness."""
    max_open: PositiveInt | None = None
    """Prompt groups asked for and not yet trained, at most; None: as many as max_staleness allows, which is
    (max_staleness + 1) x the groups of an update."""


class ConstantLagConfig(Section):
    """What goes with train.mode constant_lag."""

    lag: NonNegativeInt = 1
    """k: the batch of update t was sampled by the weights of version t - k; the first k by those of version 0."""


class CheckpointConfig(Section):
    every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: PositiveInt = 2
    """How many of the newest stay."""
    background: bool = True
    """Training stands still while the state is copied into host memory, not while it is written. The copy stays until
    that is done: weights and optimizer of its shard on one rank of each model shard (--dry-run says how much)."""
    resume: bool = True
    """Go on from the newest checkpoint of run_dir, if there is one."""
    export_hf: bool = True
    """Write an HF-format folder at the end."""


class SyncConfig(Section):
    transport: Literal["disk", "broadcast", "shared_memory", "ipc"] = "disk"
    """How weights reach the engines: through a folder, over the network to all at once, in host memory of one machine,
    in device memory of one machine (CUDA IPC; on a CPU that is host memory)."""
    delta: bool = False
    """Send only what changed since the last sync (not disk); keeps a copy at both ends."""
    bucket_mb: PositiveInt = 512
    """MiB sent at a time, which is what the sender holds beside one whole tensor."""
    timeout_s: PositiveFloat = 120
    """Seconds that the engines may take to join a broadcast, and a bucket to reach them."""
    folder: Path | None = None
    """Where the disk transport writes; None: shared memory (/dev/shm) if it holds three copies of model.path and one
    node is all there is, else the run directory."""
    probe_tolerance: PositiveFloat | None = None
    """Largest |engine - trainer| log-prob on the probe before the run is stopped; None: measured only."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray cluster to join; None: one is started here."""
    nodes: PositiveInt = 1
    """Nodes with trainer ranks."""
    ranks_per_node: PositiveInt = 8
    """Trainer ranks (GPUs) on each."""
    rollout_nodes: NonNegativeInt = 0
    """Further nodes, for engines alone. Trainers then take nodes with Ray's custom resource ``trainer``, engines those
    with ``rollout``. 0: both go wherever there is room."""
    threads_per_rank: PositiveInt = 1
    """OMP threads of a rank on a CPU."""
    max_restarts: NonNegativeInt = 3
    """Where a trainer rank dies, all of them are started again from the newest checkpoint, and the engines stay: this
    often without a newer checkpoint in between; then the run ends. 0: never; nor under colocate and sync.transport
    ipc, where engines are launched for the ranks that they share a device with."""
    colocate: bool = False
    """Trainer and engines on the same devices, taking turns: one is in their memory, the other waits in the host's.
    Not in train.mode asynchronous, where both are at work at once (docs/colocation.md)."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


class LogConfig(Section):
    samples_per_step: NonNegativeInt = 4
    """Readable responses kept under samples/ each step."""
    rollouts_kept: NonNegativeInt = 8
    """Newest rollout batches kept whole under rollouts/, for ``compare`` and ``budget --run``; 0: none."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases."""
    project: str = "megatron_vespo"
    """wandb project."""


class RunConfig(Section):
    """A whole run."""

    name: str
    """Name of the run."""
    run_dir: Path | None = None
    """Everything the run writes goes here; None: runs/<name>."""
    seed: int = 1
    """Seed of data order, sampling and initialisation."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    rollout: RolloutConfig = RolloutConfig()
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    train: TrainConfig = TrainConfig()
    asynchronous: AsynchronousConfig = AsynchronousConfig()
    constant_lag: ConstantLagConfig = ConstantLagConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sync: SyncConfig = SyncConfig()
    cluster: ClusterConfig = ClusterConfig()
    log: LogConfig = LogConfig()

    @property
    def directory(self) -> Path:
        return self.run_dir or Path("runs") / self.name

    @property
    def groups_per_update(self) -> int:
        return self.train.prompts_per_step // self.train.mini_batches

    @property
    def knows_old_policy(self) -> bool:
        """Whether log pi_old is the trainer's own, so that staleness and engine mismatch can be told apart."""
        return self.train.old_logprobs == "exact"

    @property
    def keeps_weights(self) -> bool:
        """Whether the trainer needs weights that it no longer has."""
        return self.knows_old_policy and self.train.mode == "asynchronous" and self.asynchronous.max_staleness > 0
