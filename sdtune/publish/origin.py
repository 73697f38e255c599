"""What is known of a run's base model and dataset: by the Hub, and by the files of the base on this machine."""

from typing import NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from sdtune.publish import hub
from sdtune.run import base_license
from sdtune.run.public_name import may_be_hub_id
from sdtune.run.settings import RunSettings

FAMILY_TAGS = {
    "StableDiffusionPipeline": ["stable-diffusion", "stable-diffusion-diffusers"],
    "StableDiffusionInpaintPipeline": ["stable-diffusion", "stable-diffusion-diffusers"],
    "StableDiffusionUpscalePipeline": ["stable-diffusion", "stable-diffusion-diffusers"],
    "StableDiffusionXLInpaintPipeline": ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"],
    "StableDiffusionXLPipeline": ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"],
    "StableDiffusionXLImg2ImgPipeline": ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"],
    "StableDiffusion3Pipeline": ["sd3", "sd3-diffusers"],
    "FluxPipeline": ["flux", "flux-diffusers"],
    "FluxKontextPipeline": ["flux", "flux-diffusers"],
    "Flux2Pipeline": ["flux2", "flux2-diffusers"],
    "Flux2KleinPipeline": ["flux2-klein", "flux2-klein-diffusers"],
    "QwenImagePipeline": ["qwen-image", "qwen-image-diffusers"],
    "ZImagePipeline": ["z-image", "z-image-diffusers"],
    "KandinskyV22PriorPipeline": ["kandinsky"],
    "KandinskyV22Pipeline": ["kandinsky"],
}
"""Pipeline class of a base to the tags under which the Hub files its adapters."""


class Origin(NamedTuple):
    """Base and data count as on the Hub only when their names are no local folders."""

    base_on_hub: bool = False
    data_on_hub: bool = False
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


def look_up(api: HfApi, settings: RunSettings) -> Origin:
    """What the Hub answers. When it does not answer, only the names are judged, and the license is unknown."""
    try:
        return hub.retrying(lambda: ask(api, settings), hub.TRIES_BEFORE)
    except Exception as error:
        hub.warn(f"the card carries no license: {hub.why(error)}")
        return by_name(settings)


def by_name(settings: RunSettings) -> Origin:
    """Whether the names of base and data can be ids of the Hub, and the license of a base that is on this machine."""
    base, dataset = settings.about.base, str(settings.values.get("dataset") or "")
    known = base_license.of_base(base, settings.about.revision, settings.values.get("cache_dir")) if base else ()
    return Origin(base is not None and may_be_hub_id(base), may_be_hub_id(dataset), *known)


def ask(api: HfApi, settings: RunSettings) -> Origin:
    """Whether base and data exist on the Hub, and the base's license."""
    origin = by_name(settings)
    if origin.data_on_hub:
        origin = origin._replace(data_on_hub=api.repo_exists(settings.values["dataset"], repo_type="dataset"))
    base, revision = settings.about.base, settings.about.revision
    if base is None or not origin.base_on_hub:
        return origin
    try:
        card = api.model_info(base, revision=revision, timeout=20).card_data
    except (RepositoryNotFoundError, HFValidationError) as error:
        return origin._replace(base_on_hub=isinstance(error, GatedRepoError))
    return origin._replace(**base_license.of_metadata(card.to_dict() if card else {})._asdict())
