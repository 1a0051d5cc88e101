"""The records that cross a boundary between processes.

Legend of shapes: P prompts, M branch steps, G members of a group (G' those of one unit), J granularities, R rewards;
L latent tokens and D channels of a packed latent; S text tokens; H, W pixels. Arrays are numpy, so that Ray's object
store hands them out without a copy; latents and log-probabilities are always float32, images uint8.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Images = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PromptEmbedding:
    """What the text encoders made of one prompt. bfloat16 has no numpy type: it is stored as its int16 bits."""

    prompt: str
    pooled: NDArray[Any]  # [D_pooled]
    sequence: NDArray[Any]  # [S, D_text]
    dtype: str  # "float32", "bfloat16" or "float16": what the bits mean


@dataclass(frozen=True, slots=True)
class AnchorUnit:
    """One prompt's deterministic trajectory: T evaluations."""

    iteration: int
    slot: int  # place of the prompt in its iteration, 0..P-1
    prompt: str

    @property
    def name(self) -> str:
        return f"anchor/{self.iteration}/{self.slot}"


@dataclass(frozen=True, slots=True)
class BranchUnit:
    """Members [first_member, first_member + members) of the group that branches off one anchor at one step."""

    iteration: int
    slot: int
    prompt: str
    branch_step: int
    first_member: int
    members: int

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


Unit = AnchorUnit | BranchUnit | SampleUnit


@dataclass(frozen=True, slots=True)
class Anchor:
    """The anchor trajectory at the branch steps, in the order of `sampler.branch_steps`."""

    latents: FloatArray  # [M, L, D]
    velocities: FloatArray  # [M, L, D]


@dataclass(frozen=True, slots=True)
class Branches:
    """The stochastic transitions of one branch unit, under the policy that sampled them."""

    next_latents: FloatArray  # [G', L, D]
    log_prob: FloatArray  # [G'], nats, mean over latent dimensions


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor runs."""

    pid: int
    node: str  # Ray's id
    address: str


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
    """Everything the learner needs of one prompt: M branch steps of G members each.

    On its way through the driver `embedding`, `anchor` and the entries of `branches` are object references; the
    learner rank that receives the record fetches them. `branches[m]` are the units of branch step m, in member order.
    """

    slot: int
    prompt: str
    rewards: FloatArray  # [R, M, J, G], NaN where a score is missing
    embedding: Any  # PromptEmbedding
    anchor: Any  # Anchor
    branches: tuple[tuple[Any, ...], ...]  # M tuples of Branches


@dataclass(frozen=True, slots=True)
class Rollout:
    """One iteration's rollouts, and what it took to make them."""

    prompts: list[PromptRollout]
    anchor_scores: dict[str, FloatArray]  # [P] by reward, trained or not: the on-policy evaluation
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
