"""The memory that adapters on each base need, estimated from its published shapes: no weights, no download.

    python bench/family_memory.py > runs/family_memory.md
    python bench/family_memory.py --only 'Z-Image|klein' --resolution 512

A folder of configurations stands in for each base (bench/family_shapes.json has what differs from the defaults of
diffusers' classes, and transformers' sizes), and `sdtune check` traces a step on it: one image, bf16, rank 4, gradient
checkpointing, AdamW, and captions as long as are read. The process itself is left out, as it is not on a GPU.
"""

import argparse
import inspect
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from torch import nn

from sdtune.config.methods.lora import LoraConfig
from sdtune.models import families
from sdtune.models.quantize import sizes
from sdtune.recipes.lora import Lora
from sdtune.training.memory_estimate import estimate, meta_recipe

SHAPES = Path(__file__).with_name("family_shapes.json")
CARDS = (8, 16, 24, 48, 80)
"""Gigabytes of common cards."""
SPARE = 0.9
"""Share of a card that tensors may fill; the rest is the driver's, and what kernels and the allocator lose."""
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_base(folder: Path, shape: dict[str, Any]) -> Path:
    """A pipeline folder without weights: configurations, and tokenizers of a few words."""
    index = {"_class_name": shape["class"], **shape.get("settings", {})}
    for part, (library, kind, config) in shape["parts"].items():
        index[part] = [library, kind]
        (folder / part).mkdir(parents=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        stated = {"_class_name": kind, **(defaults(kind) if library == "diffusers" else {}), **config}
        (folder / part / name).write_text(json.dumps(stated), encoding="utf-8")
        if part.startswith("text_encoder"):
            tokenizer = part.replace("text_encoder", "tokenizer")
            made = tokenizer_for(kind)
            made.save_pretrained(folder / tokenizer)
            index[tokenizer] = ["transformers", type(made).__name__]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def defaults(kind: str) -> dict[str, Any]:
    """What a class of diffusers takes where nothing is said: its published configurations state these too."""
    parameters = inspect.signature(getattr(diffusers, kind)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def tokenizer_for(encoder: str) -> Any:
    """A tokenizer of the kind that a text encoder has; its words do not matter here."""
    if encoder.startswith("CLIP"):
        return transformers.CLIPTokenizer.from_pretrained(families.resolve_model("tiny"), subfolder="tokenizer")
    if encoder.startswith("T5"):
        words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁", -3.0), ("a", -4.0)]
        made = transformers.T5Tokenizer(vocab=words, extra_ids=0)
    else:
        made = transformers.Qwen2Tokenizer(vocab={"a": 0}, merges=[])
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        made.chat_template = CHAT
    made.model_max_length = 512
    return made


def weight_bytes(shape: dict[str, Any], part: str) -> int:
    """Bytes of a part in bf16."""
    library, kind, config = shape["parts"][part]
    with torch.device("meta"):
        if library == "diffusers":
            module = getattr(diffusers, kind).from_config(config)
        else:
            made = getattr(transformers, kind)
            module = made(made.config_class(**config))
    return 2 * sum(p.numel() for p in module.parameters())


def needs(shape: dict[str, Any], resolution: int) -> dict[str, int]:
    """Bytes of a training step with the base in bf16, int8 and nf4, of its text encoders, and of samples with nf4."""
    with tempfile.TemporaryDirectory() as place:
        folder, pictures = write_base(Path(place) / "base", shape), Path(place) / "pictures"
        pictures.mkdir()
        Image.new("RGB", (resolution, resolution)).save(pictures / "a.png")
        cfg = LoraConfig(
            model=str(folder),
            dataset=str(pictures),
            caption="a",
            resolution=resolution,
            train_batch_size=1,
            mixed_precision="bf16",
            gradient_checkpointing=True,
            output_dir=Path(place) / "run",
        )
        recipe, dataset = meta_recipe(Lora, cfg, 1, lambda line: None)
        denoiser: nn.Module = recipe.family.denoiser
        coded = {kind: sizes(denoiser, kind) for kind in ("int8", "nf4")}
        need = estimate(recipe, dataset, torch.device("cpu"), base=0)
    step = need.total - need.reading - need.preview
    found = {"bf16": step}
    for kind, (plain, codes, largest) in coded.items():
        found[kind] = step - plain + codes + largest
    encoders = sum(weight_bytes(shape, part) for part in shape["parts"] if part.startswith("text_encoder"))
    found["text"] = encoders
    found["samples"] = need.weights - coded["nf4"][0] + coded["nf4"][1] + encoders + weight_bytes(shape, "vae")
    return found


def card(size: int) -> str:
    """The smallest common card that holds so much."""
    return next((f"{gigabytes} GB" for gigabytes in CARDS if size <= SPARE * gigabytes * 1e9), "more than 80 GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression on the names of bases")
    parser.add_argument("--resolution", type=int, default=0, help="pixels a side; by default what the base is made for")
    given = parser.parse_args()
    families.silence_libraries()
    print("| Base | Pixels | Step: bf16 | int8 | nf4 | Text encoders | Samples, nf4 | Card: nf4 | Card: int8 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, shape in json.loads(SHAPES.read_text(encoding="utf-8")).items():
        if re.search(given.only, name):
            pixels = given.resolution or (512 if shape["class"] == "StableDiffusionPipeline" else 1024)
            need = needs(shape, pixels)
            shown = " | ".join(f"{need[kind] / 1e9:.1f}" for kind in ("bf16", "int8", "nf4", "text", "samples"))
            cards = " | ".join(card(max(need[kind], need["text"])) for kind in ("nf4", "int8"))
            print(f"| {name} | {pixels} | {shown} | {cards} |", flush=True)


if __name__ == "__main__":
    main()
