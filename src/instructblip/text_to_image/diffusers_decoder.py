"""Stable Diffusion or Sana from a local diffusers directory, behind the interface of decoders.

The tokens that a pipeline takes as ``prompt_embeds`` are the condition; its own text encoder is
never loaded. Which loss and which steps belong to it, its scheduler's config says. Nothing is
downloaded and no code of the directory is run. Needs the extra ``[image-generation]``.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from instructblip.model.checkpoints.weights import read_json
from instructblip.text_to_image.config import DiffusersConfig

BACKBONES = {
    # class in model_index.json: (folder, attribute of its config with the condition's width)
    "UNet2DConditionModel": ("unet", "cross_attention_dim"),
    "SanaTransformer2DModel": ("transformer", "caption_channels"),
}


class DiffusersDecoder(nn.Module):
    """``backbone`` (U-Net or transformer), ``vae`` (always frozen) and the scheduler."""

    def __init__(
        self, backbone: nn.Module, vae: nn.Module, scheduler: Any, config: DiffusersConfig
    ) -> None:
        super().__init__()
        self.backbone, self.vae = backbone, vae
        self.scheduler, self.train_scheduler = scheduler, scheduler.from_config(scheduler.config)
        self.config = config
        settings: Any = backbone.config
        self.condition_width = settings[BACKBONES[type(backbone).__name__][1]]
        if not isinstance(self.condition_width, int):
            raise ValueError(
                f"{config.path}: condition widths {self.condition_width} that differ between "
                "blocks; expected one number"
            )
        self.channels = settings["in_channels"]
        self.flow = (  # Sana's DPM solver says so in its config, FlowMatchEuler in its name
            scheduler.config.get("prediction_type") == "flow_prediction"
            or "FlowMatch" in type(scheduler).__name__
        )
        self.factor = _vae_factor(vae)
        self.image_size = config.image_size or settings["sample_size"] * self.factor
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of the {self.factor} pixels that one "
                f"latent of {config.path} stands for"
            )

    @classmethod
    def from_pretrained(cls, config: DiffusersConfig) -> "DiffusersDecoder":
        """Load backbone, VAE and scheduler.

        Raises ImportError without diffusers, FileNotFoundError naming the missing parts, and
        ValueError for a pipeline whose condition does not come as a sequence of tokens.
        """
        try:
            import diffusers
        except ImportError as error:
            raise ImportError(
                "a decoder of kind diffusers needs the package: pip install "
                '"instructblip[image-generation]"'
            ) from error
        root = Path(config.path)
        if not (root / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{root} is no diffusers directory: it has no model_index.json; give a folder that "
                "a pipeline's save_pretrained wrote"
            )
        index = read_json(root / "model_index.json")
        names = {n: v[1] for n, v in index.items() if isinstance(v, list) and len(v) == 2}
        backbone = next((n for n in names.values() if n in BACKBONES), None)
        if backbone is None:
            raise ValueError(
                f"{root} holds a {index.get('_class_name')}; expected a pipeline with one of "
                f"{', '.join(BACKBONES)}"
            )
        folder = BACKBONES[backbone][0]
        missing = [
            f"{part}/{file}"
            for part, file in (
                (folder, "config.json"), ("vae", "config.json"),
                ("scheduler", "scheduler_config.json"),
            )
            if not (root / part / file).is_file()
        ]  # fmt: skip
        for part in (folder, "vae"):
            if not any((root / part).glob("diffusion_pytorch_model*.safetensors")):
                missing.append(f"{part}/diffusion_pytorch_model.safetensors")
        if missing:
            raise FileNotFoundError(
                f"{root} is incomplete: {', '.join(missing)} missing; download them again"
            )
        load: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        scheduler_class = getattr(diffusers, names["scheduler"])
        return cls(
            getattr(diffusers, backbone).from_pretrained(str(root), subfolder=folder, **load),
            getattr(diffusers, names["vae"]).from_pretrained(str(root), subfolder="vae", **load),
            scheduler_class.from_pretrained(str(root), subfolder="scheduler"),
            config,
        )

    def forward(self, noisy: Tensor, moment: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """The backbone's prediction for latents at time steps ``moment`` [B]."""
        return self.backbone(
            noisy, timestep=moment, encoder_hidden_states=condition, encoder_attention_mask=mask
        ).sample

    def loss(
        self,
        pictures: Float[Tensor, "B 3 G G"],
        condition: Float[Tensor, "B K C"],
        mask: Bool[Tensor, "B K"],
    ) -> Float[Tensor, " B"]:
        """Mean squared error of what the scheduler's config says is predicted."""
        latents = self.encode(pictures)
        noise = torch.randn_like(latents)
        scheduler, number = self.train_scheduler, self.train_scheduler.config.num_train_timesteps
        if self.flow:
            level = torch.sigmoid(torch.randn(len(latents), device=latents.device))
            shift = scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0
            level = shift * level / (1 + (shift - 1) * level)
            t = level[:, None, None, None]
            noisy, wanted, moment = (1 - t) * latents + t * noise, noise - latents, level * number
        else:
            moment = torch.randint(number, (len(latents),), device=latents.device)
            noisy = scheduler.add_noise(latents, noise, moment)
            wanted = noise
            if scheduler.config.prediction_type == "v_prediction":
                kept = scheduler.alphas_cumprod.to(latents)[moment][:, None, None, None]
                wanted = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        return (self(noisy, moment, condition, mask) - wanted).square().mean((1, 2, 3))

    @torch.no_grad()
    def encode(self, pictures: Float[Tensor, "B 3 G G"]) -> Tensor:
        """Latents, scaled as the backbone knows them."""
        vae: Any = self.vae
        encoded = vae.encode(pictures)
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.sample()
        return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor

    def start(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        side = self.image_size // self.factor
        noise = torch.randn(number, self.channels, side, side, generator=generator)
        parameter = next(self.backbone.parameters())
        scale = 1.0 if self.flow else float(self.scheduler.init_noise_sigma)
        return noise.to(parameter.device) * scale

    def schedule(self, steps: int) -> list[float]:
        self.scheduler.set_timesteps(steps)
        return [float(t) for t in self.scheduler.timesteps]

    def predict(self, noisy: Tensor, level: float, condition: Tensor, mask: Tensor) -> Tensor:
        moment = torch.tensor(level, dtype=self.scheduler.timesteps.dtype)
        scaled = noisy if self.flow else self.scheduler.scale_model_input(noisy, moment)
        return self(scaled, moment.to(noisy.device).expand(len(noisy)), condition, mask)

    def advance(self, noisy: Tensor, prediction: Tensor, place: int, levels: list[float]) -> Tensor:
        return self.scheduler.step(prediction, self.scheduler.timesteps[place], noisy).prev_sample

    def pixels(self, clean: Tensor) -> Float[Tensor, "B 3 G G"]:
        vae: Any = self.vae
        latents = clean / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        return vae.decode(latents).sample.clamp(-1, 1)


def _vae_factor(vae: nn.Module) -> int:
    """Pixels of a picture's side for one of the latents'."""
    settings: Any = vae.config
    blocks = settings.get("block_out_channels") or settings.get("encoder_block_out_channels")
    return 2 ** (len(blocks) - 1)
