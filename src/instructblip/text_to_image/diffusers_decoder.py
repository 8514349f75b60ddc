"""Stable Diffusion or Sana from a local diffusers directory, behind the interface ``Decoder``.

The condition takes the place of a pipeline's ``prompt_embeds``; its own text encoder is not loaded.
The scheduler's config decides the loss and the sampling steps. Nothing is downloaded and no code of
the directory is run. Needs the extra ``[image-generation]``.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from instructblip.core.files import read_json
from instructblip.text_to_image.config import DiffusersConfig
from instructblip.text_to_image.decoder import Condition, Guided, Images, Latents, Mask

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
                f"{config.path}: the blocks have different condition widths, "
                f"{self.condition_width}; expected one number"
            )
        self.channels = settings["in_channels"]
        self.flow = (  # Sana's DPM solver: by its config; FlowMatchEuler: by its name
            scheduler.config.get("prediction_type") == "flow_prediction"
            or "FlowMatch" in type(scheduler).__name__
        )
        vae_config: Any = vae.config
        blocks = vae_config.get("block_out_channels") or vae_config.get(
            "encoder_block_out_channels"
        )
        self.factor = 2 ** (len(blocks) - 1)  # pixels of an image's side for one latent
        self.image_size = config.image_size or settings["sample_size"] * self.factor
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of {self.factor}, the pixels that "
                f"one latent of {config.path} stands for"
            )

    @classmethod
    def from_pretrained(cls, config: DiffusersConfig) -> "DiffusersDecoder":
        """Load backbone, VAE and scheduler.

        Raises ImportError without diffusers, FileNotFoundError naming the missing parts, and
        ValueError for a pipeline that is not conditioned on a sequence of tokens.
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
                f"{root} is not a diffusers directory: it has no model_index.json; give a folder "
                "that a pipeline's save_pretrained wrote"
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
        configs = (f"{folder}/config.json", "vae/config.json", "scheduler/scheduler_config.json")
        missing = [file for file in configs if not (root / file).is_file()]
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

    def forward(
        self, noisy: Latents, timestep: Shaped[Tensor, " N"], condition: Condition, mask: Mask
    ) -> Latents:
        """The backbone's prediction."""
        return self.backbone(
            noisy, timestep=timestep, encoder_hidden_states=condition, encoder_attention_mask=mask
        ).sample

    def loss(self, images: Images, condition: Condition, mask: Mask) -> Float[Tensor, " N"]:
        """Mean squared error of the prediction that the scheduler's config names."""
        latents = self.encode(images)
        noise = torch.randn_like(latents)
        scheduler, number = self.train_scheduler, self.train_scheduler.config.num_train_timesteps
        if self.flow:
            level = torch.sigmoid(torch.randn(len(latents), device=latents.device))
            shift = scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0
            level = shift * level / (1 + (shift - 1) * level)
            t = level[:, None, None, None]
            noisy, target, timestep = (1 - t) * latents + t * noise, noise - latents, level * number
        else:
            timestep = torch.randint(number, (len(latents),), device=latents.device)
            noisy = scheduler.add_noise(latents, noise, timestep)
            target = noise
            if scheduler.config.prediction_type == "v_prediction":
                alpha = scheduler.alphas_cumprod.to(latents)[timestep][:, None, None, None]
                target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        return (self(noisy, timestep, condition, mask) - target).square().mean((1, 2, 3))

    @torch.no_grad()
    def encode(self, images: Images) -> Latents:
        """Latents at the scale of the backbone."""
        vae: Any = self.vae
        encoded = vae.encode(images)
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.sample()
        return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor

    def predict(self, noisy: Latents, level: float, condition: Condition, mask: Mask) -> Latents:
        timestep = torch.tensor(level, dtype=self.scheduler.timesteps.dtype)
        scaled = noisy if self.flow else self.scheduler.scale_model_input(noisy, timestep)
        return self(scaled, timestep.to(noisy.device).expand(len(noisy)), condition, mask)

    def sample(
        self, guided: Guided, number: int, steps: int, generator: torch.Generator | None = None
    ) -> Images:
        """The steps of the scheduler, then the VAE's decoder."""
        side = self.image_size // self.factor
        noise = torch.randn(number, self.channels, side, side, generator=generator)
        scale = 1.0 if self.flow else float(self.scheduler.init_noise_sigma)
        latents = noise.to(next(self.backbone.parameters()).device) * scale
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            prediction = guided(latents, float(timestep))
            latents = self.scheduler.step(prediction, timestep, latents).prev_sample
        vae: Any = self.vae
        latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        return vae.decode(latents).sample.clamp(-1, 1)
