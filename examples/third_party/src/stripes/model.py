"""The two models: a transformer that denoises a strip of patches, and an encoder of the prompt's bytes."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Attention over the patches and the prompt, and a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        query, key, value = self.to_qkv(self.norm(hidden)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.to_out(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.feed_forward(hidden)


class StripesTransformer(ModelMixin, ConfigMixin):
    """Predicts the flow of each patch, given the prompt and the time."""

    _repeated_blocks = ["Block"]
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(self, width: int = 256, heads: int = 4, layers: int = 3, channels: int = 16) -> None:
        super().__init__()
        self.enter = nn.Linear(channels, width)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.leave = nn.Linear(width, channels)

    def forward(self, patches: torch.Tensor, prompt_embeds: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """patches (batch, length, channels), prompt_embeds (batch, words, width), timestep (batch,) → like patches."""
        time = self.time(timestep.to(patches.dtype)[:, None, None] / 1000)
        hidden = torch.cat([self.enter(patches) + time, prompt_embeds], dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.leave(hidden[:, : patches.shape[1]])


class TextEncoder(ModelMixin, ConfigMixin):
    """Sixteen bytes of the prompt, embedded and mixed."""

    @register_to_config
    def __init__(self, width: int = 256, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (batch, 16), each 0 to 255 → (batch, 16, width)."""
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden
