"""--stratified-timesteps: an image of each step in each equal part of the timesteps, however the step is divided."""

from types import SimpleNamespace

import pytest
import torch

from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.data.denoising_dataset import DenoisingDataset


def drawn(group, steps, stratified=True):
    cfg = DdpmConfig(dataset="d", output_dir="o", stratified_timesteps=stratified)
    dataset = DenoisingDataset(SimpleNamespace(cfg=cfg, seed=0, group=group))
    return torch.stack([dataset.draw_timestep(position) for position in range(group * steps)]).view(steps, group)


def test_each_part_has_one_image_of_a_step_and_each_image_is_uniform():
    u = drawn(8, 400)
    assert torch.equal((u * 8).floor().sort(dim=1).values, torch.arange(8.0).double().expand(400, 8))
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 0.06  # of each place in a step, over the steps
    assert ((8 * u) % 1 - drawn(8, 400, stratified=False)).abs().max() < 1e-12


def test_the_mean_of_a_step_varies_less():
    curve = torch.exp  # any loss that rises with the timestep
    apart, spread = (curve(drawn(8, 200, stratified)).mean(1).var().item() for stratified in (False, True))
    assert spread < apart / 20


@pytest.mark.parametrize("group", [1, 3])
def test_any_number_of_images_will_do(group):
    assert (drawn(group, 5) < 1).all()
