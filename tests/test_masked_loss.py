"""Masks weigh the loss: where they are black nothing is learnt, and masks of one value change nothing."""

import torch
from PIL import Image
from safetensors.torch import load_file

from sdtune.diffusion.objective import DDPM, denoising_loss
from tests.conftest import status
from tests.image_folders import paint

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
