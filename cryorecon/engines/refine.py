"""Local pose refinement shared by the engines: Levenberg-Marquardt on each image's likelihood."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.engines.observations import Observations
from cryorecon.physics.fourier import shell_sums, shift_phases
from cryorecon.physics.pose_derivatives import (
    Derivatives,
    pose_products,
    slices_of,
    squared_residual,
)
from cryorecon.physics.rotations import exp_map

_LARGEST_TURN_RAD = 0.15
_LARGEST_SHIFT_PX = 2.0
# Standard deviation of an offset's Gaussian prior, as a share of the box, half again what is
# searched through by default, and its least: a tighter one in small boxes makes maps of noise
# alike.
_OFFSET_SPREAD, _LEAST_OFFSET_SPREAD_PX = 0.15, 10.0
# Steps that would gain less log-likelihood are not taken: they move a pose by less than a fifth of
# its standard deviation, sqrt(2 x 0.02).
LEAST_GAIN = 0.02
# The expected curvature is less than the true one, for an image's own noise is part of the map:
# undamped, seven first steps of ten go too far.
_DAMPING = 1.0


@dataclass(frozen=True)
class Poses:
    """Poses of n images.

    Attributes
    ----------
    rotations : Tensor, shape (n, 3, 3)
    offsets_px : Tensor, shape (n, 2)
        RELION origins in pixels.
    log_likelihood : Tensor, shape (n,)
        Against an empty image.
    """

    rotations: Tensor
    offsets_px: Tensor
    log_likelihood: Tensor


class PoseObjective:
    """Log-likelihood of each image with its gradient and expected curvature in the pose.

    Offsets are undone in the image, which leaves every product with the prediction as it is; and
    derivatives are taken about the map's axes, then turned, five numbers an image.
    """

    def __init__(self, observations: Observations, model: Derivatives) -> None:
        root = observations.precision().sqrt()
        self.plane, self.model = observations.plane, model
        self.target = observations.coefficients * root
        self.power = self.target.abs().square().sum(-1)
        self.gain = observations.ctf * root
        spread_px = max(_OFFSET_SPREAD * self.plane.box, _LEAST_OFFSET_SPREAD_PX)
        self.offset_precision = spread_px**-2
        self.prior = torch.zeros(5, dtype=root.dtype, device=root.device)
        self.prior[3:] = self.offset_precision

    def select(self, rows: Tensor) -> PoseObjective:
        """Of some of the images, in any number."""
        few = copy(self)
        few.target, few.power, few.gain = self.target[rows], self.power[rows], self.gain[rows]
        return few

    def value(self, rotations: Tensor, offsets_px: Tensor) -> Tensor:
        """The log-likelihood alone."""
        left = squared_residual(
            self.model, self.plane, rotations, offsets_px, self.target, self.gain
        )
        return self._with_prior(left, offsets_px)

    def __call__(self, rotations: Tensor, offsets_px: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (n,), gradients (n, 5; per radian about the image's axes, per pixel), curvatures.

        Parameters
        ----------
        rotations : Tensor, shape (n, 3, 3)
        offsets_px : Tensor, shape (n, 2)
        """
        products = pose_products(
            self.model, self.plane, rotations, offsets_px, self.target, self.gain
        )
        frame = torch.eye(5, dtype=products.dtype, device=products.device)
        frame = frame.repeat(len(products), 1, 1)
        frame[:, :3, :3] = rotations
        gradient = 2 * (frame @ products[:, :5, 5:]).squeeze(-1)
        gradient[:, 3:] -= offsets_px * self.offset_precision
        curvature = 2 * frame @ products[:, :5, :5] @ frame.transpose(-1, -2)
        value = self._with_prior(products[:, 5, 5], offsets_px)
        return value, gradient, curvature + torch.diag(self.prior)

    def _with_prior(self, residual: Tensor, offsets_px: Tensor) -> Tensor:
        return self.power - residual - (offsets_px**2).sum(-1) * self.offset_precision / 2


def refine_poses(
    observations: Observations,
    model: Derivatives,
    rotations: Tensor,
    offsets_px: Tensor,
    n_steps: int = 6,
) -> Poses:
    """Levenberg-Marquardt steps of each image's rotation and offset on its log-likelihood.

    Parameters
    ----------
    observations : Observations of n images
    model : Derivatives of the map
    rotations : Tensor, shape (n, 3, 3)
    offsets_px : Tensor, shape (n, 2)
    n_steps : int
        At most.

    Returns
    -------
    Poses
        Never less likely than what came in. An image whose next step would gain less than 0.02 of
        log-likelihood is not looked at again.
    """
    objective = PoseObjective(observations, model)
    return refined(objective, rotations, offsets_px, n_steps)


def refined(
    objective: PoseObjective, rotations: Tensor, offsets_px: Tensor, n_steps: int
) -> Poses:  # fmt: skip
    """As :func:`refine_poses`, for an objective that is used more than once."""
    if n_steps == 0:
        return Poses(rotations, offsets_px, objective.value(rotations, offsets_px))
    walk = _Walk(objective, rotations, offsets_px)
    found = Poses(rotations.clone(), offsets_px.clone(), walk.value.clone())
    for number in range(1, n_steps + 1):
        step = walk.step()
        if not len(step):
            break
        walk.take(step, last=number == n_steps)
        found.rotations[walk.rows] = walk.rotations
        found.offsets_px[walk.rows] = walk.offsets_px
        found.log_likelihood[walk.rows] = walk.value
    return found


class _Walk:
    """Poses of the images that still move."""

    def __init__(self, objective: PoseObjective, rotations: Tensor, offsets_px: Tensor) -> None:
        self.objective, self.rotations, self.offsets_px = objective, rotations, offsets_px
        self.value, self.gradient, self.curvature = objective(rotations, offsets_px)
        self.damping = torch.full_like(self.value, _DAMPING)
        self.rows = torch.arange(len(rotations), device=rotations.device)

    def step(self) -> Tensor:
        """The next step of each image, shape (n, 5); images that gain nothing by it stay behind."""
        diagonal = torch.diagonal(self.curvature, dim1=-2, dim2=-1)
        damped = self.curvature + torch.diag_embed(diagonal * self.damping[:, None] + 1e-6)
        # Without the check, which waits for a device: steps that are not finite are not taken.
        step = torch.linalg.solve_ex(damped, self.gradient).result
        bent = (self.curvature @ step[..., None]).squeeze(-1)
        gain = (step * (self.gradient - bent / 2)).sum(-1)
        moving = torch.nonzero((gain >= LEAST_GAIN) & gain.isfinite())[:, 0]
        if len(moving) < len(self.rows):
            self._keep(moving)
        return step[moving]

    def _keep(self, few: Tensor) -> None:
        self.objective = self.objective.select(few)
        self.rotations, self.offsets_px = self.rotations[few], self.offsets_px[few]
        self.value, self.gradient = self.value[few], self.gradient[few]
        self.curvature, self.damping = self.curvature[few], self.damping[few]
        self.rows = self.rows[few]

    def take(self, step: Tensor, *, last: bool) -> None:
        """Go where it is likelier; without derivatives for another step if it is the last."""
        turn = step[:, :3]
        length = turn.norm(dim=-1, keepdim=True)
        turn = turn * (_LARGEST_TURN_RAD / length.clamp(min=_LARGEST_TURN_RAD))
        rotations = exp_map(turn) @ self.rotations
        offsets_px = self.offsets_px + step[:, 3:].clamp(-_LARGEST_SHIFT_PX, _LARGEST_SHIFT_PX)
        trial, kept = (rotations, offsets_px), (self.gradient, self.curvature)
        found = (self.objective.value(*trial), *kept) if last else self.objective(*trial)
        better = found[0] > self.value
        column, block = better[:, None], better[:, None, None]
        self.rotations = torch.where(block, rotations, self.rotations)
        self.offsets_px = torch.where(column, offsets_px, self.offsets_px)
        self.value = torch.where(better, found[0], self.value)
        self.gradient = torch.where(column, found[1], self.gradient)
        self.curvature = torch.where(block, found[2], self.curvature)
        self.damping = torch.where(better, self.damping * 0.2, self.damping * 8).clamp(1e-4, 1e4)


def predictions(observations: Observations, model: Derivatives, poses: Poses) -> Tensor:
    """What a map predicts of n images at their poses, shape (n, m), complex."""
    slices = slices_of(model, poses.rotations, observations.plane)
    phases = shift_phases(poses.offsets_px, observations.plane).to(slices.dtype)
    return slices * phases * observations.ctf


def residual_power(observations: Observations, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Power of what a prediction does not explain, summed by optics group and shell.

    Returns
    -------
    power : Tensor, shape (groups, n_shells), real
        Sum of ``|Y - predicted|^2`` over images and coefficients.
    count : Tensor, shape (groups, n_shells), real
        Coefficients in each sum.
    """
    plane, groups = observations.plane, len(observations.noise_power)
    power = (observations.coefficients - predicted).abs() ** 2
    shell = shell_sums(power, plane.shell, plane.n_shells)
    per_shell = shell_sums(torch.ones_like(power[0]), plane.shell, plane.n_shells)
    total = power.new_zeros(groups, plane.n_shells)
    total.index_add_(0, observations.group, shell)
    images = shell_sums(power.new_ones(len(power)), observations.group, groups)
    return total, images[:, None] * per_shell


def image_scales(
    observations: Observations, predicted: Tensor, held: Tensor | None = None, spread: float = 0.2
) -> Tensor:
    """Likeliest factor on each prediction, shape (n,); a Gaussian prior draws scales towards 1.

    Parameters
    ----------
    predicted : Tensor, shape (n, m), complex
    held : Tensor, shape (n,), optional
        Scales that the predictions have: the prior is of these times the factors.
    spread : float
        Standard deviation of the prior.
    """
    precision = observations.precision()
    overlap = ((observations.coefficients * predicted.conj()).real * precision).sum(-1)
    power = (predicted.abs() ** 2 * precision).sum(-1)
    held = torch.ones_like(power) if held is None else held.abs().to(power)
    pull = held / (2 * spread**2)
    return (held * (overlap + pull) / (power + held * pull)).clamp(0.25, 4.0) / held
