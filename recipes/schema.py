"""What a recipe may say, with every default: dataclasses < one YAML < `key=value`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from layers.names import check_choice, check_positive
from layers.precision.operands import OPERANDS
from layers.selection import select_layers
from zoo.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, tokens and batches."""

    corpus: str = "classics7"  # a row of recipes.data.CORPORA
    tokenizer: str = "bytes"  # bytes | bpe1024 | bpe4096
    seq_len: int = 256  # tokens a sequence
    batch_size: int = 16  # sequences a micro-batch and process (that reads data of its own)
    eval_bytes_per_domain: int | None = 8192  # during training; None: all of the validation part
    final_bytes_per_domain: int | None = None  # at the end; None: all of the validation part
    # recall | copy | facts, or {name: ..., its options}, in place of corpus and tokenizer; an
    # answer counts as a byte: recipes/synthetic.py
    task: Any = None


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """How memory tables are trained apart: values of memory layers, neurons of PEER."""

    optimizer: Literal["row_adam", "row_adagrad", "adamw"] = "row_adam"  # recipes/row_optim.py
    second_moment: Literal["element", "row"] = "element"  # of the row optimizers
    moments: Literal["lazy", "decayed"] = "lazy"  # row_adam: of rows that a step does not touch
    bias_correction: Literal["row", "global"] = "row"  # row_adam: by touches of the row, or steps
    # gradients of the touched rows alone; auto: of tables from SPARSE_FROM rows on
    sparse: Literal["auto", "always", "never"] = "auto"
    lr_scale: float = 4.0  # times optim.lr (UltraMemV2; V1 and Memory+ 10)
    # decay: the scale falls to 1, and the run's schedule applies | scheduled: it does not fall |
    # constant: neither (PKM)
    schedule: Literal["decay", "scheduled", "constant"] = "decay"
    decay_fraction: float = 1.0  # decay only: of all steps, until the scale is 1
    weight_decay: float = 0.0  # of rows never touched too, all of it when they are
    clip_norm: float | None = 1.0  # of the tables together; optim.clip_norm is of all the others


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; vectors are never decayed
    clip_norm: float | None = 1.0
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_fraction: float = 0.05  # of all steps
    decay_fraction: float = 0.2  # wsd only: the last part of all steps, shape 1 - sqrt
    final_lr_ratio: float = 0.1
    table: TableConfig | None = None  # None: memory tables as all else, with dense gradients


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The loop."""

    max_steps: int = 200  # optimizer steps
    accumulate: int = 1  # micro-batches a step
    eval_every_steps: int = 50
    checkpoint_every_steps: int = 100
    log_every_steps: int = 10
    sharpness_eps: float = 1e-3  # reach of the perturbed logits; recipes/sharpness.py
    activation_checkpointing: bool = False
    compile: bool = False
    matmul: Literal["auto", "default"] = "auto"  # auto: the fast fp32 path where it stays exact
    threads: int | None = None  # None: as many as there are cores
    accelerator: str = "cpu"
    devices: int = 1  # of the accelerator, a process each: recipes/ranks.py
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"  # of several devices; auto: ddp unless
    expert_parallel: int = 1  # this is more: processes that share each layer's experts
    table_parallel: Literal["none", "rows", "columns"] = "none"  # how they share memory tables


@dataclass(frozen=True, kw_only=True)
class ProbesConfig:
    """What is measured of the formats' errors; leaves are chosen as by a rule of a precision."""

    every_steps: int = 50  # optimizer steps; of each such step the first micro-batch
    name: str = "*"  # glob over the leaves' qualified names, e.g. "blocks.*.ffn.*"
    roles: tuple[str, ...] = ()  # any, when empty
    layers: str | None = None  # as in layers.selection: "0", "-1:", "last 15%"
    operands: tuple[str, ...] = OPERANDS

    def __post_init__(self) -> None:
        check_positive(**{"probes.every_steps": self.every_steps})
        for operand in self.operands:
            check_choice("operand in probes.operands", operand, OPERANDS)
        if self.layers is not None:
            select_layers(self.layers, 10_000)  # the grammar; how many there are shows later


@dataclass(frozen=True, kw_only=True)
class NestedConfig:
    """Which granularities of nested FFNs (matformer, moe) a step trains; recipes/nested.py."""

    # sample: one, drawn; joint: all, on the same batch; sandwich: widest, narrowest, one drawn
    mode: Literal["sample", "joint", "sandwich"] = "sample"
    probabilities: tuple[float, ...] = ()  # of each granularity, narrowest first; empty: alike
    reduction: Literal["sum", "mean"] = "sum"  # of the losses of joint and sandwich
    distill: float = 0.0  # weight of KL(widest || narrower) in a step's narrower passes

    def __post_init__(self) -> None:
        if any(p <= 0 for p in self.probabilities) or (
            self.probabilities and abs(sum(self.probabilities) - 1) > 1e-3
        ):
            raise ValueError(
                "nested.probabilities must be positive and sum to 1, "
                f"got {list(self.probabilities)}"
            )
        if self.probabilities and self.mode == "joint":
            raise ValueError("nested.probabilities have no use in mode joint, which draws nothing")
        if self.distill < 0:
            raise ValueError(f"nested.distill must not be negative, got {self.distill}")
        if self.distill and self.mode == "sample":
            raise ValueError(
                "nested.distill needs the widest in every step: take mode joint or sandwich"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, whole."""

    seed: int = 0
    init_from: str | None = None  # a run's directory or a weights file; None: drawn from the seed
    precision: Any = "bf16"  # a preset by name, or a policy written out
    model: ModelConfig = field(default_factory=ModelConfig)
    loss_weights: dict[str, float] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    prior_teacher: str | None = None  # a dense run whose FFNs teach factor_llm's routers
    probes: ProbesConfig | None = None  # off
    nested: NestedConfig | None = None  # None: nested FFNs train as the widest alone
