"""The Hugging Face Hub: a repository that is ready before training, a card, and an upload of named files."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console

from sdtune.configs import UserError

PUSH_FAILED = 3
"""Exit code of a run that is complete on disk but not on the Hub."""


def check(cfg: Any, main: bool) -> None:
    """Make sure, before hours are spent, that the repository exists and may be written to."""
    if not getattr(cfg, "push_to_hub", False) or not main:
        return
    try:
        repository(HfApi(), cfg)
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"--push-to-hub: {first}; set HF_TOKEN or run `hf auth login`, and see --hub-model-id"
        ) from None


def repository(api: HfApi, cfg: Any) -> str:
    """The full name of the run's repository, created if need be."""
    user = api.whoami()["name"]
    name = cfg.hub_model_id or cfg.output_dir.resolve().name
    name = name if "/" in name else f"{user}/{name}"
    return api.create_repo(name, private=cfg.hub_private or None, exist_ok=True).repo_id


def push_after_training(cfg: Any, files: list[Path]) -> None:
    """Upload a finished run; a failure costs nothing but the upload."""
    write_card(cfg, files)
    if not cfg.push_to_hub:
        return
    try:
        url = push(cfg, files)
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        Console(stderr=True).print(f"not pushed: {first}\nthe run is complete in {cfg.output_dir}", highlight=False)
        raise SystemExit(PUSH_FAILED) from None
    print(f"pushed: {url}")


def push(cfg: Any, files: list[Path]) -> str:
    """One commit of the artefact, the card, the config, the metrics and the samples; never a checkpoint or a log."""
    api, out = HfApi(), cfg.output_dir
    known = [out / name for name in ("README.md", "config.yaml", "metrics.jsonl", "report.html")]
    known += sorted((out / "samples").glob("*.png"))
    named = [f for f in (*files, *known) if f.is_file()]
    operations = [CommitOperationAdd(str(f.relative_to(out)), f) for f in named]
    return api.create_commit(repository(api, cfg), operations, commit_message=f"sdtune {cfg.method}").commit_url


def write_card(cfg: Any, files: list[Path]) -> None:
    """README.md of the run: what it is, how to use it, how it was made."""
    out = cfg.output_dir
    on_hub = cfg.model.count("/") == 1 and not Path(cfg.model).exists()
    data = ModelCardData(
        base_model=cfg.model if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "diffusers-training", cfg.method, "sdtune"],
    )
    samples = sorted((out / "samples").glob("step-*.png"))
    picture = f"\n![samples](samples/{samples[-1].name})\n" if samples else ""
    data_name = Path(cfg.dataset).name if Path(cfg.dataset).exists() else cfg.dataset  # no path of this machine
    settings = yaml.safe_dump(json.loads(cfg.model_dump_json()), sort_keys=False)
    text = f"""---
{data.to_yaml()}
---

# {out.resolve().name}

Trained from `{cfg.model}` on `{data_name}` with `sdtune {cfg.method}`.
{picture}
```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{cfg.model}")
pipe.load_lora_weights("{cfg.hub_model_id or out.resolve().name}")
```

<details><summary>Settings</summary>

```yaml
{settings}```
</details>
"""
    ModelCard(text).save(out / "README.md")
