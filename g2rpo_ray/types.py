"""The records that cross a boundary between processes.

Legend of shapes: P prompts, R rewards; N nodes, E stochastic edges and Q leaves of a prompt's tree; B branch points of
its trunks; L latent tokens and D channels of a packed latent; S text tokens; H, W pixels. Arrays are numpy, so that
Ray's object store hands them out without a copy; latents and log-probabilities are always float32, images uint8.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from g2rpo_ray.algo import Choice, Tree

FloatArray = NDArray[np.float32]
Ints = NDArray[np.int64]
Images = NDArray[np.uint8]
Metadata = Mapping[str, Any]
"""What rewards are told of a prompt beside its text, from the file that it stands in; empty for most."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as numpy holds it; bfloat16, which numpy does not know, as its int16 bits."""

    dtype: str  # torch's name of it: what the bits mean
    data: NDArray[Any]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "StoredTensor":
        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        return cls(str(tensor.dtype).removeprefix("torch."), bits.cpu().numpy())

    def tensor(self) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(self.data))  # a copy: Ray's arrays cannot be written to, and torch warns
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor


@dataclass(frozen=True, slots=True)
class PromptEmbedding:
    """What the text encoders made of one prompt: tensors by the names of the pipeline's own arguments."""

    prompt: str
    tensors: Mapping[str, StoredTensor]
    negative: "PromptEmbedding | None" = None
    """What the run guides away from; on what is read for a run with `model.negative_prompt`."""


@dataclass(frozen=True, slots=True)
class TrunkUnit:
    """The roots of one prompt's tree and their trunks, as far as its branches need them, or to the image."""

    iteration: int
    slot: int  # place of the prompt in its iteration, 0..P-1
    prompt: str
    choice: Choice | None = None  # in the place of `auto`; None: that of the start

    @property
    def name(self) -> str:
        return f"trunk/{self.iteration}/{self.slot}"


@dataclass(frozen=True, slots=True)
class BranchUnit:
    """Children [first_member, first_member + members) of all roots at one branch step, with everything below them.

    They are counted root by root: child c of root r is number r · G + c.
    """

    iteration: int
    slot: int
    prompt: str
    branch_step: int
    first_member: int
    members: int
    choice: Choice | None = None

    @property
    def name(self) -> str:
        return f"branch/{self.iteration}/{self.slot}/{self.branch_step}/{self.first_member}"


@dataclass(frozen=True, slots=True)
class SampleUnit:
    """Deterministic samples of one prompt, one for each seed: what held-out evaluation looks at."""

    prompt: str
    seeds: tuple[int, ...]
    steps: int | None = None  # sampling steps; None: those of the configuration
    adapter_share: float = 1.0  # of the steps, from the first on, that the adapter makes; the base makes the rest

    @property
    def name(self) -> str:
        return f"sample/{self.prompt}/{self.seeds[0]}"


Unit = TrunkUnit | BranchUnit | SampleUnit


@dataclass(frozen=True, slots=True)
class Trunk:
    """The trunks at their branch points, in the order of `tree.branch_points`."""

    latents: FloatArray  # [B, L, D]
    velocities: FloatArray  # [B, L, D]


@dataclass(frozen=True, slots=True)
class Branches:
    """The stochastic edges of one branch unit, under the policy that sampled them."""

    nodes: Ints  # [n], those of the unit that trained edges start or end at; of the forward process, images
    latents: FloatArray  # [n, L, D]
    edges: Ints  # [e], all of the unit
    log_prob: FloatArray  # [e], nats, mean over latent dimensions; NaN where a step has no noise


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor runs."""

    pid: int
    node: str  # Ray's id
    address: str
    takes_groups: bool = False  # of a reward's server: it needs all images at once that credit compares


@dataclass(frozen=True, slots=True)
class Span:
    """What somebody did when, by the clock of the machine it was done on: a bar in the timeline."""

    who: str
    address: str
    what: str
    started: float  # seconds of the epoch
    seconds: float
    weights_version: int | None = None


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What the driver learns of a finished unit; small, where the tensors are not."""

    unit: str
    actor: str
    place: Place
    started: float  # seconds of the epoch, before fetching
    weights_version: int
    evaluations: int
    images: int
    seconds: float
    fetch_seconds: float  # before that, to fetch and verify new weights

    def spans(self) -> list[Span]:
        """The unit in the timeline."""
        fetched = self.started + self.fetch_seconds
        parts = (("weights", self.started, self.fetch_seconds), (self.unit, fetched, self.seconds))
        return [Span(self.actor, self.place.address, *part, self.weights_version) for part in parts if part[2] > 1e-3]


@dataclass(frozen=True, slots=True)
class WeightsManifest:
    """What a receiver of LoRA weights must find: anything else and it refuses to work."""

    version: int
    tensors: int
    bytes: int
    checksum: str  # SHA-256 over names, shapes, dtypes and bytes


@dataclass(frozen=True, slots=True)
class PromptRollout:
    """Everything the learner needs of one prompt; the tree says what the arrays mean.

    On its way through the driver `embedding`, `trunk` and the entries of `branches` are object references; the learner
    rank that receives the record fetches them.
    """

    iteration: int
    slot: int
    prompt: str
    tree: Tree
    scores: FloatArray  # [R, Q] by the trained rewards, NaN where one is missing
    embedding: Any  # PromptEmbedding
    trunk: Any  # Trunk
    branches: tuple[Any, ...]  # of Branches


@dataclass(frozen=True, slots=True)
class Rollout:
    """One iteration's rollouts, and what it took to make them."""

    prompts: list[PromptRollout]
    anchor_scores: dict[str, FloatArray]  # by reward, trained or not, of all trunks' images: the on-policy evaluation
    reports: list[UnitReport]
    weights_version: int
    seconds: float  # from the first unit to the last score
    sampling_seconds: float  # from the first unit to the last image


@dataclass(frozen=True, slots=True)
class Samples:
    """Deterministic samples of held-out prompts under one weights version."""

    prompts: list[str]
    scores: dict[str, FloatArray]  # [prompts, seeds] by reward, NaN where missing
    pictures: list[Images]  # [H, W, 3], the first seed of the first prompts: what a grid shows
    evaluations: int
    traces: list[dict[str, float]] = field(default_factory=list)  # of each prompt's images: see record/panel.py
