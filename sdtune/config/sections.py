"""The settings that methods share, declared once, in sections.

A field here is a flag, a YAML key, an attribute of the resolved config, a line of ``--help`` and a row of the
docs. A method's config (``methods/``) inherits the sections it reads and adds its own fields.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Interval
from pydantic import AfterValidator, Field, model_validator

from sdtune.config.errors import RunFailed as RunFailed
from sdtune.config.errors import UserError as UserError
from sdtune.config.scores import OF_AGREEMENT, Agreement, Criterion
from sdtune.config.section_base import (
    Count,
    Counts,
    Description,
    NameList,
    Natural,
    NonNegative,
    PathOrId,
    Positive,
    Precision,
    Section,
    Seed,
    Share,
    StrList,
    aliases,
    requires,
)

BIASED = ("earlier", "later", "range")
"""Timestep biases that there are."""
WARMED = ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
"""Shapes of a learning rate that begin with a warm-up."""
LrSchedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"
]
"""Shapes of a learning rate over a run, as diffusers names them."""


class Model(Section):
    model: Annotated[PathOrId, aliases("pretrained_model_name_or_path")] = "tiny"
    """Base model: Hub id, folder of a diffusers pipeline, .safetensors file, or `tiny` or `tiny-flow` (built in)."""
    revision: str | None = None
    """Branch, tag or commit of the base on the Hub. Default: its main branch."""
    variant: str | None = None
    """Variant of the weight files, such as fp16. Default: the files without a variant."""
    vae: Annotated[PathOrId | None, aliases("pretrained_vae_model_name_or_path")] = None
    """VAE to use in place of the base's own: Hub id or folder. Default: the base's own."""
    cache_dir: Path | None = None
    """Where models and datasets from the Hub are kept. Default: the Hub's own cache folder."""

    def describe(self) -> Description:
        return super().describe()._replace(base=self.model, revision=self.revision)


class TextEncoding(Section):
    clip_skip: Count | None = None
    """Layer of CLIP to read, counted from the last, as kohya's scripts and UIs count. Default: the base's own."""
    long_prompts: bool = False
    """Read prompts and captions beyond 77 tokens in chunks of 75, as UIs do. Default: the rest is cut, and told."""
    prompt_weights: bool = False
    """Weigh words of prompts as in `(red:1.4)` or `red++` (needs compel). Default: such prompts are refused."""

    def describe(self) -> Description:
        return super().describe()._replace(clip_skip=self.clip_skip, long_prompts=self.long_prompts)


class Source(Section):
    dataset_config_name: str | None = None
    """Configuration of a Hub dataset. Default: its own default."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a Hub dataset. Default: its main branch."""
    split: str = "train"
    """Split of a Hub or saved dataset."""
    image_column: str = "image"
    """Column that holds the image."""
    follow_links: bool = False
    """Read images, tables and shards that are links out of the dataset folder, and linked folders; captions never."""
    first_frame: bool = False
    """Take the first frame of animations and the first page of TIFF files. Default: they are an error."""


class Data(Source):
    dataset: Annotated[PathOrId, aliases("dataset_name", "train_data_dir")]
    """Folder of images, Hub id, dataset saved by `save_to_disk`, tar shards, or `tiny-hearts` (built in)."""
    max_train_samples: Count | None = None
    """Use this many images, drawn with the seed. Default: all of them."""
    repeats: Count = 1
    """How often an epoch shows each image."""
    folder_repeats: bool = False
    """Show images of a folder such as `10_sks toy` 10 times an epoch, captioned `sks toy` if they have no caption."""
    resolution: Annotated[int, Ge(8)] = 512
    """Side of the training images in pixels; with buckets, the side of a square of the same area."""
    center_crop: bool = True
    """Crop the middle. `--no-center-crop` crops at random; such crops cannot be cached."""
    random_flip: bool = False
    """Mirror half of the images."""
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = "lanczos"
    """Resampling filter of the resize."""
    buckets: bool = False
    """Keep aspect ratios: group images into shapes of about the same area; a batch has one shape."""
    bucket_step: Annotated[int, Ge(8), requires("buckets")] = 32
    """Sides of the buckets are multiples of this many pixels."""
    bucket_max_aspect: Annotated[float, Ge(1), requires("buckets")] = 2.0
    """Longest side of a bucket over its shortest."""
    on_bad_image: Literal["error", "skip"] = "error"
    """error names all unreadable images and stops; skip leaves them out and counts them."""
    num_holdout_images: Natural = 0
    """Do not train on this many images, and report their loss at fixed timesteps and noise."""
    dataloader_num_workers: Natural | None = None
    """Processes that read images; changes the speed only. Leave out for 2, or for none if all images are cached."""

    def loader_workers(self, reads_images: bool) -> int:
        """Processes of a loader: as asked, or else what its items need.

        An item whose image is encoded already takes less time than its way from another process. What is encoded
        while a run trains needs the VAE, which is in the training process.
        """
        if self.dataloader_num_workers is None:
            return 2 if reads_images and not (isinstance(self, Cache) and self.lazy_cache) else 0
        return self.dataloader_num_workers

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height of the training images; with buckets, of images of the same area."""
        return self.resolution, self.resolution


class ImageSize(Data):
    """Sizes of models that need not be square."""

    width: Annotated[int, Ge(8)] | None = None
    """Width of the training images in pixels, which is then that of the samples. Default: resolution."""
    height: Annotated[int, Ge(8)] | None = None
    """Height of the training images in pixels, which is then that of the samples. Default: resolution."""

    @property
    def image_size(self) -> tuple[int, int]:
        return self.width or self.resolution, self.height or self.resolution

    @model_validator(mode="after")
    def _whole_size(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height: give both, or neither for a square of resolution")
        return self


class Streaming(Section):
    streaming: bool = False
    """Download a Hub dataset (parquet or tar) while it trains, as far as needed. Tar shards are always read so."""
    shuffle_window: Count = 8192
    """Number of streamed images that are shuffled at a time. The order of the shards is new in each epoch."""
    stream_lanes: Count = 8
    """Parts of a step with their own shards: best a multiple of the processes. Lowered until it divides the step."""


class Latents(Section):
    shard_cache: Path | None = None
    """Folder for the VAE moments of a streamed dataset, a file for each shard. Default: compute them each time."""


class Cache(Section):
    cache: bool = True
    """Compute VAE moments and text embeddings once and keep them on disk, where that is exact."""
    lazy_cache: Annotated[bool, requires("cache")] = False
    """Encode an image when it is first shown, and not before the first step; until all are, the VAE needs memory."""

    @model_validator(mode="after")
    def _images_are_encoded_where_the_model_is(self) -> Self:
        if self.lazy_cache and getattr(self, "dataloader_num_workers", None):
            raise ValueError("lazy_cache encodes in the training process: give no dataloader_num_workers with it")
        return self


class Captions(Cache):
    caption_column: str | None = None
    """Column that holds the caption (of a list, one is drawn each time). Default: `text`, or the only other column."""
    caption: str | None = None
    """One caption for all images, in place of their own. Default: their own captions."""
    caption_dropout: Share = 0.0
    """Share of captions that are left empty. Classifier-free guidance needs some."""
    caption_per_line: bool = False
    """Each line of a caption file is a caption, of which one is drawn each time. Default: the lines are joined."""
    shuffle_tags: bool = False
    """Shuffle the comma-separated tags of a caption each time."""
    keep_tags: Annotated[Natural, requires("shuffle_tags")] = 0
    """Leave this many tags at the front in place when shuffling."""

    def describe(self) -> Description:
        known = super().describe()
        return known._replace(trigger=known.trigger or self.caption)


class Masks(Section):
    masked_loss: bool = False
    """Weigh the loss at each place by the image's mask (`a-mask.png` or `masks/a.png`), where it has one."""
    mask_column: Annotated[str | None, requires("masked_loss")] = None
    """Column that holds the mask of each image; in a folder `mask_file_name` for mask. Leave out for files of masks."""


class EditCaptions(Section):
    original_caption_column: Annotated[str | None, requires("clip_model")] = None
    """Column with a caption of the image before the edit, to score edits by CLIP. Leave out for no such score."""
    edited_caption_column: Annotated[str | None, requires("clip_model")] = None
    """Column with a caption of the image after the edit; give both. Leave out for no such score."""

    @property
    def edit_columns(self) -> dict[str, str]:
        """The two columns, each with the name of its option; empty if they are not read."""
        names = {self.original_caption_column: "original_caption_column"}
        names |= {self.edited_caption_column: "edited_caption_column"}
        return {column: name for column, name in names.items() if column is not None}

    @model_validator(mode="after")
    def _two_captions(self) -> Self:
        if len(self.edit_columns) == 1:
            raise ValueError("original_caption_column and edited_caption_column: give two columns, or neither")
        return self


class Classes(Section):
    class_column: str | None = None
    """Column that holds the class of an image; `folder` takes the name of its folder. Default: no classes."""


class DroppedClasses(Classes):
    class_dropout: Annotated[Share, requires("class_column")] = 0.1
    """Share of classes replaced by the null class, which is what classifier-free guidance learns from."""


class SavedModel(Section):
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub. Default: its main branch."""
    cache_dir: Path | None = None
    """Where models and datasets from the Hub are kept. Default: the Hub's own cache folder."""


class Schedule(Section):
    num_train_timesteps: Annotated[Annotated[int, Ge(2)] | None, aliases("ddpm_num_steps")] = None
    """Timesteps T of the forward process. Default: the model's; from scratch, 1000."""
    beta_schedule: Annotated[
        Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None, aliases("ddpm_beta_schedule")
    ] = None
    """How the noise grows (squaredcos_cap_v2: Nichol & Dhariwal 2021). Default: the model's; from scratch, linear."""
    beta_start: Annotated[float | None, Interval(gt=0, lt=1)] = None
    """First beta. Default: the model's; from scratch, 1e-4. Not used by squaredcos_cap_v2."""
    beta_end: Annotated[float | None, Interval(gt=0, lt=1)] = None
    """Last beta. Default: the model's; from scratch, 0.02. Not used by squaredcos_cap_v2."""


class OutOfRange(Section):
    out_of_range: Literal["clip", "keep", "threshold"] | None = None
    """What sampling does with image estimates outside [-1, 1]. Default: as the model says; from scratch, clip."""
    dynamic_thresholding_ratio: Annotated[Share, requires("out_of_range", "threshold")] = 0.995
    """`threshold` clips an estimate to this quantile of its absolute values and divides by it (Saharia et al. 2022)."""
    sample_max_value: Annotated[Annotated[float, Ge(1)], requires("out_of_range", "threshold")] = 100.0
    """Largest value that `threshold` clips to and divides by. At 1 it does what `clip` does."""


class Network(Section):
    channels: Annotated[int | None, Interval(ge=1, le=4)] = None
    """Channels of every image: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha. Default: what the images have."""
    block_out_channels: Annotated[Counts, Field(min_length=1)] = [128, 128, 256, 256, 512, 512]
    """Channels at each level; the next level has half the pixels along a side."""
    layers_per_block: Count = 2
    """Residual blocks at each level."""
    attention_resolutions: Counts = [16]
    """Levels with self-attention, each given by its side in pixels, the shorter one where they differ."""
    attention_head_dim: Count | None = None
    """Channels of an attention head. Default: all channels in one head."""
    norm_num_groups: Count = 32
    """Groups of the normalisation. It has to divide every number of block_out_channels."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout in the residual blocks."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if odd := [n for n in self.block_out_channels if n % self.norm_num_groups]:
            raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide {odd[0]} of block_out_channels")
        return self


class ResidualBlocks(Section):
    resblock_updown: bool = False
    """Halve and double the sides inside residual blocks, as guided-diffusion does. Leave out for convolutions."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """The timestep is added in a residual block (default), or scales and shifts it (Dhariwal & Nichol 2021)."""


class Denoising(Section):
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the network predicts. Default: what the model's scheduler says."""
    snr_gamma: Positive | None = None
    """Min-SNR-gamma loss weight (Hang et al. 2023; 5 is usual). Default: all timesteps weigh the same."""
    noise_offset: NonNegative = 0.0
    """Add this much noise that is constant over each channel (0.05 to 0.1 is usual)."""
    input_perturbation: NonNegative = 0.0
    """Extra noise on the input alone (Ning et al. 2023; 0.1 is usual)."""
    rescale_betas_zero_snr: bool = False
    """Rescale the schedule to end in pure noise (Lin et al. 2023); wants v_prediction."""
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = "none"
    """Draw some timesteps more often: the first or last portion, or a range."""
    timestep_bias_multiplier: Annotated[Positive, requires("timestep_bias_strategy", *BIASED)] = 1.0
    """How many times more often."""
    timestep_bias_begin: Annotated[Natural, requires("timestep_bias_strategy", "range")] = 0
    """First timestep of the range."""
    timestep_bias_end: Annotated[Count, requires("timestep_bias_strategy", "range")] = 1000
    """End of the range, not included."""
    timestep_bias_portion: Annotated[Share, requires("timestep_bias_strategy", "earlier", "later")] = 0.25
    """Portion that `earlier` and `later` favour."""
    stratified_timesteps: bool = False
    """Spread the timesteps of a step's images evenly, an image in each equal part of their distribution."""
    loss_type: Literal["l2", "huber"] = "l2"
    """Mean squared error, or pseudo-Huber, which forgives outliers (Song & Dhariwal 2023)."""
    huber_c: Annotated[Positive, requires("loss_type", "huber")] = 0.1
    """Error at which the Huber loss turns from quadratic to linear."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr with prediction_type epsilon: pure noise says nothing of the image; "
                "use prediction_type v_prediction"
            )
        if self.timestep_bias_strategy == "range" and self.timestep_bias_begin >= self.timestep_bias_end:
            raise ValueError("timestep_bias_begin must be smaller than timestep_bias_end")
        return self


class BaseOptions(TextEncoding):
    """Options that some base models have a use for; given for another, they are refused by name."""

    weighting_scheme: Literal["base", "none", "logit_normal", "mode", "sigma_sqrt", "cosmap"] = "base"
    """Density of timesteps (logit_normal, mode) or weight of the loss (sigma_sqrt, cosmap). Default: the base's own."""
    logit_mean: float = 0.0
    """Mean of the logit of the timestep under logit_normal; more is noisier."""
    logit_std: Positive = 1.0
    """Standard deviation of the logit of the timestep under logit_normal."""
    mode_scale: float = 1.29
    """Scale of the mode density (Esser et al. 2024, equation 20); 0 is uniform."""
    timestep_shift: Positive | None = None
    """Shift of the timesteps towards the noise; 1 is no shift. Default: the fixed shift of the base's scheduler."""
    resolution_shift: bool = False
    """Shift the timesteps by the size of the image, as a scheduler with dynamic shifting does when it samples."""
    guidance_embedding: Annotated[NonNegative, aliases("guidance_scale")] = 3.5
    """Guidance that a guidance-distilled denoiser (FLUX.1 dev, FLUX.2 dev) is told in training."""
    max_sequence_length: Annotated[Count | None, aliases("text_encoder_max_sequence_length")] = None
    """Tokens of a caption that the language model reads. Default: as many as the stock pipeline reads."""
    t5: bool = True
    """Read the third text encoder of Stable Diffusion 3; --no-t5 trains without it, in far less memory."""

    @model_validator(mode="after")
    def _one_shift(self) -> Self:
        if self.timestep_shift and self.resolution_shift:
            raise ValueError("timestep_shift and resolution_shift both say how timesteps are shifted: give one")
        return self


class Plain:
    """What families and objectives read of a method that has none of the options of Denoising and BaseOptions.

    Distillation has a loss of its own, and the forward process of its teacher.
    """

    prediction_type: ClassVar[None] = None
    snr_gamma: ClassVar[None] = None
    noise_offset: ClassVar[float] = 0.0
    input_perturbation: ClassVar[float] = 0.0
    rescale_betas_zero_snr: ClassVar[bool] = False
    timestep_bias_strategy: ClassVar[Literal["none"]] = "none"
    timestep_bias_multiplier: ClassVar[float] = 1.0
    timestep_bias_begin: ClassVar[int] = 0
    timestep_bias_end: ClassVar[int] = 1000
    timestep_bias_portion: ClassVar[float] = 0.25
    weighting_scheme: ClassVar[Literal["base"]] = "base"
    logit_mean: ClassVar[float] = 0.0
    logit_std: ClassVar[float] = 1.0
    mode_scale: ClassVar[float] = 1.29
    timestep_shift: ClassVar[None] = None
    resolution_shift: ClassVar[bool] = False
    guidance_embedding: ClassVar[float] = 3.5
    max_sequence_length: ClassVar[None] = None
    t5: ClassVar[bool] = True
    clip_skip: ClassVar[None] = None
    long_prompts: ClassVar[bool] = False
    prompt_weights: ClassVar[bool] = False


class Phases(Section):
    phase_steps: Count | None = None
    """Optimizer steps of a phase, to train on later with the same phases. Default: the run in equal parts."""


RATE_FREE = re.compile(r"(?:.*:)?(?:prodigy|dadapt)\w*", re.IGNORECASE)
"""Names of optimizers, and of classes, that find the learning rate themselves and take --learning-rate as a factor."""


def finds_rate(optimizer: object) -> bool:
    """Whether the value of --optimizer names an optimizer that finds the learning rate itself."""
    return RATE_FREE.fullmatch(str(optimizer)) is not None


class Optim(Section):
    learning_rate: Positive = 1e-4
    """Peak learning rate. Optimizers that find their own, such as prodigy, take 1 by default."""
    scale_lr: bool = False
    """Multiply the learning rate by the images of an optimizer step: batch x accumulation x processes."""
    lr_scheduler: LrSchedule = "constant"
    """Shape of the learning rate over the run, in optimizer steps."""
    lr_warmup_steps: Annotated[Natural, requires("lr_scheduler", *WARMED)] = 0
    """Optimizer steps over which the learning rate rises from 0, with another lr_scheduler than constant."""
    lr_num_cycles: Annotated[Count, requires("lr_scheduler", "cosine_with_restarts")] = 1
    """Hard restarts of `cosine_with_restarts`."""
    lr_power: Annotated[Positive, requires("lr_scheduler", "polynomial")] = 1.0
    """Power of `polynomial`."""
    lr_step_rules: Annotated[str | None, requires("lr_scheduler", "piecewise_constant")] = None
    """Rules of `piecewise_constant`, such as 1:100,0.1:200,0.01. Only that scheduler uses them."""
    optimizer: str = "adamw"
    """adamw, adamw8bit (paged_), torchao_adamw8bit (4bit, fp8), prodigy, adamw_schedulefree, ... or module:Class."""
    optimizer_args: dict[str, Any] = {}
    """Further arguments of the optimizer, as YAML: '{d_coef: 2}'."""
    use_8bit_adam: bool = False
    """Means the same as --optimizer adamw8bit."""
    adam_beta1: Share = 0.9
    """First-moment decay."""
    adam_beta2: Share = 0.999
    """Second-moment decay."""
    adam_weight_decay: NonNegative = 1e-2
    """Decoupled weight decay."""
    adam_epsilon: Positive = 1e-8
    """Term that keeps the division finite."""
    max_grad_norm: Positive = 1.0
    """Scale the gradient down to this norm when it is larger."""
    use_ema: bool = False
    """Keep an exponential moving average of the trained weights, and use it for samples and the artefact."""
    ema_decay: Annotated[float, Interval(ge=0, lt=1), requires("use_ema")] = 0.9999
    """Decay of the average once it is warm."""
    ema_warmup: Annotated[Literal["power", "ratio"], requires("use_ema")] = "power"
    """How the decay rises: by ema_power, or as (1 + step) / (10 + step), which diffusers' text-to-image script uses."""
    ema_inv_gamma: Annotated[Positive, requires("use_ema")] = 1.0
    """Inverse factor of the average's warm-up."""
    ema_power: Annotated[Positive, requires("use_ema")] = 2 / 3
    """Power of the average's warm-up: decay = 1 - (1 + step / inv_gamma) ^ -power."""

    @model_validator(mode="before")
    @classmethod
    def _rate_that_is_found(cls, values: Any) -> Any:
        found = isinstance(values, dict) and finds_rate(values.get("optimizer"))
        return {"learning_rate": 1.0} | values if found else values


class Run(Section):
    method: ClassVar[str]
    """Name of the command."""
    entry: ClassVar[str]
    """`module:Class` of the recipe."""

    output_dir: Path
    """The run's folder: config, metrics, report, checkpoints and the artefact."""
    steps: Annotated[Count | None, aliases("max_train_steps")] = None
    """Optimizer steps. Default: 1000, unless num_train_epochs is given."""
    num_train_epochs: Count | None = None
    """How often every image is seen, in place of steps. Default: steps decide."""
    train_batch_size: Count = 4
    """Images per process and forward pass."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. Needs less memory and about a third more time."""
    mixed_precision: Precision | None = None
    """Precision of frozen weights and forward pass (fp8: bf16, linear layers in 8 bits). Default: the launcher's."""
    seed: Seed = 0
    """Seed of everything random."""
    compile: bool = False
    """Compile the denoiser with torch.compile. Refused on a CPU, where its gradients are wrong."""
    cuda_graphs: bool = False
    """Record a micro-step on the GPU once and repeat it. Faster where a step is small; one process, all cached."""
    deterministic: bool = False
    """Use only kernels that give the same bits each time. Slower; for a run on a GPU that is continued to the bit."""
    ddp_timeout: Count = 1800
    """Seconds that a process waits for the others before the run fails. Work of one process alone does not count."""
    checkpointing_steps: Natural = 500
    """Steps between checkpoints. 0 saves only the last one. An interrupted run always saves one."""
    checkpoints_total_limit: Annotated[int, Ge(2)] = 2
    """Checkpoints to keep. The oldest is removed once a newer one is safely on disk."""
    export_steps: Natural = 0
    """Steps between copies of the artefact, such as exports/step-000500/. 0 keeps only the last artefact."""
    max_bad_steps: Count = 10
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    log_steps: Count = 10
    """Steps between lines of metrics.jsonl."""
    profile: Natural = 0
    """Record this many steps, after the first one, as trace.json, which a browser opens. 0 records none."""
    report_to: StrList = []
    """Trackers to write to besides metrics.jsonl: tensorboard, wandb, trackio, mlflow, ..."""
    tracker_project_name: Annotated[str, requires("report_to")] = "sdtune"
    """Project under which the trackers file the run."""

    @property
    def max_steps(self) -> int:
        """Steps when they do not depend on the number of images."""
        return self.steps or 1000

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps and self.num_train_epochs:
            raise ValueError("steps and num_train_epochs both say how long to train: give one")
        return self


class Scores(Section):
    evaluate_steps: Natural = 0
    """Steps between scores of drawn images, which are measured at the start and the end too. 0 measures none."""
    num_evaluation_images: Annotated[Count, requires("evaluate_steps")] = 32
    """Images to draw for the scores: held-out images that are followed or edited, else as in the sample grids."""
    features: Annotated[PathOrId, requires("evaluate_steps")] = "random-conv"
    """Network that compares images: random-conv (built in), inception, or a CLIP or DINO folder or Hub id."""
    clip_model: Annotated[PathOrId | None, requires("evaluate_steps")] = None
    """CLIP model, folder or Hub id, that compares images with their prompts. Leave out for no CLIP score."""
    classifier: Annotated[PathOrId | None, requires("evaluate_steps")] = None
    """Run of `sdtune classifier`, or a transformers image classifier, to check the classes. Leave out for no check."""
    keep_best: Annotated[Criterion | None, requires("evaluate_steps")] = None
    """Also keep the artefact of the step that is best by this score, in best/. Leave out for the last step alone."""
    patience: Annotated[Natural, requires("keep_best")] = 0
    """End the run after this many scores in a row that are not better. 0 trains all steps."""

    @property
    def agreement(self) -> Agreement | None:
        """In what the drawn images are compared with those that go with their prompts."""
        return None

    @model_validator(mode="after")
    def _agreement_is_measured(self) -> Self:
        measured = OF_AGREEMENT[self.agreement] if self.agreement else None
        if self.keep_best == "edge_overlap" != measured:
            raise ValueError(
                "keep_best edge_overlap: only where images follow edges, which is for controlnet and t2i-adapter with "
                "condition edges, or with evaluate_condition edges"
            )
        if self.keep_best == "edit_direction" != measured:
            raise ValueError(
                "keep_best edit_direction: only where CLIP judges edits, which is for instruct-pix2pix with "
                "clip_model, original_caption_column and edited_caption_column"
            )
        return self


class Preview(Scores):
    num_validation_images: Natural = 4
    """Images of a sample grid. 0 draws no grid."""
    validation_steps: Natural = 200
    """Steps between sample grids, and between holdout losses. 0 makes them only at the start and at the end."""
    validation_inference_steps: Count = 25
    """Denoising steps of a sample."""


class Prompts(Section):
    validation_prompt: Annotated[StrList, aliases("validation_prompts")] = []
    """Prompts of the sample grids. Default: captions of the dataset."""
    negative_prompt: str = ""
    """What the samples should not show."""
    validation_guidance_scale: NonNegative = 5.0
    """Classifier-free guidance of the samples (Ho & Salimans 2022). 1 means no guidance."""

    @property
    def passes_per_step(self) -> int:
        """Passes of the denoiser for each step of a sample."""
        return 1 if self.validation_guidance_scale == 1 else 2


class ValidationImages(Preview):
    validation_image: list[Path] = []
    """Images that the samples start from, one for each validation_prompt. Default: some of the dataset."""


class Repository(Section):
    hub_model_id: str | None = None
    """Repository to push to, as user/name. Default: the name of output_dir under your account."""
    hub_private: Annotated[bool, aliases("hub_private_repo")] = False
    """Create the repository as a private one."""
    hub_revision: str | None = None
    """Branch to push to. It is made if it does not exist. Default: main."""
    hub_create_pr: bool = False
    """Open a pull request, or add to the open one of this run, instead of writing to a branch."""
    license: str | None = None
    """License on the model card, as the Hub spells it. Default: that of the base."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.hub_revision and self.hub_create_pr:
            raise ValueError("hub_revision and hub_create_pr: a pull request is a branch of its own; give one")
        return self


class Hub(Repository):
    push_to_hub: bool = False
    """Upload the artefact, card, samples, config, metrics and report when training ends."""
    hub_strategy: Annotated[Literal["end", "checkpoint"], requires("push_to_hub")] = "end"
    """end uploads when training ends; checkpoint also after each checkpoint, while training goes on."""


def lokr_factor(value: int) -> int:
    """The value, if a side can be divided by it; ``ValueError`` if not."""
    if value != -1 and value < 1:
        raise ValueError(f"is a number of rows, or -1 for about the square root, not {value}")
    return value


def start_of_lora(value: str) -> str:
    """The value, if there is such a start of a LoRA; ``ValueError`` says which there are."""
    if not re.fullmatch(r"gaussian|olora|pissa(_niter_[1-9]\d*)?", value):
        raise ValueError(f"is gaussian, olora, pissa, or pissa_niter_N such as pissa_niter_16, not {value}")
    return value


class Adapter(Section):
    adapter: Literal["lora", "loha", "lokr"] = "lora"
    """Kind of the adapters: LoRA (Hu et al. 2021), LoHa (Hyeon-Woo et al. 2021), LoKr (Yeh et al. 2024)."""
    rank: Annotated[Count, aliases("lora_rank")] = 4
    """Rank r of the factors."""
    alpha: Annotated[Positive | None, aliases("lora_alpha")] = None
    """The update is scaled by alpha / rank. Default: alpha = rank."""
    dropout: Annotated[Annotated[float, Interval(ge=0, lt=1)], aliases("lora_dropout"), requires("adapter", "lora")] = (
        0.0
    )
    """Dropout on the input of a LoRA."""
    rank_dropout: Annotated[Annotated[float, Interval(ge=0, lt=1)], requires("adapter", "loha", "lokr")] = 0.0
    """Share of the rows of the update that LoHa and LoKr leave out, drawn anew for each forward pass."""
    target_modules: Annotated[NameList, aliases("lora_target_modules", "lora_layers")] = []
    """Modules of the denoiser that get an adapter: ends of names, or a regular expression. Default: the base's own."""
    use_dora: Annotated[bool, requires("adapter", "lora")] = False
    """Weight-decomposed adapters (DoRA; Liu et al. 2024)."""
    use_rslora: Annotated[bool, requires("adapter", "lora")] = False
    """Scale by alpha / sqrt(rank) (rsLoRA; Kalajdzievski 2023)."""
    init_lora_weights: Annotated[str, AfterValidator(start_of_lora), requires("adapter", "lora")] = "gaussian"
    """Start of a LoRA: gaussian, pissa or pissa_niter_N (Meng et al. 2024), olora (Büyükakyüz 2024)."""
    lora_plus_ratio: Annotated[Positive, aliases("loraplus_lr_ratio"), requires("adapter", "lora")] = 1.0
    """Learning rate of B divided by that of A (LoRA+; Hayou et al. 2024)."""
    use_effective_conv2d: Annotated[bool, aliases("use_tucker", "use_cp"), requires("adapter", "lokr")] = False
    """Factor the 3 x 3 convolutions of LoKr through a core, with fewer numbers (Hyeon-Woo et al. 2021)."""
    decompose_both: Annotated[bool, requires("adapter", "lokr")] = False
    """Factor the first matrix of LoKr as well, where the rank is small enough."""
    decompose_factor: Annotated[
        Annotated[int, AfterValidator(lokr_factor)], aliases("lokr_factor"), requires("adapter", "lokr")
    ] = -1
    """Sides of the first matrix of LoKr, where they divide those of the weight. -1 is about the square root."""
    train_text_encoder: bool = False
    """Adapt the text encoder's q, k, v and out projections as well."""
    text_encoder_lr: Annotated[Positive | None, requires("train_text_encoder")] = None
    """Learning rate of the text encoder's adapters. Default: learning_rate."""
    init_adapter: Annotated[Path | None, aliases("init_lora")] = None
    """Start from this adapter file. Default: start from zero."""
    quantize_base: Literal["int8", "nf4"] | None = None
    """Hold the linear layers of the frozen base in 8 or 4 bits (QLoRA; Dettmers et al. 2023). Default: in full."""

    @model_validator(mode="after")
    def _adapters_that_read_the_weights(self) -> Self:
        if self.quantize_base and self.use_dora:
            raise ValueError("use_dora with quantize_base: DoRA reads the weights themselves; leave one of them out")
        if self.quantize_base and self.starts_from_base:
            raise ValueError(
                f"init_lora_weights {self.init_lora_weights} with quantize_base: it is computed from the weights in "
                "full; leave one of them out"
            )
        if self.quantize_base == "nf4" and self.adapter != "lora":
            raise ValueError(f"adapter {self.adapter} with quantize_base nf4: PEFT has it on int8 alone; take int8")
        if self.init_adapter and self.starts_from_base:
            raise ValueError(
                f"init_lora_weights {self.init_lora_weights} with init_adapter: both say how to start; leave one out"
            )
        return self

    @property
    def starts_from_base(self) -> bool:
        """Whether the adapter starts with a part of the base's weights, which is taken out of them (PiSSA, OLoRA)."""
        return self.init_lora_weights != "gaussian"

    @property
    def quantizations(self) -> tuple[str, ...]:
        """What ``quantize_base`` may be beside the other options."""
        if self.use_dora or self.starts_from_base:
            return ()
        return ("int8", "nf4") if self.adapter == "lora" else ("int8",)

    def describe(self) -> Description:
        kind = {"lora": "DoRA" if self.use_dora else "LoRA", "loha": "LoHa", "lokr": "LoKr"}[self.adapter]
        rank, alpha = self.rank, self.alpha or self.rank
        if self.starts_from_base:  # what it started with is in its file too, beside what it became
            alpha, rank = 2 * alpha * (rank**0.5 if self.use_rslora else 1), 2 * rank
        return super().describe()._replace(adapter=kind, rank=rank, alpha=alpha)


class OptionalLora(Adapter):
    """With ``lora``, an option of the method, a LoRA on its network; no other kind, and none on a text encoder.

    For methods whose base is the teacher, which an adapter must leave as it is, or whose stock pipeline reads LoRA
    alone.
    """

    section_requires: ClassVar[dict[str, str]] = {"Adapter": "lora"}
    adapter: ClassVar[Literal["lora"]] = "lora"  # type: ignore[misc]
    rank_dropout: ClassVar[float] = 0.0  # type: ignore[misc]
    init_lora_weights: ClassVar[str] = "gaussian"  # type: ignore[misc]
    use_effective_conv2d: ClassVar[bool] = False  # type: ignore[misc]
    decompose_both: ClassVar[bool] = False  # type: ignore[misc]
    decompose_factor: ClassVar[int] = -1  # type: ignore[misc]
    train_text_encoder: ClassVar[bool] = False  # type: ignore[misc]
    text_encoder_lr: ClassVar[None] = None  # type: ignore[misc]


class Options(Section):
    """Options of every command."""

    config: str | None = None
    """YAML file of these options, or the name of a shipped one (sdtune ls)."""
    dry_run: bool = False
    """Print the resolved config and stop."""


class Machine(Options):
    """Options of the commands that train or say what training costs."""

    num_processes: Count | None = None
    """Train on this many processes, a GPU each; without GPUs, on the CPU."""
    find_batch_size: bool = False
    """Cut the images of a step into the largest batches that fit, the rest accumulated."""
    memory: str | None = None
    """With --find-batch-size, what a process may use, such as 8GB. Default: all there is."""


class Launch(Machine):
    """Options of the commands that train, which say how to run and not what to learn."""

    accelerate_config: str | None = None
    """Launch as this accelerate config says: a file, or the name of a shipped one (sdtune ls)."""
    overwrite: bool = False
    """Discard the run in output_dir."""
    allow_change: bool = False
    """Continue though config or data changed."""


MAY_CHANGE = frozenset(
    "steps num_train_epochs output_dir ddp_timeout dataloader_num_workers cache lazy_cache cache_dir "
    "shard_cache gradient_checkpointing cuda_graphs deterministic profile "
    "checkpointing_steps checkpoints_total_limit export_steps max_bad_steps log_steps report_to tracker_project_name "
    "train_batch_size gradient_accumulation_steps validation_prompt negative_prompt num_validation_images "
    "validation_steps validation_inference_steps validation_guidance_scale prompt_weights push_to_hub "
    "hub_model_id hub_private hub_revision hub_create_pr hub_strategy license phase_steps".split()
)
"""What may differ when a run is continued: none of it touches an image, a draw or the mathematics of a step. A run that
trains in phases compares how long they are, however that was said (``training.state``).

The batch may be cut differently, as long as the images per optimizer step stay the same.
"""
