"""Stripes: a small diffusion model and its pipeline, as a repository of one's own would have them."""

from stripes.model import StripesTransformer, TextEncoder
from stripes.pipeline import StripesPipeline, make_pipeline

__all__ = ["StripesPipeline", "StripesTransformer", "TextEncoder", "make_pipeline"]
