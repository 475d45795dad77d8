"""Coarse-to-fine image fitting: the 2-D experiments of Shekarforoush et al. 2022, section 5.

Networks are trained on an image at half its size and queried at full size. Five of the six
methods are multiplicative filter networks of the same bands; they differ in skip connections, in
the frequencies of their layers, and in which scales' losses act when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cryorecon.networks.mfn import MfnConfig, ResidualMfn, paper_bands
from cryorecon.networks.sape import Sape

Method = Literal[
    "residual", "residual-bacon", "bacon-fair", "bacon-unfair", "bacon-unstaged", "sape"
]
METHODS: tuple[Method, ...] = (
    "residual",
    "residual-bacon",
    "bacon-fair",
    "bacon-unfair",
    "bacon-unstaged",
    "sape",
)
Progress = Callable[[int, float], None]

# SAPE: share of the iterations in which features are let in, and the squared error below which
# a point needs no finer ones.
_SAPE_RAMP = 0.5
_SAPE_ENOUGH = 1e-3


@dataclass(frozen=True)
class ImageFitConfig:
    """Size and length of a fit; the defaults are the paper's.

    Attributes
    ----------
    iterations : tuple of int
        Length of the stage of each scale, coarse to fine.
    width : int
        Hidden units a layer.
    learning_rate : float
        Of Adam (that of the published code; the paper names none).
    """

    iterations: tuple[int, ...] = (500, 500, 1000, 8000)
    width: int = 256
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        if not self.iterations or min(self.iterations) < 1:
            raise ValueError(f"every stage needs iterations, got {self.iterations}")


@dataclass(frozen=True)
class ImageFit:
    """What a fit leaves.

    Attributes
    ----------
    full : Tensor, shape (2 N, 2 N, C)
        The network at full size.
    psnr_db : float
        Of `full` against the image, ``-10 log10`` of the mean squared error over pixels and
        colours of values in [0, 1]; not clipped.
    at_stage_end, at_end : list of Tensor, shape (N, N, C)
        Each scale's output at the end of its own stage and of all training; empty for methods
        without scales or stages.
    spectrum_change : list of float
        Mean over colours and frequencies of the modulus of the difference of the two's
        unnormalised Fourier transforms, by scale.
    """

    full: Tensor
    psnr_db: float
    at_stage_end: list[Tensor]
    at_end: list[Tensor]
    spectrum_change: list[float]


def pixel_centres(size: int) -> Tensor:
    """(x, y) of the pixels of a square image, in boxes, edges at +-1/2; shape (N^2, 2)."""
    axis = (torch.arange(size) + 0.5) / size - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)


def spectrum_change(before: Tensor, after: Tensor) -> float:
    """Mean modulus of the change of an image's unnormalised Fourier transform."""
    return float(torch.fft.fft2(after - before, dim=(0, 1)).abs().mean())


def psnr_db(found: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio of values in [0, 1], without clipping."""
    return float(-10 * torch.log10((found - image).square().mean()))


def fit_image(
    train: Tensor,
    image: Tensor,
    method: Method,
    config: ImageFitConfig,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> ImageFit:
    """Fit a network to an image at half its size.

    Parameters
    ----------
    train : Tensor, shape (N, N, C), values in [0, 1]
    image : Tensor, shape (2 N, 2 N, C)
        The image at full size; only judged against.
    progress : callable, optional
        Called with (iterations done, loss).
    """
    if method == "sape":
        return _fit_sape(train, image, config, generator, progress)
    network = ResidualMfn(_network_config(method, len(train), train.shape[-1], config), generator)
    points, target = pixel_centres(len(train)), train.flatten(0, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    n_scales, done = len(config.iterations), 0
    at_stage_end = []
    for stage, length in enumerate(config.iterations):
        for _ in range(length):
            loss = _loss(network, points, target, method, stage)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if progress is not None:
                progress(done, float(loss.detach()))
        if method != "bacon-unstaged":
            with torch.no_grad():
                at_stage_end.append(network(points, stage + 1)[-1].reshape(train.shape))
    with torch.no_grad():
        outputs = network(points, n_scales)
        full = network(pixel_centres(len(image)), n_scales)[-1].reshape(image.shape)
    at_end = [o.reshape(train.shape) for o in outputs]
    changes = [spectrum_change(a, b) for a, b in zip(at_stage_end, at_end, strict=False)]
    return ImageFit(full, psnr_db(full, image), at_stage_end, at_end, changes)


def _network_config(method: Method, size: int, n_colours: int, config: ImageFitConfig) -> MfnConfig:
    """All methods get the same bands, up to the training grid's Nyquist frequency."""
    residual = method.startswith("residual")
    return MfnConfig(
        bands=paper_bands(size // 2, len(config.iterations)),
        width=config.width,
        ndim=2,
        n_outputs=n_colours,
        residual=residual,
        initialisation="proposed" if method == "residual" else "bacon",
        bias=method != "residual",
    )


def _loss(
    network: ResidualMfn, points: Tensor, target: Tensor, method: Method, stage: int
) -> Tensor:
    """Squared error of the scales that a method trains in a stage."""
    if method == "bacon-fair":
        outputs = network(points, trained=stage)
    elif method == "bacon-unstaged":
        outputs = network(points)
    else:
        outputs = network(points, stage + 1)[-1:]
    return torch.stack([(o - target).square().mean() for o in outputs]).sum()


def _fit_sape(
    train: Tensor,
    image: Tensor,
    config: ImageFitConfig,
    generator: torch.Generator,
    progress: Progress | None,
) -> ImageFit:
    size, colours, total = len(train), train.shape[-1], sum(config.iterations)
    n_layers = len(config.iterations)
    network = Sape(size // 2, config.width // 2, config.width, n_layers, 2, colours, generator)
    points, target = pixel_centres(size), train.flatten(0, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate / 5)
    seen = torch.zeros(size * size)
    for done in range(1, total + 1):
        error = (network(points, seen) - target).square()
        loss = error.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        local = _blurred(error.detach().mean(-1).reshape(size, size)).flatten()
        seen = (seen + (local > _SAPE_ENOUGH) / (_SAPE_RAMP * total)).clamp(max=1)
        if progress is not None:
            progress(done, float(loss.detach()))
    scaled = torch.nn.functional.interpolate(
        seen.reshape(1, 1, size, size), size=image.shape[:2], mode="bilinear"
    )
    with torch.no_grad():
        full = network(pixel_centres(len(image)), scaled.flatten()).reshape(image.shape)
    return ImageFit(full, psnr_db(full, image), [], [], [])


def _blurred(values: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(values[None, None], 5, 1, 2, count_include_pad=False)[
        0, 0
    ]
