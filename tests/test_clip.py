"""``sdtune clip``: its loss, steps cut into chunks, and its artefact in transformers, scores and guidance."""

import json
import math
import re

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import CLIPModel

from sdtune.config.methods.clip import ClipConfig
from sdtune.config.sections import UserError
from sdtune.data import toy_world
from sdtune.evaluation import toy_clip
from sdtune.evaluation.judges import Clip as Judge
from sdtune.models.clip import read_clip, save_clip
from sdtune.models.vision import load_pretrained
from sdtune.recipes.clip import MAX_SCALE, Clip, contrastive_loss
from sdtune.run import stock_lines, usage
from tests.conftest import status

SMALL = {"resolution": 16, "hidden_size": 32, "image_layers": 1, "text_layers": 1, "projection_dim": 16}


def recipe_of(pictures, **settings):
    torch.manual_seed(0)
    return Clip(ClipConfig(**{"dataset": str(pictures)} | SMALL | settings), torch.device("cpu")).train()


def gradients(recipe, positions=range(6)):
    data = recipe.dataset(6, lambda line: None)
    items = [data[p] for p in positions]
    loss, _ = recipe({name: torch.stack([item[name] for item in items]) for name in ("pixels", "tokens")})
    loss.mean().backward()
    return loss, {name: p.grad for name, p in recipe.named_parameters()}


# ---- the loss --------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_paper_where_all_captions_differ():
    """Figure 3: cross entropy along both axes, the right pair on the diagonal."""
    unit = torch.nn.functional.normalize(torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    tokens, scale = torch.arange(5)[:, None], torch.tensor(7.0)
    loss, figures = contrastive_loss(unit, unit, tokens, tokens, scale)
    logits, labels = scale * unit[:, 0] @ unit[:, 1].T, torch.arange(5)
    paper = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(loss.mean(), paper)
    assert figures["scale"].tolist() == [7.0] * 5


def test_equal_captions_are_no_negatives():
    """Two pictures of one caption: perfect embeddings have the least loss there is, the entropy of the target."""
    own = torch.eye(3)[[0, 0, 1]][:, None].expand(-1, 2, -1)
    tokens = torch.tensor([[1, 2], [1, 2], [1, 3]])
    loss, figures = contrastive_loss(own, own, tokens, tokens, torch.tensor(100.0))
    torch.testing.assert_close(loss, torch.tensor([2.0, 2.0, 1.0]).log())
    assert figures["text_of_image"].tolist() == figures["image_of_text"].tolist() == [1.0] * 3


def test_chunks_give_the_gradient_of_the_whole_batch(pictures):
    """Its pictures are all compared, so that chunks alone would give another one."""
    loss, whole = gradients(recipe_of(pictures))
    chunked, parts = gradients(recipe_of(pictures, chunk_size=4))
    torch.testing.assert_close(chunked, loss)
    # Sums in another order: a few units in the last place of the largest numbers that are added
    rounding = 16 * torch.finfo(torch.float32).eps * max(gradient.abs().max().item() for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=rounding)


def test_the_temperature_is_clamped_and_does_not_decay(pictures):
    recipe = recipe_of(pictures)
    recipe.clip.logit_scale.data.fill_(9.0)
    recipe.after_step()
    assert recipe.clip.logit_scale.exp().item() == pytest.approx(MAX_SCALE)
    decaying, flat = recipe.parameter_groups()
    assert any(p is recipe.clip.logit_scale for p in flat["params"])
    assert flat["weight_decay"] == 0.0
    assert all(p.ndim > 1 for p in decaying["params"])
    assert len(decaying["params"]) + len(flat["params"]) == len(list(recipe.parameters()))


def test_noised_pictures_are_those_of_a_diffusion(pictures):
    """By the run's draws of a position, clean at u = 0 and pure noise at 1; captions and loss stay as they are."""
    recipe = recipe_of(pictures, noised=True)
    data = recipe.dataset(4, lambda line: None)
    items = [data[p] for p in range(4)]
    assert not torch.equal(items[0]["noise"], items[1]["noise"]) and torch.equal(data[2]["noise"], items[2]["noise"])
    batch = {name: torch.stack([item[name] for item in items]) for name in ("pixels", "tokens", "noise", "u")}
    batch["u"] = torch.tensor([0.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    x, noise = batch["pixels"], batch["noise"]
    c, s = math.cos(math.pi / 8), math.sin(math.pi / 8)
    seen = torch.stack([x[0], noise[1], 0.5**0.5 * (x[2] + noise[2]), c * x[3] + s * noise[3]])
    plain, _ = recipe_of(pictures)({"pixels": seen, "tokens": batch["tokens"]})
    torch.testing.assert_close(recipe(batch)[0], plain)
    assert "noise" not in recipe_of(pictures).dataset(4, lambda line: None)[0]


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"gradient_accumulation_steps": 4, "train_batch_size": 8},
            "--gradient-accumulation-steps 4: .*--train-batch-size 32 --chunk-size 8",
        ),
        ({"patch_size": 5}, "--patch-size 5: does not divide --resolution 16"),
        ({"tokenizer": "{tmp}/none"}, "--tokenizer .*none: "),
    ],
)
def test_what_cannot_be_trained_is_one_line(settings, said, pictures, tmp_path):
    filled = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(UserError, match=said) as told:
        recipe_of(pictures, **filled)
    assert "\n" not in str(told.value)


def test_a_step_of_one_picture_is_refused(pictures):
    with pytest.raises(UserError, match=r"--train-batch-size 1: .*at least 2"):
        recipe_of(pictures).dataset(1, lambda line: None)


def test_it_is_not_cut_into_slices(pictures, monkeypatch):
    recipe = recipe_of(pictures)
    monkeypatch.setattr("sdtune.recipes.clip.DTensor", torch.nn.Parameter)  # as FSDP makes of every weight
    with pytest.raises(UserError, match="a CLIP is not cut into slices"):
        recipe.parameter_groups()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model m --patch-size 4", "patch_size describes a new CLIP"),
        ("--hidden-size 40", "hidden_size 40 is no multiple of 32"),
        ("--buckets", "a CLIP sees squares"),
    ],
)
def test_options_that_do_not_go_together(words, said, capsys):
    assert status(["clip", "--dataset", "d", "--dry-run", *words.split()]) == 2
    assert re.search(said, capsys.readouterr().err)


# ---- the artefact ----------------------------------------------------------------------------------------


@pytest.fixture
def run(shared):
    return shared("clip", "--steps", "4")


def test_it_is_continued_and_judged_and_told(run, pictures):
    """As `sdtune evaluate` and CLIP guidance read it; a run that goes on from it starts with its weights."""
    assert json.loads((run / "config.json").read_text())["architectures"] == ["CLIPModel"]
    judge = Judge(str(run))
    assert judge.network.side == 16
    seen = judge.network(torch.rand(2, 3, 16, 16).to(judge.network.mean.device)).cpu()
    assert judge.scores(seen, ["a red circle", "a blue square"]).shape == (2,)
    recipe = Clip(ClipConfig(dataset=str(pictures), model=str(run), resolution=16), torch.device("cpu"))
    for name, tensor in CLIPModel.from_pretrained(run).state_dict().items():
        assert torch.equal(tensor, recipe.clip.state_dict()[name])
    torch.testing.assert_close(recipe.mean.flatten(), load_pretrained(str(run), "--model").mean.flatten().cpu())
    assert "--clip-guidance-scale" in (run / "report.html").read_text()
    with pytest.raises(UserError, match="--resolution 64: this CLIP sees pictures of 16"):
        Clip(ClipConfig(dataset=str(pictures), model=str(run)), torch.device("cpu"))


def test_a_folder_says_whether_pictures_were_noised(run, shared, pixels, tmp_path):
    """And guidance shows it those; one that goes on without noise is a usual CLIP again."""
    noised = shared("clip", "--steps", "4", "--noised")
    says = [json.loads((folder / "config.json").read_text()).get("noised") for folder in (run, noised)]
    assert says == [None, True]
    out = tmp_path / "drawn"
    words = ["sample", "--model", str(pixels), "--steps", "2", "--clip-model", str(noised), "--prompt", "a red circle"]
    assert status([*words, "--clip-guidance-scale", "2", "--output-dir", str(out)]) == 0
    assert (out / "00000.png").exists()
    usual = save_clip(tmp_path / "usual", read_clip(ClipConfig(dataset="d", model=str(noised), resolution=16), "cpu"))
    assert next(json.loads(p.read_text()) for p in usual if p.name == "config.json")["noised"] is False


def test_it_is_not_taken_for_an_adapter_or_a_classifier(run):
    files = {path.name: path for path in run.iterdir() if path.is_file()}
    kind = usage.artefact_kind(files)
    assert kind == usage.ArtefactKind(clip=True)
    compile(stock_lines.lines(kind, "runs/clip", None, "", None, "a red star", None), "lines", "exec")


def test_scores_of_the_toy_world(run):
    """Of a CLIP that has learnt nothing, near chance; captions are distinct, and of triples that are held out."""
    pairs = toy_clip.distinct(64, 0)
    assert len(pairs) == len({caption for caption, _ in pairs}) == 64
    assert all(toy_world.is_held_out(s.colour, s.shape, s.ground) for _, s in pairs)
    assert all(0 <= value <= 0.7 for value in toy_clip.knows_pictures(str(run), 16).values())
