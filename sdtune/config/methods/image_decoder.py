"""Options of `sdtune image-decoder`."""

from pathlib import Path
from typing import Annotated, ClassVar

from sdtune.config.section_base import (
    Description,
    NameList,
    Natural,
    NonNegative,
    PathOrId,
    Positive,
    Share,
    aliases,
    requires,
)
from sdtune.config.sections import Cache, Data, Denoising, Hub, Optim, OptionalLora, Preview, Run, SavedModel


class ImageDecoderConfig(OptionalLora, Denoising, SavedModel, Cache, Data, Optim, Preview, Hub, Run):
    """From CLIP embeddings of pictures to pictures: the decoder of unCLIP and Kandinsky 2.2 (Ramesh et al. 2022)."""

    method: ClassVar[str] = "image-decoder"
    entry: ClassVar[str] = "sdtune.recipes.image_decoder:ImageDecoder"
    examples: ClassVar[str] = r"""
    sdtune image-decoder --config image-decoder/tiny-shapes
    sdtune image-decoder --model kandinsky-community/kandinsky-2-2-decoder --dataset photos \
        --clip-model kandinsky-community/kandinsky-2-2-prior --lora --mixed-precision bf16
    sdtune image-decoder --model tiny --clip-model runs/clip --dataset photos --resolution 64
    """

    # No options here
    quantize_base: ClassVar[None] = None  # type: ignore[misc]
    lora_plus_ratio: ClassVar[float] = 1.0  # type: ignore[misc]
    evaluate_steps: ClassVar[int] = 0  # type: ignore[misc]
    """Its samples are variations of pictures, and there are no captions to score them by."""
    keep_best: ClassVar[None] = None  # type: ignore[misc]
    patience: ClassVar[int] = 0  # type: ignore[misc]
    compile: ClassVar[bool] = False  # type: ignore[misc]
    prediction_type: ClassVar[None] = None  # type: ignore[misc]
    rescale_betas_zero_snr: ClassVar[bool] = False  # type: ignore[misc]
    """The noise schedule is the base's own."""
    answers: ClassVar[dict[str, str]] = dict.fromkeys(
        ("validation_prompt", "validation_prompts"),
        "samples are variations of images: use --validation-image, or leave the flag out",
    )

    output_dir: Path = Path("runs/image-decoder")
    model: Annotated[PathOrId, aliases("pretrained_decoder_model_name_or_path", "pretrained_model_name_or_path")] = (
        "tiny"
    )
    """KandinskyV22Pipeline to continue, or a Stable Diffusion base that a new decoder starts from: folder or Hub id."""
    clip_model: Annotated[PathOrId, aliases("pretrained_prior_model_name_or_path")]
    """CLIP whose embeddings are decoded, or a prior that has it: folder or Hub id."""
    embedding_dropout: Share = 0.1
    """Share of embeddings replaced by that of a picture of zeros, with which the stock pipeline guides."""
    lora: bool = False
    """Train low-rank adapters in place of all weights, on a model that is a decoder already."""
    target_modules: Annotated[NameList, aliases("lora_target_modules", "lora_layers"), requires("lora")] = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    ]
    """Modules of the UNet that get an adapter: ends of names, or a regular expression."""
    cache: bool = True
    """Compute latents and embeddings once and keep them on disk, where that is exact."""
    validation_guidance_scale: NonNegative = 4.0
    """Classifier-free guidance of the samples. 1 means no guidance."""
    validation_image: list[Path] = []
    """Images of which the samples are variations. Default: some of the dataset."""

    num_validation_images: Natural = 4
    learning_rate: Positive = 1e-4
    adam_weight_decay: NonNegative = 0.0

    def describe(self) -> Description:
        known = super().describe()._replace(base=self.model, revision=self.revision)
        return known if self.lora else known._replace(adapter="", rank=None, alpha=None)
