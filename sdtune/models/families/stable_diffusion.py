"""Stable Diffusion 1 and 2 (Rombach et al. 2022): a VAE, one CLIP text encoder and a UNet on 4-channel latents."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.diffusion.objective import DDPM, Objective
from sdtune.models.families.latent import DDPM_ONLY, LatentFamily


class StableDiffusion(LatentFamily):
    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    denoiser_name = "unet"
    trainable_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    options: ClassVar[frozenset[str]] = DDPM_ONLY
    patch = 1
    encode_options: ClassVar[dict[str, Any]] = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}

<<<<<<< HEAD
    def check(self) -> None:
        takes, gives = self.denoiser.config.in_channels, self.latent_channels
        if takes != gives:
=======
    def __init__(self, kind: Any):
        self.from_pretrained = kind.load_config


class StableDiffusion:
    """Parts load when first used, so that a run whose cache is full never holds a VAE or a frozen text encoder.

    Args:
        cfg: a config with the sections Model and Denoising.
        source: folder or Hub id of the pipeline; ``index`` is its ``model_index.json``.
        dtype: of every part, except a VAE whose configuration says that fp16 is too little for it (``force_upcast``);
            a recipe casts what it trains to fp32.
    """

    pipeline_class = StableDiffusionPipeline

    def __init__(self, cfg: Any, source: str, index: Mapping[str, Any], device: torch.device, dtype: torch.dtype):
        self.cfg, self.source, self.index, self.device, self.dtype = cfg, source, index, device, dtype
        for part in ("text_encoder", "tokenizer", "vae", "unet", "scheduler"):
            if not isinstance(index.get(part), list) or index[part][:1] in ([], [None]):
                raise UserError(f"--model {cfg.model}: its model_index.json names no {part}")
        self.parts: dict[str, nn.Module] = {}
        self.retained: set[str] = {"unet"}
        if self.denoiser.config.in_channels != self.vae_config["latent_channels"]:
>>>>>>> 842cfe8 (A damaged model_index.json, or a part's, is refused in words: found by the fuzzer of model folders)
            raise UserError(
                f"--model {self.cfg.model}: its UNet takes {takes} channels, its VAE gives {gives}: an inpainting or "
                "editing model, not text-to-image"
            )

<<<<<<< HEAD
    def make_objective(self) -> Objective:
=======
    # ---- parts -----------------------------------------------------------------------------------------

    def _read(self, kind: Any, part: str, source: str | None = None, **more: Any) -> Any:
        """One part of the base from its folder or repository."""
        where = {"subfolder": part, "revision": self.cfg.revision} if source is None else {}
        try:
            return kind.from_pretrained(source or self.source, cache_dir=self.cfg.cache_dir, **where, **more)
        except Exception as error:  # of a damaged configuration or file the libraries raise many kinds
            asked = f"--vae {source}" if source else f"--model {self.cfg.model}: {part}"
            reason = str(error).strip() or type(error).__name__
            raise UserError(f"{asked}: {reason.splitlines()[0]}") from error

    def _meta_part(self, kind: Any, part: str, source: str | None) -> nn.Module:
        """A part on the meta device; only its configuration is read."""
        if part == "text_encoder":
            config, make = self._read(CLIPTextConfig, part), kind
        else:
            config, make = self._read(ConfigOnly(kind), part, source), kind.from_config
        with self.device:
            return make(config)

    def part(self, name: str) -> nn.Module:
        """A frozen part of the base on the run's device, in evaluation mode; on the meta device its shapes alone."""
        if name not in self.parts:
            kind: Any = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}[name]
            other, dtype = self.cfg.vae if name == "vae" else None, self.dtype
            if name == "vae" and dtype == torch.float16 and self.vae_config.get("force_upcast", True):
                kind, dtype = Fp32Vae, torch.float32
            if self.device.type == "meta":
                module = self._meta_part(kind, name, other).to(dtype)
            else:
                variant = {} if other else {"variant": self.cfg.variant}
                module = self._read(kind, name, other, dtype=dtype, **variant)
            self.parts[name] = module.requires_grad_(False).eval().to(self.device)
        return self.parts[name]

    @property
    def denoiser(self) -> Any:
        return self.part("unet")

    @property
    def vae(self) -> Any:
        return self.part("vae")

    @property
    def text_encoder(self) -> Any:
        return self.part("text_encoder")

    def retain(self, part: str) -> nn.Module:
        """The part, which from now on is never unloaded, because it holds weights that train."""
        self.retained.add(part)
        return self.part(part)

    def unload_frozen(self) -> None:
        """Drop the parts in which nothing trains; they are read again when next used."""
        self.parts = {name: module for name, module in self.parts.items() if name in self.retained}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- sizes and tokenizer ----------------------------------------------------------------------------

    @property
    def vae_config(self) -> Any:
        """The VAE's configuration, without its weights."""
        return (
            self.parts["vae"].config
            if "vae" in self.parts
            else self._read(ConfigOnly(AutoencoderKL), "vae", self.cfg.vae)
        )

    @property
    def latent_channels(self) -> int:
        return self.vae_config["latent_channels"]

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def resolution(self) -> int:
        return self.denoiser.config.sample_size * self.downscale

    @cached_property
    def tokenizer(self) -> Any:
        return self._read(CLIPTokenizer, "tokenizer")

    # ---- the forward process ---------------------------------------------------------------------------

    def _objective(self) -> DDPM:
>>>>>>> 842cfe8 (A damaged model_index.json, or a part's, is refused in words: found by the fuzzer of model folders)
        cfg = self.cfg
        changed: dict[str, Any] = {}
        if cfg.rescale_betas_zero_snr:
            changed["rescale_betas_zero_snr"] = True
        if cfg.prediction_type:
            changed["prediction_type"] = cfg.prediction_type
        scheduler = DDPMScheduler.from_config(self._read(DDPMScheduler, "scheduler").config, **changed)
        if cfg.rescale_betas_zero_snr and scheduler.config.prediction_type == "epsilon":
            raise UserError("--rescale-betas-zero-snr: this base predicts epsilon; add --prediction-type v_prediction")
        return DDPM.of(cfg, scheduler)

    def text_tensors(self, encoded: Any) -> dict[str, Tensor]:
        return {"embeds": encoded[0]}

    def predict(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        dtype = self.dtype
        return self.denoiser(x_t.to(dtype), t, encoder_hidden_states=cond["embeds"].to(dtype)).sample

    @cached_property
    def scheduler(self) -> Any:
        kind, changed = self.part_class("scheduler"), {}
        if self.cfg.prediction_type:
            changed["prediction_type"] = self.cfg.prediction_type
        if self.cfg.rescale_betas_zero_snr:  # most schedulers cannot; sampling must start at the last timestep
            kind, changed = DDIMScheduler, changed | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return kind.from_config(self._read(kind, "scheduler").config, **changed)
