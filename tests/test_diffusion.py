"""The forward process, targets, weights and timesteps, against diffusers' schedulers and the papers' formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from sdtune.config.sections import UserError
from sdtune.diffusion.objective import DDPM, bias_timesteps, denoising_loss, per_image

T = 1000
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler(prediction="epsilon", **more):
    return DDPMScheduler(num_train_timesteps=T, prediction_type=prediction, **SD15 | more)


def objective(prediction="epsilon", zero_snr=False, **more) -> DDPM:
    return DDPM(scheduler(rescale_betas_zero_snr=zero_snr).alphas_cumprod, prediction, **more)


def alpha_bars(zero_snr=False):
    """The paper's alpha-bar in float64, from the betas alone."""
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / (T - 1)) ** 2 for t in range(T)]
    roots, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        roots.append(product**0.5)
    if zero_snr:  # Lin et al. 2023, algorithm 1
        first, last = roots[0], roots[-1]
        roots = [(root - last) * first / (first - last) for root in roots]
    return [root**2 for root in roots]


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def batch(dtype):
    """Clean latents, noise, and timesteps with both ends among them."""
    numbers = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(9, 4, 5, 3, generator=numbers, dtype=dtype) for _ in range(2))
    t = torch.tensor([0, 1, 2, 10, 250, 500, 750, 998, 999])
    return x0, noise, t


# ---- the forward process and the target ----------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_is_that_of_diffusers(batch, zero_snr):
    x0, noise, t = batch
    expected = scheduler(rescale_betas_zero_snr=zero_snr).add_noise(x0, noise, t)
    x_t = objective(zero_snr=zero_snr).noise(x0, noise, t)
    assert x_t.dtype == x0.dtype
    assert (x_t - expected).abs().max() < (1e-6 if x0.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_targets_are_those_of_diffusers(batch, zero_snr):
    x0, noise, t = batch
    velocity = scheduler(rescale_betas_zero_snr=zero_snr).get_velocity(x0, noise, t)
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": x0}
    for prediction in PREDICTIONS:
        target = objective(prediction, zero_snr).target(x0, noise, t)
        assert target.dtype == x0.dtype
        assert (target - expected[prediction]).abs().max() < (1e-6 if x0.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_alpha_bar_is_the_papers(zero_snr):
    expected = torch.tensor(alpha_bars(zero_snr), dtype=torch.float64)
    assert (objective(zero_snr=zero_snr).alphas_cumprod - expected).abs().max() < 1e-6


def test_noise_keeps_the_variance(batch):
    _, _, t = batch
    a, s = objective().scales(t, torch.zeros(9, 1, dtype=torch.float64))
    assert a.shape == s.shape == (9, 1)
    assert torch.allclose(a.square() + s.square(), torch.ones(9, 1, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_stands_for_the_image_it_was_made_of(prediction, batch):
    x0, noise, t = batch
    of = objective(prediction)
    found = of.x0(of.noise(x0, noise, t), of.target(x0, noise, t), t)
    assert (found - x0).abs().max() < (2e-5 if x0.dtype == torch.float32 else 1e-12)  # noise / a_t, and a_999 = 0.07


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_is_what_diffusers_steps_towards(prediction, batch):
    x0, noise, t = batch
    of, pred = objective(prediction), torch.randn_like(noise)
    x_t = of.noise(x0, noise, t)
    stepper = scheduler(prediction, clip_sample=False)
    for i, step in enumerate(t):
        expected = stepper.step(pred[i], step, x_t[i]).pred_original_sample
        one = slice(i, i + 1)
        assert torch.allclose(of.x0(x_t[one], pred[one], t[one])[0], expected, atol=2e-6, rtol=2e-6)


def test_zero_terminal_snr_ends_in_pure_noise(batch):
    x0, noise, t = batch
    last = t == 999
    of = objective("v_prediction", zero_snr=True)
    assert torch.equal(of.noise(x0, noise, t)[last], noise[last])
    assert torch.equal(of.target(x0, noise, t)[last], -x0[last])
    assert (of.alphas_cumprod[:-1] > 0).all()
    found = of.x0(of.noise(x0, noise, t), of.target(x0, noise, t), t)
    assert (found - x0).abs().max() < 2e-6  # velocity knows the image at every timestep


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 8, 8), (2, 4, 3, 8, 8)])
def test_scales_fit_images_of_any_rank(shape):
    x0 = torch.ones(shape)
    x_t = objective().noise(x0, torch.zeros(shape), torch.tensor([0, 999]))
    assert x_t.shape == shape
    assert x_t[0].min() > 0.99
    assert x_t[1].max() < 0.1
    assert per_image(torch.tensor([1.0, 2.0]), x0).shape == (2, *[1] * (len(shape) - 1))


# ---- min-SNR ---------------------------------------------------------------------------------------------


def min_snr(prediction, gamma, alpha_bar):
    """Hang et al. 2023, section 3.4, one timestep."""
    if alpha_bar == 0:
        return {"epsilon": 1.0, "v_prediction": 0.0, "sample": 0.0}[prediction]
    snr = alpha_bar / (1 - alpha_bar)
    return {"epsilon": min(snr, gamma) / snr, "v_prediction": min(snr, gamma) / (snr + 1), "sample": min(snr, gamma)}[
        prediction
    ]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_are_the_papers(prediction, gamma, zero_snr):
    of = objective(prediction, zero_snr, snr_gamma=gamma)
    expected = [min_snr(prediction, gamma, a) for a in of.alphas_cumprod.tolist()]
    weight = of.weight(torch.arange(T))
    assert weight.shape == (T,)
    assert weight.isfinite().all()
    assert torch.allclose(weight.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)


def test_min_snr_weights_are_those_of_diffusers():
    compute_snr = pytest.importorskip("diffusers.training_utils").compute_snr
    t = torch.arange(T)
    snr = compute_snr(scheduler(), t)
    for prediction, divisor in {"epsilon": snr, "v_prediction": snr + 1}.items():
        expected = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / divisor
        assert torch.allclose(objective(prediction, snr_gamma=5.0).weight(t), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("prediction", "limit"), [("epsilon", 1), ("v_prediction", 0), ("sample", 0)])
def test_min_snr_at_zero_terminal_snr_has_its_limit(prediction, limit):
    assert objective(prediction, zero_snr=True, snr_gamma=5.0).weight(torch.tensor([999])).tolist() == [limit]


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_same_loss_whatever_is_predicted(gamma):
    """Weights make an error of noise or velocity count as min(snr, gamma) times that of the image it implies."""
    numbers = torch.Generator().manual_seed(0)
    x0, noise, wrong = (torch.randn(50, 4, 4, 4, generator=numbers, dtype=torch.float64) for _ in range(3))
    t = torch.linspace(0, 999, 50).long()
    losses = []
    for prediction in PREDICTIONS:
        of = objective(prediction, snr_gamma=gamma)
        x_t = of.noise(x0, noise, t)
        image = x0 + 0.1 * wrong  # the image that this prediction stands for, the same for all
        a, s = of.scales(t, x0)
        implied = (x_t - a * image) / s
        pred = {"epsilon": implied, "v_prediction": a * implied - s * image, "sample": image}[prediction]
        assert torch.allclose(of.x0(x_t, pred, t), image, atol=1e-9)
        squared = (pred - of.target(x0, noise, t)).square().flatten(1).mean(1)
        losses.append(squared * of.weight(t))
    assert torch.allclose(losses[0], losses[2], rtol=1e-5)
    assert torch.allclose(losses[1], losses[2], rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_without_gamma_all_timesteps_weigh_alike(prediction):
    assert torch.equal(objective(prediction).weight(torch.arange(T)), torch.ones(T))


def test_without_gamma_an_error_of_the_image_weighs_as_that_of_the_noise():
    """Salimans & Ho 2022, equation 9: the signal-to-noise ratio."""
    of = objective("sample")
    alpha_bar = of.alphas_cumprod
    assert torch.allclose(of.weight(torch.arange(T)), (alpha_bar / (1 - alpha_bar)).float())


# ---- timesteps -------------------------------------------------------------------------------------------


def drawn(odds=None, per_timestep=8, steps=T):
    """How often each timestep comes up over a grid of quantiles, one in the middle of each cell."""
    of = DDPM(torch.linspace(0.999, 0.01, steps), timestep_odds=odds)
    total = int((torch.ones(steps) if odds is None else odds).sum() * per_timestep)
    u = (torch.arange(total, dtype=torch.float64) + 0.5) / total
    return torch.bincount(of.timesteps(u), minlength=steps)


@pytest.mark.parametrize("steps", [7, 1000])
def test_uniform_timesteps_are_each_drawn_as_often(steps):
    assert drawn(steps=steps).tolist() == [8] * steps


def test_quantiles_of_the_ends():
    of = objective()
    t = of.timesteps(torch.tensor([0.0, 1e-9, 1 / T + 1e-9, 0.5 + 1e-9, 1 - 1e-9, 1.0], dtype=torch.float64))
    assert t.tolist() == [0, 0, 1, 500, 999, 999]
    assert t.dtype == torch.int64
    assert of.timesteps(torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 999]  # float32, as torch.rand gives them


def test_quantiles_on_the_edges():
    four = DDPM(torch.linspace(0.9, 0.1, 4))
    assert four.timesteps(torch.tensor([0, 0.25, 0.5, 0.75])).tolist() == [0, 1, 2, 3]
    ten = DDPM(torch.linspace(0.9, 0.1, 10))  # ten tenths add up to a little less than 1
    assert ten.timesteps(torch.tensor([math.nextafter(1, 0)], dtype=torch.float64)).tolist() == [9]


def test_timesteps_rise_with_their_quantile():
    t = objective().timesteps(torch.linspace(0, 1, 12345, dtype=torch.float64))
    assert (t.diff() >= 0).all()


def of_diffusers(strategy, multiplier, begin, end, portion, steps=T):
    """Odds by the meaning of diffusers' generate_timestep_weights, counted one timestep at a time."""
    chosen = {
        "none": lambda t: False,
        "earlier": lambda t: t < int(portion * steps),
        "later": lambda t: t >= steps - int(portion * steps),
        "range": lambda t: begin <= t < end,
    }[strategy]
    return [multiplier if chosen(t) else 1.0 for t in range(steps)]


@pytest.mark.parametrize("portion", [0.25, 0.1, 1.0, 0.0005])
@pytest.mark.parametrize("multiplier", [4.0, 0.5])
@pytest.mark.parametrize("strategy", ["none", "earlier", "later", "range"])
def test_biased_timesteps_are_drawn_that_much_more_often(strategy, multiplier, portion):
    settings = SimpleNamespace(multiplier=multiplier, begin=200, end=500, portion=portion)
    odds = bias_timesteps(T, strategy, **vars(settings))
    expected = of_diffusers(strategy, **vars(settings))
    assert odds.tolist() == expected
    assert drawn(odds).tolist() == [8 * share for share in expected]


def test_a_bias_to_nothing_leaves_the_others_alone():
    assert drawn(bias_timesteps(T, "later", 3.0, portion=0.0)).tolist() == [8] * T


# ---- the loss --------------------------------------------------------------------------------------------


def test_the_squared_error_is_that_of_torch():
    pred, target = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    distance = objective().distance(pred, target)
    assert distance.shape == (3,)
    expected = [torch.nn.functional.mse_loss(p, y) for p, y in zip(pred, target, strict=True)]
    assert torch.allclose(distance, torch.stack(expected))
    assert torch.allclose(objective().distance(pred.half(), target.half()), distance, rtol=1e-2)
    assert objective().distance(pred.half(), target.half()).dtype == torch.float32


@pytest.mark.parametrize("c", [0.01, 0.1, 3.0])
def test_pseudo_huber_is_the_papers(c):
    """Song & Dhariwal 2023, section 3.3: sqrt(e^2 + c^2) - c."""
    pred, target = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    distance = objective(huber_c=c).distance(pred, target)
    errors = (pred - target).flatten(1).tolist()
    expected = [sum(math.sqrt(e * e + c * c) - c for e in row) / len(row) for row in errors]
    assert distance.tolist() == pytest.approx(expected, rel=1e-4)


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    near, far, zero = torch.full((1, 1), 1e-2), torch.full((1, 1), 1e4), torch.zeros(1, 1)
    of = objective(huber_c=1.0)
    assert of.distance(near, zero).item() == pytest.approx(1e-4 / 2, rel=1e-2)  # e^2 / 2c
    assert of.distance(far, zero).item() == pytest.approx(1e4 - 1, rel=1e-4)
    assert of.distance(zero, zero).item() == 0
    assert of.distance(-far, zero) == of.distance(far, zero)


@pytest.mark.parametrize("more", [{}, {"snr_gamma": 5.0}, {"huber_c": 0.1}, {"zero_snr": True}], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_predictor_has_no_loss(prediction, more):
    numbers = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(6, 4, 8, 8, generator=numbers) for _ in range(2))
    of = objective(prediction, **more)
    seen = []

    def predict(x_t, t):
        seen.append((x_t, t))
        return of.target(x0, noise, t)

    u = torch.tensor([0.0, 0.1005, 0.4005, 0.6005, 0.9005, 0.9999])
    loss = denoising_loss(of, predict, x0, {"u": u, "noise": noise})
    assert loss.tolist() == [0.0] * 6
    ((x_t, t),) = seen
    assert t.tolist() == [0, 100, 400, 600, 900, 999]
    assert torch.equal(x_t, of.noise(x0, noise, t))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_each_image_is_its_own(prediction):
    numbers = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(5, 4, 8, 8, generator=numbers) for _ in range(2))
    u = torch.rand(5, generator=numbers)
    of = objective(prediction, snr_gamma=5.0)
    whole = denoising_loss(of, lambda x_t, t: x_t * 0.3, x0, {"u": u, "noise": noise})
    assert whole.shape == (5,)
    for i in range(5):
        one = slice(i, i + 1)
        alone = denoising_loss(of, lambda x_t, t: x_t * 0.3, x0[one], {"u": u[one], "noise": noise[one]})
        assert torch.allclose(alone, whole[one])
        t = of.timesteps(u[one])
        error = 0.3 * of.noise(x0[one], noise[one], t) - of.target(x0[one], noise[one], t)
        assert alone.item() == pytest.approx((error.square().mean() * of.weight(t)).item(), rel=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perturbed_noise_reaches_the_input_and_not_the_target(prediction):
    """Ning et al. 2023, algorithm 1: x_t from noise + 0.1 xi, the target from noise alone."""
    numbers = torch.Generator().manual_seed(0)
    x0, noise, extra = (torch.randn(3, 4, 8, 8, generator=numbers) for _ in range(3))
    of, u = objective(prediction), torch.tensor([0.2005, 0.5005, 0.8005])
    t = of.timesteps(u)
    input_noise = noise + 0.1 * extra

    def predict(x_t, t):
        assert torch.equal(x_t, of.noise(x0, input_noise, t))
        return of.target(x0, noise, t)

    loss = denoising_loss(of, predict, x0, {"u": u, "noise": noise, "input_noise": input_noise})
    assert loss.tolist() == [0.0] * 3
    assert t.tolist() == [200, 500, 800]


def test_the_gradient_reaches_the_network_and_nothing_else():
    x0, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    scale = torch.tensor(0.5, requires_grad=True)
    batch = {"u": torch.tensor([0.3, 0.6]), "noise": noise}
    denoising_loss(objective(snr_gamma=5.0), lambda x_t, t: scale * x_t, x0, batch).mean().backward()
    assert scale.grad is not None
    assert scale.grad.abs() > 0
    assert x0.grad is None


@pytest.mark.parametrize(("begin", "end", "named"), [(1000, 2000, "begin 1000"), (0, 2000, "end 2000")])
def test_a_range_of_timesteps_beyond_the_schedule_is_refused(begin, end, named):
    with pytest.raises(UserError, match=f"--timestep-bias-{named}: the schedule has the timesteps 0 to 999"):
        bias_timesteps(1000, "range", 2.0, begin, end)
    assert bias_timesteps(100, "range", 2.0, 50).sum() == 150  # up to the end that is the default
