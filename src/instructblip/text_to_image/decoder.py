"""What draws: the interface of decoders, and the native one, a small diffusion transformer.

Flow matching in pixels: at noise level t a picture x is ``(1 - t) x + t e`` with Gaussian e, and
the velocity is ``e - x``. The network gives the clean picture, from which the velocity follows:
flat shapes lie on far fewer dimensions than the pixels of a patch, noise does not (Li and He 2025,
"Back to basics"). The layout of a picture is decided where almost everything is noise: an object of
20 x 20 even pixels is still visible at t = 0.95. So training and sampling dwell there.
"""

import math
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from instructblip.text_to_image.blocks import MLP, Attention
from instructblip.text_to_image.config import NativeConfig

MIN_NOISE = 0.5
"""Below this noise level the velocity's error is not weighted any higher: at 0.1 the few samples
with little noise had most of the gradient (compare Hang et al. 2023, "Min-SNR weighting")."""

EVEN_WEIGHT = 0.05
"""Weight of the error of a picture's mean colour. No prompt names the background: near pure noise
its three numbers had nine tenths of the loss, and what is drawn upon it the rest."""


class Decoder(Protocol):
    """A picture decoder. ``predict`` must be linear in what guidance combines."""

    condition_width: int
    image_size: int

    def loss(
        self,
        pictures: Float[Tensor, "B 3 G G"],
        condition: Float[Tensor, "B K C"],
        mask: Bool[Tensor, "B K"],
    ) -> Float[Tensor, " B"]:
        """Loss of each picture; noise comes from torch's default generator."""
        ...

    def start(self, number: int, generator: torch.Generator | None) -> Float[Tensor, "B ..."]:
        """Noise to begin with."""
        ...

    def schedule(self, steps: int) -> list[float]:
        """The noise levels or time steps at which the network is asked, in order."""
        ...

    def predict(self, noisy: Tensor, level: float, condition: Tensor, mask: Tensor) -> Tensor:
        """What ``advance`` needs, of the shape of ``noisy``."""
        ...

    def advance(self, noisy: Tensor, prediction: Tensor, place: int, levels: list[float]) -> Tensor:
        """From ``levels[place]`` to the level after it."""
        ...

    def pixels(self, clean: Tensor) -> Float[Tensor, "B 3 G G"]:
        """The finished pictures in [-1, 1]."""
        ...


class NativeLayer(nn.Module):
    """Self-attention, attention to the condition, feed-forward; scales and shifts from the time."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.condition = Attention(width, config.num_heads, config.condition_width)
        self.norm3 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = MLP(width)
        self.modulation_bias = nn.Parameter(torch.zeros(6, width))

    def forward(self, hidden: Tensor, modulation: Tensor, condition: Tensor, mask: Tensor):
        """``modulation`` [N, 6, W] is shared by the layers; each adds its own bias. N is a multiple
        of the conditions' B: the noise levels of one picture share its keys and values."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (modulation + self.modulation_bias[None]).unsqueeze(2).unbind(1)
        )  # 6 of [N, 1, W]
        hidden = hidden + (1 + gate1) * self.attention(self.norm1(hidden) * (1 + scale1) + shift1)
        asking = self.norm2(hidden).reshape(len(condition), -1, hidden.shape[2])  # [B, N/B X, W]
        hidden = hidden + self.condition(asking, condition, mask).reshape(hidden.shape)
        return hidden + (1 + gate2) * self.mlp(self.norm3(hidden) * (1 + scale2) + shift2)


class Details(nn.Module):
    """Corrects a picture by its neighbourhoods, which the borders of patches do not cut: three
    convolutions over squares of 2 x 2 pixels of the picture and the noisy one, and the noise level.
    It begins as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Conv2d(25, width, 3, padding=1)
        self.hidden = nn.Conv2d(width, width, 3, padding=1)
        self.output = nn.Conv2d(width, 12, 3, padding=1)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        picture: Float[Tensor, "N 3 G G"],
        noisy: Float[Tensor, "N 3 G G"],
        level: Float[Tensor, " N"],
    ) -> Float[Tensor, "N 3 G G"]:
        seen = nn.functional.pixel_unshuffle(torch.cat([picture, noisy], dim=1), 2)
        plane = level[:, None, None, None].expand(-1, 1, *seen.shape[2:]).to(seen)
        seen = torch.cat([seen, plane], dim=1).contiguous(memory_format=torch.channels_last)
        hidden = self.input(seen).relu()
        return picture + nn.functional.pixel_shuffle(self.output(self.hidden(hidden).relu()), 2)


class NativeDecoder(nn.Module):
    """The native decoder; needs nothing but torch."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size, self.condition_width = config.image_size, config.condition_width
        side, width = config.image_size // config.patch_size, config.width
        pixels = 3 * config.patch_size**2
        self.patch_input = nn.Linear(pixels, width)
        rows, columns = torch.randn(2, side, width) / math.sqrt(2)  # "top left" names one of each
        places = (rows[:, None] + columns[None]).flatten(0, 1)
        self.position_embedding = nn.Parameter(places[None])
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled = nn.Linear(config.condition_width, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.layers = nn.ModuleList(NativeLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        # what a patch can show has more dimensions than the width: the last step is not linear
        self.patch_hidden = nn.Linear(width, 2 * width)
        self.patch_output = nn.Linear(2 * width, pixels)
        self.details = Details(config.detail_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Attention | MLP):  # the residual stream starts quiet
                last = module.output if isinstance(module, Attention) else module.down
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(config.num_layers))
        nn.init.xavier_uniform_(self.patch_input.weight, gain=0.4)  # noise below the position
        nn.init.normal_(self.modulation.weight, std=0.002)
        nn.init.zeros_(self.patch_output.weight)

    def forward(
        self,
        noisy: Float[Tensor, "N 3 G G"],
        level: Float[Tensor, " N"],
        condition: Float[Tensor, "B K C"],
        mask: Bool[Tensor, "B K"],
    ) -> Float[Tensor, "N 3 G G"]:
        """What ``config.predict`` says: the clean picture or the velocity. N is a multiple of B:
        as many pictures as that in a row have the same condition."""
        patch = self.config.patch_size
        hidden = self.patch_input(nn.functional.pixel_unshuffle(noisy, patch).flatten(2).mT)
        hidden = hidden + self.position_embedding
        present = mask[:, :, None].to(condition)
        pooled = (condition * present).sum(1) / present.sum(1)
        pooled = self.pooled(pooled).repeat_interleave(len(noisy) // len(condition), dim=0)
        moment = self.time(time_features(level)) + pooled
        modulation = self.modulation(nn.functional.silu(moment)).unflatten(1, (6, -1))
        for layer in self.layers:
            hidden = layer(hidden, modulation, condition, mask)
        hidden = nn.functional.gelu(self.patch_hidden(self.norm(hidden)))
        patches = self.patch_output(hidden).mT  # [N, 3 patch^2, patches]
        side = self.config.image_size // patch
        picture = nn.functional.pixel_shuffle(patches.unflatten(2, (side, side)), patch)
        return self.details(picture, noisy, level)

    def loss(
        self,
        pictures: Float[Tensor, "B 3 G G"],
        condition: Float[Tensor, "B K C"],
        mask: Bool[Tensor, "B K"],
    ) -> Float[Tensor, " B"]:
        """Squared error of the velocity, a mean over pixels and ``config.noise_levels``."""
        levels = self.config.noise_levels
        level = self._random_levels(len(pictures)).to(pictures.device)
        pictures = pictures.repeat_interleave(levels, dim=0)
        noise = torch.randn_like(pictures)
        t = level[:, None, None, None]
        noisy = (1 - t) * pictures + t * noise
        given = self(noisy, level, condition, mask).float()
        if self.config.predict == "velocity":
            error = _uneven(given - (noise - pictures))
        else:
            error = _uneven(given - pictures) / level.clamp(min=MIN_NOISE).square()
        return error.unflatten(0, (-1, levels)).mean(1)

    def _random_levels(self, number: int) -> Float[Tensor, " N"]:
        """``noise_levels`` for each of ``number`` pictures, one from each quantile of as many."""
        levels = self.config.noise_levels
        quantile = (torch.rand(number, levels) + torch.arange(levels)) / levels
        logit = torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)).flatten()
        return torch.sigmoid(self.config.noise_mean + self.config.noise_std * logit)

    def start(
        self, number: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "B 3 G G"]:
        """Drawn on the CPU, so that a seed gives the same picture on every device."""
        side = self.config.image_size
        noise = torch.randn(number, 3, side, side, generator=generator)
        return noise.to(self.position_embedding.device)

    def schedule(self, steps: int) -> list[float]:
        """Noise levels from 1 down, close together at the noisy end."""
        shift = self.config.shift
        even = [1 - i / steps for i in range(steps)]
        return [shift * u / (1 + (shift - 1) * u) for u in even]

    def predict(self, noisy: Tensor, level: float, condition: Tensor, mask: Tensor) -> Tensor:
        """The velocity."""
        levels = torch.full((len(noisy),), level, device=noisy.device)
        given = self(noisy, levels, condition, mask).float()
        return given if self.config.predict == "velocity" else (noisy - given) / level

    def advance(self, noisy: Tensor, prediction: Tensor, place: int, levels: list[float]) -> Tensor:
        """An Euler step."""
        following = levels[place + 1] if place + 1 < len(levels) else 0.0
        return noisy + (following - levels[place]) * prediction

    def pixels(self, clean: Tensor) -> Float[Tensor, "B 3 G G"]:
        return clean.clamp(-1, 1)


def _uneven(error: Float[Tensor, "N 3 G G"]) -> Float[Tensor, " N"]:
    """Mean square of an error, that of each channel's mean counted ``EVEN_WEIGHT`` times.

    The two parts are orthogonal, so the best prediction stays the same.
    """
    even = error.mean((2, 3))  # [N, 3]
    return error.square().mean((1, 2, 3)) - (1 - EVEN_WEIGHT) * even.square().mean(1)


def time_features(level: Float[Tensor, " B"], width: int = 64) -> Float[Tensor, "B 64"]:
    """Sines and cosines of the noise level, 0 to 1, at wavelengths from 1/100 to 4."""
    rates = torch.exp(torch.linspace(math.log(math.pi / 2), math.log(200 * math.pi), width // 2))
    angles = level[:, None] * rates.to(level)[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
