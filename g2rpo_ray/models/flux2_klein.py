"""FLUX.2 klein: FLUX.2 with Qwen3 for text; the base models are guided, the others distilled to few steps."""

from diffusers import Flux2KleinPipeline

from g2rpo_ray.models import flux2


class Model(flux2.Model):
    pipeline_class = Flux2KleinPipeline

    def _guides(self) -> bool:
        return not self._pipeline.config.is_distilled
