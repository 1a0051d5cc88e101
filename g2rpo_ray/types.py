"""The records that processes exchange.

Dimensions: P prompts, R rewards; N nodes, E stochastic edges and Q leaves of a prompt's tree; B branch points of its
trunks; L latent tokens and D channels of a packed latent; S text tokens; H, W pixels. Arrays are numpy arrays, which
Ray's object store shares without a copy. Latents and log-probabilities are float32, images uint8.
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
"""Metadata of a prompt from the prompt file; rewards receive it. Empty for most prompts."""

# One string identifies a prompt everywhere: its text, then the size and digest of each source picture, as in
# "make it red [source 64x48 9f86d081884c7d659a2feaa0c55ad015]". Random keys and files use this string alone.
SOURCES = re.compile(r" \[source((?: \d+x\d+ [0-9a-f]{32})+)\]\Z")


def text_of(prompt: str) -> str:
    """The text of a prompt, without its sources."""
    return SOURCES.sub("", prompt)


def sources_of(prompt: str) -> str:
    """The suffix of a prompt that identifies its source pictures; "" without any. Appended to another text, it gives
    a prompt with the same sources."""
    found = SOURCES.search(prompt)
    return found[0] if found else ""


def sources_in(metadata: Mapping[str, Any]) -> tuple[Any, ...]:
    """The source pictures in a prompt's metadata. A field `source` that is not a tuple belongs to the user."""
    found = metadata.get("source", ())
    return found if isinstance(found, tuple) else ()


def source_sizes(prompt: str) -> tuple[str, ...]:
    """Width and height of each source, such as "64x48": prompts of equal sizes have tensors of equal shapes."""
    found = SOURCES.search(prompt)
    return tuple(found[1].split()[::2]) if found else ()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a numpy array; bfloat16, which numpy does not have, is stored as int16 bits."""

    dtype: str  # torch's name of the dtype, such as "bfloat16"
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
    """The embedding of the negative prompt, in a run with `model.negative_prompt`."""


@dataclass(frozen=True, slots=True)
class TrunkUnit:
    """The roots of one prompt's tree and their trunks, up to the last branch point or to the image."""

    iteration: int
    slot: int  # index of the prompt in its iteration, 0..P-1
    prompt: str
    choice: "Choice | None" = None  # replaces `auto`; None: the choice at the start of the run

    @property
    def name(self) -> str:
        return f"trunk/{self.iteration}/{self.slot}"


@dataclass(frozen=True, slots=True)
class BranchUnit:
    """Children [first_member, first_member + members) of all roots at one branch step, with everything below them.

    Child c of root r has number r · G + c.
    """

    iteration: int
    slot: int
    prompt: str
    branch_step: int
    first_member: int
    members: int
    choice: "Choice | None" = None
    exact: bool = False  # an exact completion, in addition to the same unit by `rollout.completions`

    @property
    def name(self) -> str:
        return (
            f"{'exact' if self.exact else 'branch'}/{self.iteration}/{self.slot}/{self.branch_step}/{self.first_member}"
        )


@dataclass(frozen=True, slots=True)
class SampleUnit:
    """Deterministic samples of one prompt, one for each seed, for held-out evaluation."""

    prompt: str
    seeds: tuple[int, ...]
    steps: int | None = None  # sampling steps; None: those of the configuration
    adapter_share: float = 1.0  # the share of steps, from the first on, with the adapter; the rest use the base

    @property
    def name(self) -> str:
        return f"sample/{self.prompt}/{self.seeds[0]}"


Unit = TrunkUnit | BranchUnit | SampleUnit


@dataclass(frozen=True, slots=True)
class Trunk:
    """Latents and velocities of the trunks at their branch points, in the order of `tree.branch_points`."""

    latents: FloatArray  # [B, L, D]
    velocities: FloatArray  # [B, L, D]


@dataclass(frozen=True, slots=True)
class Branches:
    """The stochastic edges of one branch unit, with log-probabilities of the policy that sampled them."""

    nodes: Ints  # [n] nodes of the unit at which trained edges start or end; the images for forward-process objectives
    latents: FloatArray  # [n, L, D]
    edges: Ints  # [e] all stochastic edges of the unit
    log_prob: FloatArray  # [e], nats, mean over latent dimensions; NaN where a step has no noise


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor runs."""

    pid: int
    node: str  # Ray's node id
    address: str
    takes_groups: bool = False  # reward actors: it scores all images of a comparison group in one call
    waits: tuple[float, int] = (
        0.0,
        1,
    )  # reward actors: longest request, seconds; number of concurrent ones


@dataclass(frozen=True, slots=True)
class Span:
    """A bar in the timeline: actor, work, start and duration, by its machine's clock."""

    who: str
    address: str
    what: str
    started: float  # Unix time, seconds
    seconds: float
    weights_version: int | None = None


@dataclass(frozen=True, slots=True)
class UnitReport:
    """A finished unit's report to the driver; it holds no tensors."""

    unit: str
    actor: str
    place: Place
    started: float  # Unix time in seconds, before fetching weights
    weights_version: int
    evaluations: int
    images: int
    seconds: float
    fetch_seconds: float  # to fetch and verify new weights, before the unit
    digests: Mapping[str, str] = field(default_factory=dict)  # digests of its arrays: see runs/audit.py

    def spans(self) -> list[Span]:
        """The timeline's bars for the unit: fetching weights, and the work; none shorter than a millisecond."""
        fetched = self.started + self.fetch_seconds
        parts = (("weights", self.started, self.fetch_seconds), (self.unit, fetched, self.seconds))
        return [Span(self.actor, self.place.address, *part, self.weights_version) for part in parts if part[2] > 1e-3]


@dataclass(frozen=True, slots=True)
class WeightsManifest:
    """Version, number of tensors and checksum of published weights; a receiver refuses weights that differ."""

    version: int
    tensors: int
    bytes: int
    checksum: str  # SHA-256 of names, shapes, dtypes and bytes


@dataclass(frozen=True, slots=True)
class PromptRollout:
    """The learner's data for one prompt; the tree gives the indices of the arrays.

    In the driver `embedding`, `trunk` and the entries of `branches` are object references; the learner rank that
    receives the record fetches them.
    """

    iteration: int
    slot: int
    prompt: str
    tree: "Tree"
    scores: FloatArray  # [R, Q] of the trained rewards, NaN where a score is missing
    embedding: Any  # PromptEmbedding
    trunk: Any  # Trunk
    branches: tuple[Any, ...]  # of Branches
    exact_scores: FloatArray | None = None  # [R, Q] of exact completions, for a prompt that was completed both ways


@dataclass(frozen=True, slots=True)
class Rollout:
    """One iteration's rollouts, with their reports and durations."""

    prompts: list[PromptRollout]
    anchor_scores: dict[str, FloatArray]  # for each reward, the scores of all trunks' images: on-policy evaluation
    reports: list[UnitReport]
    weights_version: int
    seconds: float  # from the first unit to the last score
    sampling_seconds: float  # from the first unit to the last image
    weights: str = ""  # checksum of the LoRA weights that sampled


@dataclass(frozen=True, slots=True)
class Samples:
    """Deterministic samples of held-out prompts under one weights version."""

    prompts: list[str]
    scores: dict[str, FloatArray]  # [prompts, seeds] for each reward, NaN where missing
    pictures: list[Images]  # [H, W, 3], the first seed of the first prompts, for a grid
    evaluations: int
    traces: list[dict[str, float]] = field(default_factory=list)  # one for each prompt: see runs/hacking.py


@dataclass(frozen=True, slots=True)
class Cell:
    """One adapter (version 0: the base), one prompt and one number of sampling steps."""

    key: str  # digest of the adapter, of the prompt's metadata and of all settings that affect its scores
    version: int
    unit: SampleUnit
    shown: bool  # whether the grid has its image

    @property
    def name(self) -> tuple[str, int | None, str]:
        return self.key, self.unit.steps, self.unit.prompt
