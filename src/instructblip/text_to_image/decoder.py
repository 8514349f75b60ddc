"""The interface of image decoders, and the native decoder: a small diffusion transformer.

Flow matching in pixels: at noise level t an image x becomes ``(1 - t) x + t e`` with Gaussian noise
e, and the velocity is ``e - x``. The network predicts the clean image, from which the velocity
follows: flat shapes lie on far fewer dimensions than the pixels of a patch, noise does not (Li and
He 2025, "Back to basics"). The layout of an image is decided where almost everything is noise: an
object of 20 x 20 even pixels is still visible at t = 0.95. So training and sampling dwell there.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from instructblip.text_to_image.blocks import MLP, Attention
from instructblip.text_to_image.config import NativeConfig

MIN_NOISE = 0.5
"""Lower noise levels do not raise the weight of the velocity's error: at 0.1 the few samples with
little noise dominated the gradient (compare Hang et al. 2023, "Min-SNR weighting")."""

EVEN_WEIGHT = 0.05
"""Weight of the error of an image's mean colour. No prompt names the background: near pure noise
its three numbers made up nine tenths of the loss, and the objects the rest."""


Images = Float[Tensor, "N 3 G G"]
Latents = Float[Tensor, "N ..."]
"""The form in which a decoder samples: images, or their latents."""
Condition = Float[Tensor, "B K C"]
Mask = Bool[Tensor, "B K"]
"""True where a token of the condition takes part."""
Guided = Callable[[Latents, float], Latents]
"""(noisy, noise level or time step) -> ``predict``, combined over the conditions."""


class Decoder(Protocol):
    """An image decoder. ``predict`` must be linear in what guidance combines."""

    condition_width: int
    image_size: int

    def loss(self, images: Images, condition: Condition, mask: Mask) -> Float[Tensor, " N"]:
        """Loss of each image; noise comes from torch's default generator."""
        ...

    def predict(self, noisy: Latents, level: float, condition: Condition, mask: Mask) -> Latents:
        """What a step of ``sample`` needs, in the shape of ``noisy``."""
        ...

    def sample(
        self, guided: Guided, number: int, steps: int, generator: torch.Generator | None
    ) -> Images:
        """``number`` images in [-1, 1], from noise that is the same on every device."""
        ...


class NativeLayer(nn.Module):
    """Self-attention, cross-attention to the condition, feed-forward; the noise level modulates."""

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

    def forward(
        self,
        hidden: Float[Tensor, "N X W"],
        modulation: Float[Tensor, "N 6 W"],
        condition: Condition,
        mask: Mask,
    ) -> Float[Tensor, "N X W"]:
        """The layers share ``modulation``; each adds its own bias. N is a multiple of B: the noise
        levels of one image share the keys and values of its condition."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (modulation + self.modulation_bias[None]).unsqueeze(2).unbind(1)
        )  # 6 of [N, 1, W]
        hidden = hidden + (1 + gate1) * self.attention(self.norm1(hidden) * (1 + scale1) + shift1)
        asking = self.norm2(hidden).reshape(len(condition), -1, hidden.shape[2])  # [B, N/B X, W]
        hidden = hidden + self.condition(asking, condition, mask).reshape(hidden.shape)
        return hidden + (1 + gate2) * self.mlp(self.norm3(hidden) * (1 + scale2) + shift2)


class Details(nn.Module):
    """Corrects an image across the borders of patches; it starts as the identity.

    Three convolutions over squares of 2 x 2 pixels of the predicted image, the noisy one and the
    noise level.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Conv2d(25, width, 3, padding=1)
        self.hidden = nn.Conv2d(width, width, 3, padding=1)
        self.output = nn.Conv2d(width, 12, 3, padding=1)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def forward(self, image: Images, noisy: Images, level: Float[Tensor, " N"]) -> Images:
        squares = nn.functional.pixel_unshuffle(torch.cat([image, noisy], dim=1), 2)
        plane = level[:, None, None, None].expand(-1, 1, *squares.shape[2:]).to(squares)
        squares = torch.cat([squares, plane], dim=1)  # [N, 25, G/2, G/2]
        hidden = self.input(squares.contiguous(memory_format=torch.channels_last)).relu()
        return image + nn.functional.pixel_shuffle(self.output(self.hidden(hidden).relu()), 2)


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
        # a patch has more dimensions than the width: the last step is not linear
        self.patch_hidden = nn.Linear(width, 2 * width)
        self.patch_output = nn.Linear(2 * width, pixels)
        self.details = Details(config.detail_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Attention | MLP):  # the residual stream starts small
                last = module.output if isinstance(module, Attention) else module.down
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(config.num_layers))
        nn.init.xavier_uniform_(self.patch_input.weight, gain=0.4)  # noise below the position
        nn.init.normal_(self.modulation.weight, std=0.002)
        nn.init.zeros_(self.patch_output.weight)

    def forward(
        self, noisy: Images, level: Float[Tensor, " N"], condition: Condition, mask: Mask
    ) -> Images:
        """The clean image or the velocity, as ``config.predict`` says. N is a multiple of B: each
        condition belongs to N / B consecutive images."""
        patch = self.config.patch_size
        hidden = self.patch_input(nn.functional.pixel_unshuffle(noisy, patch).flatten(2).mT)
        hidden = hidden + self.position_embedding  # [N, patches, W]
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
        image = nn.functional.pixel_shuffle(patches.unflatten(2, (side, side)), patch)
        return self.details(image, noisy, level)

    def loss(self, images: Images, condition: Condition, mask: Mask) -> Float[Tensor, " N"]:
        """Squared error of the velocity, the mean over pixels and ``config.noise_levels``."""
        levels = self.config.noise_levels
        level = self._random_levels(len(images)).to(images.device)
        images = images.repeat_interleave(levels, dim=0)
        noise = torch.randn_like(images)
        t = level[:, None, None, None]
        noisy = (1 - t) * images + t * noise
        output = self(noisy, level, condition, mask).float()
        if self.config.predict == "velocity":
            error = _uneven(output - (noise - images))
        else:
            error = _uneven(output - images) / level.clamp(min=MIN_NOISE).square()
        return error.unflatten(0, (-1, levels)).mean(1)

    def _random_levels(self, number: int) -> Float[Tensor, " N"]:
        """``noise_levels`` for each of ``number`` images, one from each of as many quantiles."""
        levels = self.config.noise_levels
        quantile = (torch.rand(number, levels) + torch.arange(levels)) / levels
        logit = torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)).flatten()
        return torch.sigmoid(self.config.noise_mean + self.config.noise_std * logit)

    def predict(self, noisy: Images, level: float, condition: Condition, mask: Mask) -> Images:
        """The velocity."""
        levels = torch.full((len(noisy),), level, device=noisy.device)
        output = self(noisy, levels, condition, mask).float()
        return output if self.config.predict == "velocity" else (noisy - output) / level

    def sample(
        self, guided: Guided, number: int, steps: int, generator: torch.Generator | None = None
    ) -> Images:
        """Euler steps along noise levels from 1 to 0, close together at the noisy end."""
        side, shift = self.config.image_size, self.config.shift
        even = [1 - i / steps for i in range(steps + 1)]
        levels = [shift * u / (1 + (shift - 1) * u) for u in even]
        noise = torch.randn(number, 3, side, side, generator=generator)
        images = noise.to(self.position_embedding.device)
        for level, following in pairwise(levels):
            images = images + (following - level) * guided(images, level)
        return images.clamp(-1, 1)


def _uneven(error: Images) -> Float[Tensor, " N"]:
    """Mean square of an error in which the mean of each channel counts ``EVEN_WEIGHT`` times.

    The two parts are orthogonal, so the best prediction stays the same.
    """
    even = error.mean((2, 3))  # [N, 3]
    return error.square().mean((1, 2, 3)) - (1 - EVEN_WEIGHT) * even.square().mean(1)


def time_features(level: Float[Tensor, " B"], width: int = 64) -> Float[Tensor, "B 64"]:
    """Sines and cosines of the noise level, 0 to 1, at wavelengths from 1/100 to 4."""
    rates = torch.exp(torch.linspace(math.log(math.pi / 2), math.log(200 * math.pi), width // 2))
    angles = level[:, None] * rates.to(level)[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
