"""The model by itself, watched by markers: no recipe is needed for these."""

import torch
from stripes import StripesTransformer

from pytest_diffopt import compile_fullgraph, max_memory, max_recompiles, recipes, requires_gpu


def inputs(length: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ones(1, length, 16, device=device), torch.ones(1, 16, 256, device=device), torch.ones(1, device=device)


@compile_fullgraph
@max_recompiles(1)
def test_one_graph_serves_every_size() -> None:
    compiled = torch.compile(StripesTransformer(), backend="eager")
    for length in (16, 32, 64):
        compiled(*inputs(length))


@requires_gpu(simulated=True)
@max_memory("14MiB")
def test_the_transformer_fits(accelerator) -> None:
    model = StripesTransformer().to(accelerator.device)
    model(*inputs(64, str(accelerator.device)))


@recipes("stripes.recipes.toml")
def test_every_recipe_gives_an_image_in_range(observation) -> None:
    assert observation.failure is None
    images = [output.array() for output in observation.outputs if not output.component]
    assert images
    assert all(image.min() >= 0 and image.max() <= 1 for image in images)
