"""What the server asks of a client, and what the client answers. Nothing here depends on how messages travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pruning.spec import FULL, SubModelSpec
from wire.flat import Scalar, require, require_choice

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes
    ----------
    name : zoo name, ``torchvision:NAME``, ``timm:NAME`` or ``package.module:function``.
    width : multiplies every width, > 0 (zoo models).
    exits : with exit heads (zoo models that have them): ViTs at a quarter, half, three quarters and all of the depth,
        convolutional nets behind every stage, the mlp behind every layer.
    scales : with a learnable scale for every head and neuron (ViTs and the mlp; BatchNorm has scales of its own).
    gates : with a gate on every layer that can have one (ADP's dynamic pruning; models with convolutions).
    residual_outputs : with a unit for every feature that attention and MLP write into the residual stream, which stays
        whole (ViTs of the zoo).
    patch_size : side of a vision transformer's patch, pixels; 0: what the model does by itself (the zoo's: an eighth of
        the image, 16 from 128 pixels up; ``vit_micro``: a quarter).
    """

    name: str = "cnn"
    width: float = 1.0
    exits: bool = False
    scales: bool = False
    gates: bool = False
    residual_outputs: bool = False
    patch_size: int = 0

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.width > 0, "width", self.width, "a positive number")
        require(self.patch_size >= 0, "patch-size", self.patch_size, "pixels, or 0 for the model's own")


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how clients share it.

    Attributes
    ----------
    name : ``digits``, ``cifar10``, ``cifar100``, ``mnist``, ``fashion-mnist``, ``npz:PATH``, ``folder:PATH``,
        ``hub:NAME`` or ``package.module:function``.
    dir : directory of the torchvision data sets.
    download : let torchvision or the hub download them; ``hub:`` needs it.
    partition : ``iid``, ``dirichlet:ALPHA`` (labels and sizes differ), ``balanced-dirichlet:ALPHA`` (labels differ,
        sizes do not: update times then tell devices apart, not data), ``merged-dirichlet:ALPHA``,
        ``pathological:CLASSES``, ``label-blocks:CLASSES``, ``quantity:SIGMA``, or in deployment ``own``: each device
        has a share of its own, which the server never sees.
    min_size : least examples of a client.
    test_ratio : share of its examples that a client keeps for its own test.
    max_train : use only this many training examples; 0 for all.
    max_test : of the server's held-out set; 0 for all.
    seed : of the partition.
    """

    name: str = "digits"
    dir: str = "data"
    download: bool = False
    partition: str = "balanced-dirichlet:0.5"
    min_size: int = 10
    test_ratio: float = 0.2
    max_train: int = 0
    max_test: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.min_size >= 2, "min-size", self.min_size, "at least 2 (one example to train on, one to test)")
        require(0 < self.test_ratio < 1, "test-ratio", self.test_ratio, "a number in (0, 1)")
        require(self.max_train >= 0, "max-train", self.max_train, ">= 0")
        require(self.max_test >= 0, "max-test", self.max_test, ">= 0")
        require(self.seed >= 0, "seed", self.seed, ">= 0")


@dataclass(frozen=True)
class TrainConfig:
    """How a client trains.

    Attributes
    ----------
    local_epochs : passes over its examples in one round.
    batch_size : examples a step.
    learning_rate : of the first round.
    schedule : ``constant``, or ``cosine`` to zero over the run's rounds.
    optimizer : ``sgd`` or ``adam``.
    momentum, nesterov : of SGD.
    weight_decay : of either.
    label_smoothing : in [0, 1).
    sparsity : factor of the regulariser on BatchNorm scales (never on their biases).
    sparsity_norm : ``l1``, or ``group-lasso`` over the rows by which a layer writes each unit.
    augment : ``none`` or ``flip-shift``.
    max_grad_norm : clip to it; 0 for no clipping.
    device : ``cpu``, ``cuda`` or ``auto``.
    """

    local_epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 0.05
    schedule: str = "cosine"
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    sparsity: float = 0.0
    sparsity_norm: str = "l1"
    augment: str = "none"
    max_grad_norm: float = 0.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.local_epochs >= 1, "local-epochs", self.local_epochs, ">= 1")
        require(self.batch_size >= 1, "batch-size", self.batch_size, ">= 1")
        require(self.learning_rate > 0, "learning-rate", self.learning_rate, "> 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        require(self.weight_decay >= 0, "weight-decay", self.weight_decay, ">= 0")
        require(0 <= self.label_smoothing < 1, "label-smoothing", self.label_smoothing, "in [0, 1)")
        require(self.sparsity >= 0, "sparsity", self.sparsity, ">= 0")
        require(self.max_grad_norm >= 0, "max-grad-norm", self.max_grad_norm, ">= 0")
        require_choice("schedule", self.schedule, ("constant", "cosine"))
        require_choice("optimizer", self.optimizer, ("sgd", "adam"))
        require_choice("sparsity-norm", self.sparsity_norm, ("l1", "group-lasso"))
        require_choice("augment", self.augment, ("none", "flip-shift"))
        require_choice("device", self.device, ("cpu", "cuda", "auto"))


@dataclass(frozen=True)
class CompressionConfig:
    """How uploads are compressed.

    Attributes
    ----------
    kind : ``none``, or ``dgc``: the largest entries of the update, the rest kept for later (Lin et al. 2018).
    density : share of the entries of each tensor that is sent, in (0, 1].
    momentum : momentum correction of the accumulated update, in [0, 1); 0 when the optimiser has its own.
    """

    kind: str = "none"
    density: float = 0.1
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Check every range."""
        require_choice("kind", self.kind, ("none", "dgc"))
        require(0 < self.density <= 1, "density", self.density, "in (0, 1]")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")


@dataclass(frozen=True)
class Job:
    """What stays the same for all instructions of a run.

    Attributes
    ----------
    model, data, train : the configurations above.
    num_clients : partitions of the data.
    num_rounds : of the run, for learning-rate schedules.
    seed : of the run.
    compression : of uploads.
    store_dir : where clients keep what must survive between rounds.
    lineage : names of this run and of those it continues, newest first, comma-separated: where a device, which keeps
        its memory under them, looks for it.
    num_classes, mean, std : of the server's data, per channel and comma-separated: for devices with data of their own.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    num_clients: int
    num_rounds: int
    seed: int
    compression: CompressionConfig = CompressionConfig()
    store_dir: str = ""
    lineage: str = ""
    num_classes: int = 0
    mean: str = ""
    std: str = ""


@dataclass(frozen=True)
class Instruction:
    """One request to one client; self-contained.

    Attributes
    ----------
    action : ``train`` or ``evaluate``.
    dispatch : number of this request, unique in the run.
    partition_id : the client's share of the data.
    server_round, global_version : when it was sent, and of which global model it is a part.
    spec : what the client keeps; ``state`` is the extracted sub-model.
    objective : name of what the client minimises, with its ``settings``.
    last_dispatch : the client's last request whose reply was merged; its own state continues from there. -1 for none.
    kept_dispatches : those that it may have to continue from if the run goes back to a checkpoint that is kept.
    is_partial : ``state`` lacks entries of the sub-model on purpose: the client has them itself, or does without.
    wants_delta : answer with the difference to ``state`` instead of the trained values.
    companions : tensors that the objective needs beside the weights.
    work_ratio : how much to train, as a multiple of the run's local epochs; to the nearest batch, at least one.
    """

    action: str
    dispatch: int
    partition_id: int
    server_round: int
    global_version: int
    job: Job
    state: State
    spec: SubModelSpec = FULL
    objective: str = "cross-entropy"
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    last_dispatch: int = -1
    kept_dispatches: tuple[int, ...] = ()
    is_partial: bool = False
    wants_delta: bool = False
    companions: State = field(default_factory=dict)
    work_ratio: float = 1.0


@dataclass(frozen=True)
class Report:
    """One client's answer.

    Attributes
    ----------
    dispatch, partition_id : of the request it answers.
    state : trained entries of the sub-model; empty after an evaluation. With ``is_delta``, differences to what was
        received; with ``is_sparse``, as ``pruning.compress.sparsify`` writes them.
    num_examples : trained or evaluated on.
    label_counts : examples by class, [num_classes].
    train_macs : executed, forward and backward, by the whole request.
    compute_s : of training, measured on the client's clock.
    peak_memory_bytes : weights, gradients, optimiser state and the activations of the largest batch, counted while
        training.
    metrics : ``loss``, ``accuracy`` and what the objective adds.
    narrowed : the part of the spec the client really trained, if it is not all of it; ``state`` holds only that part.
    companions : tensors that the objective has for the server beside the weights.
    num_steps : optimiser steps made.
    busy_s : of everything the client's process did for this request, its own start and training included; 0 if unknown.
    """

    dispatch: int
    partition_id: int
    state: State
    num_examples: int
    label_counts: tuple[int, ...] = ()
    train_macs: float = 0.0
    compute_s: float = 0.0
    peak_memory_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_delta: bool = False
    is_sparse: bool = False
    narrowed: SubModelSpec | None = None
    companions: State = field(default_factory=dict)
    num_steps: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A request that will not be answered: the client raised, died, or took too long."""

    dispatch: int
    partition_id: int
    reason: str


def state_bytes(state: State) -> int:
    """Bytes of the tensors of a state dict."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def payload_bytes(message: Instruction | Report) -> int:
    """Bytes of all tensors that a message carries."""
    return state_bytes(message.state) + state_bytes(message.companions)
