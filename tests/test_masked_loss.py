"""Masks weigh the loss: where they are black nothing is learnt, and masks of one value change nothing."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdtune.cli import imported
from sdtune.config.commands import METHODS
from sdtune.config.sections import Masks, UserError
from sdtune.data import load_images
from sdtune.diffusion.objective import DDPM, denoising_loss
from sdtune.models import families
from tests.conftest import status
from tests.image_folders import config, paint, rows_to

ALPHAS = torch.linspace(0.99, 0.01, 10)


def loss(mask=None, wrong=None):
    x0, noise = torch.zeros(2, 4, 8, 8), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = {"u": torch.tensor([0.2, 0.7], dtype=torch.float64), "noise": noise}
    if mask is not None:
        batch["mask"] = mask
    error = torch.zeros_like(noise) if wrong is None else wrong
    return denoising_loss(DDPM(ALPHAS), lambda x, t: noise + error, x0, batch)


def test_errors_under_black_do_not_count():
    mask = torch.ones(2, 1, 8, 8)
    mask[:, :, :, :4] = 0
    wrong = torch.zeros(2, 4, 8, 8)
    wrong[:, :, :, :4] = 3
    assert torch.equal(loss(mask, wrong), torch.zeros(2))
    assert loss(wrong=wrong).min() > 1


def test_the_loss_is_a_mean_over_the_weights():
    wrong = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = (wrong.square() * mask).sum((1, 2, 3)) / (4 * mask.sum((1, 2, 3)))
    assert torch.allclose(loss(mask, wrong), expected, rtol=1e-5)
    assert torch.equal(loss(torch.ones(2, 1, 8, 8), wrong), loss(wrong=wrong))


def test_a_run_with_masks(tmp_path, capsys):
    """Through the command line, with crops and the latents of the VAE."""
    options = "--resolution 64 --steps 2 --train-batch-size 2 --num-validation-images 0 --no-cache --caption x"
    options += " --dataloader-num-workers 0 --model tiny"
    loras = {}
    for masked in (["--masked-loss"], []):
        folder = tmp_path / f"pictures-{len(masked)}"
        image = Image.open(paint(folder / "a.png", (64, 64), shade=200))
        mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, 32, 64))
        mask.save(folder / "a-mask.png")
        out = tmp_path / f"run-{len(masked)}"
        assert status(["lora", "--dataset", str(folder), "--output-dir", str(out), *options.split(), *masked]) == 0
        loras[len(masked)] = load_file(out / "pytorch_lora_weights.safetensors")
    said = capsys.readouterr().out
    assert "masks: 1, their images are weighted by them" in said and "masks: 1, not trained on" in said
    assert any(not torch.equal(loras[0][name], tensor) for name, tensor in loras[1].items())


NEEDS = {
    "textual-inversion": {"placeholder_token": "<x>", "caption": None},
    "custom-diffusion": {"placeholder_token": ["<x>"], "caption": "a <x>"},
    "controlnet": {"condition": "edges"},
    "t2i-adapter": {"condition": "edges"},
}
"""What methods want beside images and captions."""
MASKED = [name for name, command in METHODS.items() if issubclass(command.load(), Masks)]


def test_the_methods_on_a_text_to_image_base_take_masks():
    others = {"ddpm", "lcm", "progressive", "consistency", "classifier"}
    assert set(MASKED) | others >= {"lora", "dreambooth", "text-to-image", "instruct-pix2pix", *NEEDS}


@pytest.mark.parametrize("method", MASKED)
def test_every_method_weighs_its_loss_by_the_column_of_masks(method, sd, tmp_path):
    """A mask is black where the loss of this sample happens to be large or small: another mask, another loss."""
    families.silence_libraries()
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    paint(tmp_path / "a.png", (32, 32))
    mask.save(tmp_path / "a-is.png")
    row = {"file_name": "a.png", "mask_file_name": "a-is.png", "input_image_file_name": "a.png", "text": "a"}
    rows_to(tmp_path / "metadata.jsonl", row)
    options = {"model": str(sd), "dataset": str(tmp_path), "resolution": 32, "cache": False, "caption": "a"}
    kind = METHODS[method].load()
    cfg = kind(**options | NEEDS.get(method, {}), masked_loss=True, mask_column="mask", output_dir=tmp_path / "run")
    recipe = imported(cfg.entry)(cfg, torch.device("cpu"))
    item = recipe.dataset(1, lambda line: None)[0]
    assert torch.equal(item["mask"][0], torch.arange(16).lt(8).float().expand(16, 16))
    batch = torch.utils.data.default_collate([item])
    with torch.no_grad():
        halves = [recipe(batch | {"mask": m}) for m in (batch["mask"], 1 - batch["mask"])]
    one, other = (h[0] if isinstance(h, tuple) else h for h in halves)
    assert not torch.equal(one, other)


def test_a_black_mask_and_a_table_without_a_column_are_told(tmp_path):
    paint(tmp_path / "a.png", (32, 32))
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    rows_to(tmp_path / "metadata.jsonl", {"file_name": "a.png", "mask_file_name": "black.png", "text": "a"})
    with pytest.raises(UserError, match="its mask is all black"):
        load_images(config(tmp_path, masked_loss=True, mask_column="mask"))
    with pytest.raises(UserError, match=r"every image needs a other \(--mask-column\)|--mask-column"):
        load_images(config(tmp_path, masked_loss=True, mask_column="other"))
