"""The published protocol of the residual MFN: alternate structure and poses from perturbed poses.

Shekarforoush et al. 2022, section 6: a 3-layer network of 128 hidden units trains one scale after
the other; each mini-batch takes structure steps, then pose steps, both with Adam on the squared
error; images are band-limited by a Gaussian. It starts 45 to 90 degrees from poses that are known
and so is no ab initio method. Three things differ from the authors' released code: the Gaussian
acts on the prediction too, frequencies are whole cycles per box, and what is kept from being
negative is the map, not each scale's addition to it (the paper's equation 8 has neither).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.network_map import GRID_MARGIN, FitConfig, NetworkMap
from cryorecon.engines.observations import Observations, centred
from cryorecon.networks.mfn import MfnConfig, paper_bands
from cryorecon.physics.fourier import max_band, shift_phases
from cryorecon.physics.masks import Support
from cryorecon.physics.pose_derivatives import derivatives, slices_with_gradient
from cryorecon.physics.projection import extract_slices, padded_transform
from cryorecon.physics.rotations import exp_map


@dataclass(frozen=True)
class PaperConfig:
    """Settings of the protocol; the defaults are the paper's for 4AKE.

    Attributes
    ----------
    epochs : tuple of int
        Epochs of each scale, coarse to fine; 0 skips a scale.
    batch : int
        Images of a structure step (of the released code; the paper names none).
    pose_batch : int
        Images whose poses move after each structure step; 0 takes those of the step. An epoch moves
        every pose once. With few images fewer keep what the paper has with 50,000: 83 turns of
        structure steps between two visits of an image.
    structure_steps, pose_steps : int
        Of each mini-batch.
    structure_rate, pose_rate : float
        Learning rates of Adam; poses in radians.
    width : int
    diameter : float
        Of the soft mask, as a fraction of the box side.
    coarsest : int
        Band of the first scale in cycles per box, the others in equal ratios up to Nyquist; 0
        divides Nyquist by 3.3 from scale to scale as the paper does, whose 64 px give 3, 9, 31.
    non_negative : bool
        Whether negative density is set to 0.
    """

    epochs: tuple[int, ...] = (25, 25, 50)
    batch: int = 600
    pose_batch: int = 0
    structure_steps: int = 5
    pose_steps: int = 20
    structure_rate: float = 1e-3
    pose_rate: float = 1e-2
    width: int = 128
    diameter: float = 0.9
    coarsest: int = 0
    non_negative: bool = True


def perturbed(
    rotations: Tensor, least_deg: float, most_deg: float, generator: torch.Generator
) -> Tensor:
    """Rotations turned about random axes by angles uniform between two bounds."""
    n = len(rotations)
    axes = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=-1)
    angles = least_deg + (most_deg - least_deg) * torch.rand(n, 1, generator=generator)
    return exp_map(torch.deg2rad(angles) * axes).to(rotations) @ rotations


def gaussian_filtered(observations: Observations, band: float) -> Observations:
    """Images and predictions alike under a Gaussian of width two thirds of the band.

    The network's band is a cube's: they are kept beyond it, as far as the scale's grid holds.
    """
    within = observations.within(band + GRID_MARGIN)
    gain = torch.exp(-0.5 * (within.plane.radius / (2 / 3 * band)) ** 2).to(within.ctf)
    return replace(within, coefficients=within.coefficients * gain, ctf=within.ctf * gain)


def scale_bands(last: int, config: PaperConfig) -> tuple[int, ...]:
    """Band of each scale in cycles per box, the last of them Nyquist's."""
    n = len(config.epochs)
    if config.coarsest == 0:
        return paper_bands(last, n)
    ratio = (last / config.coarsest) ** (1 / max(n - 1, 1))
    return tuple(round(config.coarsest * ratio**scale) for scale in range(n))


class PaperProtocol:
    """A run: network, poses, and the loss of each epoch.

    Parameters
    ----------
    observations : Observations of n images
    rotations : Tensor, shape (n, 3, 3)
        Where the poses start.
    offsets_px : Tensor, shape (n, 2)
        Held fixed: the paper's images are centred.
    """

    def __init__(
        self,
        config: PaperConfig,
        observations: Observations,
        rotations: Tensor,
        offsets_px: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.config, self.observations, self.generator = config, observations, generator
        self.rotations, self.offsets_px = rotations.clone(), offsets_px
        self.bands = scale_bands(max_band(observations.plane.box), config)
        network = MfnConfig(self.bands, config.width)
        fit = FitConfig(learning_rate=config.structure_rate)
        self.map = NetworkMap(network, Support(config.diameter / 2), generator, fit)
        self._match_scale()

    def epochs(self, done: int = 0) -> Iterator[tuple[int, int, float]]:
        """Run all epochs; yields (scale, epochs done, mean relative loss) after each.

        Parameters
        ----------
        done : int
            Epochs that a loaded state has behind it.

        Raises
        ------
        FloatingPointError
            If the loss is not finite.
        """
        before = 0
        for scale, count in enumerate(self.config.epochs):
            band = float(min(self.bands[scale], max_band(self.observations.plane.box)))
            filtered = gaussian_filtered(self.observations, band)
            for epoch in range(before + 1, before + count + 1):
                if epoch <= done:
                    continue
                losses = [self._batch(filtered, rows, scale) for rows in self._turns()]
                mean = sum(losses) / len(losses)
                if not math.isfinite(mean):
                    raise FloatingPointError(f"loss {mean} in epoch {epoch}, scale {scale + 1}")
                yield scale, epoch, mean
            before += count

    def state(self) -> dict[str, Any]:
        """Between two epochs: all that the run has changed, by reference."""
        generator = self.generator.get_state()
        return {"map": self.map.state(), "rotations": self.rotations, "generator": generator}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.map.load(state["map"])
        self.rotations = state["rotations"]
        self.generator.set_state(state["generator"])

    def volume(self, scale: int) -> Tensor:
        """The map of one scale on the images' grid, shape (N, N, N)."""
        with torch.no_grad():
            return self._density(scale, self.observations.plane.box)

    def _density(self, scale: int, box: int | None = None) -> Tensor:
        density = self.map.volume(scale, box)
        return density.relu() if self.config.non_negative else density

    def _match_scale(self) -> None:
        """Begin with the power that the images have at the poses they start from."""
        low = self.observations.within(self.bands[0])
        matched, weight = low.matched()
        sums = NormalEquations.empty(self.bands[0], 2, weight.dtype, weight.device)
        signal = centred(matched, self.offsets_px, low.plane)
        sums.add(signal, weight, self.rotations, low.plane)
        self.map.match_scale(sums.solve(sums.shell_mean_weight()[: self.bands[0] + 1]), 0)

    def _turns(self) -> tuple[Tensor, ...]:
        order = torch.randperm(len(self.rotations), generator=self.generator)
        return order.split(self.config.pose_batch or self.config.batch)

    def _batch(self, images: Observations, rows: Tensor, scale: int) -> float:
        seen, loss = self._joined_by_others(rows), 0.0
        batch = images.select(seen)
        for _ in range(self.config.structure_steps):
            loss = self._structure_step(batch, seen, scale)
        self._pose_steps(images.select(rows), rows, scale)
        return loss

    def _joined_by_others(self, rows: Tensor) -> Tensor:
        """These images and others drawn at random, as many as a structure step takes."""
        wanted = min(self.config.batch, len(self.rotations)) - len(rows)
        if wanted <= 0:
            return rows
        order = torch.randperm(len(self.rotations), generator=self.generator)
        return torch.cat([rows, order[~torch.isin(order, rows)][:wanted]])

    def _structure_step(self, batch: Observations, rows: Tensor, scale: int) -> float:
        transform = padded_transform(self._density(scale))
        slices = extract_slices(transform, self.rotations[rows], batch.plane)
        phases = shift_phases(self.offsets_px[rows], batch.plane).to(slices.dtype)
        residual = batch.coefficients - slices * phases * batch.ctf
        weight = batch.plane.multiplicity.to(batch.ctf)
        norm = (weight * batch.coefficients.abs() ** 2).sum()
        loss = (weight * residual.abs() ** 2).sum() / norm
        self.map.optimizer.zero_grad()
        loss.backward()
        self.map.optimizer.step()
        return float(loss.detach())

    def _pose_steps(self, batch: Observations, rows: Tensor, scale: int) -> None:
        """Adam on each image's rotation vector; the map stays as it is."""
        with torch.no_grad():
            model = derivatives(self._density(scale), 2, float(batch.plane.radius[-1]))
        turn = torch.zeros(len(rows), 3, requires_grad=True)
        optimizer = torch.optim.Adam([turn], lr=self.config.pose_rate, betas=(0.9, 0.9))
        rotations = self.rotations[rows]
        weight = batch.plane.multiplicity.to(batch.ctf)
        phases = shift_phases(self.offsets_px[rows], batch.plane).to(batch.coefficients.dtype)
        gain = phases * batch.ctf
        for _ in range(self.config.pose_steps):
            before = turn.detach().clone()
            slices, torque = slices_with_gradient(model, rotations, batch.plane)
            residual = batch.coefficients - slices * gain
            pull = (residual.conj() * gain)[..., None] * torque
            turn.grad = -2 * (weight[:, None] * pull.real).sum(1)
            optimizer.step()
            # Steps are taken about the current pose: gradients are exact there.
            rotations = exp_map((turn.detach() - before).to(rotations)) @ rotations
        self.rotations[rows] = rotations
