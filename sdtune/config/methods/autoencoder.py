"""Options of `sdtune autoencoder`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import model_validator

from sdtune.config.section_base import Count, Description, Natural, NonNegative, Positive, aliases, requires
from sdtune.config.sections import Data, Hub, Model, Optim, Run, Streaming


class AutoencoderConfig(Model, Streaming, Data, Optim, Hub, Run):
    """The autoencoder (VAE) of a base, its decoder alone or both halves (AutoencoderKL; Rombach et al. 2022)."""

    method: ClassVar[str] = "autoencoder"
    entry: ClassVar[str] = "sdtune.recipes.autoencoder:Autoencoder"
    examples: ClassVar[str] = r"""
    sdtune autoencoder --config autoencoder/tiny-shapes
    sdtune autoencoder --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset photos --perceptual-scale 0.1 --disc-scale 0.5 --mixed-precision bf16
    sdtune sample --vae runs/autoencoder --prompt "a red star"
    """
    evaluate_steps: ClassVar[int] = 0
    """Its samples are reconstructions, which are compared with their own images."""
    keep_best: ClassVar[None] = None
    patience: ClassVar[int] = 0
    compile: ClassVar[bool] = False  # type: ignore[misc]

    output_dir: Path = Path("runs/autoencoder")
    vae_config: Annotated[Path | None, aliases("model_config_name_or_path")] = None
    """JSON file that describes the network; its weights start at random. Default: start from the VAE of the base."""
    train_encoder: bool = False
    """Train the encoder too; no model that was trained on the old latents fits then. Default: the decoder alone."""
    rec_loss: Literal["l1", "l2"] = "l1"
    """Distance of pixels: mean absolute, or mean squared."""
    sample_posterior: bool = True
    """Decode a sample of the latent's distribution, as denoisers see it. `--no-sample-posterior` decodes its mean."""
    kl_scale: Annotated[NonNegative, requires("train_encoder")] = 1e-6
    """Weight of the KL divergence of a latent from a normal distribution, divided by the numbers of an image."""
    perceptual_scale: NonNegative = 0.0
    """Weight of the perceptual distance. 0 leaves it out."""
    perceptual_network: Annotated[str, requires("perceptual_scale")] = "random-conv"
    """Network that sees: random-conv (built in), or a .safetensors file with the weights of LPIPS in VGG16."""
    disc_scale: NonNegative = 0.0
    """Weight of the adversarial loss, relative to the gradient of the others. 0 leaves it out."""
    disc_start: Annotated[Natural, requires("disc_scale")] = 0
    """Step from which the adversarial loss counts. The discriminator trains from the first step."""
    disc_learning_rate: Annotated[Positive | None, requires("disc_scale")] = None
    """Learning rate of the discriminator. Default: learning_rate."""
    disc_channels: Annotated[Count, requires("disc_scale")] = 64
    """Channels of the discriminator's first layer, a multiple of 8; each next one has twice as many."""
    disc_layers: Annotated[Count, requires("disc_scale")] = 3
    """How often the discriminator halves an image: with 3 it judges patches of 70 pixels a side, with 2 of 34."""

    learning_rate: Positive = 4.5e-6
    use_ema: bool = True
    num_validation_images: Natural = 4
    """Images of a sample grid, each left of its reconstruction. 0 draws no grid."""
    validation_steps: Natural = 200
    """Steps between sample grids, and between holdout losses. 0 makes them only at the start and at the end."""

    validation_image: list[Path] = []
    """Images that the sample grids show. Default: some of the dataset."""

    @model_validator(mode="after")
    def _whole_network(self) -> Self:
        if self.vae_config and not self.train_encoder:
            raise ValueError("vae_config starts from random weights, also those of the encoder: add --train-encoder")
        if self.vae_config and self.vae:
            raise ValueError("vae_config and vae both say which network is trained: give one")
        if self.disc_channels % 8:
            raise ValueError(f"disc_channels {self.disc_channels} is no multiple of 8")
        return self

    def describe(self) -> Description:
        known = super().describe()
        return known._replace(base=None, revision=None) if self.train_encoder else known
