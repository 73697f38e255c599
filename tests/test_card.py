"""The model card: what the Hub is told is true, valid, and tells nothing of this machine."""

import re
import shlex
import shutil

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants
from safetensors.torch import save_file

from sdtune.config.methods.lora import LoraConfig
from sdtune.publish import model_card, redact
from sdtune.publish.origin import Origin, ask, by_name
from sdtune.run import base_license, settings
from sdtune.run.artefacts import artefact, by_path
from tests.conftest import command, status
from tests.tinyhub import TinyHub


@pytest.fixture
def api(monkeypatch):
    with TinyHub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield HfApi(endpoint=server.url, token=server.token)


@pytest.fixture(scope="module")
def run(sd, pictures, tmp_path_factory):
    AcceleratorState._reset_state(reset_partial_state=True)
    prompts = ["--validation-prompt", "a red circle", 'a "blue" square: 2', "--validation-inference-steps", "2"]
    options = ["--num-validation-images", "2", "--num-holdout-images", "2", "--caption", "a sks circle"]
    out = tmp_path_factory.mktemp("cards") / "run"
    assert status(command(sd, pictures, out, *prompts, *options)) == 0
    return out


LOCAL = Origin()


def made(run, origin=LOCAL, **changed):
    """Front matter, text and pictures of a card."""
    known = settings.read(run)
    known = known.changed({"output_dir": str(run)} | changed)
    about = {name: value for name, value in changed.items() if name in ("model", "revision")}
    known = known._replace(about=known.about._replace(**{"base" if k == "model" else k: v for k, v in about.items()}))
    text, pictures = model_card.model_card(known, run, "tester/cards", origin, by_path(run, artefact(run)))
    return ModelCard(text).data.to_dict(), text, pictures


def test_card_of_a_run(run, api):
    data, text, pictures = made(run)
    ModelCard(text).validate()
    assert data["tags"][-3:] == ["stable-diffusion", "stable-diffusion-diffusers", "sdtune"]
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert data["instance_prompt"] == "a sks circle"
    assert not {"license", "base_model", "datasets"} & data.keys()
    assert [entry["text"] for entry in data["widget"]] == ["a red circle", 'a "blue" square: 2']
    assert {entry["output"]["url"] for entry in data["widget"]} == pictures.keys()
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0]["type"] == "loss"
    for picture in re.findall(r"\]\((.*?)\)", text):
        assert (run / picture).is_file()
    assert text == made(run)[1]


def test_nothing_of_this_machine(run):
    _, text, _ = made(run)
    assert str(run.parent) not in text
    assert "/tmp" not in text and "/home" not in text
    assert "on `tiny-sd`, which is not on the Hub" in text
    for name in ("config.yaml", "report.html"):
        hidden = redact.hide_paths((run / name).read_text(), settings.read(run))
        assert str(run.parent) not in hidden and str(settings.read(run).about.base) not in hidden


def test_command_gives_the_config_again(run, capsys):
    _, text, _ = made(run)
    (line,) = re.findall(r"```sh\n(.*)\n```", text)
    (listed,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert status([*shlex.split(line)[1:], "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(listed)


def test_usage_is_python(run):
    for changes in ({}, {"model": "user/base", "revision": "v1", "hub_revision": "b"}, {"model": "a/b/c.safetensors"}):
        (source,) = re.findall(r"```python\n(.*?)```", made(run, Origin("user" in str(changes)), **changes)[1], re.S)
        compile(source, "card", "exec")
        assert 'load_lora_weights("tester/cards", weight_name="pytorch_lora_weights.safetensors"' in source
    assert (
        'DiffusionPipeline.from_pretrained("user/base", revision="v1")'
        in made(run, Origin(True), model="user/base", revision="v1")[1]
    )


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("conditioner.embedders.0.x", "StableDiffusionXLPipeline"),
        ("model.diffusion_model.joint_blocks.0.x", "StableDiffusion3Pipeline"),
        ("cond_stage_model.x", "StableDiffusionPipeline"),
    ],
)
def test_usage_reads_a_base_in_one_file_as_what_it_is(tensor, kind, run, tmp_path):
    save_file({tensor: torch.zeros(1)}, tmp_path / "base.safetensors")
    text = made(run, model=str(tmp_path / "base.safetensors"))[1]
    assert f"pipe = {kind}.from_single_file(" in text


def test_license_is_carried_over_from_the_base(api, run):
    api.create_repo("tester/base")
    front = "---\nlicense: other\nlicense_name: rail\nlicense_link: https://example.org\n---\n"
    api.create_commit("tester/base", [CommitOperationAdd("README.md", front.encode())], commit_message="card")
    api.create_repo("tester/images", repo_type="dataset")
    base = ask(api, named("tester/base", "tester/images"))
    assert base == Origin(True, True, "other", "rail", "https://example.org")
    data, text, _ = made(run, base, model="tester/base", dataset="user/images")
    assert (data["license"], data["license_name"]) == ("other", "rail")
    assert (data["base_model"], data["base_model_relation"]) == ("tester/base", "adapter")
    assert data["datasets"] == ["user/images"]
    ModelCard(text).validate()
    data, _, _ = made(run, base, model="tester/base", license="mit")
    assert data["license"] == "mit" and "license_name" not in data


NON_COMMERCIAL = (
    "---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: LICENSE.md\n---\n# x\n"
)


def test_a_license_that_forbids_use_is_told_in_the_plan_and_on_the_card(run, sd, pictures, tmp_path, capsys):
    base = shutil.copytree(sd, tmp_path / "base")
    (base / "README.md").write_text(NON_COMMERCIAL)
    capsys.readouterr()
    assert status(["check", *command(base, pictures, tmp_path / "out")]) == 0
    told = "license: base is under flux-1-dev-non-commercial-license (LICENSE.md), which forbids commercial use"
    assert capsys.readouterr().out.count(told) == 1
    origin = by_name(named(str(base), "user/images"))
    data, text, _ = made(run, origin)
    assert (data["license"], data["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    assert "forbids commercial use, also of what is made from it" in text
    for front in ("no card", "---\nlicense: apache-2.0\n---\n", "---\nlicense: [a\n---\n", "---\n- license\n---\n"):
        (base / "README.md").write_text(front)
        assert base_license.notice(named_config(str(base))) == ""


@pytest.mark.parametrize(
    ("name", "forbids"),
    [
        ("cc-by-nc-4.0", True),
        ("flux-non-commercial-license", True),
        ("mit", False),
        ("openrail++", False),
        ("once", False),
    ],
)
def test_names_of_licenses_that_forbid_use(name, forbids):
    assert bool(base_license.License(name).forbids_use) is forbids


def named_config(model):
    return LoraConfig(model=model, dataset="user/images")


def named(model, dataset):
    return settings.RunSettings.of(LoraConfig(model=model, dataset=dataset))


def test_base_that_the_hub_does_not_know_is_no_base_model(api, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ask(api, named("models/mine", "user/images")) == Origin()
    (tmp_path / "models").mkdir()
    for name in ("models/mine", "tiny", "/models/mine", "~/mine", "./mine"):
        assert by_name(named(name, name)) == Origin()
    assert by_name(named("user/base", "user/images")) == Origin(True, True)


def test_prompts_and_long_texts_are_no_paths(tmp_path):
    cfg = LoraConfig(dataset="user/images", caption="x" * 5000, output_dir=tmp_path, negative_prompt="/imagine a/b")
    shown = redact.redact(settings.RunSettings.of(cfg)).values
    assert (shown["caption"], shown["negative_prompt"]) == (cfg.caption, cfg.negative_prompt)
    assert (shown["dataset"], shown["output_dir"]) == ("user/images", tmp_path.name)


def test_run_of_a_recipe_of_ones_own(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    with (run / "config.yaml").open("a") as file:
        file.write("gain: 3.0\n")
    assert "gain: 3.0" in made(run)[1]
