"""From text to a config and back: every mistake told at once, everything told read again as it was."""

import contextlib
import random
import shlex
import typing
from pathlib import Path

import pytest
import yaml

from sdtune.config import fields, parsing, shipped
from sdtune.config.commands import METHODS, config_class, methods
from sdtune.config.foreign_flags import ANSWERS, COMMON_NAMES
from sdtune.config.methods.autoencoder import AutoencoderConfig
from sdtune.config.methods.classifier import ClassifierConfig
from sdtune.config.methods.clip import ClipConfig
from sdtune.config.methods.custom_diffusion import CustomDiffusionConfig
from sdtune.config.methods.dreambooth import DreamBoothConfig
from sdtune.config.methods.image_decoder import ImageDecoderConfig
from sdtune.config.methods.instruct_pix2pix import InstructPix2PixConfig
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.methods.progressive import ProgressiveConfig
from sdtune.config.methods.textual_inversion import TextualInversionConfig
from sdtune.config.methods.unclip_prior import PriorConfig
from sdtune.config.scores import OF_AGREEMENT, Criterion
from sdtune.config.sections import Run, UserError
from sdtune.config.verbs import SampleConfig
from sdtune.run import folder
from tests.conftest import status
from tests.diffusers_flags import FLAGS, IN_EACH

CONFIGS = (*methods(), SampleConfig)
LEAST = {config: {"dataset": "d"} if issubclass(config, Run) else {"prompt": ["x"]} for config in CONFIGS}
LEAST[ClassifierConfig] |= {"class_column": "c"}
LEAST[ProgressiveConfig] |= {"model": "m"}
LEAST[PriorConfig] |= {"model": "m"}
LEAST[ImageDecoderConfig] |= {"clip_model": "c"}
LEAST[TextualInversionConfig] |= {"placeholder_token": "<x>"}
LEAST_WITH = {
    **{(config, "width"): {"height": 64} for config in CONFIGS},
    **{(config, "height"): {"width": 64} for config in CONFIGS},
    (SampleConfig, "classifier"): {"classes": ["x"]},
    (SampleConfig, "clip_model"): {"clip_guidance_scale": 2.0},
    (SampleConfig, "clip_guidance_scale"): {"clip_model": "c"},
    (DreamBoothConfig, "placeholder_token"): {"lora": True},
    (DreamBoothConfig, "prior_preservation"): {"class_prompt": ["p"]},
    (CustomDiffusionConfig, "prior_preservation"): {"class_prompt": ["p"]},
    (DreamBoothConfig, "unet_frac"): {"train_text_encoder": True},
    (AutoencoderConfig, "vae_config"): {"train_encoder": True},
    (PriorConfig, "clip_model"): {"model": None},
    (PriorConfig, "num_layers"): {"model": None, "clip_model": "c"},
    (PriorConfig, "attention_head_dim"): {"model": None, "clip_model": "c"},
    (InstructPix2PixConfig, "original_caption_column"): {"edited_caption_column": "after"},
    (InstructPix2PixConfig, "edited_caption_column"): {"original_caption_column": "before"},
}
"""What an option cannot do without, besides what it says of itself that it requires."""
ON = {
    "class_column": "c",
    "classifier": "c",
    "clip_model": "c",
    "evaluate_steps": 5,
    "initializer_token": ["x"],
    "interpolate": ["a", "b"],
    "keep_best": "likeness",
    "model": "m",
    "placeholder_token": "<x>",
    "prior": "p",
    "report_to": ["tensorboard"],
}
"""A value of each required option that is no switch."""


def least(config, name):
    """A config in which the option has an effect, without the option."""
    values = LEAST[config] | LEAST_WITH.get((config, name), {})
    for option, choices in config.requirements(name):
        values = least(config, option) | values | {option: choices[0] if choices else ON.get(option, True)}
    return values


TEXTS = ["1e-4", "no", "null", "~", "2024-13-01", "1:30", "0x_", " padded ", "ein Stern, größer", "赤い星 🌟", "a\nb"]
TEXTS += ["- a", "#x: y", "'", '"', "{a: b}", "%x", "", "a=b", "-5 degrees", "--rank", "--no-such", "\\n", "7", "true"]
ONLY = {
    "bucket_max_aspect": [1.5],
    "channels": [2],
    "sample_max_value": [1.5, 0.1 + 1.2],
    "disc_channels": [72],
    "hidden_size": [64],
    "time_cond_proj_dim": [128],
    "sampling_steps": [[4, 2, 1]],
    "sigma_max": [40.0],
    "w_max": [20.0],
    "norm_num_groups": [16],
    "keep_best": [score for score in typing.get_args(Criterion) if score not in OF_AGREEMENT.values()],
    "init_lora_weights": ["olora", "pissa", "pissa_niter_16"],
    "decompose_factor": [1, 4],
    "attention_head_dim": [32],
    "interpolate": [["a b", "1e5"]],
    "image": [["a b", "1e5"]],
    "mask_image": [["a b", "1e5"]],
    "validation_image": [["a b", "1e5"]],
    "initializer_token": [["a b"], ["größer"]],
    "conditioning_dropout": [0.25],
    "timestep_bias_begin": [11],
    "placeholder_token": ["<größer>", "1e-4", "--rank", "'"],
    "validation_prompt": [["a <x> b", "c"], ["<x>", *TEXTS]],
}
REFUSED = {
    (config, name)
    for config in (ClassifierConfig, ClipConfig, PriorConfig)
    for name in ("buckets", "bucket_step", "bucket_max_aspect")
}
REFUSED |= {
    (METHODS[method].load(), name)
    for method in ("controlnet", "t2i-adapter", "instruct-pix2pix")
    for name in ("long_prompts", "prompt_weights")
}
NOT_DEFAULT = {"lr_step_rules", "prompt_file"}
"""Options that have no default, and whose help says when they are needed."""
FIELDS = [(c, name) for c in CONFIGS for name in c.model_fields if (c, name) not in REFUSED]
DIFFERENT = list({(name, repr(c.model_fields[name])): (c, name) for c, name in reversed(FIELDS)}.values())
"""The same, each field that several commands share in the first of them alone."""


@pytest.fixture
def written(tmp_path):
    """Write a YAML file; its path."""

    def write(text: str | bytes, name: str = "x.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def resolved(file: str | None = None, config=LoraConfig, **flags: str):
    return parsing.resolve(config, file, LEAST[config] | flags, [])


def refusal(file: str | None = None, config=LoraConfig, **flags: str) -> str:
    with pytest.raises(UserError) as error:
        resolved(file, config, **flags)
    return str(error.value)


def dry_run(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command that only resolves its config."""
    capsys.readouterr()
    code = status([words[0], "--dry-run", *words[1:]])
    return code, *capsys.readouterr()


def others(config, name):
    """Values of a field that are not its default."""
    field = config.model_fields[name]
    kind, default = fields.inner_type(field.annotation), field.get_default()
    if name in ONLY:
        return ONLY[name]
    if typing.get_origin(kind) is typing.Literal:
        return [choice for choice in typing.get_args(kind) if choice != default]
    if fields.is_list(field):
        return [[64], [32, 64, 96]] if fields.metavar(field) == "INTEGER" else [["a b", "c"], TEXTS]
    if typing.get_origin(kind) is dict:
        nested = {"d_coef": 2, "betas": [0.9, 0.99], "x": None, "on": True, "name": "1e-4", "small": 1e-9, "ü": "no"}
        return [nested]
    values = {bool: [not default], int: [1011], float: [0.5, 1e-5, 0.1 + 0.2]}
    values[str] = TEXTS if name in ("caption", "prompt") else ["ein Stern, größer", "1e-4"]
    values[Path] = [Path("größe/赤"), Path("a b"), Path("1e5"), Path("2024-01-31"), Path("~x")]
    return values[kind]


# ---- round trips -------------------------------------------------------------------------------------


def together(config, names, k=-1):
    """Settings whose fields have the k-th of their values, as many at once as go together, until each was in one."""
    waiting = [name for name in names if len(others(config, name)) > k]
    while waiting:
        settings, left, chosen = dict(LEAST[config]), [], set()
        for name in waiting:
            needed = {n: v for n, v in LEAST_WITH.get((config, name), {}).items() if n not in chosen}
            more = least(config, name) | settings | needed | {name: others(config, name)[k]}
            try:
                config.model_validate(more)
            except ValueError:
                left.append(name)
            else:
                settings = more
                chosen.add(name)
        assert left != waiting, left
        yield settings
        waiting = left


def test_what_dry_run_prints_is_the_same_config_again(written):
    """Each field of each command, with each kind of value."""
    changed = []
    for config in CONFIGS:
        names = [name for c, name in DIFFERENT if c is config]
        for k in range(max((len(others(config, name)) for name in names), default=0)):
            for settings in together(config, names, k):
                cfg = config.model_validate(settings)
                text = parsing.to_yaml(cfg)
                again = parsing.resolve(config, written(text), {}, [])
                same = again == cfg and parsing.to_yaml(again) == text
                if not (same and yaml.safe_load(text) == parsing.record(cfg)):  # the last: readers of plain YAML
                    changed.append((config.method, settings))
    assert changed == []


def test_the_command_that_continues_a_run_gives_the_same_config(capsys):
    changed = []
    for config in CONFIGS:
        for settings in together(config, [name for c, name in FIELDS if c is config]):
            cfg = config.model_validate(settings)
            _, *words = shlex.split(parsing.same_command(cfg, ["sdtune", config.method]))
            if dry_run(capsys, *words) != (0, parsing.to_yaml(cfg), ""):
                changed.append(words)
    assert changed == []


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_command_that_continues_a_run(text, capsys):
    cfg = LoraConfig(dataset=text, caption=text, validation_prompt=[text, "b", text], optimizer_args={"a": text})
    _, *words = shlex.split(parsing.same_command(cfg, ["sdtune", "lora"]))
    code, out, err = dry_run(capsys, *words)
    assert (code, err, out) == (0, "", parsing.to_yaml(cfg)), words


@pytest.mark.parametrize("config", methods(), ids=lambda c: c.method)
def test_dry_run_of_a_dry_run(config, capsys, written):
    words = [config.method, "--dataset", "赤い星/größe", "--output-dir", "~/a b", "--learning-rate", "3e-5"]
    words += ["--optimizer-args", "{betas: [0.9, 0.99], eps: 1e-5}", "--image-column", "- b"]
    words += ["--no-center-crop", "--report-to", "tensorboard", "wandb", "--num-train-epochs", "3"]
    words += [word for name, value in LEAST[config].items() if name != "dataset" for word in (fields.flag(name), value)]
    code, first, err = dry_run(capsys, *words)
    assert (code, err) == (0, "")
    assert "赤い星" in first  # readable
    assert yaml.safe_load(first)["report_to"] == ["tensorboard", "wandb"]
    assert dry_run(capsys, config.method, "--config", written(first)) == (0, first, "")


# ---- precedence and spelling -------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_defaults(written):
    file = written("rank: 8\nresolution: 256\ncenter_crop: false\nvalidation_prompt: [a, b]\n")
    cfg = resolved(file, resolution="64", validation_prompt=["c"])
    assert (cfg.rank, cfg.resolution, cfg.center_crop, cfg.validation_prompt) == (8, 64, False, ["c"])
    assert cfg.train_batch_size == LoraConfig.model_fields["train_batch_size"].default


def test_a_flag_may_say_the_default_again(capsys, written):
    file = written("rank: 8\ncenter_crop: false\nseed: 3\n")
    _, out, _ = dry_run(
        capsys, "lora", "--dataset", "d", "--config", file, "--rank", "4", "--center-crop", "--seed", "0"
    )
    assert {"rank": 4, "center_crop": True, "seed": 0}.items() <= yaml.safe_load(out).items()


def test_hyphens_and_other_names_in_the_file(written):
    cfg = resolved(written("pretrained-model-name-or-path: m\nmax_train_steps: 3\nlora_alpha: 2\nrandom-flip: yes\n"))
    assert (cfg.model, cfg.steps, cfg.alpha, cfg.random_flip) == ("m", 3, 2.0, True)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.method)
def test_no_two_fields_share_a_spelling(config):
    spellings = [s.replace("-", "_") for n, f in config.model_fields.items() for s in (n, *fields.aliases_of(f))]
    assert len(spellings) == len(set(spellings))
    taken = {
        "config",
        "dry_run",
        "num_processes",
        "accelerate_config",
        "overwrite",
        "allow_change",
        "help",
        *ANSWERS,
    }
    assert taken.isdisjoint(spellings)
    negated = {f"no_{n}" for n, f in config.model_fields.items() if f.annotation is bool}
    assert negated.isdisjoint(spellings)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.method)
def test_every_field_says_what_it_is_for(config):
    for name, field in config.model_fields.items():
        text = fields.description(config, name)
        assert text.rstrip().endswith((".", "'")), name
        if field.get_default() is None and not field.is_required():
            told = any(w in text for w in ("Default:", "Leave out", "Without it"))
            assert told or name in NOT_DEFAULT, f"{name}: what happens when it is left out?"
        assert "none is" not in text, name


@pytest.mark.parametrize(
    ("config", "name", "option", "choices"),
    [(c, n, *needed) for c in CONFIGS for n in c.model_fields for needed in c.requirements(n)],
)
def test_an_option_that_cannot_have_an_effect_is_refused(config, name, option, choices):
    base = {key: value for key, value in least(config, name).items() if key != option and key not in ("dataset",)}
    base |= LEAST[config] if option not in LEAST[config] else {"dataset": "d"}
    chosen = next((v for v in others(config, name) if v), None)
    on = config.model_fields[option]
    if chosen is None or on.is_required() or on.default in choices:
        return
    off = {option: False} if config.model_fields[option].annotation is bool else {}
    first = f"{name}|class_prompt|adapter|initializer_token|original_caption_column"
    with pytest.raises(UserError, match=f"^({first}) has no effect with"):
        parsing.resolve(config, None, base | off | {name: chosen}, [])


def test_an_optimizer_that_finds_its_rate_takes_1_by_default(written):
    assert resolved(optimizer="prodigy").learning_rate == 1
    assert resolved(written("optimizer: prodigy\n")).learning_rate == 1
    assert resolved(optimizer="prodigy", learning_rate="0.5").learning_rate == 0.5
    for name in ("dadaptadam", "prodigyopt:Prodigy", "pytorch_optimizer:DAdaptLion", "a.b:ProdigyPlusScheduleFree"):
        assert resolved(optimizer=name).learning_rate == 1
    assert (
        resolved(optimizer="torch.optim:SGD").learning_rate == resolved(optimizer="prodigy:Adam").learning_rate == 1e-4
    )
    assert resolved(config=DreamBoothConfig, optimizer="prodigy", lora=True).learning_rate == 1
    assert resolved(config=DreamBoothConfig, lora=True).learning_rate == 1e-4
    assert resolved().learning_rate == 1e-4


def test_who_says_an_options_default_expects_it_to_count():
    with pytest.raises(UserError, match=r"^rank has no effect without lora: add --lora, or leave it out$"):
        resolved(config=DreamBoothConfig, rank="4")
    assert resolved(config=DreamBoothConfig, rank="4", lora=True).rank == 4
    cfg = resolved(config=DreamBoothConfig)
    assert resolved(config=DreamBoothConfig, use_dora=False) == cfg  # asks for nothing
    assert resolved(lr_warmup_steps="0", lr_num_cycles="1").lr_warmup_steps == 0  # as diffusers' own commands say


def test_every_flag_of_diffusers_scripts_is_an_option_or_has_an_answer():
    """Under its own name; the values are for `test_cli`."""
    launch = {"num_processes", "overwrite"}
    unknown = []
    for script, (command, flags) in FLAGS.items():
        config = METHODS[command].load()
        names = fields.names_of(config)
        meant = {name for name, options in COMMON_NAMES.items() if any(option in names for option in options)}
        known = {*names, *meant, *ANSWERS, *config.answers, *launch}
        unknown += [(script, flag) for flag in (*IN_EACH, *flags.split()) if flag not in known]
    assert unknown == []


def test_names_of_modules_may_have_commas_between_them():
    assert resolved(target_modules="attn.to_k,attn.to_q, to_out.0").target_modules == [
        "attn.to_k",
        "attn.to_q",
        "to_out.0",
    ]
    assert resolved(target_modules=["to_k", "to_q"]).target_modules == ["to_k", "to_q"]
    assert resolved(target_modules=r".*\.to_q{1,2}").target_modules == [r".*\.to_q{1,2}"]


def test_options_that_may_change_exist():
    from sdtune.config.sections import MAY_CHANGE

    assert {n for config in methods() for n in config.model_fields} >= MAY_CHANGE


# ---- YAML --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelt", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4", "'1e-4'"])
def test_numbers_as_people_write_them(spelt, written):
    assert resolved(written(f"learning_rate: {spelt}")).learning_rate == 1e-4


def test_whole_numbers_as_people_write_them(written):
    cfg = resolved(written("steps: 1e3\nresolution: '64'\nrank: 8.0\nseed: -3\n"))
    assert (cfg.steps, cfg.resolution, cfg.rank, cfg.seed) == (1000, 64, 8, -3)


def test_words_of_yaml_1_1_that_are_texts_to_everybody_else(written):
    cfg = resolved(written("mixed_precision: no\noutput_dir: 2024-01-31\ncaption: 2024-13-01\npush_to_hub: off\n"))
    assert (cfg.mixed_precision, cfg.output_dir, cfg.caption) == ("no", Path("2024-01-31"), "2024-13-01")
    assert cfg.push_to_hub is False
    assert resolved(written("mixed_precision: no"), SampleConfig).mixed_precision == "no"


def test_an_empty_file_is_defaults_and_a_byte_order_mark_is_ignored(written):
    assert resolved(written("# nothing\n")) == resolved()
    assert resolved(written(b"\xef\xbb\xbfrank: 9\n")).rank == 9
    assert resolved(written(b"rank: 9\r\nseed: 1\r\n")).seed == 1


@pytest.mark.parametrize(
    ("text", "told"),
    {
        "rank: 1\n\nragk: 2": "x.yaml:3: unknown key ragk; did you mean rank?",
        "network_dim: 2": "x.yaml:1: unknown key network_dim; use --rank",
        "hub_token: secret": "HF_TOKEN",
        "qqqqqq: 2": "x.yaml:1: unknown key qqqqqq; --help lists them",
        "num_processes: 2": "x.yaml:1: unknown key num_processes",
        "5: 2": "x.yaml:1: unknown key 5",
        "rank: 1\nrank: 2": "x.yaml:2: rank: given twice",
        "steps: 1\nmax_train_steps: 2": "x.yaml:2: max_train_steps: given twice",
        "- rank": "x.yaml: wants a mapping",
        "rank 3": "x.yaml: wants a mapping",
        "3": "x.yaml: wants a mapping",
        "rank: 1\nseed: [": "not valid YAML",
        "rank: 1\n\tseed: 1": "x.yaml:2: not valid YAML",
        "rank: 1\n---\nrank: 2": "x.yaml:2: not valid YAML",
        "rank: !!python/object:x.y {}": "x.yaml:1: not valid YAML",
        "rank: *a": "x.yaml:1: not valid YAML",
        "optimizer_args: &a {b: *a}": "x.yaml:1: not valid YAML",
        "a\x00b": "x.yaml: not valid YAML",
        "seed: !!int x": "x.yaml:1: not valid YAML",
        "seed: 0x_": "x.yaml:1: seed: wants a whole number, not '0x_'",
        f"seed: {'9' * 5000}": "x.yaml:1: not valid YAML",
        "rank: four": "x.yaml:1: rank: wants a whole number, not 'four'",
        "rank: 4.5": "x.yaml:1: rank: wants a whole number, not 4.5",
        "rank: null": "x.yaml:1: rank: wants a whole number, not None",
        "rank: [4]": "x.yaml:1: rank: wants a whole number, not [4]",
        "rank: true": "x.yaml:1: rank: wants a number, not True",
        "bucket_max_aspect: [true]": "x.yaml:1: bucket_max_aspect: wants a number, not True",
        "snr_gamma: yes": "x.yaml:1: snr_gamma: wants a number, not True",
        "learning_rate: fast": "x.yaml:1: learning_rate: wants a number, not 'fast'",
        "learning_rate: .nan": "x.yaml:1: learning_rate: wants a number, not nan",
        "learning_rate: .inf": "x.yaml:1: learning_rate: wants a number, not inf",
        "learning_rate: 1e999": "x.yaml:1: learning_rate: wants a number, not inf",
        "learning_rate: -1": "x.yaml:1: learning_rate: should be greater than 0, not -1",
        "cache: maybe": "x.yaml:1: cache: wants true or false, not 'maybe'",
        "rank: 012": "x.yaml:1: rank: wants a number without leading zeros, not 012",
        "learning_rate: 0512": "x.yaml:1: learning_rate: wants a number without leading zeros, not 0512",
        "steps: 1:30": "x.yaml:1: steps: wants a whole number, not '1:30'",
        "snr_gamma: 1:30.5": "x.yaml:1: snr_gamma: wants a number, not '1:30.5'",
        "rank: 0x10": "x.yaml:1: rank: wants a whole number, not '0x10'",
        "rank: 0b11": "x.yaml:1: rank: wants a whole number, not '0b11'",
        "<<: {rank: 3}": "x.yaml:1: <<: merge keys are not read; write the options out",
        "rank: 1\ncaption: &a x\noptimizer_args: &b {<<: *a}": "not valid YAML: expected a mapping",
        'init_adapter: "C:\\Users\\x"': "put a Windows path in single quotes",
        'init_adapter: "C:\\temp\\new"': "put a Windows path in single quotes",
        "optimizer_args: " + "[" * 3000: "x.yaml:1: not valid YAML: more than 50 levels",
        "optimizer_args: " + "{a: " * 60 + "1" + "}" * 60: "x.yaml:1: not valid YAML: more than 50 levels",
        "seed: 9223372036854775808": "x.yaml:1: seed: should be less than 9223372036854775808, not 9223372036854775808",
        f"seed: {10**30}": "x.yaml:1: seed: should be less than",
        "validation_prompt: {a: b}": "x.yaml:1: validation_prompt: should be a valid list",
        "optimizer_args: [a]": "x.yaml:1: optimizer_args: wants a mapping such as '{d_coef: 2}', not ['a']",
        "lr_scheduler: cosin": "did you mean cosine?",
        "steps: 3\nnum_train_epochs: 2": "give one",
    }.items(),
)
def test_a_mistake_in_the_file_is_one_line_with_its_place(text, told, written):
    said = refusal(written(text))
    assert told in said
    assert len(said.splitlines()) <= 2 if "\x00" in text else len(said.splitlines()) == 1


def test_texts_keep_their_text(written):
    text = "revision: 12e45\nlicense: no\nsplit: 3\ncaption: 012\nvalidation_prompt: [yes, 1_0, 1:30]\n"
    cfg = resolved(written(text))
    assert (cfg.revision, cfg.license, cfg.split, cfg.caption) == ("12e45", "no", "3", "012")
    assert cfg.validation_prompt == ["yes", "1_0", "1:30"]
    assert resolved(written("revision: ~\nvae: null\nvariant:\n")) == resolved()


@pytest.mark.fault("A YAML file grows without end by its aliases", "Refused in a moment.")
def test_aliases_are_read_as_far_as_they_stand_for_what_a_file_may_hold(written):
    cfg = resolved(written("optimizer_args: {a: &x [1, 2], b: *x}"))
    assert cfg.optimizer_args == {"a": [1, 2], "b": [1, 2]}
    lines = ["optimizer_args:", "  a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"  a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 10)]
    assert "x.yaml:1: not valid YAML: stands for more than 10000 values" in refusal(written("\n".join(lines)))


@pytest.mark.parametrize("value", ["~", "~/a b/c"])
def test_a_tilde_is_the_home_folder_in_every_option_that_is_a_path(value, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    meant = str(Path(value.replace("~", str(tmp_path))))
    words = ["--dataset", value, "--output-dir", value, "--model", value, "--vae", value, "--init-adapter", value]
    out = yaml.safe_load(dry_run(capsys, "lora", *words, "--caption", value)[1])
    names = ("dataset", "output_dir", "model", "vae", "init_adapter")
    assert {out[name] for name in names} == {meant}
    assert out["caption"] == value
    words = ["--adapter", f"{value}=0.5", "b", "--prompt", value, "--interpolate", value, value]
    out = yaml.safe_load(dry_run(capsys, "sample", *words)[1])
    assert out["prompt"] == [value]
    assert out["interpolate"] == [meant, meant]
    assert out["adapter"] == [f"{meant}=0.5" if value != "~" else "~=0.5", "b"]


def test_a_tilde_is_the_home_folder_of_a_config_and_of_an_accelerate_config(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("rank: 9\n")
    assert resolved("~/x.yaml").rank == 9
    assert shipped.accelerate_file("~/x.yaml") == tmp_path / "x.yaml"


def test_a_seed_is_what_torch_takes():
    import torch

    for config in CONFIGS:
        for seed in (-(2**63), 2**63 - 1):
            cfg = parsing.resolve(config, None, LEAST[config] | {"seed": str(seed)}, [])
            torch.Generator().manual_seed(cfg.seed)
        with pytest.raises(UserError, match="--seed: should be"):
            parsing.resolve(config, None, LEAST[config] | {"seed": str(2**63)}, [])


def test_a_file_that_is_no_text(written):
    assert refusal(written(b"rank: \xff\n")).endswith("x.yaml: not UTF-8 text")
    assert "x.yaml: not UTF-8 text" in refusal(written("rank: 3\n".encode("utf-16")))


def test_a_file_that_is_not_there(tmp_path):
    assert refusal("nope.yaml") == "--config nope.yaml: no such file or recipe; `sdtune ls` lists them"
    assert "no such file or recipe" in refusal(str(tmp_path))


def test_the_most_harmless_mistake_does_not_hide_the_others(written):
    file = written("ragk: 1\nrank: x\nseed: 1\nseed: 2\n")
    with pytest.raises(UserError) as error:
        parsing.resolve(LoraConfig, file, {"resolution": "7", "cache": "perhaps"}, ["--foo=1", "bar"])
    lines = [line.strip() for line in str(error.value).splitlines()]
    starts = ["--foo: no such option", "bar: unexpected", f"{file}:1: unknown key ragk", f"{file}:4: seed: given twice"]
    starts += [f"{file}:2: rank: wants", "--resolution: should be", "--cache: wants true", "--dataset: is required"]
    assert [sum(line.startswith(start) for line in lines) for start in starts] == [1] * len(lines)


def test_shipped_recipes_resolve_by_name_and_path():
    for name, path in shipped.recipes().items():
        config = METHODS[name.partition("/")[0]].load()
        assert parsing.resolve(config, name, {}, []) == parsing.resolve(config, str(path), {}, [])


def test_a_recipe_is_found_by_its_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "sd15-naruto.yaml").write_text("# sd15 on naruto\nrank: 13\ndataset: d\n")
    named = {"lora/sd15-naruto": tmp_path / "lora" / "sd15-naruto.yaml"}
    monkeypatch.setattr(shipped, "recipes", lambda: named)
    assert resolved("lora/sd15-naruto").rank == 13
    assert (
        refusal("lora/sd15-narut") == "--config lora/sd15-narut: no such file or recipe; did you mean lora/sd15-naruto?"
    )
    code, out, _ = dry_run(capsys, "lora", "--config=lora/sd15-naruto", "--rank=2")
    assert code == 0
    assert yaml.safe_load(out)["rank"] == 2


# ---- whose settings they are ---------------------------------------------------------------------------


def test_settings_say_whose_they_are(capsys, written):
    for words in (["lora", "--dataset", "d"], ["sample", "--prompt", "p"]):
        _, out, _ = dry_run(capsys, *words)
        assert out.startswith(f"method: {words[0]}\n")
        assert dry_run(capsys, words[0], "--config", written(out)) == (0, out, "")
    _, out, _ = dry_run(capsys, "merge", "--adapter", "a", "--output", "b.safetensors", "--model", "m")
    assert "method" not in yaml.safe_load(out)  # there it is an option, and stays one
    file = written("adapter: [a, b]\noutput: c.safetensors\nmethod: svd\nrank: 4\n")
    assert yaml.safe_load(dry_run(capsys, "merge", "--config", file)[1])["combine"] == "svd"


@pytest.mark.parametrize("text", ["method: other", "instance_prompt: a\nmethod: other", "rank: x\nmethod: other\nq: 1"])
def test_settings_of_another_command_are_one_line(text, written):
    line = text.splitlines().index("method: other") + 1
    said = refusal(written(text), rank="4.5")
    assert said.endswith(f"x.yaml:{line}: method: these are the settings of `sdtune other`, not of `sdtune lora`")
    assert len(said.splitlines()) == 1


def test_a_changed_method_is_a_changed_option(tmp_path):
    cfg, file = LoraConfig(dataset="d"), tmp_path / "config.yaml"
    file.write_text(parsing.to_yaml(cfg))
    assert folder.differences(cfg, file) == []
    file.write_text(parsing.to_yaml(cfg).replace("method: lora", "method: other").replace("rank: 4", "rank: 5"))
    assert folder.differences(cfg, file) == []  # it never began
    (tmp_path / "metrics.jsonl").touch()
    assert folder.differences(cfg, file) == ["method was other, is lora", "--rank was 5, is 4"]
    file.write_text(parsing.to_yaml(cfg).replace("method: lora\n", ""))  # of a time when only LoRA was there
    assert folder.differences(cfg, file) == []
    file.write_text(parsing.to_yaml(cfg).replace("scale_lr: false\n", ""))  # of a time when there was no such option
    assert folder.differences(cfg, file) == []
    assert folder.differences(LoraConfig(dataset="d", scale_lr=True), file) == ["--scale-lr was False, is True"]


def test_the_class_of_settings():
    assert config_class({}) is config_class({"method": "lora"}) is config_class({"method": []}) is LoraConfig
    for config in methods():
        assert config_class({"method": config.method, "rank": 4}) is config
        assert config_class(dict.fromkeys(config.model_fields) | {"method": "own", "gain": 3}) is config


# ---- anything at all ---------------------------------------------------------------------------------

PIECES = [
    *TEXTS,
    *(f"{n}: " for n in LoraConfig.model_fields),
    "\n",
    "\n",
    "\n",
    " ",
    "[",
    "]",
    "{",
    "}",
    ":",
    "&a ",
    "*a",
]
PIECES += [
    "!!float ",
    "!!binary x",
    "<<: ",
    "? ",
    "| ",
    "> ",
    "\t",
    "\u2028",
    "\x85",
    "\ufeff",
    "0b_",
    "1_000",
    "0o7",
    ".inf",
]


@pytest.mark.parametrize("seed", range(4))
def test_any_file_gives_a_config_or_lines_of_advice(seed, written):
    numbers = random.Random(seed)
    for _ in range(60):
        file = written("".join(numbers.choices(PIECES, k=numbers.randrange(1, 12))))
        cfg = LoraConfig(dataset="d")
        with contextlib.suppress(UserError):
            cfg = resolved(file)
        assert parsing.resolve(LoraConfig, written(parsing.to_yaml(cfg)), {}, []) == cfg


@pytest.mark.parametrize("seed", range(4))
def test_any_command_line_ends_in_a_config_or_lines_of_advice(seed, capsys):
    numbers = random.Random(seed)
    flags = [fields.flag(n) for n in LoraConfig.model_fields]
    flags += ["--no-center-crop", "--no-rank", "--ragk", "-x", "--", "-", "--num-processes", "--scale_lr", "--config"]
    values = [*TEXTS, "nan", "inf", "-1", "0", "0.5", "3", "1e9", "9" * 5000, "[", "{a: 0x_}"]
    for _ in range(25):
        words = ["--dataset", "d"]
        for flag in numbers.choices(flags, k=numbers.randrange(1, 5)):
            value = numbers.choice(values)
            words += [f"{flag}={value}"] if numbers.random() < 0.4 else [flag, value][: numbers.randrange(1, 3)]
        code, out, err = dry_run(capsys, "lora", *words)
        assert code in (0, 2), words
        assert bool(err) == (code == 2), words
        assert bool(out) == (code == 0), words
        assert "Traceback" not in err
