"""Prompts, the order in which they are used, and their embeddings in Parquet. No Ray here."""

from g2rpo_ray.data.embeddings import EmbeddingStore, fingerprint
from g2rpo_ray.data.prompts import iteration_prompts, read_prompts

__all__ = ["EmbeddingStore", "fingerprint", "iteration_prompts", "read_prompts"]
