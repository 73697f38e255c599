"""The lines that a card gives for use run as they stand, whatever the run has made."""

import json
import re
import shlex
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image

from sdtune.config.methods.dreambooth import DreamBoothConfig
from sdtune.config.methods.new_word import NewWord
from sdtune.config.sections import Data, Hub, Model, Optim, Preview, Prompts, Run
from sdtune.models import pipeline_folder
from sdtune.models.formats import embedding
from sdtune.publish import model_card
from sdtune.publish.origin import Origin
from sdtune.run import artefacts, usage
from sdtune.run.contact_sheet import cells
from sdtune.run.folder import begin
from sdtune.run.settings import RunSettings, read
from tests.conftest import command, status
from tests.test_card import LOCAL, api  # noqa: F401

pytestmark = pytest.mark.usefixtures("api")  # which looks at the front matter of a card


class Scratch(Data, Optim, Preview, Hub, Run):
    """Settings of a run with no base, no prompts and no adapter."""

    method: ClassVar[str] = "scratch"


class Gain(Scratch):
    """Settings of a recipe of one's own."""

    gain: int = 1


class Word(NewWord, Model, Data, Optim, Prompts, Preview, Hub, Run):
    """Settings of a run that learns a word."""

    method: ClassVar[str] = "word"
    placeholder_token: str = "<circle>"


class Subject(DreamBoothConfig):
    """Settings of a run that changes a whole base."""

    instance_prompt: str = "a photo of sks dog"


@pytest.fixture(scope="module")
def lora_run(sd, pictures, tmp_path_factory):
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path_factory.mktemp("usage") / "run"
    shown = ["--validation-prompt", 'a "red" circle', "--num-validation-images", "1"]
    words = command(
        sd, pictures, out, "--steps", "4", *shown, "--validation-inference-steps", "2", "--train-text-encoder"
    )
    assert status(words) == 0
    return out


def carded(cfg, run, repo, origin=LOCAL):
    """Front matter and text of a card."""
    weights = artefacts.by_path(run, artefacts.artefact(run))
    known = RunSettings.of(cfg) if isinstance(cfg, Run) else cfg
    text, _ = model_card.model_card(known.changed({"output_dir": str(run)}), run, repo, origin, weights)
    ModelCard(text).validate()
    return ModelCard(text).data.to_dict(), text


def code(text):
    (source,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    return source


def ran(text, base=None):
    """What the lines for use leave behind; two steps, and a seed, are added to the call."""
    source = code(text).replace(f"path/to/{base.name}", str(base)) if base else code(text)
    (call,) = re.findall(r"image = pipe\((.*)\)\.images", source)
    seeded = 'num_inference_steps=2, generator=torch.Generator("cpu").manual_seed(0)'
    source = source.replace(f"pipe({call})", f"pipe({', '.join(filter(None, [call, seeded]))})")
    known = {"torch": torch}
    exec(compile(source, "card", "exec"), known)
    assert isinstance(known["image"], Image.Image)
    return known


def artefact(out, *files):
    out.mkdir(exist_ok=True)
    artefacts.record(out, 4, files)
    (out / "metrics.jsonl").write_text('{"step": 4, "loss": 0.5}\n{"step": 4, "holdout_loss": 0.25}\n')
    return out


def word(out, token="<circle>"):
    out.mkdir(exist_ok=True)
    rows = torch.linspace(-1, 1, 2 * 32).reshape(2, 32)
    file = out / "learned_embeds.safetensors"
    embedding.write(file, embedding.Embedding(token, {"text_encoder": rows}, {}, "diffusers"), "diffusers")
    return file, rows


def learnt(known, token="<circle>"):
    """The vectors that a pipeline has for a word."""
    tokenizer, encoder = known["pipe"].tokenizer, known["pipe"].text_encoder
    ids = tokenizer.convert_tokens_to_ids([token, f"{token}_1"])
    assert tokenizer.unk_token_id not in ids
    return encoder.get_input_embeddings().weight[ids].detach()


def test_adapter(lora_run, sd):
    _, text = carded(read(lora_run), lora_run, str(lora_run))
    with Image.open(lora_run / "samples" / "step-000004.png") as sheet:
        shown = cells(sheet)[0][0]
    text = text.replace('circle").images', 'circle", guidance_scale=5.0).images')
    assert ran(text, sd)["image"].tobytes() == shown.tobytes()


def test_kind_of_adapter_that_diffusers_cannot_hold(sd, pictures, tmp_path, monkeypatch):
    """A line for the shell comes before those of Python."""
    run = tmp_path / "run"
    shown = ["--validation-prompt", "a red circle", "--num-validation-images", "1", "--validation-inference-steps", "2"]
    words = command(sd, pictures, run, "--steps", "2", *shown, "--train-text-encoder", "--adapter", "lokr")
    assert status(words) == 0
    data, text = carded(read(run), run, str(run))
    assert {"lokr", "template:sd-lora"} <= set(data["tags"]) and "lora" not in data["tags"]
    assert "A LoKr adapter of rank 4" in text
    (shell,) = re.findall(r"^# first, in a shell: sdtune (.*)$", code(text), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert status(shlex.split(shell)) == 0
    with Image.open(run / "samples" / "step-000002.png") as sheet:
        preview = np.asarray(cells(sheet)[0][0]).astype(int)
    drawn = np.asarray(ran(text.replace('circle").images', 'circle", guidance_scale=5.0).images'), sd)["image"])
    assert np.abs(drawn - preview).max() <= 1
    with Image.open(run / "samples" / "step-000000.png") as sheet:
        assert np.abs(np.asarray(cells(sheet)[0][0]).astype(int) - preview).max() > 1


def test_embedding(sd, tmp_path):
    file, rows = word(tmp_path / "run")
    run = artefact(tmp_path / "run", file)
    data, text = carded(Word(dataset="d", model=str(sd), output_dir=run), run, str(run))
    assert 'weight_name="learned_embeds.safetensors", token="<circle>"' in code(text)
    assert torch.equal(learnt(ran(text, sd)), rows)
    assert data["tags"][3:] == ["textual_inversion", "stable-diffusion", "stable-diffusion-diffusers", "sdtune"]
    assert data["instance_prompt"] == "<circle>"
    assert "Use `<circle>` in the prompt." in text
    assert f"The embedding of a new word (textual inversion) on `{sd.name}`, which is not on the Hub, " in text


def test_adapter_and_embedding(lora_run, sd, tmp_path):
    run = tmp_path / "run"
    file, rows = word(run)
    adapter = run / "pytorch_lora_weights.safetensors"
    adapter.write_bytes((lora_run / adapter.name).read_bytes())
    artefact(run, file, adapter)
    data, text = carded(Subject(dataset="d", model=str(sd), output_dir=run), run, str(run))
    known = ran(text, sd)
    assert torch.equal(learnt(known), rows)
    adapted = [name for name, _ in known["pipe"].text_encoder.named_parameters() if "lora_B" in name]
    assert adapted
    assert all(known["pipe"].text_encoder.get_parameter(name).abs().sum() > 0 for name in adapted)
    assert {"lora", "textual_inversion", "template:sd-lora"} <= set(data["tags"])
    assert "A LoRA adapter of rank 4 and the embedding of a new word" in text
    assert usage.sample(usage.artefact_kind(artefacts.by_path(run, artefacts.artefact(run))), "R", "p") == [
        *("sdtune", "sample", "--adapter", "R", "--prompt", "p")
    ]


def test_pipeline_of_a_base_on_the_hub(sd, tmp_path):
    from diffusers import DiffusionPipeline

    run = tmp_path / "run"
    pipe = DiffusionPipeline.from_pretrained(sd)
    artefact(run, *pipeline_folder.write_pipeline(run, pipe))
    base = {"model": "user/base", "revision": "v1", "hub_revision": "b"}
    data, text = carded(Subject(dataset="d", output_dir=run, **base), run, "user/name", Origin(base_on_hub=True))
    assert (data["base_model"], data["base_model_relation"]) == ("user/base", "finetune")
    assert data["tags"][3:] == ["dreambooth", "stable-diffusion", "stable-diffusion-diffusers", "sdtune"]
    assert data["instance_prompt"] == "a photo of sks dog"
    assert "A `StableDiffusionPipeline`, fine-tuned from `user/base` (revision `v1`), trained on `d`" in text
    assert 'pipe = DiffusionPipeline.from_pretrained("user/name", revision="b")' in code(text)
    assert "rank" not in text.partition("To reproduce it")[0].lower()
    _, text = carded(Subject(dataset="d", output_dir=run, model=str(sd)), run, str(run))
    assert ran(text)["pipe"].unet.config.sample_size == pipe.unet.config.sample_size


def pixels(run, names=()):
    unet = UNet2DModel(
        *(8, 1, 1),
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=len(names) + 1 if names else None,
    )
    extra = {"classes.json": json.dumps(list(names)).encode()} if names else {}
    return artefact(run, *pipeline_folder.write_pipeline(run, DDPMPipeline(unet, DDPMScheduler()), extra))


@pytest.mark.parametrize("names", [(), ("zero", "größer `als`")])
def test_pixels(names, tmp_path):
    run = pixels(tmp_path / "run", names)
    data, text = carded(Scratch(dataset="user/digits", output_dir=run), run, str(run), Origin(data_on_hub=True))
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert data["tags"] == ["unconditional-image-generation", "diffusers", "diffusers-training", "sdtune"]
    assert not {"base_model", "base_model_relation", "instance_prompt", "license"} & data.keys()
    assert data["model-index"][0]["results"][0]["task"]["type"] == "unconditional-image-generation"
    assert "A `DDPMPipeline`, trained on `user/digits` with `sdtune scratch`." in text
    assert ran(text)["image"].size == (8, 8)
    labels = "Labels: 0 is `zero`, 1 is `` größer `als` ``. Label 2 leaves the class open."
    assert (labels in text) == bool(names)
    words = usage.sample(usage.artefact_kind(artefacts.by_path(run, artefacts.artefact(run))), "R", "p")
    assert words == ["sdtune", "sample", "--model", "R"]


def test_label_that_is_given_is_the_one_that_is_drawn(tmp_path):
    run = pixels(tmp_path / "run", ("a", "b", "c"))
    _, text = carded(Scratch(dataset="d", output_dir=run), run, str(run))
    with torch.no_grad():
        images = {label: ran(text.replace("tensor([0])", f"tensor([{label}])"))["image"].tobytes() for label in (0, 2)}
    assert images[0] != images[2]


def test_more_classes_than_can_be_listed(tmp_path):
    what = usage.artefact_kind(
        artefacts.by_path(tmp_path, artefacts.artefact(pixels(tmp_path, [str(k) for k in range(1000)])))
    )
    told = usage.classes(what)
    assert told == (
        "The 1000 classes are listed in `classes.json`, in the order of their labels. Label 1000 leaves the class open."
    )


def test_classifier(tmp_path):
    settings = {"_class_name": "NoisyClassifier", "in_channels": 1, "sample_size": 8}
    texts = {"config.json": json.dumps(settings), "classes.json": '["a", "b"]', "scheduler/scheduler_config.json": "{}"}
    for name, text in ({"diffusion_pytorch_model.safetensors": ""} | texts).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    run = artefact(tmp_path, *(tmp_path / name for name in ["diffusion_pytorch_model.safetensors", *texts]))
    data, text = carded(Scratch(dataset="d", output_dir=run), run, "user/name")
    assert data["pipeline_tag"] == "image-classification"
    assert "classifier-guidance" in data["tags"]
    assert "A classifier of noised images, trained on `d`" in text
    assert 'NoisyClassifier.from_pretrained("user/name")' in code(text)
    compile(code(text), "card", "exec")
    assert "Labels: 0 is `a`, 1 is `b`." in text
    words = usage.sample(usage.artefact_kind(artefacts.by_path(run, artefacts.artefact(run))), "R", "p")
    assert words == ["sdtune", "sample", "--model", "...", "--classifier", "R", "--class", "a"]


def test_card_of_a_recipe_of_ones_own_tells_its_own_settings_alone(tmp_path):
    run = pixels(tmp_path / "run")
    begin(Gain(dataset="d", output_dir=run, seed=5, gain=3), ["run", "/some/where/mine.py"], False, False)
    known = read(run)
    assert (known.method, known.values["gain"], known.values["dataset"]) == ("scratch", 3, "d")
    _, text = carded(known, run, str(run))
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(settings).keys() == {"method", *Gain.model_fields}
    (line,) = re.findall(r"```sh\n(.*)\n```", text)
    assert line == "sdtune run mine.py --output-dir run --seed 5 --dataset d --gain 3"
    assert "/some/where" not in text
