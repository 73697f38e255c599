"""``sdtune inspect``: describes an adapter file; needs no base model."""

import json
import math
from collections import Counter
from typing import Any

from PIL import Image, ImageDraw

from sdtune.config.untrusted import printable
from sdtune.config.verbs import InspectConfig
from sdtune.models.formats import AdapterFile, Embedding, embedding, metadata, read
from sdtune.models.formats.tensor_file import json_object

BAR = 40
"""Characters of the longest bar."""
TRAINING = (
    "steps max_train_steps epoch num_epochs learning_rate unet_lr seed optimizer num_train_images resolution".split()
)


def inspect(cfg: InspectConfig) -> str:
    """The text or JSON to print; writes the chart of the norms to ``cfg.png`` if it is given."""
    found = embedding.read(cfg.input)
    facts = of_embedding(found) if found else of_adapter(read(cfg.input))
    if cfg.png:
        norm_chart(facts["norms"], str(cfg.input.name)).save(cfg.png, format="PNG")
    if cfg.as_json:
        return json.dumps(plain_json(facts), indent=2, allow_nan=False)
    return "\n".join([*lines(facts), *bars(facts["norms"])])


def of_adapter(adapter: AdapterFile) -> dict[str, Any]:
    modules = adapter.modules()
    norms: dict[str, float] = {}
    for name, module in modules.items():
        norms[block(name)] = norms.get(block(name), 0.0) + module.norm() ** 2
    return {
        "format": adapter.format,
        "kind": adapter.kinds,
        "base": metadata.base_of(adapter),
        "rank": counted(m.rank for m in modules.values()),
        "alpha": counted(round(m.alpha, 6) for m in modules.values()),
        "targets": sorted({target(name) for name in modules}),
        "modules": {part: len(own) for part, own in sorted(adapter.parts.items())},
        "parameters": sum(m.parameters() for m in modules.values()),
        "words": [word.token for word in adapter.words],
        "dtype": sorted({str(t.dtype).removeprefix("torch.") for m in modules.values() for t in m.tensors.values()}),
        "trigger": trigger(adapter.metadata, metadata.provenance(adapter)),
        "trained": trained(adapter.metadata, metadata.provenance(adapter)),
        "norms": {name: round(math.sqrt(square), 6) for name, square in norms.items()},
    }


def of_embedding(found: Embedding) -> dict[str, Any]:
    return {
        "format": found.format,
        "kind": ["textual inversion"],
        "trigger": [found.token],
        "vectors": {part: list(table.shape) for part, table in sorted(found.parts.items())},
        "parameters": sum(table.numel() for table in found.parts.values()),
        "trained": trained(found.metadata, {}),
        "norms": {
            f"{part} {k}": round(float(v.norm()), 6) for part, t in sorted(found.parts.items()) for k, v in enumerate(t)
        },
    }


def plain_json(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: they become null; what is nested too deeply becomes text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): plain_json(v) for k, v in value.items()}
    return [plain_json(v) for v in value] if isinstance(value, list) else value


def block(name: str) -> str:
    """``unet.down_blocks.0`` and ``text_encoder.layers.3`` of a module's name."""
    words = name.replace("text_model.encoder.", "").split(".")
    return ".".join(words[: 3 if len(words) > 2 and words[2].isdigit() else 2])


def target(name: str) -> str:
    """The last words of a module's name that ``--target-modules`` takes: ``to_q``, ``to_out.0``, ``net.0.proj``."""
    words = name.split(".")
    first = len(words) - 1
    while first and (words[first].isdigit() or words[first] == "proj"):
        first -= 1
    return ".".join(words[first:])


def counted(values: Any) -> dict[str, int]:
    """Value to the number of modules that have it, the most frequent first."""
    return {f"{value:g}": n for value, n in Counter(values).most_common()}


def trigger(about: dict[str, str], record: dict[str, Any]) -> list[str]:
    words = record.get("trigger") or record.get("instance_prompt") or about.get("modelspec.trigger_phrase")
    if words:
        return [str(word) for word in words] if isinstance(words, list) else [str(words)]
    tags: Counter[str] = Counter()
    for folder in json_object(about.get("ss_tag_frequency")).values():
        if isinstance(folder, dict):
            tags.update({tag: count for tag, count in folder.items() if isinstance(count, int)})
    return [tag for tag, _ in tags.most_common(5)]


def trained(about: dict[str, str], record: dict[str, Any]) -> dict[str, Any]:
    """The facts of the training in the metadata: kohya's ``ss_`` entries, and sdtune's own record, which wins."""
    of_kohya = {name: about[f"ss_{name}"] for name in TRAINING if about.get(f"ss_{name}") not in (None, "None")}
    return of_kohya | {k: v for k, v in record.items() if v is not None and k not in ("base", "trigger")}


def lines(facts: dict[str, Any]) -> list[str]:
    shown = []
    for name, value in facts.items():
        if name == "norms" or value in (None, [], {}):
            continue
        if isinstance(value, dict) and name in ("rank", "alpha"):
            value = next(iter(value)) if len(value) == 1 else ", ".join(f"{v} ({n} modules)" for v, n in value.items())
        elif isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        text = f"{value:,}" if isinstance(value, int) else printable(str(value), lines=False)
        shown.append(f"{name:<11} {text}")
    return shown


def bars(norms: dict[str, float]) -> list[str]:
    """A line for each block, with the norm of its change as a bar of characters."""
    longest, most = max(map(len, norms)), max(norms.values()) or 1.0
    rows = [f"{name:<{longest}} {'█' * round(BAR * norm / most):<{BAR}} {norm:.3g}" for name, norm in norms.items()]
    return ["", "norm of the change", *rows]


def norm_chart(norms: dict[str, float], title: str) -> Image.Image:
    """The norm of the change of each block as a bar chart (RGB)."""
    row, left, width = 22, 230, 720
    image = Image.new("RGB", (width, row * (len(norms) + 2)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((10, 6), f"{title}: norm of the change", fill="black")
    most = max(norms.values()) or 1.0
    for k, (name, norm) in enumerate(norms.items(), start=1):
        draw.text((10, row * k + 6), name, fill="black")
        draw.rectangle((left, row * k + 5, left + (width - left - 80) * norm / most, row * k + 18), fill="#3b6ea5")
        draw.text((left + (width - left - 80) * norm / most + 6, row * k + 6), f"{norm:.3g}", fill="black")
    return image
