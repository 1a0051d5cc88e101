"""The records that cross a boundary between processes.

Legend of shapes: P prompts, R rewards; N nodes, E stochastic edges and Q leaves of a prompt's tree; B branch points of
its trunks; L latent tokens and D channels of a packed latent; S text tokens; H, W pixels. Arrays are numpy, so that
Ray's object store hands them out without a copy; latents and log-probabilities are always float32, images uint8.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the processes that start actors, and the cheapest actors, need no torch
    import torch

    from g2rpo_ray.algo.completion import Choice
    from g2rpo_ray.algo.tree import Tree

FloatArray = NDArray[np.float32]
Ints = NDArray[np.int64]
Images = NDArray[np.uint8]
Metadata = Mapping[str, Any]
"""Metadata of a prompt from its file, which rewards receive; empty for most prompts."""

# A prompt is known everywhere by one string: its text, and after it the size and digest of each source picture, as in
# "make it red [source 64x48 9f86d081884c7d659a2feaa0c55ad015]". Keys, noise and files need nothing else.
SOURCES = re.compile(r" \[source((?: \d+x\d+ [0-9a-f]{32})+)\]\Z")


def text_of(prompt: str) -> str:
    """What a prompt says, without its sources."""
    return SOURCES.sub("", prompt)


def sources_of(prompt: str) -> str:
    """The end of a prompt that stands for its source pictures; "" without any. Of another text it makes the prompt
    with the same sources."""
    found = SOURCES.search(prompt)
    return found[0] if found else ""


def sources_in(metadata: Mapping[str, Any]) -> tuple[Any, ...]:
    """The source pictures in what is known of a prompt. A field `source` that is no tuple is the user's own."""
    found = metadata.get("source", ())
    return found if isinstance(found, tuple) else ()


def source_sizes(prompt: str) -> tuple[str, ...]:
    """Width and height of each source, such as "64x48": prompts of equal sizes have tensors of equal shapes."""
    found = SOURCES.search(prompt)
    return tuple(found[1].split()[::2]) if found else ()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as numpy holds it; bfloat16, which numpy does not know, as its int16 bits."""

    dtype: str  # torch's name of it: what the bits mean
    data: NDArray[Any]

    @classmethod
    def of(cls, tensor: "torch.Tensor") -> "StoredTensor":
        import torch

        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        return cls(str(tensor.dtype).removeprefix("torch."), bits.cpu().numpy())

    def tensor(self) -> "torch.Tensor":
        import torch

        tensor = torch.from_numpy(np.array(self.data))  # a copy: Ray's arrays cannot be written to, and torch warns
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor


@dataclass(frozen=True, slots=True)
class PromptEmbedding:
    """The text encoders' output for one prompt: tensors by the names of the pipeline's arguments."""

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
    choice: "Choice | None" = None  # in the place of `auto`; None: that of the start

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
    choice: "Choice | None" = None
    exact: bool = False  # completed as all else, beside the same unit that is completed by `rollout.completions`

    @property
    def name(self) -> str:
        return (
            f"{'exact' if self.exact else 'branch'}/{self.iteration}/{self.slot}/{self.branch_step}/{self.first_member}"
        )


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
    waits: tuple[float, int] = (0.0, 1)  # the same: seconds that a question takes at most, and how many at a time


@dataclass(frozen=True, slots=True)
class Span:
    """A bar in the timeline: actor, work, start and duration, by the clock of its machine."""

    who: str
    address: str
    what: str
    started: float  # seconds of the epoch
    seconds: float
    weights_version: int | None = None


@dataclass(frozen=True, slots=True)
class UnitReport:
    """The report of a finished unit for the driver; it is small and has no tensors."""

    unit: str
    actor: str
    place: Place
    started: float  # seconds of the epoch, before fetching
    weights_version: int
    evaluations: int
    images: int
    seconds: float
    fetch_seconds: float  # before that, to fetch and verify new weights
    digests: Mapping[str, str] = field(default_factory=dict)  # of its arrays: see runs/audit.py

    def spans(self) -> list[Span]:
        """The unit in the timeline."""
        fetched = self.started + self.fetch_seconds
        parts = (("weights", self.started, self.fetch_seconds), (self.unit, fetched, self.seconds))
        return [Span(self.actor, self.place.address, *part, self.weights_version) for part in parts if part[2] > 1e-3]


@dataclass(frozen=True, slots=True)
class WeightsManifest:
    """Version, number of tensors and checksum of published weights; a receiver refuses anything else."""

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
    tree: "Tree"
    scores: FloatArray  # [R, Q] by the trained rewards, NaN where one is missing
    embedding: Any  # PromptEmbedding
    trunk: Any  # Trunk
    branches: tuple[Any, ...]  # of Branches
    exact_scores: FloatArray | None = None  # [R, Q] of exact completions, of a prompt that was completed both ways


@dataclass(frozen=True, slots=True)
class Rollout:
    """One iteration's rollouts, and what it took to make them."""

    prompts: list[PromptRollout]
    anchor_scores: dict[str, FloatArray]  # by reward, trained or not, of all trunks' images: the on-policy evaluation
    reports: list[UnitReport]
    weights_version: int
    seconds: float  # from the first unit to the last score
    sampling_seconds: float  # from the first unit to the last image
    weights: str = ""  # checksum of the LoRA that sampled


@dataclass(frozen=True, slots=True)
class Samples:
    """Deterministic samples of held-out prompts under one weights version."""

    prompts: list[str]
    scores: dict[str, FloatArray]  # [prompts, seeds] by reward, NaN where missing
    pictures: list[Images]  # [H, W, 3], the first seed of the first prompts: what a grid shows
    evaluations: int
    traces: list[dict[str, float]] = field(default_factory=list)  # of each prompt's images: see runs/hacking.py


@dataclass(frozen=True, slots=True)
class Cell:
    """One adapter (version 0: the base) on one prompt at one number of steps."""

    key: str  # digest of the adapter, of the prompt's metadata and of every setting that its scores depend on
    version: int
    unit: SampleUnit
    shown: bool  # whether a picture of it goes into the grid

    @property
    def name(self) -> tuple[str, int | None, str]:
        return self.key, self.unit.steps, self.unit.prompt
