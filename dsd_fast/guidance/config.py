"""Settings of the guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from dsd_fast.diffusion.noise_path import NUM_TRAIN_TIMESTEPS
from dsd_fast.guidance.registry import FORMULATIONS
from dsd_fast.ranges import Bins, ConfigError, NonNegative, Registered, Share, ShareOverRun
from dsd_fast.schedules import Schedule

TRAJECTORIES = ("exact", "cached")

# Multiples of it, modulo 1, are spread evenly however many there are.
_GOLDEN = 0.6180339887498949

_METHOD = Registered(lambda: FORMULATIONS)


@dataclass
class GuidanceConfig:
    """Settings of the guidance; the defaults are the official ones of Diverse Score Distillation,
    but for `trajectory`, of which the official one is "exact"."""

    # The formulation. Any but "dsd" brings its paper's scale, noise levels and weight along, which
    # flags change as ever (docs/guides/formulations.md); "recon" is MVDream's own loss.
    method: Annotated[str, _METHOD.check, _METHOD.flag] = "dsd"
    # Classifier-free guidance scale: of the target prediction and, unless trajectory_scale says
    # otherwise, of the trajectory.
    guidance_scale: NonNegative = 7.5
    # Guidance scale of the trajectory, which the seed chooses its object by; None (official) takes
    # guidance_scale. Guidance narrows what a model draws, so that samples of a lower scale are more
    # diverse; of objects that has hardly been seen (docs/results/comparison.md).
    trajectory_scale: NonNegative | None = None
    # Share of the target prediction whose contrast is brought back to that without guidance, which
    # makes colours burst where it is followed for long (Lin et al. 2023). Of "dsd" alone.
    rescale: Share = 0.0
    # Perp-Neg: interpolate the view prompts by azimuth and push away from the other views.
    use_perp_neg: bool = True
    # Lowest noise level, as a share of 1000: a number or a schedule.
    min_step_percent: ShareOverRun = 0.32
    # Highest noise level, as a share of 1000: a number or a schedule.
    max_step_percent: ShareOverRun = 0.98
    # Let t fall from the highest to the lowest level over the run; otherwise t is random per view.
    t_anneal: bool = True
    # Anneal by the square root of the progress, fast at first.
    sqrt_anneal: bool = True
    # Lower bound of t_delta.
    delta_min: Annotated[int, Interval(ge=0, lt=NUM_TRAIN_TIMESTEPS)] = 1
    # Intervals of the full trajectory from 999 to 0.
    n_ddim_steps: Annotated[int, Interval(ge=1, lt=NUM_TRAIN_TIMESTEPS)] = 10
    # "cached" keeps the trajectories of azimuth_bins azimuths and trains on views from those alone;
    # "exact" (official) simulates one at every step, for views from anywhere.
    trajectory: Literal["exact", "cached"] = "cached"
    # Bins of |azimuth| in [0, 180] degrees that share a cached trajectory, that of their centre.
    azimuth_bins: Bins = 48
    # Levels between the entries of a table of the cached trajectories' noise, which is interpolated
    # between them; 0 asks the UNet for it at every step.
    noise_table_step: Annotated[int, Interval(ge=0, le=NUM_TRAIN_TIMESTEPS)] = 20
    # Views from azimuth < 0 follow the mirror image of the trajectory of those from azimuth > 0.
    # Officially both follow the same picture, so that a thing seen from the side faces the same way
    # from both sides and grows two backs; mirrored, they agree on a mirror-symmetric object.
    mirror_trajectory: bool = False
    # Weight of the gradient: "sds" is sigma_t^2 (official), "ddim" is sigma_t / alpha_t, the step
    # that the trajectory itself takes.
    weighting: Literal["sds", "ddim"] = "sds"
    # Share of the trajectory's own noise in what the target prediction is compared with: a number,
    # or a schedule over the level t in place of the step. At 0 (official) the UNet is asked anew,
    # at scale 1, for the rendering put at t_delta; where t_delta = t, as late in a run, only the
    # classifier's direction is left, which has no rest. At 1 the gradient rests where a rendering
    # is what is predicted of it, as in DDIM, and half of the UNet's rows are saved.
    trajectory_share: ShareOverRun = 0.0
    # Of "dsd" with a multi-view model and cached trajectories: the share of the steps that are
    # anchored, a number or a schedule. Their views stand where a trajectory's own do, and what they
    # see is drawn to the clean images that the seed's trajectory has there at anchor_percent: the
    # exact form, whose renderings are those. Elsewhere the UNet is asked about the rendering, at
    # each step anew, and what it answers is followed to the end, which is what the prompt makes
    # likeliest: the more steps, the more alike seeds become.
    anchors: ShareOverRun = 0.0
    # Noise level of the anchors, as a share of 1000: a number or a schedule.
    anchor_percent: ShareOverRun = 0.02
    # Draw the rendering's latents from the VAE's posterior; False takes its mean.
    sample_posterior: bool = True
    # Without Perp-Neg: the usual guidance convention instead of the official one (a scale higher).
    standard_cfg: bool = False
    # At scale 1 use the conditional prediction alone, without negatives or extrapolation.
    pure_conditional: bool = False

    def validate(self) -> None:
        """Raise ConfigError for levels whose lowest is above the highest, or anchors without cached
        trajectories."""
        if self.method == "dsd" and self.trajectory != "cached" and self.has_anchors:
            raise ConfigError(
                "anchors: they are of cached trajectories: pass --guidance.trajectory cached, or "
                f"--guidance.anchors 0; got {self.anchors}"
            )
        low, high = Schedule.parse(self.min_step_percent), Schedule.parse(self.max_step_percent)
        for step in sorted({int(step) for step, _ in (*low.knots, *high.knots)}):
            if low(step) > high(step):
                raise ConfigError(
                    f"min_step_percent: expected at most max_step_percent, {high(step):g} at step "
                    f"{step}, got {low(step):g}"
                )

    def is_anchored(self, step: int) -> bool:
        """Whether the views of a step stand on their trajectory. Such steps are spread evenly."""
        return self.has_anchors and step * _GOLDEN % 1.0 < Schedule.parse(self.anchors)(step)

    @property
    def has_anchors(self) -> bool:
        """Whether any step is anchored; of "dsd" alone."""
        return self.method == "dsd" and Schedule.parse(self.anchors).maximum > 0

    @property
    def lattice(self) -> int | None:
        """Bins of |azimuth| on whose centres training cameras are to be, or None for anywhere.

        There a cached trajectory is that of the camera's own text; elsewhere it is the nearest
        centre's. Without Perp-Neg the text has four views, and nothing is to be gained. Other
        methods have no trajectories.
        """
        on_lattice = self.method == "dsd" and self.trajectory == "cached" and self.use_perp_neg
        return self.azimuth_bins if on_lattice else None
