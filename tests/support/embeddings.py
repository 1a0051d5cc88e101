"""An embedding as the store has it."""

import numpy as np

from g2rpo_ray.types import PromptEmbedding, StoredTensor


def embedding(prompt: str, dtype: str = "float32") -> PromptEmbedding:
    """Random bits, NaNs and infinities among them."""
    rng = np.random.default_rng(list(prompt.encode()))
    stored_as = {"float32": np.float32, "bfloat16": np.int16, "float16": np.float16}[dtype]
    pooled, sequence = (StoredTensor(dtype, np.frombuffer(rng.bytes(4 * size), stored_as)) for size in (6, 5 * 8))
    sequence = StoredTensor(dtype, sequence.data.reshape(5, -1))
    mask = StoredTensor("bool", rng.random(5) < 0.5)
    return PromptEmbedding(prompt, {"pooled": pooled, "sequence": sequence, "mask": mask})
