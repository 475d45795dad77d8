"""Whether the images' power follows the CTF of their table: it tells before there is any map."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryorecon.conventions import electron_wavelength_angst
from cryorecon.io.particles import Particles
from cryorecon.physics.ctf import CtfParameters, ctf
from cryorecon.physics.fourier import half_plane, to_coefficients
from cryorecon.physics.imaging import noise_power_outside, shell_means
from cryorecon.physics.masks import soft_ball
from cryorecon.run.load import normalised
from cryorecon.run.sample import Sample

# Groups of fewer images of the sample are not looked at by themselves; nor is detail coarser than
# this, in cycles per diameter, where ice counts for as much as the CTF.
_LEAST_IMAGES, _COARSEST = 100, 1.5
# Power beyond so many times a shell's median is of something that outshines particles.
_OUTSHINES = 5.0
# Where in a shell the CTF is looked at, in shells and degrees.
_STEPS, _ANGLES_DEG = (-1 / 3, 0.0, 1 / 3), (0.0, 60.0, 120.0)
# Factors on the defocus that are tried: powers of these, and how many to either side.
_COARSE, _N_COARSE, _FINE, _N_FINE = 1.05, 33, 1.01, 5
# Another factor is told of if it is so far from 1, and likelier by so much, and by this share.
_OTHER, _LIKELIER, _SHARE = 1.07, 25.0, 0.1
# The table's CTF is another's if it explains less than this of the signal's power, surely.
_EXPLAINED, _SURE = 0.3, 4.0
# Shells are noise's where the signal has less than this share; images are multiplied by their CTF
# if most of the power of three such shells follows it: of ice and carbon a third does at most. Of
# particles brighter than this, against noise, what lies around them is their own signal.
_NOISE, _FOLLOWS, _LEAST_SHELLS, _BRIGHT = 0.3, 0.6, 3, 1.8
# Where the squared CTF of images differs by less than this share, it tells nothing.
_VARIES = 0.2
_VOLTAGES_KV, _SAME_VOLTAGE = (80, 100, 120, 200, 300), 0.05


@dataclass(frozen=True)
class _Power:
    """Power of n images of one kind by shell, and their optics.

    Attributes
    ----------
    power : Tensor, shape (n, m), float64
        In units of the noise outside the particle.
    signal : Tensor, shape (m,)
        Mean of what exceeds the noise.
    inside : float
        Mean square of pixels where the particle is.
    shells : Tensor, shape (m,)
        In cycles per box.
    """

    power: Tensor
    signal: Tensor
    inside: float
    shells: Tensor
    optics: CtfParameters
    box: int
    pixel_size_angst: float

    @staticmethod
    def of(sample: Sample, diameter: float) -> _Power:
        """Of all images of a sample, beyond the coarsest shells."""
        particles, box = sample.particles, sample.particles.box
        plane, radius_px = half_plane(box), diameter / 2 * box
        ball = soft_ball(box, radius_px, 2.0, 2)
        images = normalised(sample.images, 1 - ball, sloping=True)
        inside = float((images.square().mean(0) * ball).sum() / ball.sum())
        power = shell_means(to_coefficients(images, plane).abs().square().double(), plane)
        noise = noise_power_outside(images, radius_px, plane).double()
        first = max(2, math.ceil(_COARSEST / diameter))
        power = torch.minimum(power, _OUTSHINES * power.median(0).values)[:, first:]
        signal = (power.mean(0) - noise[first:]).clamp(min=0)
        shells = torch.arange(first, first + power.shape[1])
        optics = particles.ctf_parameters()
        return _Power(power, signal, inside, shells, optics, box, particles.pixel_size_angst)

    def squared_ctf(self, factor: float) -> Tensor:
        """Of each image and shell with its defocus times a factor, shape (n, m)."""
        radius = (self.shells[:, None] + torch.tensor(_STEPS, dtype=torch.float64))[..., None]
        angle = torch.deg2rad(torch.tensor(_ANGLES_DEG, dtype=torch.float64))
        at = torch.stack(torch.broadcast_tensors(radius * angle.cos(), radius * angle.sin()), -1)
        u, v = (x * factor for x in (self.optics.defocus_u_angst, self.optics.defocus_v_angst))
        optics = replace(self.optics, defocus_u_angst=u, defocus_v_angst=v)
        found = ctf(at.flatten(0, 2), optics, self.box, self.pixel_size_angst).square()
        # A shell has more coefficients farther out.
        share = (radius / radius.sum(1, keepdim=True)).expand(-1, -1, len(angle)).flatten(1)
        return (found.unflatten(1, share.shape) * share).sum(-1) / len(angle)

    def gain(self, factor: float) -> float:
        """How much likelier the CTF makes the power, in log-likelihood, over shells."""
        power, known = (x - x.mean(0) for x in (self.power, self.squared_ctf(factor)))
        spread = (power.square().mean(0) * known.square().mean(0)).sqrt()
        alike = (power * known).mean(0) / spread.clamp(min=1e-12)
        return float(len(power) / 2 * alike.clamp(min=0).square().sum())

    def best_factor(self) -> tuple[float, float]:
        """Factor on the defocus that makes the power likeliest, and its gain."""
        tried = [_COARSE**k for k in range(-_N_COARSE, _N_COARSE + 1)]
        best = max(tried, key=self.gain)
        best = max((best * _FINE**k for k in range(-_N_FINE, _N_FINE + 1)), key=self.gain)
        return best, self.gain(best)

    def explained(self) -> tuple[float, float]:
        """Share of the signal's power that changes as the squared CTF does; its standard error."""
        known = self.squared_ctf(1.0)
        expected = self.signal / known.mean(0).clamp(min=1e-12)
        power, known = (x - x.mean(0) for x in (self.power, known))
        noise = power.square().mean(0).clamp(min=1e-300) / len(power)
        weight = expected * known.square().mean(0) / noise
        total = float((weight * expected).sum())
        found = float((expected * (power * known).mean(0) / noise).sum())
        return (found / total, total**-0.5) if total > 0 else (1.0, math.inf)

    def multiplied(self) -> bool:
        """Whether noise follows the squared CTF, too."""
        known, level = self.squared_ctf(1.0), self.power.mean(0)
        power, about = (x - x.mean(0) for x in (self.power, known))
        spread = about.square().mean(0)
        slope = (power * about).mean(0) / spread.clamp(min=1e-12)
        follows = slope * known.mean(0) / level.clamp(min=1e-300)
        noise = (self.signal < _NOISE * level) & (spread.sqrt() > _VARIES * known.mean(0))
        asked = self.inside < _BRIGHT and int(noise.sum()) >= _LEAST_SHELLS
        return asked and float(follows[noise].median()) > _FOLLOWS


def power_doubts(sample: Sample, diameter: float) -> list[str]:
    """Lines on a CTF that the images' power does not follow.

    Where the CTF of some images lets more through than that of others, in a shell, they hold more
    power there, whatever their poses.

    Parameters
    ----------
    sample : Sample
    diameter : float
        Of the particle, as a fraction of the box side.
    """
    group = torch.from_numpy(sample.particles.optics_index())
    counts = torch.bincount(group)
    # Many small ones, as of beam shifts, are one.
    kind = torch.where(counts[group] < _LEAST_IMAGES, -1, group)
    found: list[str] = []
    for number in kind.unique().tolist():
        rows = torch.nonzero(kind == number)[:, 0]
        if len(rows) < _LEAST_IMAGES:
            continue
        of = "" if len(rows) == len(group) else f" of optics group {number + 1}"
        of = " of small optics groups" if of and number < 0 else of
        some = Sample(sample.particles.subset(rows.numpy()), sample.images[rows])
        found += _doubts(_Power.of(some, diameter), sample.particles, of)
    return found


def _doubts(power: _Power, particles: Particles, of: str) -> list[str]:
    if power.multiplied():
        return [
            f"the noise of the images{of} follows the CTF of {particles.path}: they look "
            "multiplied by it; extract them without"
        ]
    factor, gain = power.best_factor()
    more = gain - power.gain(1.0)
    share, error = power.explained()
    far = abs(math.log(factor)) > math.log(_OTHER)
    if far and more > max(_LIKELIER, _SHARE * gain):
        pixel = particles.stored_pixel_size_angst / math.sqrt(factor)
        return [
            f"the images{of} look recorded {factor:.2f} times as far from focus as "
            f"{particles.path} says, as if pixels were {pixel:.3g} A{_voltage_text(power, factor)}"
            ": check the pixel size, the voltage and the defocus"
        ]
    if share + _SURE * error < _EXPLAINED:
        return [
            f"the power of the images{of} does not follow the CTF of {particles.path}: its "
            "defocus may be that of other images"
        ]
    return []


def _voltage_text(power: _Power, factor: float) -> str:
    """A usual voltage that explains a factor, where there is one."""
    known = power.optics.voltage_kv
    wavelength = float(electron_wavelength_angst(known.median())) * factor
    for voltage in _VOLTAGES_KV:
        other = electron_wavelength_angst(torch.tensor(float(voltage)))
        if abs(math.log(wavelength / float(other))) < _SAME_VOLTAGE:
            return f", or the voltage {voltage} kV"
    return ""
