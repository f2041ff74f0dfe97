"""The pipeline, and the small one of it that tests build: seeded, with no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput

from stripes.model import StripesTransformer, TextEncoder


@dataclass
class StripesOutput(BaseOutput):
    """images (batch, 3, height, width), each value 0 to 1."""

    images: torch.Tensor


class StripesPipeline(DiffusionPipeline):
    """Text to image."""

    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self, transformer: StripesTransformer, text_encoder: TextEncoder, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        height: int = 32,
        width: int = 32,
        num_inference_steps: int = 3,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
    ) -> StripesOutput:
        """One image, as a tensor: ``output_type`` takes ``"pt"`` alone."""
        if output_type != "pt":
            raise ValueError(f"output_type: found {output_type!r}; it takes 'pt'")
        device, dtype = self._execution_device, self.transformer.dtype
        ids = list(prompt.encode())[:16]
        ids += [0] * (16 - len(ids))
        prompt_embeds = self.text_encoder(torch.tensor([ids], device=device)).to(dtype)
        channels = self.transformer.config.channels
        patches = torch.randn(1, height * width // channels, channels, generator=generator).to(device, dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for timestep in self.scheduler.timesteps:
            flow = self.transformer(patches, prompt_embeds, timestep[None])
            patches = self.scheduler.step(flow, timestep, patches, return_dict=False)[0]
        grey = patches.float().reshape(1, 1, height, width).sigmoid()
        self.maybe_free_model_hooks()
        return StripesOutput(images=grey.expand(1, 3, height, width))


def make_pipeline() -> StripesPipeline:
    """The small one: what recipes name as ``"stripes:make_pipeline"``."""
    torch.manual_seed(0)
    return StripesPipeline(StripesTransformer(), TextEncoder(), FlowMatchEulerDiscreteScheduler())
