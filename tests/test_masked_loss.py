"""Masks weigh the loss: where they are black nothing is learnt, and masks of one value change nothing."""

import torch

from sdtune.diffusion.objective import DDPM, denoising_loss

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
