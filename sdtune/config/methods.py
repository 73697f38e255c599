"""One config class per method: the sections it reads, its own fields, and the defaults that are its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge
from pydantic import model_validator

from sdtune.config.sections import (
    Adapter,
    Captions,
    Classes,
    Count,
    Counts,
    Data,
    Decline,
    Denoising,
    Description,
    Hub,
    Latents,
    Model,
    Natural,
    Network,
    NonNegative,
    Optim,
    Positive,
    Preview,
    Prompts,
    Run,
    Schedule,
    Share,
    Streaming,
    Strings,
    also,
)


class LoraConfig(Adapter, Denoising, Model, Captions, Latents, Streaming, Data, Optim, Prompts, Preview, Hub, Run):
    """Low-rank adapters on a text-to-image model (LoRA; Hu et al. 2021)."""

    method: ClassVar[str] = "lora"
    entry: ClassVar[str] = "sdtune.recipes.lora:Lora"

    output_dir: Path = Path("runs/lora")


class TextToImageConfig(Denoising, Model, Captions, Latents, Streaming, Data, Optim, Prompts, Preview, Hub, Run):
    """Full fine-tuning of a text-to-image model's denoiser (Rombach et al. 2022)."""

    method: ClassVar[str] = "text-to-image"
    entry: ClassVar[str] = "sdtune.recipes.text_to_image:TextToImage"

    output_dir: Path = Path("runs/text-to-image")
    learning_rate: Positive = 1e-5
    dream: Annotated[bool, also("dream_training")] = False
    """Let the noise hold some of the network's own error, at a second forward pass (DREAM; Zhou et al. 2023)."""
    dream_detail_preservation: NonNegative = 1.0
    """Power p of DREAM; more keeps closer to the ordinary loss."""

    @model_validator(mode="after")
    def _one_noise(self) -> Self:
        if self.dream and self.input_perturbation:
            raise ValueError("dream and input_perturbation both change the noise of the input: give one")
        return self


def says(text: str, word: str) -> bool:
    """Whether a tokenizer that knows ``word`` finds it in ``text``: in any case, and beside a comma or full stop."""
    return word.lower() in text.lower()


class NewWord(Prompts):
    """The word that gets vectors of its own."""

    placeholder_token: str | None = None
    """New word that stands for what is learnt, such as <my-cat>, and that captions say; none adds no word."""
    initializer_token: Strings = []
    """Words whose vectors the new ones start from: one for all or one for each; none is the vocabulary's mean."""
    initializer_mean: bool = False
    """Start every vector at the mean of all initializer words, which may then be of several tokens."""
    num_vectors: Count = 1
    """Vectors of the new word; more hold more, and take more places of the prompt."""

    @model_validator(mode="after")
    def _a_word_that_is_shown(self) -> Self:
        word = self.placeholder_token
        if word is not None and word.split() != [word]:
            raise ValueError(f"placeholder_token {word!r}: wants one word, such as <my-cat>")
        if word and self.validation_prompt and not any(says(prompt, word) for prompt in self.validation_prompt):
            raise ValueError(f"validation_prompt: none says {word}, so no sample would show it; put it into one")
        return self

    def describe(self) -> Description:
        known, word = super().describe(), self.placeholder_token
        return known._replace(token=word, trigger=word or known.trigger)


class TextualInversionConfig(NewWord, Denoising, Model, Captions, Data, Optim, Prompts, Preview, Hub, Run):
    """A new word for what a few images show; nothing of the base moves (Textual Inversion; Gal et al. 2022)."""

    method: ClassVar[str] = "textual-inversion"
    entry: ClassVar[str] = "sdtune.recipes.textual_inversion:TextualInversion"

    placeholder_token: str
    learnable_property: Literal["object", "style"] = "object"
    """Whether the captions that the templates make name a thing or a style; a caption column or a caption wins."""
    template_file: Path | None = None
    """Captions of your own, one a line, with {} where the new word goes; none is those for learnable_property."""
    norm_weight: NonNegative = 0.0
    """Weight of the squared deviation of the vectors' norm from the vocabulary's mean norm, relative to it."""
    output_dir: Path = Path("runs/textual-inversion")
    learning_rate: Positive = 5e-3
    export_steps: Natural = 500


class DreamBoothConfig(NewWord, Adapter, Denoising, Model, Captions, Data, Optim, Prompts, Preview, Hub, Run):
    """A subject or style from a handful of images (DreamBooth; Ruiz et al. 2022), all weights or as LoRA."""

    method: ClassVar[str] = "dreambooth"
    entry: ClassVar[str] = "sdtune.recipes.dreambooth:DreamBooth"

    dataset: Annotated[str, also("instance_data", "instance_data_dir")]
    """Images of the subject: folder, Hub dataset id, or dataset saved by `save_to_disk`."""
    instance_prompt: str | None = None
    """Caption of images without one of their own, such as a photo of sks dog; none wants each captioned."""
    prior_preservation: Annotated[bool, also("with_prior_preservation")] = False
    """Train on pictures of the subject's class as well, as many a step, so that the class stays what it was."""
    class_prompt: Strings = []
    """What the class pictures show, such as a photo of a dog; several prompts take turns."""
    class_data: Annotated[Path | None, also("class_data_dir")] = None
    """Folder of class pictures; none is class-pictures in the run's folder, made by the base."""
    num_class_images: Count = 100
    """Class pictures to train on; the base makes those that the folder lacks."""
    prior_loss_weight: NonNegative = 1.0
    """Weight of the class pictures' loss (the paper's lambda)."""
    sample_batch_size: Count = 4
    """Class pictures made at a time, on each process."""
    class_inference_steps: Count = 25
    """Denoising steps of a class picture."""
    class_guidance_scale: NonNegative = 5.0
    """Classifier-free guidance of the class pictures."""
    lora: bool = False
    """Train low-rank adapters in place of all weights."""
    train_text_encoder: bool = False
    """Train the text encoder as well: all of it, or with --lora its q, k, v and out projections."""
    text_encoder_lr: Positive | None = None
    """Learning rate of the text encoder; none is learning_rate."""
    placeholder_lr: Positive | None = None
    """Learning rate of the new word's vectors; none is learning_rate."""
    unet_frac: Share = 1.0
    """Share of the run, from its start, in which the UNet trains."""
    text_encoder_frac: Annotated[Share, also("train_text_encoder_frac")] = 1.0
    """Share of the run, from its start, in which the text encoder trains."""
    placeholder_frac: Annotated[Share, also("train_text_encoder_ti_frac")] = 1.0
    """Share of the run, from its start, in which the new word's vectors train."""
    learning_rate: Positive = 5e-6
    """Peak learning rate; with --lora the default is 1e-4."""
    output_dir: Path = Path("runs/dreambooth")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_adapters(cls, values: Any) -> Any:
        lora = isinstance(values, dict) and str(values.get("lora", False)).lower() in ("true", "1", "yes", "on")
        return {"learning_rate": 1e-4} | values if lora else values

    @model_validator(mode="after")
    def _options_that_belong_together(self) -> Self:
        adapters = [n for n in Adapter.model_fields if n not in ("train_text_encoder", "text_encoder_lr")]
        of_word = ["initializer_token", "initializer_mean", "num_vectors", "placeholder_lr", "placeholder_frac"]
        for option, what, names in (
            ("prior_preservation", "prior preservation", ["class_prompt", "class_data"]),
            ("lora", "adapters", adapters),
            ("placeholder_token", "a new word", of_word),
            ("train_text_encoder", "a text encoder that trains", ["text_encoder_frac"]),
        ):
            fields = type(self).model_fields
            strays = [n for n in names if getattr(self, n) != fields[n].get_default()]
            if strays and not getattr(self, option):
                raise ValueError(f"{strays[0]} is for {what}: add --{option.replace('_', '-')}, or leave it out")
        if self.prior_preservation and not (self.class_prompt or self.class_data):
            raise ValueError(
                "prior_preservation needs class_prompt, from which the base makes class pictures, or class_data"
            )
        if self.prior_preservation and self.buckets:
            raise ValueError("prior_preservation with buckets: class pictures are square, and a batch has one shape")
        if word := self.placeholder_token:
            if not self.lora:
                raise ValueError("placeholder_token trains a new word beside adapters (pivotal tuning): add --lora")
            if self.instance_prompt and not says(self.instance_prompt, word):
                raise ValueError(f"instance_prompt does not say {word}, so the new word would not train; put it in")
            if any(says(prompt, word) for prompt in self.class_prompt):
                raise ValueError(f"class_prompt says {word}, which the base does not know; name the class alone")
        return self

    @model_validator(mode="after")
    def _something_trains_to_the_end(self) -> Self:
        shares = {"unet_frac": self.unet_frac}
        if self.train_text_encoder:
            shares["text_encoder_frac"] = self.text_encoder_frac
        if self.placeholder_token:
            shares["placeholder_frac"] = self.placeholder_frac
        if max(shares.values()) < 1:
            names = " and ".join(shares)
            raise ValueError(f"{names}: nothing would train to the end; leave one of them at 1, or ask for fewer steps")
        return self

    def describe(self) -> Description:
        known = super().describe()
        tags = ("dreambooth",) if self.instance_prompt else ()
        return known._replace(trigger=self.instance_prompt or known.trigger, tags=tags)


class DdpmConfig(Network, Schedule, Denoising, Classes, Streaming, Data, Optim, Preview, Hub, Run):
    """A diffusion model of pixels, from scratch or continued, with classes or without (DDPM; Ho et al. 2020)."""

    method: ClassVar[str] = "ddpm"
    entry: ClassVar[str] = "sdtune.recipes.ddpm:Ddpm"

    output_dir: Path = Path("runs/ddpm")
    model: Annotated[str | None, also("pretrained_model_name_or_path")] = None
    """Continue this model: a run's folder, or the folder or Hub id of a DDPMPipeline; none starts from scratch."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub; none is its main branch."""
    cache_dir: Path | None = None
    """Where models and datasets from the Hub are kept; none is the Hub's own cache folder."""
    unet_config: Annotated[Path | None, also("model_config_name_or_path")] = None
    """JSON file that describes the network, as diffusers' unet/config.json; none goes by the options of Network."""
    variance_type: Literal["fixed_small", "fixed_large"] | None = None
    """Variance of a sampling step: beta-tilde, or beta; none is the model's, from scratch fixed_small."""
    out_of_range: Literal["clip", "keep"] | None = None
    """What sampling does with estimates of the image beyond [-1, 1]; none is the model's, from scratch clip."""
    class_dropout: Share = 0.1
    """Share of classes replaced by the null class, which is what classifier-free guidance learns from."""

    resolution: Annotated[int, Ge(8)] = 64
    train_batch_size: Count = 16
    steps: Annotated[Count | None, also("max_train_steps")] = None
    """Optimizer steps; none with no num_train_epochs either is 20,000."""
    lr_scheduler: Decline = "cosine"
    lr_warmup_steps: Natural = 500
    adam_beta1: Share = 0.95
    adam_weight_decay: NonNegative = 1e-6
    use_ema: bool = True
    ema_power: Positive = 3 / 4

    @property
    def max_steps(self) -> int:
        return self.steps or 20_000

    @model_validator(mode="after")
    def _one_network(self) -> Self:
        given = [name for name in ("model", "unet_config") if getattr(self, name)]
        fields = [name for name in Network.model_fields if name != "channels"]
        given += [name for name in fields if getattr(self, name) != Network.model_fields[name].default]
        if len(given) > 1 and given[0] in ("model", "unet_config"):
            raise ValueError(f"{given[0]} describes the whole network: leave out {' and '.join(given[1:])}")
        return self

    @model_validator(mode="after")
    def _classes_to_drop(self) -> Self:
        if self.class_column is None and self.class_dropout != type(self).model_fields["class_dropout"].default:
            raise ValueError("class_dropout is for a model with classes: add --class-column, or leave it out")
        return self

    def describe(self) -> Description:
        return super().describe()._replace(base=self.model, revision=self.revision)


class ClassifierConfig(Network, Schedule, Classes, Data, Optim, Hub, Run):
    """A classifier of noised images, which guides a diffusion model (Dhariwal & Nichol 2021)."""

    method: ClassVar[str] = "classifier"
    entry: ClassVar[str] = "sdtune.recipes.classifier:Classifier"
    num_validation_images: ClassVar[int] = 0
    """It draws none."""

    output_dir: Path = Path("runs/classifier")
    class_column: str
    validation_steps: Natural = 200
    """Steps between the figures of held-out images; 0 measures only at the start and the end."""
    rescale_betas_zero_snr: bool = False
    """The schedule ends in pure noise (Lin et al. 2023), as that of the model which is to be guided."""

    resolution: Annotated[int, Ge(8)] = 64
    block_out_channels: Counts = [128, 128, 256, 256]
    attention_resolutions: Counts = [32, 16, 8]
    attention_head_dim: Count | None = 64
    train_batch_size: Count = 64
    learning_rate: Positive = 3e-4
    lr_scheduler: Decline = "linear"
    adam_weight_decay: NonNegative = 0.05

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.buckets:
            raise ValueError("buckets: a classifier sees one shape; leave it out")
        return self


METHODS: tuple[type[Run], ...] = (
    LoraConfig,
    DreamBoothConfig,
    TextualInversionConfig,
    TextToImageConfig,
    DdpmConfig,
    ClassifierConfig,
)
"""The commands that train, in the order in which --help lists them."""


def config_class(settings: Mapping[str, Any]) -> type[Run]:
    """The config class of a run's ``config.yaml``; of a recipe of one's own, the one whose keys are most alike.

    The runs of a time when `method` was not written down were all LoRA.
    """
    name = settings.get("method", LoraConfig.method)
    for config in METHODS:
        if config.method == name:
            return config
    keys = settings.keys()
    return max(METHODS, key=lambda c: len(keys & c.model_fields.keys()) / len(keys | c.model_fields.keys()))


MAY_CHANGE = frozenset(
    "steps num_train_epochs output_dir ddp_timeout dataloader_num_workers cache cache_dir shard_cache "
    "gradient_checkpointing "
    "checkpointing_steps checkpoints_total_limit export_steps max_bad_steps log_steps report_to tracker_project_name "
    "train_batch_size gradient_accumulation_steps validation_prompt negative_prompt num_validation_images "
    "validation_steps validation_inference_steps validation_guidance_scale push_to_hub hub_model_id hub_private "
    "hub_revision hub_create_pr hub_strategy license".split()
)
"""What may differ when a run is continued: none of it touches an image, a draw or the mathematics of a step.

The batch may be cut differently, as long as the images per optimizer step stay the same.
"""
