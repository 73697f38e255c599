"""Pipeline folders: complete models as stock diffusers loads them, with no path of this machine in them.

A folder is written under another name, read back, flushed, and then moved into its place part by part. The old
``model_index.json``, which makes it a pipeline, is removed first and the new one is moved last: after a kill in between
there is no pipeline rather than a mixed one.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from sdtune.run.artefacts import NEW
from sdtune.run.checkpoints import flush
from sdtune.run.files import umask

INDEX = "model_index.json"
CLIP = CLIPTextModel | CLIPTextModelWithProjection
"""Text encoders whose files keep the names that they had."""
OF_THIS_MACHINE = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
"""What diffusers and transformers write into the settings of a part about where and how it was read."""


def write_pipeline(out: Path, pipeline: Any, extra: Mapping[str, bytes] = {}) -> list[Path]:
    """Write a pipeline to folder ``out``, in place of an older one; the paths of all its files.

    Equal weights give equal bytes. Names of tensors are those of the files that a part was loaded from.

    Args:
        extra: further files by their path in ``out``, such as ``classes.json``.

    Raises:
        RuntimeError: what was written does not read back as it is; ``out`` is as it was.
    """

    def save(new: Path) -> None:
        pipeline.save_pretrained(new)
        for tokenizer in (part for part in new.iterdir() if (part / "tokenizer.json").is_file()):
            save_tables(getattr(pipeline, tokenizer.name), tokenizer)
        for name, content in extra.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content)
        forget_machine(new)
        name_processors(new / INDEX)
        verify(new, pipeline)

    return write_folder(out, save)


def write_module(out: Path, module: Any) -> list[Path]:
    """Write a model of diffusers to folder ``out`` itself, in place of an older one; the paths of its files.

    Raises:
        RuntimeError: what was written does not read back as it is; ``out`` is as it was.
    """

    def save(new: Path) -> None:
        module.save_pretrained(new)
        forget_machine(new)
        verify_module(new, module)

    return write_folder(out, save)


def write_folder(out: Path, save: Callable[[Path], None]) -> list[Path]:
    """Have ``save`` fill a folder, then move its files to ``out``, all or none; the paths of all of them."""
    new = out / NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        save(new)
        files = sorted(path for path in new.rglob("*") if path.is_file())
        for file in files:
            file.chmod(0o666 & ~umask())  # safetensors leaves 0600, which hides a model from its own group
            flush(file)
        move(new, out)
        flush(out)
        return [out / file.relative_to(new) for file in files]
    finally:
        shutil.rmtree(new, ignore_errors=True)


def move(new: Path, out: Path) -> None:
    """Move the entries of ``new`` to ``out``; what an older pipeline had there goes, its parts as a whole."""
    old = new / ".old"
    old.mkdir()
    gone = parts(out / INDEX)
    (out / INDEX).unlink(missing_ok=True)
    for name in sorted({path.name for path in new.iterdir()} - {old.name}, key=lambda name: name == INDEX):
        if (out / name).is_dir():
            (out / name).rename(old / name)
        (new / name).replace(out / name)
        gone.discard(name)
    for name in gone:
        shutil.rmtree(out / name, ignore_errors=True)


def parts(index: Path) -> set[str]:
    """The parts that a ``model_index.json`` names, each a folder beside it; none if there is no such file."""
    named = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    return {name for name, kind in named.items() if isinstance(kind, list) and kind[0]}


def forget_machine(folder: Path) -> None:
    """Remove the path of this machine from which a model was read from its settings."""
    for file in (*folder.glob("*.json"), *folder.glob("*/*.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and not config.keys().isdisjoint(OF_THIS_MACHINE):
            kept = {name: value for name, value in config.items() if name not in OF_THIS_MACHINE}
            file.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def name_processors(index: Path) -> None:
    """Name image processors as all versions of transformers know them.

    Where there is no torchvision, transformers 5 calls its class by Pillow, as in CLIPImageProcessorPil.
    """
    parts = json.loads(index.read_text(encoding="utf-8"))
    named = {
        name: part for name, part in parts.items() if isinstance(part, list) and str(part[1]).endswith("ProcessorPil")
    }
    if named:
        parts |= {name: [library, kind.removesuffix("Pil")] for name, (library, kind) in named.items()}
        index.write_text(json.dumps(parts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_tables(tokenizer: Any, folder: Path) -> None:
    """``vocab.json`` and ``merges.txt``, which transformers 5 no longer writes but 4 and ComfyUI look for."""
    model = tokenizer.backend_tokenizer.model
    if type(model).__name__ == "BPE":
        model.save(str(folder))


# ---- reading back ------------------------------------------------------------------------------------


def verify(folder: Path, pipeline: Any) -> None:
    """Compare a folder with the pipeline that it was written from: its parts, and every tensor of them, bit by bit.

    Raises:
        RuntimeError: naming what differs.
    """
    named, live = parts(folder / INDEX), {name: part for name, part in pipeline.components.items() if part is not None}
    if named != live.keys():
        raise RuntimeError(f"{folder / INDEX}: names {', '.join(sorted(named))}, not {', '.join(sorted(live))}")
    for name, part in live.items():
        if isinstance(part, nn.Module):
            verify_module(folder / name, part)


def verify_module(folder: Path, module: nn.Module) -> None:
    """Compare the weights in a folder with those of a module.

    Raises:
        RuntimeError: naming a tensor that is missing, strange, or another.
    """
    if isinstance(module, PreTrainedModel) and not isinstance(module, CLIP):
        verify_loaded(folder, module)
        return
    # transformers 5.6 dropped the level `text_model.` from CLIPTextModel; files that had it keep it
    live = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}
    found: set[int] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as saved:
            for key in saved.keys():  # noqa: SIM118
                tensor = live.get(key.removeprefix("text_model."))
                if tensor is None or not same(tensor, saved.get_tensor(key)):
                    raise RuntimeError(f"{file}: {key} does not read back as it is")
                found.add(tensor.data_ptr())
    if missing := [name for name, tensor in live.items() if tensor.data_ptr() not in found]:  # tied ones are saved once
        raise RuntimeError(f"{folder}: {missing[0]} is not in it")


def verify_loaded(folder: Path, module: PreTrainedModel) -> None:
    """Likewise for models that transformers saves under the names of older versions: what it loads is compared.

    Raises:
        RuntimeError: naming a tensor that is missing or another.
    """
    loaded = type(module).from_pretrained(folder, dtype=module.dtype).state_dict()
    for name, tensor in module.state_dict().items():
        if name not in loaded or not same(tensor, loaded[name]):
            raise RuntimeError(f"{folder}: {name} does not read back as it is")


def same(one: Tensor, other: Tensor) -> bool:
    one = one.detach().cpu()
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
