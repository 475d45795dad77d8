"""Networks that read poses off images (cryoAI, Levy et al. 2022, sections 3.2-3.3, supplement B).

Each image gives several guesses of its pose, one a head; with one head this is cryoAI's encoder,
with more it is CryoSPIN's. Images are normalised within the network, so that their scale does not
matter.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Kind = Literal["dense", "small", "paper"]
# Side of the images that each reads at least.
LEAST_INPUT_PX: dict[Kind, int] = {"dense": 4, "small": 8, "paper": 64}

_PAPER_CHANNELS = (64, 128, 256, 1024, 2048)
_SMALL_CHANNELS = (16, 32, 64)
_BANK_SIZE = 11
_BANK_SIGMAS_PX = tuple(10.0**p for p in (-1.0, -0.5, 0.0, 0.5, 1.0))


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder.

    Attributes
    ----------
    kind : "dense", "small" or "paper"
        Fully connected on the pixels, a narrow convolutional network, or the paper's.
    input_size : int
        Side of the images in pixels; at least 8 for "small", 64 for "paper".
    heads : int
        Guesses an image.
    hidden : int
        Units of the dense layers.
    shift_scale_angst : float
        What an output of 1 of the shift head stands for.
    """

    kind: Kind = "dense"
    input_size: int = 20
    heads: int = 4
    hidden: int = 512
    shift_scale_angst: float = 5.0

    def __post_init__(self) -> None:
        least = LEAST_INPUT_PX[self.kind]
        if self.input_size < least or self.heads < 1:
            raise ValueError(f"a {self.kind} encoder needs {least} px and a head")


class GaussianBank(nn.Module):
    """Five Gaussian low-pass filters of 11 px, widths 0.1 to 10 px in equal ratios, not trained.

    Supplement B of the paper names the cutoffs, 10 to 0.1 per pixel.
    """

    def __init__(self) -> None:
        super().__init__()
        axis = torch.arange(_BANK_SIZE, dtype=torch.float32) - _BANK_SIZE // 2
        kernels = []
        for sigma in _BANK_SIGMAS_PX:
            profile = torch.exp(-(axis**2) / (2 * sigma**2))
            kernel = profile[:, None] * profile
            kernels.append(kernel / kernel.sum())
        self.kernels: Tensor
        self.register_buffer("kernels", torch.stack(kernels)[:, None])

    def forward(self, images: Tensor) -> Tensor:
        """Shape (b, E, E) to (b, 5, E, E); edges are repeated."""
        padded = functional.pad(images[:, None], (_BANK_SIZE // 2,) * 4, mode="replicate")
        return functional.conv2d(padded, self.kernels.to(images.dtype))


def _double_conv(n_in: int, n_out: int) -> nn.Sequential:
    """Two convolutions and a halving, as in the first layers of VGG16; normalised by groups."""
    groups = 4 if n_out < 64 else 16
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, padding=1),
        nn.GroupNorm(groups, n_out),
        nn.ReLU(),
        nn.Conv2d(n_out, n_out, 3, padding=1),
        nn.GroupNorm(groups, n_out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def _trunk(config: EncoderConfig) -> tuple[nn.Sequential, int]:
    """Layers from filtered images to features, and how many features."""
    if config.kind == "dense":
        return nn.Sequential(nn.Flatten()), config.input_size**2
    channels = _PAPER_CHANNELS if config.kind == "paper" else _SMALL_CHANNELS
    layers: list[nn.Module] = []
    previous, size = len(_BANK_SIGMAS_PX), config.input_size
    for count in channels:
        layers.append(_double_conv(previous, count))
        previous, size = count, size // 2
    if config.kind == "paper":
        layers.append(nn.MaxPool2d(2))
        size //= 2
    return nn.Sequential(*layers, nn.Flatten()), previous * size**2


def _dense(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU()]
    return nn.Sequential(*layers)


def gram_schmidt(vectors: Tensor) -> Tensor:
    """Rotations from six numbers: two vectors made orthonormal, and their product.

    Zhou et al. 2019, "On the continuity of rotation representations".

    Parameters
    ----------
    vectors : Tensor, shape (..., 6)

    Returns
    -------
    Tensor, shape (..., 3, 3)
        The vectors are its first two rows.
    """
    first = functional.normalize(vectors[..., :3], dim=-1)
    second = vectors[..., 3:]
    second = second - (first * second).sum(-1, keepdim=True) * first
    second = functional.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -2)


class PoseEncoder(nn.Module):
    """Images to guesses of their poses.

    Parameters
    ----------
    config : EncoderConfig
    generator : torch.Generator
        Draws the weights, and where the heads' rotations begin.
    """

    def __init__(self, config: EncoderConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.bank = None if config.kind == "dense" else GaussianBank()
        self.trunk, n_features = _trunk(config)
        if config.kind == "dense":
            sizes = [n_features, config.hidden, config.hidden, 256]
        else:
            sizes = [n_features, 512, 256]
        # One stack of hidden layers a head in the paper: rotations and shifts.
        self.rotation_hidden, self.shift_hidden = _dense(sizes), _dense(sizes)
        self.rotation_head = nn.Linear(sizes[-1], 6 * config.heads)
        self.shift_head = nn.Linear(sizes[-1], 2 * config.heads)
        self._draw(generator)

    def _draw(self, generator: torch.Generator) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.rotation_head.bias, generator=generator)
        nn.init.normal_(self.shift_head.weight, std=1e-2, generator=generator)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Guesses of each image's pose.

        Parameters
        ----------
        images : Tensor, shape (b, E, E), real
            Any scale and level.

        Returns
        -------
        rotations : Tensor, shape (b, heads, 3, 3)
        shifts_angst : Tensor, shape (b, heads, 2)
            RELION origins (ox, oy).
        """
        channels = images[:, None] if self.bank is None else self.bank(images)
        mean = channels.mean((-2, -1), keepdim=True)
        spread = channels.std((-2, -1), keepdim=True)
        features = self.trunk((channels - mean) / spread.clamp(min=1e-20))
        heads = self.config.heads
        six = self.rotation_head(self.rotation_hidden(features)).unflatten(-1, (heads, 6))
        shifts = self.shift_head(self.shift_hidden(features)).unflatten(-1, (heads, 2))
        return gram_schmidt(six), shifts * self.config.shift_scale_angst
