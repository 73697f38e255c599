"""How an image was made, as the text that is stored in it."""

from typing import Any

from PIL import Image

from sdtune.config.verbs import SampleConfig


def parameters(cfg: SampleConfig, facts: dict[str, Any], record: dict[str, Any], image: Image.Image) -> str:
    """How an image was made, in the layout that image viewers read from the text chunk ``parameters``."""
    own = {"Steps": record.get("steps"), "CFG scale": record.get("guidance_scale")}
    facts = facts | {name: value for name, value in own.items() if value is not None}
    facts = facts | {"Seed": record["seed"], "Size": f"{image.width}x{image.height}", "Model": cfg.model}
    if cfg.clip_skip:
        facts["Clip skip"] = cfg.clip_skip
    if cfg.guidance_rescale:
        facts["CFG rescale"] = cfg.guidance_rescale
    if cfg.adapter:
        facts["Adapters"] = " ".join(cfg.adapter)
    if cfg.embedding:
        facts["Embeddings"] = " ".join(cfg.embedding)
    if cfg.control:
        facts["Control"] = " ".join(cfg.control)
    if cfg.unet:
        facts["UNet"] = str(cfg.unet)
    negative = record.get("negative_prompt", cfg.negative_prompt)
    negative = f"Negative prompt: {negative}\n" if negative else ""
    return f"{record['text']}\n{negative}{', '.join(f'{k}: {v}' for k, v in facts.items())}"
