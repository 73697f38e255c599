"""``sdtune custom-diffusion``: what reads the text and new words, as stock diffusers loads them; several subjects."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdtune.config.methods.custom_diffusion import CustomDiffusionConfig
from sdtune.config.sections import UserError
from sdtune.config.verbs import EvaluateConfig
from sdtune.data import Mixture, Stream
from sdtune.evaluation.inputs import plan_of
from sdtune.models import families
from sdtune.recipes.custom_diffusion import CustomDiffusion
from tests.conftest import status
from tests.families import pipelines
from tests.image_folders import paint

FILE = "pytorch_custom_diffusion_weights.safetensors"
SMALL = ["--steps", "4", "--learning-rate", "0.1"]
PROMPT = "a <thing> circle and an <other> on it"


def recipe_of(base, dataset, out, **options):
    families.silence_libraries()
    settings = {"resolution": 32, "cache": False, "learning_rate": 0.1, "output_dir": out} | options
    return CustomDiffusion(
        CustomDiffusionConfig(model=str(base), dataset=str(dataset), **settings), torch.device("cpu")
    )


def sampled(out, *words):
    assert status(["sample", "--prompt", PROMPT, "--steps", "3", "--seed", "5", "--output-dir", str(out), *words]) == 0
    return np.asarray(Image.open(out / "00000.png"))


def drawn(card, base, run):
    """The image of the card's own lines, with as many steps and the seed of `sampled`."""
    code = card.partition("```python\n")[2].partition("```")[0].replace(f'"path/to/{base.name}"', repr(str(base)))
    code = code.replace(f'"path/to/{run.name}"', repr(str(run))).replace(f'"path/to/{run.name}/', f'"{run}/')
    before, _, _ = code.rpartition("image = ")
    more = "num_inference_steps=3, guidance_scale=5.0, generator=torch.Generator('cpu').manual_seed(5)"
    names = {"torch": torch}
    exec(f"{before}pipe.set_progress_bar_config(disable=True)\nimage = pipe({PROMPT!r}, {more}).images[0]", names)
    return np.asarray(names["image"])


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_lines_of_the_card_give_the_image_of_sdtune_sample(name, sd, shared, tmp_path):
    base = sd if name == "sd" else pipelines.save(pipelines.sdxl, tmp_path / "sdxl")
    run = shared("custom-diffusion", *SMALL) if name == "sd" else tmp_path / "run"
    if name == "sdxl":
        recipe = recipe_of(base, "tiny-subject", run, caption="a <thing>", placeholder_token=["<thing>"])
        run.mkdir()
        files = recipe.export(run)
        assert [file.name for file in files] == [FILE, "learned_embeds.safetensors"]
        assert load_file(files[1]).keys() == {"clip_l", "clip_g"}
        return
    assert json.loads((run / "artefact.json").read_text())["files"] == sorted(
        [FILE, "learned_embeds.safetensors", "learned_embeds_2.safetensors"]
    )
    ours, card = sampled(tmp_path / "ours", "--adapter", str(run)), (run / "README.md").read_text()
    assert "_pipeline=pipe" in card and "Weights of the cross-attention and of new words" in card
    assert np.array_equal(ours, drawn(card, base, run))
    assert plan_of(
        EvaluateConfig(samples=str(run), reference="tiny-subject", output_dir=tmp_path / "e")
    ).sampling.adapter
    stock = diffusers.DiffusionPipeline.from_pretrained(base)
    before = stock.unet.state_dict()
    stock.unet.load_attn_procs(run, weight_name=FILE)  # as its own example does, which changes nothing
    assert stock.unet.state_dict().keys() == before.keys()


def test_it_begins_as_the_base_and_moves_only_what_reads_the_text(sd, pictures, tmp_path):
    options = {"caption": "a <thing> and an <other>", "placeholder_token": "<thing>+<other>"}
    recipe = recipe_of(sd, pictures, tmp_path, **options, initializer_token="circle+square")
    dataset = recipe.dataset(2, lambda line: None)
    batch = torch.utils.data.default_collate([dataset[0], dataset[1]])
    plain = families.load(recipe.cfg, torch.device("cpu"), torch.float32)
    text, x_t, t = recipe.family.conditioning(batch), batch["noise"], torch.tensor([3, 700])
    assert torch.allclose(recipe.family.predict(x_t, t, text), plain.predict(x_t, t, text), atol=1e-5)
    loss, figures = recipe(batch)
    loss.mean().backward()
    moved = {name for name, p in recipe.named_parameters() if p.grad is not None and p.grad.any()}
    words = {name for name in moved if name.endswith("rows")}
    assert len(words) == 2 and all("attn2.processor.to_" in name for name in moved - words)
    assert {"embedding_norm_of_word_1", "embedding_norm_of_word_2"} == figures.keys()
    started = [word.rows["text_encoder"] for word in recipe.words]
    assert not torch.equal(*started) and [len(rows) for rows in started] == [1, 1]


def concepts(tmp_path, sizes=(2, 5), of_class=True):
    listed = []
    for k, (size, word) in enumerate(zip(sizes, ("<thing>", "<other>"), strict=True)):
        for kind, count in (("photos", size), *([("class", 3)] if of_class else [])):
            for n in range(count):
                paint(tmp_path / f"{kind}-{k}" / f"{n}.png", (40, 40), shade=50 * k + n)
        entry = {"instance_data_dir": str(tmp_path / f"photos-{k}"), "instance_prompt": f"a {word} circle"}
        of = {"class_data_dir": str(tmp_path / f"class-{k}"), "class_prompt": "a circle"}
        listed.append(entry | (of if of_class else {}))
    (tmp_path / "concepts.json").write_text(json.dumps(listed))
    return tmp_path / "concepts.json"


def test_subjects_and_their_classes_take_turns(sd, tmp_path, capsys):
    file, words = concepts(tmp_path), ["<thing>", "<other>"]
    more = {"prior_preservation": True, "num_class_images": 3, "placeholder_token": words, "num_holdout_images": 1}
    recipe = recipe_of(sd, file, tmp_path / "run", **more)
    dataset = recipe.dataset(4, print)
    stream = dataset.stream
    seen, held = [stream[p] for p in range(40)], stream.holdout[0]
    assert [s.part for s in seen] == [0, 1, 2, 3] * 10 and held.part == 0 and stream.epoch_length == 4 * 5
    assert [s.caption for s in seen[:4]] == ["a <thing> circle", "a <other> circle", "a circle", "a circle"]
    shown = [{s.index for s in seen if s.part == k} for k in range(4)]
    assert shown == [{0, 1} - {held.index}, {2, 3, 4, 5, 6}, {7, 8, 9}, {10, 11, 12}]
    assert "of 2 concepts, 6 of them of the class" in capsys.readouterr().out
    batch = torch.utils.data.default_collate([dataset[p] for p in range(4)])
    with torch.no_grad():
        whole, _ = recipe(batch)
        recipe.cfg = recipe.cfg.model_copy(update={"prior_loss_weight": 0.0})
        assert torch.equal(recipe(batch)[0], torch.cat([whole[:2], torch.zeros(2)]))
    cfg = recipe.cfg.model_copy(update={"num_holdout_images": 6})
    with pytest.raises(UserError, match="leaves nothing of one of the 2 concepts"):
        Stream(cfg, recipe.images, 4)


def test_class_images_are_made_for_each_subject(sd, tmp_path, capsys):
    file = concepts(tmp_path, of_class=False)
    listed = [entry | {"class_prompt": f"a circle {k}"} for k, entry in enumerate(json.loads(file.read_text()))]
    file.write_text(json.dumps(listed))
    out = tmp_path / "run"
    words = [
        "custom-diffusion",
        "--concepts-list",
        str(file),
        "--modifier_token",
        "<thing>+<other>",
        "--model",
        str(sd),
    ]
    words += ["--with_prior_preservation", "--num-class-images", "2", "--class-inference-steps", "1", "--steps", "1"]
    words += ["--resolution", "32", "--num-validation-images", "0", "--dataloader-num-workers", "0"]
    assert status([*words, "--output-dir", str(out)]) == 0
    made = sorted(str(p.relative_to(out)) for p in (out / "class-pictures").rglob("*.png"))
    assert made == [f"class-pictures/{k}/made-{n:05d}.png" for k in range(2) for n in range(2)]
    assert "for each of 2 concepts" in capsys.readouterr().out


def test_a_mixture_finds_the_image_of_every_part(pictures, tmp_path, sd):
    recipe = recipe_of(sd, pictures, tmp_path)
    one = recipe.subjects[0]
    mixed = Mixture(one, one, one, subjects=2)
    assert mixed.sizes == [11, 11, 11] and mixed.read(12) == one.read(1) and mixed.read(32) == one.read(10)
    stream = Stream(recipe.cfg, mixed, 3)
    assert [stream[p].part for p in range(6)] == [0, 1, 2, 0, 1, 2]


def test_previews_bf16_and_checkpointing_without_a_new_word(sd, pictures, tmp_path):
    words = ["custom-diffusion", "--model", str(sd), "--dataset", str(pictures), "--resolution", "32", "--steps", "1"]
    words += ["--mixed-precision", "bf16", "--gradient-checkpointing", "--num-validation-images", "1", "--caption", "x"]
    words += [
        "--validation-inference-steps",
        "1",
        "--dataloader-num-workers",
        "0",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert status(words) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / FILE).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", "--adapter", "{run}=0.5", "--prompt", "x"], "they have no weight, and go with no other adapter"),
        (["sample", "--adapter", "{run}", "--model", "tiny", "--prompt", "x"], "made for another base"),
        (["convert", "{run}/" + FILE, "{tmp}/x.safetensors", "--to", "kohya"], "holds weights of Custom Diffusion"),
        (["custom-diffusion", "--dataset", "{tmp}/no.json"], "--concepts-list {tmp}/no.json: cannot be read"),
        (["custom-diffusion", "--dataset", "{tmp}/a.json"], "entry 1: color is none of instance_data_dir"),
        (
            ["custom-diffusion", "--dataset", "{tmp}/b.json", "--prior-preservation"],
            "entry 1: --prior-preservation needs",
        ),
        (["custom-diffusion", "--dataset", "{tmp}/b.json", "--instance-prompt", "x"], "says it for each subject"),
        (["custom-diffusion", "--dataset", "d", "--placeholder-token", "a b"], "wants one word"),
        (["custom-diffusion", "--dataset", "d", "--placeholder-token", "<a>", "<A>"], "there twice"),
        (
            ["custom-diffusion", "--dataset", "{pictures}", "--placeholder-token", "<a>", "<b>", "--model", "{sd}"],
            "11 of 11 captions do not say one of them",
        ),
        (["custom-diffusion", "--dataset", "{pictures}", "--model", "tiny-flow"], "gets no Custom Diffusion here"),
    ],
)
def test_mistakes_are_one_line(words, told, shared, sd, pictures, tmp_path, capsys):
    run = shared("custom-diffusion", *SMALL) if "{run}" in " ".join(words) else None
    (tmp_path / "a.json").write_text('[{"color": "red"}]')
    (tmp_path / "b.json").write_text('[{"instance_data_dir": "d"}]')
    places = {"run": run, "tmp": tmp_path, "pictures": pictures, "sd": sd}
    words = [word.format(**places) for word in words]
    out = [] if words[0] == "convert" else ["--output-dir", str(tmp_path / "out")]
    out += ["--resolution", "32"] if words[0] == "custom-diffusion" else []
    assert status([*words, *out]) == 2
    said = capsys.readouterr().err
    assert told.format(**places) in said and said.count("\n") == 1
