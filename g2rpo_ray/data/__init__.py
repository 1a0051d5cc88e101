"""Prompts, their order, and their embeddings in Parquet. No Ray."""

from g2rpo_ray.data.embeddings import EmbeddingStore, encode_missing, fingerprint, negative_prompts
from g2rpo_ray.data.prompts import (
    Prompts,
    drawn_prompts,
    iteration_prompts,
    without_heldout,
)
from g2rpo_ray.data.records import read_prompts, read_records

__all__ = [
    "EmbeddingStore",
    "Prompts",
    "drawn_prompts",
    "encode_missing",
    "fingerprint",
    "iteration_prompts",
    "negative_prompts",
    "read_prompts",
    "read_records",
    "without_heldout",
]
