"""Prompts, the order in which they are used, and their embeddings in Parquet. No Ray here."""

from g2rpo_ray.data.embeddings import EmbeddingStore, encode_missing, fingerprint
from g2rpo_ray.data.prompts import (
    Prompts,
    drawn_prompts,
    iteration_prompts,
    read_prompts,
    read_records,
    without_heldout,
)

__all__ = [
    "EmbeddingStore",
    "Prompts",
    "drawn_prompts",
    "encode_missing",
    "fingerprint",
    "iteration_prompts",
    "read_prompts",
    "read_records",
    "without_heldout",
]
