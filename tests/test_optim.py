"""Learning rates, steps that are skipped, averages and saved states, against torch and diffusers."""

import json

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load, save
from torch import nn
from torch.utils._pytree import tree_map

from sdtune.config.sections import Optim, UserError, finds_rate
from sdtune.training import optim, optimizer_state


def config(**fields) -> Optim:
    average = {"use_ema": True} if any(name.startswith("ema_") for name in fields) else {}
    return Optim(**{"learning_rate": 1e-2} | average | fields)


def network(seed=0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # 5120 weights in the first matrix: optimizers of 8 and 4 bits keep fewer than 4096 in 32
        return nn.Sequential(nn.Linear(5, 1024), nn.SiLU(), nn.Linear(1024, 3))


def optimizer_of(module, cfg):
    """Its first layer at one rate and its last, where the optimizer can, at another."""
    rates = (1e-2, 1e-2 if finds_rate(cfg.optimizer) else 5e-3)
    parts = zip((module[0], module[2]), rates, strict=True)
    return optim.make_optimizer(cfg, [{"params": list(part.parameters()), "lr": rate} for part, rate in parts])


def backward(module, step):
    """The gradient of step ``step``, a function of the step alone; its norm."""
    numbers = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 5, generator=numbers), torch.randn(8, 3, generator=numbers)
    module.zero_grad()
    (module(x) - y).square().mean().backward()
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])


def advance(module, optimizer, first, last):
    for step in range(first, last):
        optim.clipped_step(optimizer, backward(module, step), 1.0)


def bits(module, optimizer):
    """All that moves, as bytes and numbers."""
    state = tree_map(copied, optimizer.state_dict())
    return [p.detach().clone() for p in module.parameters()], state


def copied(value):
    """A tensor as copies of the plain ones that it consists of, which torchao's own cannot be copied as."""
    if not isinstance(value, torch.Tensor):
        return value
    return {part: inner.detach().clone() for part, inner in optimizer_state.parts_of(value).items()}


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ---- learning rate ---------------------------------------------------------------------------------------

SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {"lr_warmup_steps": 5},
    "linear": {"lr_warmup_steps": 5},
    "linear without warm-up": {"lr_scheduler": "linear"},
    "cosine": {"lr_warmup_steps": 5},
    "cosine_with_restarts": {"lr_warmup_steps": 5, "lr_num_cycles": 3},
    "polynomial": {"lr_warmup_steps": 5, "lr_power": 2.0},
    "piecewise_constant": {"lr_step_rules": "1:10,0.1:20,0.01"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_those_of_diffusers(name):
    cfg = config(**{"lr_scheduler": name} | SCHEDULES[name])
    total = 40
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.learning_rate)
    schedule = get_scheduler(
        cfg.lr_scheduler,
        reference,
        step_rules=cfg.lr_step_rules,
        num_warmup_steps=cfg.lr_warmup_steps,
        num_training_steps=total,
        num_cycles=cfg.lr_num_cycles,
        power=cfg.lr_power,
    )
    rate = optim.lr_schedule(cfg, total)
    # diffusers lets `polynomial` end at 1e-7, here it ends at 1e-7 of the peak, since every group has its own
    off = 1e-7 if name == "polynomial" else 0
    for step in range(total):
        assert cfg.learning_rate * rate(step) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12, abs=off)
        reference.step()
        schedule.step()


def test_schedules_have_their_shapes():
    """Written out, so that they do not rest on diffusers alone."""
    cosine = optim.lr_schedule(config(lr_scheduler="cosine", lr_warmup_steps=10), 110)
    assert [cosine(t) for t in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-12)
    linear = optim.lr_schedule(config(lr_scheduler="linear", lr_warmup_steps=10), 110)
    assert [linear(t) for t in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    steps = optim.lr_schedule(config(lr_scheduler="piecewise_constant", lr_step_rules="1:10,0.1:20,0.01"), 30)
    assert [steps(t) for t in (0, 9, 10, 19, 20, 29)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    constant = optim.lr_schedule(config(), 30)
    assert {constant(t) for t in range(30)} == {1}  # and no warm-up


def test_the_rate_is_a_function_of_the_step():
    rate = optim.lr_schedule(config(lr_scheduler="cosine", lr_warmup_steps=3), 20)
    forwards = [rate(t) for t in range(20)]
    assert [rate(t) for t in reversed(range(20))] == forwards[::-1]


def test_piecewise_constant_wants_its_rules():
    with pytest.raises(UserError, match="--lr-scheduler piecewise_constant: wants --lr-step-rules"):
        optim.lr_schedule(config(lr_scheduler="piecewise_constant"), 10)


# ---- which optimizer -------------------------------------------------------------------------------------


def test_adamw_gets_every_setting():
    cfg = config(
        adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.1, adam_epsilon=1e-6, optimizer_args={"amsgrad": True}
    )
    optimizer = optimizer_of(network(), cfg)
    assert isinstance(optimizer, torch.optim.AdamW)
    expected = {"betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-6, "amsgrad": True, "fused": True}
    for group, rate in zip(optimizer.param_groups, (1e-2, 5e-3), strict=True):
        assert {k: group[k] for k in expected} == expected
        assert group["lr"] == rate


def test_an_optimizer_of_ones_own():
    cfg = config(optimizer="torch.optim:SGD", optimizer_args={"momentum": 0.5})
    optimizer = optimizer_of(network(), cfg)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"optimizer": "adam"},
            "--optimizer adam: is none of adamw, adamw8bit, .*, prodigy, adamw_schedulefree, .*, nor written",
        ),
        ({"optimizer": "torch.optim:AdamX"}, "--optimizer torch.optim:AdamX: .*AdamX"),
        ({"optimizer": "no_such_module:Adam"}, "--optimizer no_such_module:Adam: No module named 'no_such_module'"),
        ({"optimizer": "paged_adamw8bit"}, "--optimizer paged_adamw8bit: its pages are those of a GPU; .* adamw8bit"),
        ({"optimizer_args": {"momentun": 1}}, "--optimizer adamw: .*momentun"),
        (
            {"optimizer": "torch.optim:SGD", "optimizer_args": {"momentum": -1}},
            "--optimizer torch.optim:SGD: .*momentum",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_told_in_a_line(fields, told):
    with pytest.raises(UserError, match=told) as error:
        optimizer_of(network(), config(**fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "module", "extra"),
    [
        ({"use_8bit_adam": True}, "bitsandbytes", "bnb"),
        ({"optimizer": "adamw8bit"}, "bitsandbytes", "bnb"),
        ({"optimizer": "torchao_adamw4bit"}, "torchao", "torchao"),
        ({"optimizer": "prodigy"}, "pytorch_optimizer", "optimizers"),
        ({"optimizer": "adamw_schedulefree"}, "pytorch_optimizer", "optimizers"),
    ],
)
def test_a_missing_extra_is_named(fields, module, extra, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.setitem(__import__("sys").modules, f"{module}.optim", None)
    with pytest.raises(UserError, match="--optimizer") as error:
        optimizer_of(network(), config(**fields))
    assert str(error.value).endswith(f"; pip install 'sdtune[{extra}]'")


def test_an_argument_that_an_optimizer_does_not_take_is_refused():
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(UserError, match="--adam-beta1: has no effect on --optimizer lion; --optimizer-args takes"):
        optimizer_of(network(), config(optimizer="lion", adam_beta1=0.5))


# ---- steps that are skipped ------------------------------------------------------------------------------

KINDS = {
    "adamw": {},
    "amsgrad": {"optimizer_args": {"amsgrad": True}},
    "plain adamw": {"optimizer": "torch.optim:AdamW", "optimizer_args": {"fused": False, "foreach": False}},
    "sgd": {"optimizer": "torch.optim:SGD", "optimizer_args": {"momentum": 0.9}},
    "prodigy": {"optimizer": "prodigy", "adam_weight_decay": 0.0},
    "adamw_schedulefree": {"optimizer": "adamw_schedulefree", "optimizer_args": {"warmup_steps": 3}},
    "adamw8bit": {"optimizer": "adamw8bit"},
    **{name: {"optimizer": name} for name in ("lion", "came", "adafactor", "ademamix", "stableadamw")},
    "torchao_adamw8bit": {"optimizer": "torchao_adamw8bit"},
    "torchao_adamw4bit": {"optimizer": "torchao_adamw4bit"},
    "torchao_adamwfp8": {"optimizer": "torchao_adamwfp8"},
}
NEEDS = {"adamw8bit": "bitsandbytes"}
NEEDS |= dict.fromkeys(("prodigy", "adamw_schedulefree", *optim.FURTHER), "pytorch_optimizer")
NEEDS |= {name: "torchao" for name in KINDS if name.startswith("torchao")}


@pytest.fixture(params=KINDS)
def cfg(request) -> Optim:
    """Settings of each kind of optimizer that is installed."""
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    return config(**KINDS[request.param])


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_step_without_a_finite_gradient_changes_nothing(cfg, bad):
    module = network()
    optimizer = optimizer_of(module, cfg)
    advance(module, optimizer, 0, 3)
    before = bits(module, optimizer)
    norm = backward(module, 3)
    next(module.parameters()).grad[0, 0] = bad
    norm = torch.nn.utils.get_total_norm(p.grad for p in module.parameters())
    assert not norm.isfinite()
    optim.clipped_step(optimizer, norm, 1.0)
    assert same(bits(module, optimizer), before)
    assert not hasattr(optimizer, "found_inf")
    advance(module, optimizer, 4, 5)
    assert not same(bits(module, optimizer)[0], before[0])


def test_a_skipped_step_is_as_if_it_had_not_been(cfg):
    runs = []
    for skip in (False, True):
        module = network()
        optimizer = optimizer_of(module, cfg)
        advance(module, optimizer, 0, 3)
        if skip:
            backward(module, 99)
            optim.clipped_step(optimizer, torch.tensor(float("nan")), 1.0)
        advance(module, optimizer, 3, 6)
        runs.append(bits(module, optimizer))
    assert same(*runs)


def test_a_first_step_may_be_skipped(cfg):
    module = network()
    optimizer = optimizer_of(module, cfg)
    before = [p.detach().clone() for p in module.parameters()]
    backward(module, 0)
    optim.clipped_step(optimizer, torch.tensor(float("inf")), 1.0)
    assert same([p.detach() for p in module.parameters()], before)
    advance(module, optimizer, 0, 2)
    other = network()
    advance(other, optimizer_of(other, cfg), 0, 2)
    assert same(list(module.parameters()), list(other.parameters()))


@pytest.mark.parametrize("max_norm", [1e-2, 1e2])
def test_finite_steps_are_those_of_torch(max_norm):
    """With gradients that are clipped, which the fused optimizer does itself, and with gradients that are not."""
    module, reference = network(), network()
    optimizer = optimizer_of(module, config())
    groups = [{"params": reference[0].parameters()}, {"params": reference[2].parameters(), "lr": 5e-3}]
    plain = torch.optim.AdamW(groups, lr=1e-2, weight_decay=1e-2)
    for step in range(5):
        optim.clipped_step(optimizer, backward(module, step), max_norm)
        backward(reference, step)
        torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
        plain.step()
    for one, other in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_norm_that_decides_is_the_one_before_clipping():
    """An optimizer that does not clip itself finds its gradients clipped."""
    module, seen = network(), []
    norm = backward(module, 0)

    class Plain(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]).item())

    optim.clipped_step(Plain(module.parameters(), lr=1e-2), norm, 1e-3)
    assert norm > 1e-2
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


# ---- the average -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema_power": 0.75},
        {"ema_inv_gamma": 3.0, "ema_power": 1.0},
        {"ema_decay": 0.5},
        {"ema_decay": 0.0},
        {"ema_warmup": "ratio"},
        {"ema_warmup": "ratio", "ema_decay": 0.5},
    ],
    ids=str,
)
def test_the_average_is_that_of_diffusers(settings):
    """Both count the first update as step 0 of the warm-up: its decay is 0, and the start is forgotten."""
    cfg = config(**settings)
    weights = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    average = optim.Average(cfg, weights)
    reference = EMAModel(
        [nn.Parameter(w.clone()) for w in weights.values()],
        decay=cfg.ema_decay,
        use_ema_warmup=cfg.ema_warmup == "power",
        inv_gamma=cfg.ema_inv_gamma,
        power=cfg.ema_power,
    )
    for step in range(1, 21):
        for w in weights.values():
            w.add_(torch.randn_like(w))
        average.update(step)
        reference.step([nn.Parameter(w.clone()) for w in weights.values()])
        for mean, expected in zip(average.mean.values(), reference.shadow_params, strict=True):
            assert torch.allclose(mean, expected, atol=1e-6, rtol=1e-6), step


def test_power_1_is_the_mean_of_all_steps():
    weights = {"a": torch.zeros(1, dtype=torch.float64)}
    average = optim.Average(config(ema_power=1.0), weights)
    for step in range(1, 11):
        weights["a"].fill_(step)
        average.update(step)
        assert average.mean["a"].item() == pytest.approx(sum(range(1, step + 1)) / step)


def test_the_decay_ends_at_its_limit():
    average = optim.Average(config(ema_decay=0.99), {"a": torch.zeros(1)})
    decays = [average.decay(step) for step in range(0, 100_000, 1000)]
    assert decays[0] == 0
    assert decays == sorted(decays)
    assert decays[-1] == 0.99


def test_the_average_takes_the_models_place_and_gives_it_back():
    module = network()
    weights = dict(module.named_parameters())
    average = optim.Average(config(), weights)
    optimizer = optimizer_of(module, config())
    for step in range(4):
        advance(module, optimizer, step, step + 1)
        average.update(step + 1)
    live = {name: w.detach().clone() for name, w in weights.items()}
    mean = {name: w.clone() for name, w in average.mean.items()}
    assert not same(live, mean)
    with average.in_place():
        assert same({n: p.detach() for n, p in module.named_parameters()}, mean)
    assert same({n: p.detach() for n, p in module.named_parameters()}, live)
    with pytest.raises(KeyboardInterrupt), average.in_place():
        raise KeyboardInterrupt
    assert same({n: p.detach() for n, p in module.named_parameters()}, live)
    assert same(average.mean, mean)
    assert all(not w.requires_grad for w in average.mean.values())


# ---- saved and put back ----------------------------------------------------------------------------------


def through_files(tensors, numbers):
    """What a checkpoint does with a state: safetensors and JSON."""
    return load(save(tensors)), json.loads(json.dumps(numbers))


def named(module):
    return {p: n for n, p in module.named_parameters()}


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_run_put_back_goes_on_as_if_it_had_not_stopped(cfg, stop):
    put_back(cfg, stop)


def test_an_optimizer_is_known_by_its_name_in_any_case():
    assert type(optimizer_of(network(), config(optimizer="AdamW"))) is torch.optim.AdamW
    pytest.importorskip("pytorch_optimizer")
    assert type(optimizer_of(network(), config(optimizer="Lion"))).__name__ == "Lion"


def test_every_further_optimizer_goes_on_as_if_it_had_not_stopped():
    pytest.importorskip("pytorch_optimizer")
    for name in optim.FURTHER:
        put_back(config(optimizer=name), 2)
    put_back(config(optimizer="soap"), 9)  # its bases turn every tenth step; then they lie in memory by columns


class Paged(torch.optim.AdamW):
    """As bitsandbytes' paged optimizers, its moments lie in tensors that nothing else can make."""

    is_paged = True

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["exp_avg"].in_pages = True


def test_moments_that_lie_in_pages_are_put_back_there():
    cfg, module = config(), network()
    optimizer = Paged(module.parameters(), lr=1e-2)
    advance(module, optimizer, 0, 3)
    tensors, numbers = through_files(*optimizer_state.save_state(optimizer, named(module)))
    resumed = Paged(module.parameters(), lr=cfg.learning_rate)
    optimizer_state.load_state(resumed, named(module), tensors, numbers)
    assert same(bits(module, resumed), bits(module, optimizer))
    assert all(state["exp_avg"].in_pages for state in resumed.state.values())


def put_back(cfg, stop):
    module = network()
    optimizer = optimizer_of(module, cfg)
    advance(module, optimizer, 0, stop)
    tensors, numbers = through_files(*optimizer_state.save_state(optimizer, named(module)))
    other = network(seed=1)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), module.parameters(), strict=True):
            mine.copy_(theirs)
    resumed = optimizer_of(other, cfg)
    optimizer_state.load_state(resumed, named(other), tensors, numbers)
    assert same(bits(other, resumed), bits(module, optimizer))
    advance(module, optimizer, stop, stop + 4)
    advance(other, resumed, stop, stop + 4)
    assert same(bits(other, resumed), bits(module, optimizer))


def test_saving_changes_nothing(cfg):
    module = network()
    optimizer = optimizer_of(module, cfg)
    advance(module, optimizer, 0, 2)
    before = bits(module, optimizer)
    tensors, _ = optimizer_state.save_state(optimizer, named(module))
    assert same(bits(module, optimizer), before)
    names = {key.partition("|")[0] for key in tensors} - {""}
    assert names <= set(named(module).values())


def test_schedule_free_is_evaluated_at_its_average():
    pytest.importorskip("pytorch_optimizer")
    module = network()
    optimizer = optimizer_of(module, config(**KINDS["adamw_schedulefree"]))
    for step in range(100):  # there and back rounds to the same more often than not
        advance(module, optimizer, step, step + 1)
        before = bits(module, optimizer)
        with optim.evaluation(optimizer):
            assert step == 0 or not same([p.detach() for p in module.parameters()], before[0])
            assert not any(g["train_mode"] for g in optimizer.param_groups)
        assert same(bits(module, optimizer), before)  # to look changes nothing


def test_prodigy_wants_one_rate():
    pytest.importorskip("pytorch_optimizer")
    groups = [{"params": [w], "lr": lr} for lr, w in zip((1.0, 0.5), network()[0].parameters(), strict=True)]
    with pytest.raises(UserError, match="--optimizer prodigy: finds one learning rate"):
        optim.make_optimizer(config(optimizer="prodigy"), groups)


def test_the_others_are_evaluated_as_they_are():
    module = network()
    optimizer = optimizer_of(module, config())
    before = bits(module, optimizer)
    with optim.evaluation(optimizer):
        assert same(bits(module, optimizer), before)
