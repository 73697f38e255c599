"""Drawing pixels: image k is what stock diffusers draws from the k-th seed, and the command says what it cannot do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from sdtune.config.sections import UserError
from sdtune.diffusion.guides import ByClassifier
from sdtune.diffusion.pixel_sampler import draw, to_images
from sdtune.diffusion.schedulers import SCHEDULERS, alpha_bars, make_scheduler
from sdtune.models import pixel_models
from sdtune.models.noisy_classifier import NoisyClassifier
from sdtune.models.vision import Pretrained
from sdtune.run import contact_sheet
from sdtune.sampling import sample_pixels
from tests.conftest import status
from tests.tinysd import tiny_tokenizer

SEEDS = [7, 8, 9]
NAMES = ["one", "two", "three"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_unet(channels=1, classes=None, **more) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=classes and classes + 1,
        **more,
    ).eval()


def tiny_clip() -> CLIPModel:
    torch.manual_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**part, "vocab_size": 600, "max_position_embeddings": 77}
    vision = {**part, "image_size": 12, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval().requires_grad_(False)


def processor():
    return CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})


def clip_network() -> Pretrained:
    return Pretrained(tiny_clip(), 12, processor().image_mean, processor().image_std)


# ---- the loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("stock", [DDPMPipeline, DDIMPipeline])
def test_each_image_is_the_one_stock_diffusers_draws(stock, channels):
    unet = tiny_unet(channels)
    pipe = stock(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    scheduler = DDPMScheduler() if stock is DDPMPipeline else make_scheduler("ddim", DDPMScheduler(), clip=True)
    options = {"eta": 0.5} if stock is DDIMPipeline else {}
    ours = to_images(draw(unet, scheduler, SEEDS, steps=5, batch_size=1, **options))
    for seed, image in zip(SEEDS, ours, strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        theirs = pipe(num_inference_steps=5, generator=generator, **options).images[0]
        assert (image.mode, image.tobytes()) == (theirs.mode, theirs.tobytes())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_batches_change_nothing_but_rounding(name):
    unet, scheduler = tiny_unet(classes=3), make_scheduler(name, DDPMScheduler(), clip=True)
    options = {"steps": 4, "labels": torch.tensor([0, 1, 2]), "guidance_scale": 2.0}
    whole = draw(unet, scheduler, SEEDS, **options)
    for batch_size in (1, 2):
        again = draw(unet, scheduler, SEEDS, batch_size=batch_size, **options)
        assert (again - whole).abs().max() < 2e-4  # sums in another order; a level of 256 is 8e-3
    assert scheduler.num_inference_steps != 4  # untouched


def test_classes_are_those_of_the_network():
    unet, scheduler = tiny_unet(classes=3), DDPMScheduler()
    labels = torch.tensor([2, 0, 1])
    scheduler.set_timesteps(4)
    for scale in (1.0, 3.0):
        ours = draw(unet, scheduler, SEEDS, steps=4, labels=labels, guidance_scale=scale)
        for k, seed in enumerate(SEEDS):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(1, 1, 8, 8, generator=generator)
            for t in scheduler.timesteps:
                with torch.no_grad():
                    null, own = (unet(x, t, class_labels=torch.tensor([label])).sample for label in (3, int(labels[k])))
                pred = null + scale * (own - null)
                x = scheduler.step(pred, t, x, generator=generator).prev_sample
            torch.testing.assert_close(ours[k], x[0].clamp(-1, 1), rtol=1e-4, atol=1e-4)
    nothing = draw(unet, scheduler, SEEDS, steps=4)
    torch.testing.assert_close(nothing, draw(unet, scheduler, SEEDS, steps=4, labels=torch.tensor([3, 3, 3])))
    assert not torch.allclose(nothing, ours)


def test_rescale_needs_guidance_to_do_anything():
    unet, scheduler, labels = tiny_unet(classes=3), DDPMScheduler(), torch.tensor([0, 1, 2])
    plain, strong, rescaled = (
        draw(unet, scheduler, SEEDS, steps=4, labels=labels, guidance_scale=scale, guidance_rescale=share)
        for scale, share in ((1, 0.7), (4, 0), (4, 0.7))
    )
    torch.testing.assert_close(plain, draw(unet, scheduler, SEEDS, steps=4, labels=labels))
    assert not torch.allclose(strong, rescaled)


def test_drawing_leaves_training_as_it_was():
    unet = tiny_unet().train()
    unet.mid_block.eval()
    before = [m.training for m in unet.modules()]
    draw(unet, DDPMScheduler(), [0], steps=1)
    assert [m.training for m in unet.modules()] == before
    assert all(p.requires_grad and p.grad is None for p in unet.parameters())


def test_progress_ends_at_one_and_every_step_is_seen():
    shares, seen = [], []
    draw(
        tiny_unet(),
        DDPMScheduler(),
        SEEDS,
        steps=4,
        batch_size=2,
        progress=shares.append,
        watch=lambda *s: seen.append(s),
    )
    assert shares == sorted(shares) and shares[-1] == 1
    assert [t for t, _ in seen] == [750, 500, 250, 0] * 2
    assert [len(x0) for _, x0 in seen] == [2] * 4 + [1] * 4


def test_start_is_the_image_under_the_noise_of_its_seed():
    unet, scheduler, pictures, seen = tiny_unet(), DDPMScheduler(clip_sample=False), torch.rand(2, 1, 8, 8), []
    unet.forward = lambda x_t, t: type("Out", (), {"sample": seen.append(x_t.clone()) or torch.zeros_like(x_t)})
    draw(unet, scheduler, [3, 3], steps=10, start=(pictures, 450))
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3)).expand(2, 1, 8, 8)
    expected = scheduler.add_noise(pictures, noise, torch.tensor([400, 400]))
    assert len(seen) == 5  # 400, 300, 200, 100, 0
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("name", ["euler", "heun", "lms", "dpm++"])
def test_alpha_bar_is_that_of_the_schedulers_own_noise(name):
    scheduler = make_scheduler(name, DDPMScheduler())
    scheduler.set_timesteps(7)
    sigmas = scheduler.sigmas[:-1].double()
    bars = alpha_bars(scheduler)
    if name == "dpm++":  # diffusers keeps sigmas of this class as s / a, too
        assert torch.equal(scheduler.timesteps, scheduler.timesteps.round())
    torch.testing.assert_close(bars, 1 / (1 + sigmas**2), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_one_made_in_memory_has_its_betas(name):
    base = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    assert torch.allclose(make_scheduler(name, base).betas, base.betas, atol=1e-6)
    assert torch.allclose(make_scheduler(name, DDPMScheduler()).betas, DDPMScheduler().betas, atol=1e-7)


def test_modes_of_images():
    x = torch.tensor([-1.0, 0.0, 1.0, 3.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert [(im.mode, im.getpixel((0, 0))) for n in (1, 2, 3, 4) for im in to_images(x[:, :n])] == [
        ("L", 0),
        ("LA", (0, 128)),
        ("RGB", (0, 128, 255)),
        ("RGBA", (0, 128, 255, 255)),
    ]


def test_a_sheet_is_white_where_an_image_is_transparent():
    x = torch.tensor([-1.0, -1.0]).reshape(1, 2, 1, 1).expand(1, 2, 8, 8)
    ((cell, _),) = contact_sheet.cells(contact_sheet.grid(to_images(x)))
    assert cell.getpixel((0, 0)) == (255, 255, 255)


# ---- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model without and one with classes, classifiers that fit and that do not, a CLIP, and two pictures."""
    root = tmp_path_factory.mktemp("pixels")
    linear, cosine = DDPMScheduler(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    pixel_models.save(root / "plain", tiny_unet(), linear, [])
    pixel_models.save(root / "classes", tiny_unet(classes=3), linear, NAMES)
    pixel_models.save(root / "rgba", tiny_unet(4), DDPMScheduler(100), [])
    pixel_models.save(root / "unnamed", tiny_unet(classes=3), linear, [])
    pixel_models.save(root / "miscounted", tiny_unet(classes=3), linear, NAMES[:2])
    for name, side, channels, scheduler in (
        ("classifier", 8, 1, linear),
        ("classifier-16", 16, 1, linear),
        ("classifier-rgb", 8, 3, linear),
        ("classifier-cosine", 8, 1, cosine),
        ("classifier-500", 8, 1, DDPMScheduler(500)),
        ("classifier-beta", 8, 1, DDPMScheduler(beta_end=0.01)),
    ):
        torch.manual_seed(1)
        kinds = ("DownBlock2D", "AttnDownBlock2D")
        classifier = NoisyClassifier(side, channels, 3, (8, 16), kinds, 1, norm_num_groups=4, attention_head_dim=8)
        pixel_models.save_classifier(root / name, classifier, scheduler, NAMES)
    for name in ("nan", "lost"):
        weights = load_file(shutil.copytree(root / "classifier", root / name) / WEIGHTS)
        first = weights.pop("conv_in.weight")
        found = weights | ({"conv_in.weight": first * torch.nan} if name == "nan" else {})
        save_file(found, root / name / WEIGHTS, metadata={"format": "pt"})
    tiny_clip().save_pretrained(root / "clip")
    tiny_tokenizer().save_pretrained(root / "clip")
    processor().save_pretrained(root / "clip")
    for name, mode in (("a.png", "L"), ("b.png", "RGB")):
        pixels = np.random.default_rng(len(mode)).integers(0, 256, (8, 12, len(mode)), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(root / name)
    (root / "text.png").write_text("no image")
    return root


@pytest.fixture
def sampled(folders, tmp_path):
    """Run ``sdtune sample`` with FOLDERS/ in words replaced; its images in order and its records."""

    def run(*words: str, model: str = "plain"):
        out = tmp_path / "out"
        given = [word.replace("FOLDERS", str(folders)) for word in words]
        assert status(["sample", "--model", str(folders / model), "--output-dir", str(out), *given]) == 0
        records = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
        return [Image.open(out / record["file_name"]) for record in records], records, out

    return run


def test_the_command_draws_what_stock_diffusers_does(sampled, folders):
    images, records, out = sampled("--num-images", "3", "--steps", "4", "--seed", "5", "--batch-size", "2")
    pipe = DDPMPipeline.from_pretrained(folders / "plain")
    pipe.set_progress_bar_config(disable=True)
    for k, image in enumerate(images):
        stock = pipe(num_inference_steps=4, generator=torch.Generator("cpu").manual_seed(5 + k)).images[0]
        assert np.abs(np.asarray(image, int) - np.asarray(stock, int)).max() <= 1  # batches round
    assert [record["seed"] for record in records] == [5, 6, 7]
    assert images[0].text["parameters"].startswith("\nSteps: 4, Sampler: DDPMScheduler, Seed: 5, Size: 8x8")
    assert contact_sheet.cells(Image.open(out / "grid.png"))
    assert len(sampled("--steps", "2")[0]) == 4  # goes on numbering


def test_images_are_on_disk_as_soon_as_they_are_drawn(folders, tmp_path, monkeypatch):
    calls = []

    def broken(*words, **options):
        calls.append(options)
        if len(calls) == 3:
            raise UserError("the power went")
        return draw(*words, **options)

    monkeypatch.setattr(sample_pixels, "draw", broken)
    words = f"--model {folders / 'plain'} --num-images 9 --batch-size 2 --steps 1 --output-dir {tmp_path}"
    assert status(["sample", *words.split()]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"{k:05d}.png" for k in range(4)), "prompts.jsonl"]
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 4


def test_a_sheet_shows_the_first_hundred(sampled):
    images, _, out = sampled("--num-images", "103", "--batch-size", "32", "--steps", "1")
    assert len(images) == 103
    assert len(contact_sheet.cells(Image.open(out / "grid.png"))) == 100


def test_steps_are_all_of_ddpm_and_50_of_others(sampled):
    images, _, _ = sampled("--scheduler", "ddim", "--eta", "0.5")
    assert "Steps: 50, Sampler: DDIMScheduler" in images[0].text["parameters"]
    images, _, _ = sampled(model="rgba")
    assert "Steps: 100, Sampler: DDPMScheduler" in images[-1].text["parameters"]
    assert images[-1].mode == "RGBA"


def test_the_variance_of_ddpm_s_steps_may_be_chosen_anew(sampled, folders):
    words = ["--steps", "6", "--num-images", "1"]
    images, _, _ = sampled(*words, "--variance-type", "fixed_large")
    unet = UNet2DModel.from_pretrained(folders / "plain" / "unet").eval()
    small, large = (
        to_images(draw(unet, DDPMScheduler(variance_type=kind), [0], steps=6))[0].tobytes()
        for kind in ("fixed_small", "fixed_large")
    )
    assert images[0].tobytes() == large != small
    assert "Variance: fixed_large" in images[0].text["parameters"]
    same, _, _ = sampled(*words, "--variance-type", "fixed_small")
    assert same[-1].tobytes() == small == sampled(*words)[0][-1].tobytes()


def test_classes_on_the_command_line(sampled, folders):
    words = [
        "--class",
        "three",
        "one",
        "--num-images",
        "2",
        "--steps",
        "3",
        "--guidance-scale",
        "2",
        "--batch-size",
        "3",
    ]
    images, records, _ = sampled(*words, model="classes")
    assert [(r["class"], r["text"], r["seed"]) for r in records] == [
        (name, name, k) for k, name in enumerate(["three", "three", "one", "one"])
    ]
    unet = UNet2DModel.from_pretrained(folders / "classes" / "unet").eval()
    expected = draw(unet, DDPMScheduler(), [2], steps=3, labels=torch.tensor([0]), guidance_scale=2.0)
    assert np.abs(np.asarray(images[2], int) - np.asarray(to_images(expected)[0], int)).max() <= 1
    assert "CFG scale: 2.0" in images[2].text["parameters"]


@pytest.mark.parametrize("model", ["plain", "classes"])
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_a_classifier_on_the_command_line(sampled, folders, model, scheduler):
    words = f"--class two --num-images 3 --batch-size 2 --steps 5 --scheduler {scheduler}"
    images, _, _ = sampled(
        *words.split(), "--classifier", "FOLDERS/classifier", "--classifier-scale", "20", model=model
    )
    labels, classifier = torch.tensor([1]), NoisyClassifier.from_pretrained(folders / "classifier").eval()
    options = {"steps": 5, "labels": labels if model == "classes" else None}
    unet, sampler = (
        UNet2DModel.from_pretrained(folders / model / "unet"),
        make_scheduler(scheduler, DDPMScheduler(), True),
    )
    plain, guided = (
        to_images(draw(unet, sampler, [2], guides=guides, **options))[0]
        for guides in ([], [ByClassifier(classifier, labels, 20.0)])
    )
    assert plain.tobytes() != guided.tobytes()
    assert np.abs(np.asarray(images[2], int) - np.asarray(guided, int)).max() <= 1


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm++"])
def test_half_precision(sampled, scheduler):
    words = f"--steps 3 --num-images 2 --mixed-precision bf16 --scheduler {scheduler} --class one"
    guides = "--classifier FOLDERS/classifier --clip-model FOLDERS/clip --clip-guidance-scale 2 --prompt dog"
    images, records, _ = sampled(*words.split(), *guides.split(), model="classes")
    assert len(images) == 2
    assert records[0]["text"] == "one, dog"


def test_clip_on_the_command_line(sampled):
    plain, _, _ = sampled("--num-images", "2", "--steps", "4")
    words = ["--num-images", "2", "--steps", "4", "--prompt", "a red circle", "--clip-model", "FOLDERS/clip"]
    images, records, _ = sampled(*words, "--clip-guidance-scale", "30")
    assert [(r["text"], r["seed"]) for r in records[2:]] == [("a red circle", 0), ("a red circle", 1)]
    assert all(a.tobytes() != b.tobytes() for a, b in zip(plain, images[2:], strict=True))


def test_a_strip_shows_the_way(sampled):
    images, _, out = sampled("--steps", "20", "--strip", "5", "--num-images", "2", "--batch-size", "1")
    cells = contact_sheet.cells(Image.open(out / "strip.png"))
    assert [text for _, text in cells] == ["t = 950", "t = 700", "t = 450", "t = 250", "t = 0"]
    last = np.asarray(cells[-1][0].convert("L"), int)
    assert np.abs(last - np.asarray(images[0], int)).max() <= 1  # at timestep 0 the estimate is the image


def test_a_row_between_two_images(sampled, folders):
    words = ["--interpolate", "FOLDERS/a.png", "FOLDERS/b.png", "--interpolate-count", "3", "--steps", "1000"]
    images, _, out = sampled(*words, "--interpolate-timestep", "2", "--scheduler", "ddim")
    assert len(images) == 5
    cells = contact_sheet.cells(Image.open(out / "interpolation.png"))
    assert [text for _, text in cells] == [
        "source", "0, reconstructed", "0.25", "0.5", "0.75", "1, reconstructed", "source"
    ]  # fmt: skip
    row = [np.asarray(cell.convert("L"), int) for cell, _ in cells]
    with Image.open(folders / "a.png") as source:
        assert np.array_equal(row[0], np.asarray(source.crop((2, 0, 10, 8)), int))  # the middle
    for found, wanted in ((row[1], row[0]), (row[5], row[6]), (row[3], (row[0] + row[6]) / 2)):
        assert np.abs(found - wanted).mean() < 10  # nothing is lost two timesteps from the images
    assert not (out / "grid.png").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--prompt x", "--prompt: a model of pixels knows no prompts"),
        ("--adapter x --negative-prompt y", "--adapter, --negative-prompt: not for a model of pixels"),
        ("--width 16 --height 16", "--width, --height: not for a model of pixels"),
        ("--class one", "knows no classes; a --classifier can steer"),
        ("--model FOLDERS/classes --class thre", "knows one, two, three; did you mean three?"),
        ("--model FOLDERS/unnamed --class one", "no classes.json that names them"),
        ("--model FOLDERS/miscounted --class one", "names 2 classes, but the network has 3 and the null class"),
        ("--model tiny --prompt x --class one", "--classes: not for a text-to-image model"),
        ("--classifier FOLDERS/classifier", "classifier needs a class to steer towards"),
        ("--classifier-scale 2", "classifier_scale has no effect without classifier"),
        ("--classifier FOLDERS/classifier --class seven", "knows one, two, three"),
        ("--classifier FOLDERS/nowhere --class one", "not a classifier of noised images"),
        ("--classifier FOLDERS/clip --class one", "not a classifier of noised images"),
        ("--classifier FOLDERS/nan --class one", "NaN or infinite (first conv_in.weight"),
        ("--classifier FOLDERS/lost --class one", "tensors are missing from its file (conv_in.weight)"),
        ("--classifier FOLDERS/classifier-16 --class one", "made for 16 pixels a side, the model for 8"),
        ("--classifier FOLDERS/classifier-rgb --class one", "made for 3 channels, the model for 1"),
        ("--classifier FOLDERS/classifier-cosine --class one", "its beta_schedule is squaredcos_cap_v2, the model's"),
        ("--classifier FOLDERS/classifier-500 --class one", "its num_train_timesteps is 500, the model's 1000"),
        ("--classifier FOLDERS/classifier-beta --class one", "trained with betas from 0.0001 to 0.01, the model with"),
        ("--clip-model FOLDERS/clip --prompt x", "clip_guidance_scale and clip_model: give both or neither"),
        ("--clip-model FOLDERS/clip --clip-guidance-scale 2", "--clip-model: needs a --prompt"),
        ("--clip-model FOLDERS/nowhere --clip-guidance-scale 2 --prompt x", "--clip-model"),
        ("--clip-model FOLDERS/plain --clip-guidance-scale 2 --prompt x", "--clip-model"),
        ("--guidance-scale 3", "--guidance-scale 3: guides towards a class, and FOLDERS/plain knows no classes"),
        ("--model FOLDERS/classes --guidance-scale 3", "FOLDERS/classes was asked for no --class"),
        ("--model FOLDERS/classes --class one --guidance-rescale 0.7", "--guidance-rescale: reduces the effect of"),
        ("--eta 0.5", "--eta: the noise of --scheduler ddim"),
        (
            "--variance-type fixed_large --scheduler ddim",
            "--variance-type: is for --scheduler ddpm; DDIMScheduler sets",
        ),
        ("--variance-type learned", "--variance-type"),
        ("--interpolate-timestep 100", "interpolate_timestep has no effect without interpolate: add --interpolate"),
        ("--interpolate-count 3", "interpolate_count has no effect without interpolate"),
        ("--steps 1001", "--steps 1001: this model has 1000 timesteps"),
        ("--interpolate FOLDERS/a.png", "interpolate is between two images, not 1"),
        ("--interpolate FOLDERS/a.png FOLDERS/none.png", "none.png: No such file"),
        ("--interpolate FOLDERS/a.png FOLDERS/text.png", "text.png: not an image that can be read"),
        ("--interpolate FOLDERS/a.png FOLDERS/b.png --num-images 2", "--interpolate: one row"),
        (
            "--interpolate FOLDERS/a.png FOLDERS/b.png --scheduler euler",
            "starts from noise only",
        ),
        ("--interpolate FOLDERS/a.png FOLDERS/b.png --interpolate-timestep 1000", "the last of this model is 999"),
    ],
)
def test_bad_input_is_one_line(folders, tmp_path, capsys, words, told):
    given = [word.replace("FOLDERS", str(folders)) for word in words.split()]
    if "--model" not in given:
        given = ["--model", str(folders / "plain"), *given]
    assert status(["sample", "--output-dir", str(tmp_path / "out"), *given]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and told.replace("FOLDERS", str(folders)) in lines[0]
    assert not list(Path(tmp_path).glob("out/*"))


def test_what_cannot_be_drawn_from_code():
    with pytest.raises(UserError, match="no classes"):
        draw(tiny_unet(), DDPMScheduler(), [0], steps=2, labels=torch.tensor([0]))
    three = UNet2DModel(
        8,
        1,
        3,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(UserError, match="only twice the channels"):
        draw(three, DDPMScheduler(), [0], steps=2)
