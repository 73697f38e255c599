"""The commands that do not train, each declared as its config."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Interval
from pydantic import BeforeValidator, model_validator

from sdtune.config.foreign_flags import SAMPLERS
from sdtune.config.scores import Agreement
from sdtune.config.section_base import (
    Count,
    Counts,
    DrawingPrecision,
    Levels,
    Natural,
    NonNegative,
    PathOrId,
    PathOrIds,
    Section,
    Seed,
    Share,
    StrList,
    aliases,
    positional,
    requires,
)
from sdtune.config.sections import Model, OutOfRange, Repository, Source, TextEncoding

Sampler = Annotated[
    Literal[
        "ddim", "ddpm", "dpm++", "dpm++-karras", "euler", "euler-karras", "euler-ancestral", "heun", "heun-karras",
        "lms", "lms-karras", "pndm", "unipc", "lcm"
    ],
    BeforeValidator(lambda v: SAMPLERS.get(v.lower(), v) if isinstance(v, str) else v),
]  # fmt: skip


class Verb(Section):
    method: ClassVar[str]
    """Name of the command."""
    entry: ClassVar[str]
    """`module:function` that does it; a text it returns is printed."""


class Pixels(Section):
    classes: Annotated[StrList, aliases("class", "class_name")] = []
    """Classes to show, as classes.json of the model or classifier names them. Default: no particular class."""
    classifier: Path | None = None
    """Run of `sdtune classifier`, which steers towards the class (Dhariwal & Nichol 2021). Default: no steering."""
    classifier_scale: Annotated[NonNegative, requires("classifier")] = 1.0
    """How strongly the classifier steers."""
    clip_model: PathOrId | None = None
    """CLIP that steers towards the prompt: folder or Hub id of a transformers CLIPModel. Default: no steering."""
    clip_guidance_scale: NonNegative = 0.0
    """How strongly CLIP steers; needs clip_model and a prompt."""
    eta: Share = 0.0
    """Noise of DDIM's steps, from none to that of DDPM (Song et al. 2020)."""
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] | None = None
    """Variance of DDPM's steps: beta-tilde, beta (Ho et al. 2020), or what the model learned. Default: the model's."""
    strip: Natural = 0
    """Save strip.png: the estimate of the first image at this many of its steps. 0 saves no strip."""
    interpolate: list[Path] = []
    """Two images, and others between them: from noise (Ho et al. 2020, figure 8), or of what CLIP sees with --prior."""
    interpolate_timestep: Annotated[Natural, aliases("interpolate_steps"), requires("interpolate")] = 500
    """Timestep to which the two are noised: higher strays further from them."""
    interpolate_count: Annotated[Count, requires("interpolate")] = 9
    """Images between the two."""

    @model_validator(mode="after")
    def _what_guidance_needs(self) -> Self:
        if self.classifier and not self.classes:
            raise ValueError("classifier needs a class to steer towards: give --class")
        if bool(self.clip_guidance_scale) != bool(self.clip_model):
            raise ValueError("clip_guidance_scale and clip_model: give both or neither")
        if self.interpolate and len(self.interpolate) != 2:
            raise ValueError(f"interpolate is between two images, not {len(self.interpolate)}")
        return self


class Unclip(Section):
    prior: PathOrId | None = None
    """Prior for a decoder of unCLIP, such as Kandinsky 2.2: folder or Hub id. Leave out for all other models."""
    prior_steps: Annotated[Count, requires("prior")] = 25
    """Denoising steps of the prior."""
    prior_guidance_scale: Annotated[NonNegative, requires("prior")] = 4.0
    """Classifier-free guidance of the prior. 1 means no guidance."""


class SampleConfig(Unclip, Pixels, OutOfRange, TextEncoding, Model, Verb):
    """Images from a base model, any adapters, and prompts; or from a model of pixels, and classes."""

    method: ClassVar[str] = "sample"
    entry: ClassVar[str] = "sdtune.sampling.command:main"
    examples: ClassVar[str] = r"""
    sdtune sample --adapter runs/lora --prompt "a red heart"
    sdtune sample --model runs/ddpm --num-images-per-prompt 16
    sdtune sample --control runs/controlnet=0.8 --image edges.png --prompt "a red star"
    sdtune sample --model runs/ddpm --then runs/super-resolution
    sdtune sample --adapter runs/lora=0.8 --prompt-file prompts.txt --seed 7 \
        --scheduler dpm++ --steps 20
    """

    model: Annotated[PathOrId, aliases("pretrained_model_name_or_path")] = "auto"
    """Base model, as for training; `auto` is what the first run folder below was trained on, else `tiny`."""
    adapter: Annotated[PathOrIds, aliases("lora")] = []
    """Adapters: file, folder, run folder or Hub id, each with an optional =WEIGHT, such as runs/lora=0.8."""
    embedding: Annotated[PathOrIds, aliases("textual_inversion")] = []
    """Learnt words: file, run folder or Hub id of a textual inversion. Those beside an adapter are loaded with it."""
    best: bool = False
    """Of runs that kept it, take the step that was best (--keep-best) in place of the last one."""
    unet: Path | None = None
    """UNet to use in place of the base's: its folder, or that of a pipeline. Default: the base's own."""
    control: Annotated[PathOrIds, aliases("controlnet")] = []
    """Networks that follow an image: run of `sdtune controlnet` or folder or Hub id, each with an optional =SCALE."""
    image: Annotated[list[Path], aliases("control_image")] = []
    """Images to follow, one a --control, to edit, to enlarge, or with --prior to vary: one for all prompts, or each."""
    mask_image: list[Path] = []
    """Masks, one for each of --image: an inpainting model paints where they are white. Default: it paints all."""
    image_guidance_scale: NonNegative | None = None
    """How closely an edit keeps to its image (Brooks et al. 2023). Default: that of the stock pipeline, 1.5."""
    noise_level: Natural | None = None
    """Timestep to which a model that enlarges noises a small image, to hide its flaws. Default: the model's own."""
    then: PathOrIds = []
    """Models that enlarge what was drawn, one after another: runs of `sdtune super-resolution`. Default: none."""
    prompt: Annotated[StrList, aliases("prompts")] = []
    """What to show. Several prompts give one image each."""
    prompt_file: Path | None = None
    """UTF-8 file with a prompt on each line, after those of --prompt; `--n --w --h --d --l --s --cn` as in kohya's."""
    negative_prompt: str = ""
    """What not to show; needs guidance_scale above 1."""
    num_images_per_prompt: Annotated[Count, aliases("num_images")] = 1
    """Images of each prompt and class."""
    steps: Annotated[Count | None, aliases("num_inference_steps")] = None
    """Denoising steps. Default: a distilled model's own; else 25, of pixels 50, or with ddpm all of its timesteps."""
    guidance_scale: NonNegative | None = None
    """Classifier-free guidance, 1 for none. Default: a distilled model's own; else 5 with prompts, 1 with classes."""
    xy: StrList = []
    """Table over two of scale, step, guidance and seed, such as --xy scale=0.4,0.7,1 step=200,400: xy.png. Off."""
    guidance_rescale: Share = 0.0
    """Pull the guided prediction back to the contrast of the plain one (Lin et al. 2023; 0.7 is usual)."""
    seed: Seed = 0
    """Image k starts from the noise of torch.Generator("cpu").manual_seed(seed + k)."""
    scheduler: Sampler | None = None
    """Sampler, also as interfaces call it, such as "Euler a" or "DPM++ 2M Karras". Default: the base's own."""
    width: Annotated[int | None, Ge(8)] = None
    """Width in pixels. Default: the base's own."""
    height: Annotated[int | None, Ge(8)] = None
    """Height in pixels. Default: the base's own."""
    batch_size: Count = 4
    """Images made at once; changes memory and speed."""
    mixed_precision: DrawingPrecision = "no"
    """Precision of weights and computation; no is 32 bit."""
    output_dir: Path = Path("samples")
    """Folder of the images. Numbering continues after the images that are there."""

    @model_validator(mode="after")
    def _some_prompt(self) -> Self:
        draws_prompts = self.model in ("auto", "tiny", "tiny-flow")  # others may need none
        if draws_prompts and not self.prompt and self.prompt_file is None:
            raise ValueError("nothing to show: give prompt or prompt_file")
        return self

    @model_validator(mode="after")
    def _whole_size(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height: give both, or neither for the base's own")
        return self

    @model_validator(mode="after")
    def _tables_of_one_model(self) -> Self:
        if self.xy and self.then:
            raise ValueError("xy and then: a table shows what one model draws; leave one of them out")
        return self


class EvaluateConfig(OutOfRange, TextEncoding, Source, Verb):
    """How close images are to a reference, and to their prompts and classes: FID and the like, with intervals."""

    method: ClassVar[str] = "evaluate"
    entry: ClassVar[str] = "sdtune.evaluation.evaluate:main"
    examples: ClassVar[str] = r"""
    sdtune evaluate samples --reference photos
    sdtune evaluate runs/lora --reference tiny-hearts --num-images 200
    sdtune evaluate samples --reference photos --features inception
    """

    samples: Annotated[PathOrId, positional("SAMPLES")]
    """Folder of images, such as one of `sdtune sample`; or a model or run folder, which is sampled first."""
    reference: PathOrId
    """What to compare with: folder of images, Hub dataset id, saved dataset, or one that is built in."""
    caption_column: str | None = None
    """Column of the reference that holds captions, to sample with. Default: `text`, or the only other column."""
    features: PathOrId = "random-conv"
    """Network: random-conv (built in), inception (of FID), its weights' file, or a CLIP or DINO folder or Hub id."""
    clip_model: PathOrId | None = None
    """CLIP model, folder or Hub id, that compares images with their prompts. Leave out for no CLIP score."""
    classifier: PathOrId | None = None
    """Run of `sdtune classifier`, or a transformers image classifier, to check the classes. Leave out for no check."""
    condition: Agreement | None = None
    """Compare with the `image` of prompts.jsonl: edges, or an edit's direction in CLIP. Leave out for neither."""
    trained_on: PathOrId | None = None
    """Images that the model was trained on, to see whether SAMPLES copy them. Leave out for no memorisation."""
    bound: bool = False
    """Measure only the variational bound of SAMPLES, a model of pixels, on the reference (bits a dimension)."""
    levels: Annotated[Levels, requires("bound")] = 256
    """Values that a pixel of the reference can have: 256 in files of 8 bits, 17 of the digits that are built in."""
    num_holdout_images: Annotated[Natural, requires("bound")] = 0
    """Of a reference that a run trained on, take only the images that it held out: its number, and its seed."""
    neighbours: Count = 3
    """Neighbours k of precision and recall (Kynkäänniemi et al. 2019)."""
    resamples: Annotated[Natural, aliases("bootstrap")] = 200
    """Bootstrap resamples of the images for each 95 % interval (Efron 1979). 0 gives no intervals."""
    seed: Seed = 0
    """Seed of the resamples, and of the images when a model is sampled."""
    num_images: Count = 500
    """Images to sample from a model: with the reference's captions, or as many of each of its classes, rounded up."""
    steps: Annotated[Counts, aliases("num_inference_steps")] = []
    """Denoising steps of those images. Several numbers compare the model with itself. Default: as `sdtune sample`."""
    guidance_scale: NonNegative | None = None
    """Classifier-free guidance of those images. Default: that of `sdtune sample`."""
    output_dir: Path = Path("evaluation")
    """Folder of evaluation.json, evaluation.svg and, from a model, the sampled images."""

    @model_validator(mode="after")
    def _some_spread(self) -> Self:
        if self.resamples == 1:
            raise ValueError("resamples 1: a single one has no spread; give 0 for no intervals, or 200")
        return self

    @model_validator(mode="after")
    def _clip_for_edits(self) -> Self:
        if self.condition == "edit" and self.clip_model is None:
            raise ValueError("condition edit: CLIP measures the direction of an edit; give clip_model as well")
        return self

    @model_validator(mode="after")
    def _only_the_bound(self) -> Self:
        used = {"samples", "reference", "bound", "levels", "num_holdout_images", "resamples", "seed", "output_dir"}
        fields = {
            name: f for name, f in type(self).model_fields.items() if name not in used | Source.model_fields.keys()
        }
        given = [name for name, f in fields.items() if getattr(self, name) != f.get_default(call_default_factory=True)]
        if self.bound and given:
            raise ValueError(f"{given[0]}: bound draws no images and compares none; leave it out")
        return self


class PushConfig(Repository, Verb):
    """Upload a run to the Hugging Face Hub: artefact, card, samples, config, metrics and report."""

    method: ClassVar[str] = "push"
    entry: ClassVar[str] = "sdtune.publish.publish:push_run"
    examples: ClassVar[str] = r"""
    sdtune push runs/lora
    sdtune push runs/lora --hub-model-id user/name --hub-private
    """

    run: Annotated[Path, positional("RUN")]
    """Folder of the run. Its config decides what is not given here."""
    best: bool = False
    """Upload the artefact of the step that was best (--keep-best) in place of the last one."""


class WatchConfig(Verb):
    """How far runs are, with their last loss and score: a table that stays up to date."""

    method: ClassVar[str] = "watch"
    entry: ClassVar[str] = "sdtune.run.watch:watch"
    examples: ClassVar[str] = r"""
    sdtune watch
    sdtune watch runs/lora --open
    """

    runs: Annotated[list[Path], positional("RUNS")] = [Path("runs")]
    """Run folders, and folders of runs."""
    open: bool = False
    """Open the report of the first run in the browser, where it stays up to date too."""
    once: bool = False
    """Print the table once and end, as always where the output is no terminal."""


class CompareConfig(Verb):
    """Runs beside each other on one page: settings, curves, samples, scores, time, memory, size."""

    method: ClassVar[str] = "compare"
    entry: ClassVar[str] = "sdtune.run.compare:main"
    examples: ClassVar[str] = r"""
    sdtune compare runs/rank-4 runs/rank-16
    sdtune compare runs/rank-4 runs/rank-16 --json
    """

    runs: Annotated[list[Path], positional("RUNS")]
    """Folders of the runs, two or more."""
    output: Path = Path("compare.html")
    """Page to write."""
    as_json: Annotated[bool, aliases("json")] = False
    """Print the comparison as JSON, and write no page."""

    @model_validator(mode="after")
    def _some_runs(self) -> Self:
        if len(self.runs) < 2:
            raise ValueError("runs: give two runs or more")
        return self


class ConvertConfig(Verb):
    """An adapter file in another format, checked to do the same."""

    method: ClassVar[str] = "convert"
    entry: ClassVar[str] = "sdtune.conversion.convert:convert"
    examples: ClassVar[str] = r"""
    sdtune convert runs/lora lora-kohya.safetensors --to kohya
    sdtune convert downloaded.safetensors peft-folder --to peft
    """

    input: Annotated[Path, positional("IN")]
    """Adapter in any known format: .safetensors file, run folder, or folder in PEFT's layout."""
    output: Annotated[Path, positional("OUT")]
    """New .safetensors file; for peft a new folder."""
    to: Literal["diffusers", "peft", "kohya", "comfyui"]
    """Format to write: kohya is what A1111, Forge and sd-scripts read as well."""
    model: Annotated[PathOrId | None, aliases("pretrained_model_name_or_path")] = None
    """Base model to compare the outputs in. Default: the file's own base, if it is on this machine."""
    token: str | None = None
    """Word of a textual inversion. Default: what the file or its name says."""


class InspectConfig(Verb):
    """What an adapter file is: kind, base, rank, targets, how it was trained, and where it changes the model."""

    method: ClassVar[str] = "inspect"
    entry: ClassVar[str] = "sdtune.conversion.inspect:inspect"
    examples: ClassVar[str] = r"""
    sdtune inspect runs/lora
    sdtune inspect downloaded.safetensors --png change.png
    """

    input: Annotated[Path, positional("FILE")]
    """Adapter in any known format: .safetensors file, run folder, or folder in PEFT's layout."""
    as_json: Annotated[bool, aliases("json")] = False
    """Print JSON."""
    png: Path | None = None
    """Also draw the norms of the change, as an image in this file."""


class MergeConfig(Model, Verb):
    """Adapters into a base, several adapters into one, two models into an adapter, a rank into a smaller one."""

    method: ClassVar[str] = "merge"
    entry: ClassVar[str] = "sdtune.conversion.merge:main"
    examples: ClassVar[str] = r"""
    sdtune merge --adapter runs/a=0.6 runs/b=0.4 --output both.safetensors
    sdtune merge --model tiny --adapter runs/lora --output-dir merged
    sdtune merge --resize --rank 4 --adapter runs/lora --output small.safetensors
    """

    adapter: Annotated[PathOrIds, aliases("lora")] = []
    """Adapters: file, folder, run folder or Hub id, each with an optional =WEIGHT, such as runs/lora=0.8."""
    output: Path | None = None
    """Adapter file to write, in diffusers' format."""
    output_dir: Path | None = None
    """Pipeline folder to write: the base with the adapters folded into its weights."""
    combine: Annotated[Literal["concat", "svd"], aliases("method")] = "concat"
    """Several adapters into one: concat adds their ranks up and is exact, svd is the closest of a rank."""
    resize: bool = False
    """Bring one adapter to another rank."""
    extract: bool = False
    """Make an adapter of what sets --tuned apart from --model."""
    tuned: Annotated[PathOrId | None, requires("extract")] = None
    """Model with the changes to extract: folder, Hub id or single .safetensors file."""
    rank: Annotated[Count | None, aliases("new_rank", "dim")] = None
    """Rank of svd, resize and extract; with energy, the largest."""
    energy: Annotated[float | None, Interval(gt=0, le=1)] = None
    """Smallest rank of each module that retains this share of the change's squared norm, in place of one rank."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of what is written; everything is computed in 64 bits."""
    overwrite: bool = False
    """Replace what output or output_dir names, once the new one is verified."""

    model: Annotated[PathOrId, aliases("pretrained_model_name_or_path")] = ""
    """Base model, as for training; adapters other than plain LoRA need it, and so does all that writes a model."""

    @property
    def work(self) -> Literal["fold", "concat", "svd", "resize", "extract"]:
        """What is to be done."""
        if self.extract or self.resize:
            return "extract" if self.extract else "resize"
        return "fold" if self.output_dir else self.combine

    @model_validator(mode="after")
    def _one_work(self) -> Self:
        if self.extract and self.resize:
            raise ValueError("extract and resize: give one of them")
        if (self.output is None) == (self.output_dir is None):
            raise ValueError("give output, a file for an adapter, or output_dir, a folder for a whole model")
        if self.output_dir and (self.work != "fold" or "combine" in self.model_fields_set):
            raise ValueError("output_dir is for a base with adapters folded in; an adapter goes to output")
        if self.output and self.output.suffix != ".safetensors":
            raise ValueError(f"output {self.output}: an adapter file is named *.safetensors")
        return self

    @model_validator(mode="after")
    def _what_it_needs(self) -> Self:
        needed = {"fold": "adapter model", "extract": "model tuned"}.get(self.work, "adapter").split()
        if missing := [f"--{name}" for name in needed if not getattr(self, name)]:
            raise ValueError(f"{self.work if self.work != 'fold' else 'output_dir'} needs {' and '.join(missing)}")
        if self.work == "resize" and len(self.adapter) > 1:
            raise ValueError(f"resize takes one adapter, not {len(self.adapter)}; several become one by combine svd")
        if self.extract and self.adapter:
            raise ValueError("extract compares two models and takes no adapter")
        sized = self.rank is not None or self.energy is not None
        if self.work in ("fold", "concat") and sized:
            raise ValueError("rank and energy are for svd, resize and extract; concat keeps every rank")
        if self.work not in ("fold", "concat") and not sized:
            raise ValueError(f"{self.work} needs --rank or --energy")
        return self
