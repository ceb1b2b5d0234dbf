"""One rendering of a training step with all its losses, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import scene
from benchmarks.case import Workload, by_reference
from benchmarks.field import DENSITY_FLOPS, FEATURE_FLOPS
from dsd_fast.scene.background import Background, BackgroundConfig
from dsd_fast.scene.field import Field, FieldConfig
from dsd_fast.scene.losses import LossConfig, regularizers
from dsd_fast.scene.renderer import Renderer

# Room for the samples a ray of this scene has on average: 47 to march and 29 to keep at 512².
_ROOM = (64.0, 40.0)


def render(width: int, device: torch.device, generator: torch.Generator) -> Workload:
    """width² pixels of the official field at step 0, its initial blob: 8 of 16 levels are active.

    March, visibility, field with normals, compositing, background, the five regularisers and a
    random gradient of the image in place of the guidance's, back to all parameters. The grid of
    occupied cells is not updated, rays are not jittered. Flops: the field's two networks alone,
    once for each sample that marching takes and three times (forward and backward) for each that
    is seen.
    """
    field = Field(FieldConfig(), generator).to(device)
    background = Background(BackgroundConfig(random_aug=False), generator).to(device)
    cfg = replace(scene.RENDERER, randomized=False, sample_room=_ROOM)
    renderer = Renderer(cfg, scene.RADIUS).to(device)
    renderer.occupancy.load_state_dict(scene.occupancy(device).state_dict())
    cameras = scene.view(width, scene.RENDER_FOVY_DEG, device, generator)
    towards = torch.randn(1, width, width, 3, generator=generator).to(device) / width**2
    parameters = [*field.parameters(), *background.parameters()]
    unused = torch.Generator()

    def forward():
        # Step 1 leaves the grid alone.
        draws = renderer.draw(field, background, cameras, 1, unused)
        return renderer.render(field, background, cameras, draws)

    def call() -> tuple[Tensor, ...]:
        output = forward()
        terms = regularizers(output, LossConfig(), step=0).values()
        loss = (output.rgb * towards).sum() + sum(weight * value for value, weight in terms)
        return output.rgb, output.opacity, *torch.autograd.grad(loss, parameters)

    names = [name for module in (field, background) for name, _ in module.named_parameters()]
    with torch.no_grad():
        n_samples = int(forward().n_samples)
    return Workload(
        compiled=call,
        reference=by_reference(call),
        outputs=("rgb", "opacity", *(f"gradient of {name}" for name in names)),
        n_items=n_samples,
        n_flops=n_samples * (4 * DENSITY_FLOPS + 3 * FEATURE_FLOPS),
    )
