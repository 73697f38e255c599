"""Models of unCLIP (Ramesh et al. 2022) as pipelines of Kandinsky 2.2 have them: both halves of CLIP, and the prior."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from diffusers import KandinskyV22PriorPipeline, PriorTransformer, UnCLIPScheduler
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from sdtune.config.methods.unclip_prior import PriorConfig
from sdtune.config.sections import UserError
from sdtune.data import cache
from sdtune.data.token_counts import token_counts
from sdtune.models import families
from sdtune.models.part_files import ConfigOnly, check_tokenizer, read_part, read_scheduler

RANGE = 10.0
"""What sampling holds whitened embeddings to. UnCLIPScheduler's own default, 1, is that of pixels."""
EMBEDDINGS = ("positional_embedding", "prd_embedding")
"""What a PriorTransformer has all zeros in, which no two tokens can then be told apart by."""


class Towers:
    """CLIP's image encoder and text encoder, frozen and in fp32, each read when it is first used.

    Args:
        source: folder or Hub id of a CLIPModel, or of a KandinskyV22PriorPipeline.
        where: the option with its value, with which an error begins.
        inside: whether ``source`` is a pipeline, whose parts are folders in it.
        hub: revision and cache folder.
    """

    def __init__(self, source: str, where: str, device: torch.device, inside: bool, **hub: Any):
        self.source, self.where, self.device, self.inside, self.hub = source, where, device, inside, hub
        self.parts: dict[str, Any] = {}
        self.width: int = self.config("image_encoder", CLIPVisionModelWithProjection).projection_dim
        self.side: int = self.config("image_encoder", CLIPVisionModelWithProjection).image_size
        self.text_config = self.config("text_encoder", CLIPTextModelWithProjection)
        check_tokenizer(self.tokenizer, self.text_config, where)

    def read_part(self, kind: Any, name: str) -> Any:
        place = {"subfolder": name} if self.inside else {}
        return read_part(kind, self.source, f"{self.where}: {name}", **place, **self.hub)

    def config(self, name: str, kind: Any) -> Any:
        return self.read_part(kind.config_class, name)

    @cached_property
    def tokenizer(self) -> Any:
        return self.read_part(CLIPTokenizer, "tokenizer")

    @cached_property
    def image_processor(self) -> Any:
        return self.read_part(CLIPImageProcessor, "image_processor")

    @property
    def image_encoder(self) -> Any:
        return self.part("image_encoder", CLIPVisionModelWithProjection)

    @property
    def text_encoder(self) -> Any:
        return self.part("text_encoder", CLIPTextModelWithProjection)

    def part(self, name: str, kind: Any) -> Any:
        if name not in self.parts:
            if self.device.type == "meta":
                with torch.device("meta"):
                    found = kind(self.config(name, kind))
            else:
                found = self.read_part(kind, name).float().to(self.device)
            self.parts[name] = found.eval().requires_grad_(False)
        return self.parts[name]

    def unload(self) -> None:
        """Free the memory of both encoders; they are read again when next used."""
        self.parts = {}

    # ---- what the dataset asks for

    @property
    def window(self) -> int:
        return int(self.tokenizer.model_max_length)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        def count(texts: Sequence[str]) -> list[int]:
            return [len(ids) for ids in self.tokenizer(list(texts), truncation=False, verbose=False).input_ids]

        return token_counts(self.tokenizer, captions, count)

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """As the stock pipeline has them: cut to the window, and filled up to it."""
        made = self.tokenizer(
            list(captions), padding="max_length", max_length=self.window, truncation=True, return_tensors="pt"
        )
        return {"ids": made.input_ids, "mask": made.attention_mask.bool()}

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, 3, side, side]`` in [-1, 1] -> embeddings as they are, not of length 1: ``[B, D]``."""
        seen, encoder = self.image_processor, self.image_encoder
        x = pixels.to(encoder.device)
        mean, std = (x.new_tensor(numbers).view(1, 3, 1, 1) for numbers in (seen.image_mean, seen.image_std))
        embeds: Tensor = encoder((x / 2 + 0.5 - mean) / std).image_embeds
        return embeds

    def blank(self, like: Tensor) -> Tensor:
        """Pictures of CLIP's mean colour, which are all zeros to it, shaped as ``like`` ``[B, 3, side, side]``."""
        mean = like.new_tensor(self.image_processor.image_mean).view(1, 3, 1, 1)
        return (2 * mean - 1).expand_as(like)

    def read(self, ids: Tensor) -> dict[str, Tensor]:
        out = self.text_encoder(ids.to(self.text_encoder.device))
        return {"embeds": out.text_embeds, "states": out.last_hidden_state}

    def image_key(self) -> str:
        seen = (self.image_processor.image_mean, self.image_processor.image_std)
        return cache.digest(cache.weights_digest(self.image_encoder), seen, transformers.__version__)

    def text_key(self) -> str:
        sha = hashlib.sha256(f"unCLIP {transformers.__version__} {self.window}".encode())
        sha.update(self.tokenizer.backend_tokenizer.to_str().encode())
        sha.update(cache.weights_digest(self.text_encoder).encode())
        return sha.hexdigest()[:24]


class PriorParts(NamedTuple):
    prior: Any
    """A PriorTransformer in fp32."""
    scheduler: Any
    towers: Towers


def read_prior(cfg: PriorConfig, device: torch.device) -> PriorParts:
    """The prior of ``cfg``: one that is continued, or a new one. On the meta device shapes alone.

    Raises:
        UserError: a part cannot be read, or CLIP sees pictures of another size.
    """
    families.silence_libraries()
    if cfg.model:
        source, where = prior_source(cfg.model, "--model")
        hub = {"revision": cfg.revision, "cache_dir": cfg.cache_dir}
        towers = Towers(source, where, device, inside=True, **hub)
        scheduler = read_scheduler(UnCLIPScheduler, source, f"{where}: scheduler", subfolder="scheduler", **hub)
        place = {"subfolder": "prior", **hub}
        if device.type == "meta":
            with torch.device("meta"):
                config = read_part(ConfigOnly(PriorTransformer), source, f"{where}: prior", **place)
                prior = PriorTransformer.from_config(config)
        else:
            prior = read_part(PriorTransformer, source, f"{where}: prior", **place).float().to(device)
    else:
        source, where = str(Path(str(cfg.clip_model)).expanduser()), f"--clip-model {cfg.clip_model}"
        towers = Towers(source, where, device, inside=False, cache_dir=cfg.cache_dir)
        scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample=True, clip_sample_range=RANGE)
        prior = new_prior(cfg, towers, device)
    if cfg.resolution != towers.side:
        raise UserError(f"--resolution {cfg.resolution}: this CLIP sees pictures of {towers.side}; give that number")
    return PriorParts(prior, scheduler, towers)


def prior_source(name: str, option: str) -> tuple[str, str]:
    """Folder or Hub id of a prior's pipeline, and the words with which an error of it begins.

    Raises:
        UserError: a folder that holds no such pipeline, or no folder.
    """
    where, path = f"{option} {name}", Path(name).expanduser()
    if path.is_dir():
        if not (path / "prior" / "config.json").is_file():
            raise UserError(f"{where}: no prior in that folder; a KandinskyV22PriorPipeline is wanted")
        return str(path), where
    if path.exists() or name.count("/") != 1 or name[0] in "./~":
        raise UserError(f"{where}: no such folder; a Hub id is written user/name")
    return name, where


def new_prior(cfg: PriorConfig, towers: Towers, device: torch.device) -> Any:
    """A PriorTransformer of random weights, as wide as the states of captions.

    Raises:
        UserError: heads do not divide that width.
    """
    text, width = towers.text_config, towers.text_config.hidden_size
    if width % cfg.attention_head_dim:
        raise UserError(
            f"--attention-head-dim {cfg.attention_head_dim}: does not divide {width}, CLIP's width for text"
        )
    with torch.device(device if device.type == "meta" else "cpu"):
        prior = PriorTransformer(
            num_attention_heads=width // cfg.attention_head_dim,
            attention_head_dim=cfg.attention_head_dim,
            num_layers=cfg.num_layers,
            embedding_dim=towers.width,
            num_embeddings=towers.window,
            # a projection of the states would have to be as wide as an embedding
            encoder_hid_proj_type="linear" if text.hidden_size == towers.width else None,
        )
        for name in EMBEDDINGS:
            nn.init.normal_(getattr(prior, name), std=0.02)
    return prior


def prior_pipeline(prior: Any, scheduler: Any, towers: Towers) -> KandinskyV22PriorPipeline:
    """The stock pipeline of a prior."""
    return KandinskyV22PriorPipeline(
        prior, towers.image_encoder, towers.text_encoder, towers.tokenizer, scheduler, towers.image_processor
    )


def load_prior(name: str, dtype: torch.dtype, device: torch.device) -> KandinskyV22PriorPipeline:
    """The stock pipeline of a prior, to sample with. Raises: UserError for one that cannot be read."""
    source, where = prior_source(name, "--prior")
    towers = Towers(source, where, device, inside=True)
    prior = read_part(PriorTransformer, source, f"{where}: prior", subfolder="prior")
    scheduler = read_scheduler(UnCLIPScheduler, source, f"{where}: scheduler", subfolder="scheduler")
    pipe = prior_pipeline(prior, scheduler, towers).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
