"""The words with which other trainers do the step that a benchmark measures: diffusers' scripts, and sd-scripts.

A LoRA of rank 4 on the same base and pictures, in float32, learning rate 1e-4, AdamW. The scripts run as they are.
"""

import json
import shutil
from pathlib import Path

from sdtune.models import families

SCRIPTS = {
    "sdxl": "examples/text_to_image/train_text_to_image_lora_sdxl.py",
    "sd3": "examples/dreambooth/train_dreambooth_lora_sd3.py",
    "ddpm": "examples/unconditional_image_generation/train_unconditional.py",
}
"""The script of diffusers for the last word of a shape's name; all others take `OF_SD`."""
OF_SD = "examples/text_to_image/train_text_to_image_lora.py"
KOHYA = {"tiny": "train_network.py", "sd15": "train_network.py", "sdxl": "sdxl_train_network.py"}
"""The scripts of sd-scripts. That of SD 3 reads single files in the layout of its authors."""


def script_of(shape: str) -> str:
    return SCRIPTS.get(shape.split("-")[-1], OF_SD)


def lora(checkout: Path, shape: str, model: str, images: Path, batch: int) -> list[str]:
    """The words of the script of diffusers, but for resolution, precision, steps and folder of the result."""
    words = [str(checkout / script_of(shape)), "--pretrained_model_name_or_path", families.resolve_model(model)]
    words += ["--train_batch_size", str(batch), "--rank", "4", "--caption_column", "text", "--center_crop"]
    words += ["--checkpointing_steps", "100000", "--dataloader_num_workers", "0", "--lr_warmup_steps", "0"]
    if script_of(shape) == SCRIPTS["sd3"]:
        return [*words, "--dataset_name", str(images), "--instance_prompt", "-", "--image_column", "image"]
    return [*words, "--train_data_dir", str(images)]


def pixels(checkout: Path, network: Path, images: Path, batch: int) -> list[str]:
    """The same of a model of pixels with a moving average, one step an epoch if ``batch`` is all pictures."""
    words = [str(checkout / SCRIPTS["ddpm"]), "--model_config_name_or_path", str(network), "--use_ema"]
    words += ["--train_batch_size", str(batch), "--save_images_epochs", "100000", "--save_model_epochs", "100000"]
    words += ["--ddpm_num_inference_steps", "1", "--eval_batch_size", "1", "--center_crop"]
    return [*words, "--checkpointing_steps", "100000", "--dataloader_num_workers", "0", "--train_data_dir", str(images)]


def kohya(checkout: Path, shape: str, model: str, images: Path, work: Path, side: int, batch: int) -> list[str]:
    """All words of sd-scripts but for the steps and the precision; its pictures have captions in files beside them."""
    if shape not in KOHYA:
        raise SystemExit(f"--kohya: has no arm for {shape}; it has for {', '.join(KOHYA)}")
    folder = work / f"kohya-{images.name}" / "1_pictures"  # 1: how often each is shown in an epoch
    folder.mkdir(parents=True, exist_ok=True)
    for line in (images / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        shutil.copy(images / row["file_name"], folder)
        (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"], encoding="utf-8")
    words = [str(checkout / KOHYA[shape]), "--pretrained_model_name_or_path", families.resolve_model(model)]
    words += ["--train_data_dir", str(folder.parent), "--caption_extension", ".txt", "--resolution", f"{side},{side}"]
    words += ["--network_module", "networks.lora", "--network_dim", "4", "--network_alpha", "4"]
    words += ["--network_train_unet_only", "--optimizer_type", "AdamW", "--learning_rate", "1e-4", "--sdpa"]
    words += ["--train_batch_size", str(batch), "--max_data_loader_n_workers", "0", "--cache_latents"]
    words += ["--cache_text_encoder_outputs"] if shape == "sdxl" else []
    return [*words, "--output_dir", str(work / "kohya-run"), "--output_name", "lora", "--save_precision", "float"]
