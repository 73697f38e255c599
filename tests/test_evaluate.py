"""``sdtune evaluate``: the network that comes along, the cache, the judges, and the command on small folders."""

import hashlib
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import transformers
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import nn

from sdtune.config.sections import Data, UserError
from sdtune.data import load_images, toy_pairs, toy_world
from sdtune.evaluation import features, inception
from sdtune.evaluation.distances import frechet
from sdtune.evaluation.features import BATCH, RandomConv, embed, embed_each, features_of, load_network, square
from sdtune.evaluation.judges import named
from sdtune.models.noisy_classifier import NoisyClassifier
from sdtune.models.vision import load_clip
from tests.conftest import status
from tests.tinyclip import save_tiny_clip, write_preprocessor

SHAPES = ("disc", "box")


def shape(kind: str, seed: int, side: int = 16) -> Image.Image:
    """A disc or a box on grey, of random size and colour."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] - side / 2 + g.uniform(-2, 2, (2, 1, 1))
    r = g.uniform(3, 6)
    inside = np.hypot(x, y) < r if kind == "disc" else np.maximum(abs(x), abs(y)) < r
    pixels = np.where(inside[..., None], g.integers(100, 256, 3), 60)
    return Image.fromarray(pixels.astype(np.uint8))


def folder(path: Path, kinds=SHAPES, count=24, first=0) -> Path:
    """``count`` pictures in folders named as what they show."""
    for k in range(count):
        kind = kinds[k % len(kinds)]
        (path / kind).mkdir(parents=True, exist_ok=True)
        shape(kind, first + k).save(path / kind / f"{k:03}.png")
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("sets") / "reference")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """As `sdtune sample` leaves them: numbered, a sheet beside them, and a line for each in prompts.jsonl."""
    out = tmp_path_factory.mktemp("sets") / "samples"
    out.mkdir()
    with (out / "prompts.jsonl").open("w") as lines:
        for k in range(20):
            shape(SHAPES[k % 2], 100 + k).save(out / f"{k:05}.png")
            entry = {"file_name": f"{k:05}.png", "text": f"a {SHAPES[k % 2]}", "class": SHAPES[k % 2], "seed": k}
            lines.write(json.dumps(entry) + "\n")
    Image.new("RGB", (200, 200), "red").save(out / "grid.png")
    return out


@pytest.fixture(scope="session")
def clip(once) -> Path:
    return once("clip-of-words", save_tiny_clip)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A classifier of random weights, of transformers, that tells discs and boxes."""
    out = tmp_path_factory.mktemp("models") / "judge"
    torch.manual_seed(1)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=dict(enumerate(SHAPES))
    )
    transformers.ResNetForImageClassification(config).save_pretrained(out)
    write_preprocessor(out, 16)
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of the right tensors for Inception, with random numbers in them."""
    file = tmp_path_factory.mktemp("models") / "inception.pth"
    torch.manual_seed(0)
    network = inception.Inception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict() | {"fc.weight": torch.zeros(1008, 2048)}, file)
    return file


def images_of(path: Path):
    return load_images(Data(dataset=str(path), resolution=8), captions=False)


def run(*words, out: Path) -> dict:
    assert status(["evaluate", *map(str, words), "--output-dir", str(out)]) == 0
    return json.loads((out / "evaluation.json").read_text())


# ---- features ------------------------------------------------------------------------------------------


def test_the_weights_that_come_along_are_always_the_same():
    sha = hashlib.sha256(b"".join(conv.weight.detach().numpy().tobytes() for conv in RandomConv().convs))
    assert sha.hexdigest()[:16] == "acb17f7cf652c855"
    assert RandomConv().convs[0].weight.flatten()[:3].tolist() == pytest.approx(
        [0.1291287, -0.2170472, -0.4327743], abs=1e-7
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [8, 64, 100])
def test_features_of_any_pixels(channels, side):
    pixels = torch.rand(3, channels, side, side + 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    out = embed(pixels, load_network("random-conv"))
    assert out.shape == (3, 256) and out.isfinite().all()
    assert not torch.equal(out[0], out[1])


def test_grey_is_three_times_grey_and_transparency_lies_on_white():
    grey, network = torch.rand(2, 1, 8, 8) * 2 - 1, load_network("random-conv")
    assert torch.equal(embed(grey, network), embed(grey.expand(-1, 3, -1, -1), network))
    opaque, clear = torch.ones_like(grey), -torch.ones_like(grey)
    assert torch.allclose(embed(torch.cat([grey, opaque], 1), network), embed(grey, network), atol=1e-6)
    assert torch.equal(embed(torch.cat([grey.expand(-1, 3, -1, -1), clear], 1), network), embed(opaque, network))


def test_resizing_is_pillow_s_on_numbers_that_are_not_rounded():
    pixels = torch.rand(1, 50, 70, generator=torch.Generator().manual_seed(0))
    ours = square(pixels * 2 - 1, 24)[0].numpy()
    pillow = np.array(Image.fromarray(pixels[0].numpy()).resize((24, 24), Image.Resampling.BICUBIC)).clip(0, 1)
    assert np.abs(ours - pillow).max() < 1e-5


def test_neighbours_in_a_batch_do_not_show():
    pixels = torch.rand(BATCH + 5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network = load_network("random-conv")
    together = embed(pixels, network)
    assert torch.equal(embed(pixels[BATCH:], network), together[BATCH:])
    assert torch.equal(embed(pixels.flip(0), network), together.flip(0))


def test_features_see_what_changed():
    """Noise, other colours and a missing kind each lie further from a set than another draw of the same kinds."""
    network = load_network("random-conv")

    def of(first, kinds=SHAPES, change=lambda p: p):
        pictures = [np.array(shape(kinds[k % len(kinds)], first + k)) for k in range(200)]
        return embed(change(torch.tensor(np.array(pictures)).permute(0, 3, 1, 2) / 127.5 - 1), network)

    here = of(0)
    same = frechet(of(1000), here)
    noise = 0.3 * torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert frechet(of(1000, change=lambda p: p + noise), here) > 2 * same
    assert frechet(of(1000, change=lambda p: p.flip(1) * 0.8), here) > 2 * same
    assert frechet(of(1000, kinds=("disc",)), here) > 1.5 * same


def test_what_was_met_before_is_not_computed_again(reference, tmp_path, monkeypatch):
    network = load_network("random-conv")
    first = features_of(images_of(reference), network)
    moved = tmp_path / "elsewhere"
    shutil.copytree(reference, moved)
    monkeypatch.setattr(features, "forward", lambda *a: pytest.fail("computed again"))
    assert torch.equal(features_of(images_of(moved), network), first)


def test_another_kind_of_device_computes_again_and_no_factor_is_tf32(reference, monkeypatch):
    """The last digits depend on the kind of device, and figures compare between machines."""
    seen = []

    class Watched(RandomConv):
        def forward(self, x):
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().forward(x)

    network = Watched(0).eval()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    try:
        features_of(images_of(reference), network)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("highest", False)}
    passes = len(seen)
    features_of(images_of(reference), network)
    assert len(seen) == passes
    monkeypatch.setattr(features, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(features, "forward", lambda squares, network: network(torch.stack(list(squares))))
    features_of(images_of(reference), network)
    assert len(seen) > passes


def test_another_network_has_a_cache_of_its_own(reference):
    one, other = RandomConv(0).eval(), RandomConv(1).eval()
    assert not torch.equal(features_of(images_of(reference), one), features_of(images_of(reference), other))


def test_features_of_a_dino_like_model(reference, tmp_path):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    write_preprocessor(tmp_path, 28)
    network = load_network(str(tmp_path))
    images = images_of(reference)
    assert network.label == "dinov2"
    pixels = features.read(images, 5, 28)
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    by_hand = network.model(pixel_values=((pixels - mean) / std)[None]).pooler_output[0]
    assert torch.allclose(features_of(images, network)[5], by_hand, atol=1e-5)


@pytest.mark.fault("Weights of a network that judges images are incomplete", "Refused: random numbers are no figure.")
def test_a_network_whose_pooled_output_would_be_random_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    write_preprocessor(tmp_path, 32)
    with pytest.raises(UserError, match=r"2 of \d+ tensors are missing from its file \(pooler\.dense\.bias"):
        load_network(str(tmp_path))


# ---- the Inception network -----------------------------------------------------------------------------


def test_inception_has_the_published_shape(weights):
    tensors = torch.load(weights, weights_only=True)
    assert sum(name.endswith("conv.weight") for name in tensors) == 94
    network = inception.load_inception(weights)
    assert sum(p.numel() for p in network.parameters()) == 21_785_568
    assert network.eval()(torch.rand(1, 3, 299, 299)).shape == (1, 2048)


def test_a_distance_is_an_fid_only_with_the_published_weights(weights, reference, tmp_path, monkeypatch, capsys):
    few = folder(tmp_path / "few", count=4)
    words = (few, "--reference", few, "--neighbours", "1", "--resamples", "0", "--features", weights)
    other = run(*words, out=tmp_path / "other")
    sha = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert set(other["figures"]) >= {f"frechet_inception_{sha[:8]}", f"kernel_inception_{sha[:8]}"}
    assert "fid" not in other["figures"]
    monkeypatch.setattr(inception, "SHA256", sha)
    assert {"fid", "kid"} <= run(*words, out=tmp_path / "as-published")["figures"].keys()
    assert "covariance has not full rank" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # 2026-11-29: a file as it was written once
def test_files_that_are_not_the_weights(tmp_path, weights):
    tensors = torch.load(weights, weights_only=True)
    wrong = {
        "half.pth": {k: v for k, v in tensors.items() if not k.startswith("Mixed_7")},
        "code.pth": {"Conv2d_1a_3x3.conv.weight": Path("/")},
        "list.pth": [torch.zeros(1)],
    }
    for name, content in wrong.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pth").write_text("version https://git-lfs")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "program.pt"))
    for name in (*wrong, "text.pth", "program.pt"):
        with pytest.raises(UserError, match="give weights-inception-2015-12-05-6726825d"):
            load_network(str(tmp_path / name))


def test_without_a_network_the_way_out_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match=r"no route to host.*--features random-conv"):
        load_network("inception")


# ---- the command ---------------------------------------------------------------------------------------


def test_a_folder_against_itself(reference, tmp_path, capsys):
    result = run(reference, "--reference", reference, "--resamples", "20", out=tmp_path / "out")
    found = result["figures"]
    of_subject = ["likeness_random_conv", "diversity_random_conv"]
    assert list(found) == ["frechet_random_conv", "kernel_random_conv", "precision", "recall", *of_subject]
    assert found["frechet_random_conv"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["precision"]["value"] == found["recall"]["value"] == found["recall"]["high"] == 1
    assert result["samples"]["digest"] == result["reference"]["digest"]
    picture = ElementTree.parse(tmp_path / "out" / "evaluation.svg").getroot()
    words = " ".join(e.text for e in picture.iter("{http://www.w3.org/2000/svg}text"))
    assert all(shown in words for shown in ("reference (24)", "samples (24)", *found))
    points = picture.findall(".//*[@class='samples']/{http://www.w3.org/2000/svg}circle")
    assert len(points) == 24 and all(40 < float(p.get("cx")) < 460 for p in points)
    printed, warned = capsys.readouterr()
    assert "24 images" in printed and "frechet_random_conv" in printed and "95 % interval" in printed
    assert warned.count("warning:") == 1 and "24 images for 256 features" in warned


def test_the_same_command_gives_the_same_bytes(samples, reference, tmp_path, monkeypatch):
    words = (samples, "--reference", reference, "--resamples", "10")
    run(*words, out=tmp_path / "first")
    monkeypatch.setattr(features, "forward", lambda *a: pytest.fail("computed again"))
    run(*words, out=tmp_path / "again")
    for name in ("evaluation.json", "evaluation.svg"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    seeded = run(*words, "--seed", "1", out=tmp_path / "seeded")["figures"]["precision"]
    plain = json.loads((tmp_path / "first" / "evaluation.json").read_text())["figures"]["precision"]
    assert seeded["value"] == plain["value"] and seeded["low"] != plain["low"]


def test_sheets_beside_samples_do_not_count(samples, reference, tmp_path):
    assert run(samples, "--reference", reference, out=tmp_path)["samples"]["images"] == 20


def test_clip_score_is_that_of_transformers(samples, reference, clip, tmp_path):
    found = run(samples, "--reference", reference, "--clip-model", clip, out=tmp_path)["figures"]["clip_score"]
    model, tokenizer = transformers.CLIPModel.from_pretrained(clip), transformers.AutoTokenizer.from_pretrained(clip)
    images = images_of(samples)
    scores = []
    for line in (samples / "prompts.jsonl").read_text().splitlines():
        told = json.loads(line)
        index = [row.name for row in images.rows].index(told["file_name"])
        pixels = features.read(images, index, 24)
        mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
        words = tokenizer(told["text"], return_tensors="pt")
        with torch.no_grad():
            out = model(pixel_values=((pixels - mean) / std)[None], **words)
        cosine = out.logits_per_image.item() / model.logit_scale.exp().item()
        scores.append(2.5 * max(cosine, 0))
    assert len(set(scores)) == 20 and np.mean(scores) > 0
    assert found["value"] == pytest.approx(np.mean(scores), abs=1e-5)
    assert found["low"] < found["value"] < found["high"]


@pytest.mark.parametrize("labelled", ["prompts.jsonl", "folders"])
def test_class_accuracy_is_the_classifier_s(labelled, samples, reference, judge, tmp_path):
    asked = samples if labelled == "prompts.jsonl" else reference
    result = run(asked, "--reference", reference, "--classifier", judge, out=tmp_path)
    model = transformers.ResNetForImageClassification.from_pretrained(judge).eval()
    images = images_of(asked)
    right: dict[str, list[bool]] = {kind: [] for kind in SHAPES}
    for k, row in enumerate(images.rows):
        kind = row.name.split("/")[0] if labelled == "folders" else SHAPES[int(row.name[:5]) % 2] if k < 20 else None
        if kind is None:
            continue
        mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
        with torch.no_grad():
            logits = model(pixel_values=((features.read(images, k, 16) - mean) / std)[None]).logits
        right[kind].append(SHAPES[int(logits.argmax())] == kind)
    assert result["class_accuracy_of"] == pytest.approx({kind: np.mean(right[kind]) for kind in sorted(SHAPES)})
    assert result["figures"]["class_accuracy"]["value"] == pytest.approx(np.mean(right["disc"] + right["box"]))


def test_a_model_is_sampled_first(sd, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    words = (sd, "--reference", pictures, "--num-images", "8", "--steps", "1", "--resamples", "2")
    result = run(*words, out=out)
    told = [json.loads(line) for line in (out / "samples" / "prompts.jsonl").read_text().splitlines()]
    captions = [json.loads(line)["text"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    assert result["samples"]["images"] == 8
    assert len({t["text"] for t in told}) == 8 and {t["text"] for t in told} <= set(captions)
    assert status(["evaluate", *map(str, words), "--output-dir", str(out)]) == 2
    assert "has samples already" in capsys.readouterr().err


def save_pixel_models(out: Path) -> tuple[Path, Path]:
    """A model of 16 x 16 grey pixels with two classes, and a noise-aware classifier of the same, of random weights."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
        **blocks,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(out / "model")
    down = ("DownBlock2D", "DownBlock2D")
    NoisyClassifier(16, 1, 2, down_block_types=down, attention_head_dim=8, **blocks).save_pretrained(out / "classifier")
    DDPMScheduler().save_pretrained(out / "classifier" / "scheduler")
    for name in ("model", "classifier"):
        (out / name / "classes.json").write_text(json.dumps(SHAPES))
    return out / "model", out / "classifier"


def test_a_model_of_pixels_is_sampled_class_by_class_and_judged_without_noise(reference, tmp_path):
    model, classifier = save_pixel_models(tmp_path)
    words = ("--reference", reference, "--num-images", "15", "--steps", "2", "--resamples", "2")
    result = run(model, *words, "--classifier", classifier, out=tmp_path / "out")
    images = images_of(tmp_path / "out" / "samples")
    told = (tmp_path / "out" / "samples" / "prompts.jsonl").read_text().splitlines()
    asked = {entry["file_name"]: entry["class"] for entry in map(json.loads, told)}
    assert [*asked.values()] == ["disc"] * 8 + ["box"] * 8
    network = NoisyClassifier.from_pretrained(classifier).eval()
    right = []
    for k, row in enumerate(images.rows):
        if row.name in asked:
            x = torch.from_numpy(np.array(Image.open(images.read(k)))).float()[None, None] / 127.5 - 1
            with torch.no_grad():
                right.append(SHAPES[int(network(x, torch.zeros(1, dtype=torch.long)).argmax())] == asked[row.name])
    assert len(right) == 16
    assert result["figures"]["class_accuracy"]["value"] == np.mean(right)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("star", [0]),
        ("a big Star.", [0]),
        ("two dogs and one sea star", [1]),
        ("a starfish on a stone", [1]),
        ("a RED fox", [2]),
        ("a fox in the snow", [3]),
        ("a starry night", []),
        ("a star, a fox", [0, 3]),
    ],
)
def test_a_caption_names_a_class(text, classes):
    assert named(text, ["star", "sea star, starfish", "Red Fox", "fox"]) == classes


def test_a_model_on_the_hub_is_sampled_as_well(reference, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "hub" / "models--user--discs"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    save_pixel_models(tmp_path)[0].rename(cache / "model")
    (cache / "snapshots").mkdir()
    (cache / "model").rename(cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    words = ("--reference", reference, "--num-images", "8", "--steps", "1", "--resamples", "2")
    run("user/discs", *words, out=tmp_path / "out")
    told = (tmp_path / "out" / "samples" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["class"] for line in told] == ["disc"] * 4 + ["box"] * 4
    assert status(["evaluate", "user/other", *map(str, words), "--output-dir", str(tmp_path / "x")]) == 2
    assert "SAMPLES user/other: no such folder, and as a Hub id: not in the Hub cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "words", "told"),
    [
        ("classes", "--classifier {judge}", '--classifier {judge}: "ring" names no class of it; it knows disc, box'),
        (
            "classes",
            "--num-images 6",
            "--num-images: 6 images are too few for 3 neighbours and intervals; give at least 8",
        ),
        (
            "plain",
            "--classifier {judge}",
            "--classifier: the model SAMPLES has no `class` for each image; leave it out",
        ),
        ("plain", "--clip-model {clip}", "--clip-model: the model SAMPLES has no `text` for each image; leave it out"),
        ("unfinished", "", "this run has no model that draws"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_draws(
    kind, words, told, reference, judge, clip, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sdtune.evaluation.evaluate.sample", lambda cfg: pytest.fail("drew"))
    model, _ = save_pixel_models(tmp_path)
    (model / "classes.json").write_text(json.dumps(["disc", "ring"]))
    if kind == "plain":
        (model / "classes.json").unlink()
    if kind == "unfinished":
        (model / "model_index.json").unlink()
        (model / "metrics.jsonl").touch()
    out = tmp_path / "out"
    assert (
        status(
            [
                "evaluate",
                str(model),
                "--reference",
                str(reference),
                "--output-dir",
                str(out),
                *words.format(judge=judge, clip=clip).split(),
            ]
        )
        == 2
    )
    assert told.format(judge=judge) in capsys.readouterr().err


# ---- what is wrong with a command ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("{samples}", "--reference: is required"),
        ("nowhere --reference {reference}", "SAMPLES nowhere: no such folder"),
        ("{samples} --reference nowhere", "--reference nowhere: no such folder"),
        ("{empty} --reference {reference}", "SAMPLES {empty}: no images in"),
        ("{samples} --reference {empty}", "--reference {empty}: no images in"),
        ("{samples} --reference {reference} --features random-conf", "did you mean random-conv?"),
        ("{samples} --reference {reference} --features ./nowhere", "no such network, file or folder"),
        ("{samples} --reference {reference} --features {empty}", "cannot be loaded as a model of images"),
        ("{samples} --reference {reference} --features no/body", "cannot be loaded as a model of images"),
        ("{reference} --reference {samples} --clip-model {clip}", "has no `text` for each image"),
        ("{samples} --reference {samples} --clip-model {judge}", "reads no text"),
        ("{flat} --reference {samples} --classifier {judge} --neighbours 1", "has no `class` for each image"),
        ("{other} --reference {samples} --classifier {judge}", '"star" names no class of it; it knows disc, box'),
        ("{samples} --reference {flat}", "--reference: 5 images are too few for 3 neighbours"),
        ("{samples} --reference {flat} --neighbours 5 --resamples 0", "give at least 6"),
        ("{samples} --reference {reference} --resamples 1", "a single one has no spread"),
        ("{samples} --reference {reference} --output-dir {samples}/evaluation", "is inside SAMPLES, among its images"),
        ("{samples} --reference {reference} --output-dir {reference}", "is inside --reference, among its images"),
        ("{gap} --reference {reference}", "names 00099.png, which does not exist"),
        ("{broken} --reference {reference}", "prompts.jsonl:2: not JSON"),
    ],
)
def test_mistakes_are_told_in_a_line(words, told, samples, reference, clip, judge, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"samples": samples, "reference": reference, "clip": clip, "judge": judge}
    for name in ("empty", "flat", "other", "gap", "broken"):
        places[name] = tmp_path / name
        places[name].mkdir()
    for k in range(5):
        shape("disc", k).save(places["flat"] / f"{k}.png")
    folder(places["other"], kinds=("star",), count=8)
    for name, line in (("gap", '{"file_name": "00099.png"}'), ("broken", "{")):
        shutil.copytree(samples, places[name], dirs_exist_ok=True)
        first, _, _ = (samples / "prompts.jsonl").read_text().partition("\n")
        (places[name] / "prompts.jsonl").write_text(f"{first}\n{line}\n")
    assert status(["evaluate", *words.format(**places).split()]) == 2
    message = capsys.readouterr().err
    assert told.format(**places) in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "evaluation" / "evaluation.json").exists()


def test_the_overlap_of_edges_is_one_for_what_was_followed(reference, tmp_path, capsys):
    """Each sample follows its own edges, and then those of another image."""
    folder = tmp_path / "samples"
    folder.mkdir()
    (tmp_path / "edges").mkdir()
    draws = [toy_world.render(toy_world.random_scene(np.random.default_rng(k)), 32, 32) for k in range(8)]
    for k, image in enumerate(draws):
        image.save(folder / f"{k}.png")
        toy_pairs.edge_image(image).save(tmp_path / "edges" / f"{k}.png")
    words = ["evaluate", str(folder), "--reference", str(reference), "--resamples", "0", "--condition", "edges"]
    for shift, expected in ((0, 1.0), (1, None)):
        lines = [
            {"file_name": f"{k}.png", "image": str(tmp_path / "edges" / f"{(k + shift) % 8}.png")} for k in range(8)
        ]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert status([*words, "--output-dir", str(tmp_path / f"out-{shift}")]) == 0
        value = json.loads((tmp_path / f"out-{shift}" / "evaluation.json").read_text())["figures"]["edge_overlap"][
            "value"
        ]
        assert value == expected if expected else 0 < value < 0.7
    capsys.readouterr()
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"file_name": f"{k}.png"}) + "\n" for k in range(8)))
    assert status([*words, "--output-dir", str(tmp_path / "no")]) == 2
    assert "has no `image` for each image" in capsys.readouterr().err


def test_the_direction_of_an_edit_turns_with_its_captions(reference, clip, tmp_path, capsys):
    """Discs that became boxes; with the captions the other way round the same cosine is negative."""
    folder = tmp_path / "samples"
    folder.mkdir()
    (tmp_path / "discs").mkdir()
    before, after = ([shape(kind, 60 + k) for k in range(8)] for kind in ("disc", "box"))
    for k in range(8):
        before[k].save(tmp_path / "discs" / f"{k}.png")
        after[k].save(folder / f"{k}.png")
    words = ["evaluate", str(folder), "--reference", str(reference), "--resamples", "0", "--condition", "edit"]
    assert status([*words, "--output-dir", str(tmp_path / "blind")]) == 2
    assert "give clip_model" in capsys.readouterr().err
    words += ["--clip-model", str(clip)]
    found = []
    for texts in (("a disc", "a box"), ("a box", "a disc"), ("a disc", None)):
        lines = [
            {"file_name": f"{k}.png", "image": str(tmp_path / "discs" / f"{k}.png"), "text": "box"}
            | dict(zip(("text_before", "text_after"), texts, strict=True))
            for k in range(8)
        ]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        out = tmp_path / f"out-{len(found)}"
        if None in texts:
            assert status([*words, "--output-dir", str(out)]) == 2
            assert "--before and --after" in capsys.readouterr().err
        else:
            assert status([*words, "--output-dir", str(out)]) == 0
            found.append(json.loads((out / "evaluation.json").read_text())["figures"]["edit_direction"]["value"])
    model = transformers.CLIPModel.from_pretrained(clip)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    read = [
        model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output for text in ("a disc", "a box")
    ]
    network = load_clip(str(clip))[0]
    seen = [
        embed_each([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images], network)
        for images in (before, after)
    ]
    expected = torch.nn.functional.cosine_similarity(seen[1] - seen[0], read[1] - read[0]).mean().item()
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert found[1] == pytest.approx(-expected, abs=1e-5)
