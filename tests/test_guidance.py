"""Guidance against independent computations in float64, and against distributions that are known in closed form."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from sdtune.diffusion.guidance import classifier_free, rescaled, reverse_variance, shifted, shifted_mean
from sdtune.diffusion.guides import ByClassifier, ByClip, opaque_squares
from sdtune.diffusion.objective import DDPM
from sdtune.diffusion.pixel_sampler import draw
from sdtune.diffusion.schedulers import SCHEDULERS, make_scheduler
from tests.test_sampling import clip_network, processor, tiny_unet

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
BETAS = np.linspace(1e-4, 0.02, 1000)
BARS = np.cumprod(1 - BETAS)


def bar_at(t) -> float:
    """alpha-bar; between two timesteps, where Euler's class may be, s / a is interpolated."""
    sigma = np.interp(float(t), np.arange(1000), ((1 - BARS) / BARS) ** 0.5)
    return float(1 / (1 + sigma**2))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def told(prediction: str, x_t, x0, bar: float):
    """What a network says that takes ``x0`` for the image."""
    a, s = bar**0.5, (1 - bar) ** 0.5
    eps = (x_t - a * x0) / s
    return {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[prediction]


def eps_of(prediction: str, x_t, pred, bar: float):
    a, s = bar**0.5, (1 - bar) ** 0.5
    return {"epsilon": pred, "v_prediction": a * pred + s * x_t, "sample": (x_t - a * pred) / s}[prediction]


# ---- formulas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_classifier_free_guidance_is_the_papers_whatever_is_predicted(prediction, scale):
    x_t, x0_u, x0_c = (normal(k, 2, 3, 4, 4) for k in range(3))
    for bar in (0.9, 0.3, 1e-4):
        guided = classifier_free(told(prediction, x_t, x0_u, bar), told(prediction, x_t, x0_c, bar), scale)
        eps_u, eps_c = (told("epsilon", x_t, x0, bar) for x0 in (x0_u, x0_c))
        w = scale - 1  # the paper's equation 6
        torch.testing.assert_close(
            eps_of(prediction, x_t, guided, bar), (1 + w) * eps_c - w * eps_u, rtol=1e-9, atol=1e-9
        )


def test_rescale_keeps_the_contrast_of_the_conditional_prediction():
    guided, conditional = 3 * normal(0, 2, 3, 4, 4) + 1, normal(1, 2, 3, 4, 4)
    for phi in (0.0, 0.7, 1.0):
        ours = rescaled(guided, conditional, phi)
        for one, given, wanted in zip(ours.numpy(), guided.numpy(), conditional.numpy(), strict=True):
            np.testing.assert_allclose(one, phi * given * wanted.std() / given.std() + (1 - phi) * given, rtol=1e-12)
    assert rescaled(guided, conditional, 1.0)[0].std() == pytest.approx(float(conditional[0].std()))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("limit", [None, 1.0])
def test_algorithm_2_shifts_the_noise_whatever_is_predicted(prediction, limit):
    x_t, x0 = normal(0, 2, 3, 4, 4), 0.5 * normal(1, 2, 3, 4, 4).tanh()
    for bar in (0.9, 0.3, 1e-4):
        gradient = 0.5 * bar**0.5 * normal(2, 2, 3, 4, 4).tanh()
        pred = shifted(told(prediction, x_t, x0, bar), x0, gradient, bar, prediction, limit)
        expected = told("epsilon", x_t, x0, bar) - (1 - bar) ** 0.5 * gradient
        torch.testing.assert_close(eps_of(prediction, x_t, pred, bar), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(shifted(x0, x0, gradient, 0.0, prediction), x0)  # pure noise


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_algorithm_2_stays_within_what_pixels_can_be(prediction):
    bar, x_t = 1e-4, normal(0, 4)
    x0 = torch.tensor([0.5, 0.5, 3.0, 3.0], dtype=torch.float64)
    gradient = torch.tensor([1e3, -1e3, 1e3, -1e3], dtype=torch.float64)
    for limit, wanted in ((None, [1.0, -1.0, 3.0, -1.0]), (1.0, [1.0, -1.0, 1.0, -1.0])):
        pred = shifted(told(prediction, x_t, x0, bar), x0, gradient, bar, prediction, limit)
        expected = told("epsilon", x_t, torch.tensor(wanted, dtype=torch.float64), bar)
        torch.testing.assert_close(eps_of(prediction, x_t, pred, bar), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_variance_of_a_reverse_step(steps, kind):
    scheduler = DDPMScheduler(variance_type=kind)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    for t, s in ((times[0], times[1]), (times[-2], times[-1])):
        beta = 1 - BARS[t] / BARS[s]
        # x_s given x_t and x_0, by Bayes: the precisions of q(x_t | x_s) and of q(x_s | x_0) add up
        bayes = 1 / ((1 - beta) / beta + 1 / (1 - BARS[s]))
        ours = reverse_variance(BARS[t], BARS[s], large=kind == "fixed_large")
        assert ours == pytest.approx(beta if kind == "fixed_large" else bayes, rel=1e-10)
        assert ours == pytest.approx(float(scheduler._get_variance(t)), rel=1e-3)  # in float32
    assert reverse_variance(BARS[0], 1.0) == 0


def test_algorithm_1_is_exact_where_the_classifier_is_log_linear():
    mean, gradient, variance = 0.3, -1.7, 0.04
    x = np.linspace(-3, 3, 200_001)
    density = np.exp(-((x - mean) ** 2) / (2 * variance) + gradient * x)
    density /= density.sum()
    moved = shifted_mean(torch.tensor(mean), torch.tensor(gradient), variance)
    assert float(moved) == pytest.approx((density * x).sum(), abs=1e-6)
    assert (density * (x - float(moved)) ** 2).sum() == pytest.approx(variance, rel=1e-6)


# ---- samples of distributions that are known -----------------------------------------------------------


class Mixture(nn.Module):
    """The exact network for pixels that are independent draws of a mixture of two normal distributions.

    One picture is 32 x 32 draws. With labels it is the network of one component; label 2 is the null class.
    """

    MEANS, DEVIATION, WEIGHTS = (-0.5, 0.4), 0.1, (0.7, 0.3)
    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, prediction="epsilon", classes=False):
        super().__init__()
        self.prediction = prediction
        embeds = 3 if classes else None
        self.config = SimpleNamespace(in_channels=1, out_channels=1, sample_size=32, num_class_embeds=embeds)

    def logs(self, x_t, t):
        """``log w_k N(x_t; a mu_k, v)`` with ``v = a^2 sigma^2 + s^2``, stacked over k, and v."""
        bar = bar_at(t)
        v = bar * self.DEVIATION**2 + 1 - bar
        parts = [
            -((x_t - bar**0.5 * mu) ** 2) / (2 * v) + np.log(w) for mu, w in zip(self.MEANS, self.WEIGHTS, strict=True)
        ]
        return torch.stack(parts), v

    def x0(self, x_t, t, labels=None):
        logs, v = self.logs(x_t, t)
        bar = bar_at(t)
        means = torch.stack([mu + bar**0.5 * self.DEVIATION**2 / v * (x_t - bar**0.5 * mu) for mu in self.MEANS])
        mixed = (logs.softmax(0) * means).sum(0)
        return mixed if labels is None else torch.where(labels.reshape(-1, 1, 1, 1) == 2, mixed, means[labels[0] % 2])

    def forward(self, x_t, t, class_labels=None):
        x0 = self.x0(x_t, t)
        if class_labels is not None:
            x0 = torch.cat([self.x0(x[None], t, label[None]) for x, label in zip(x_t, class_labels, strict=True)])
        return SimpleNamespace(sample=told(self.prediction, x_t, x0, bar_at(t)))


class Bayes:
    """The exact classifier of every pixel of a `Mixture`: log p(component 1 | x_t)."""

    sees_x0 = False

    def __init__(self, mixture):
        self.mixture = mixture

    def __call__(self, x_t, t, x0, rows):
        return self.mixture.logs(x_t, t)[0].log_softmax(0)[1].flatten(1).sum(1)


def sampler(name, prediction="epsilon"):
    return make_scheduler(name, DDPMScheduler(clip_sample=False, prediction_type=prediction))


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"ddpm"}))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_algorithm_2_with_an_exact_classifier_is_the_conditional_network(name, prediction):
    if name in ("euler-ancestral", "pndm") and prediction == "sample":
        pytest.skip("diffusers' class cannot")
    scheduler = sampler(name, prediction)
    guided = draw(Mixture(prediction), scheduler, [0], steps=12, guides=[Bayes(Mixture())])
    conditional = draw(Mixture(prediction, classes=True), scheduler, [0], steps=12, labels=torch.tensor([1]))
    torch.testing.assert_close(guided, conditional, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_an_exact_classifier_gives_the_asked_for_part_of_a_mixture(name):
    model = Mixture()
    plain = draw(model, sampler(name), [0], steps=250).double()
    assert float((plain > 0).double().mean()) == pytest.approx(0.3, abs=0.05)
    guided = draw(model, sampler(name), [0], steps=250, guides=[Bayes(model)]).double()
    assert float((guided > 0).double().mean()) > 0.998
    assert float(guided.mean()) == pytest.approx(0.4, abs=0.01)
    assert float(guided.std()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_classifier_free_guidance_of_one_is_the_conditional_and_of_zero_the_whole(prediction):
    model, labels = Mixture(prediction, classes=True), torch.tensor([1])
    for scale, share in ((1.0, 1.0), (0.0, 0.3)):
        drawn = draw(model, sampler("ddim", prediction), [0], steps=50, labels=labels, guidance_scale=scale).double()
        assert float((drawn > 0).double().mean()) == pytest.approx(share, abs=0.05)
    open_class = draw(model, sampler("ddim", prediction), [0], steps=50).double()
    torch.testing.assert_close(open_class, drawn)  # no label is the null class
    strong = draw(model, sampler("ddim", prediction), [0], steps=50, labels=labels, guidance_scale=3.0).double()
    assert float(strong.mean()) > 0.41 and float(strong.std()) < 0.1  # away from the other class, and narrower


class Up:
    """The same gradient everywhere, at any noise, as networks have it that know little of pure noise."""

    sees_x0 = False

    def __call__(self, x_t, t, x0, rows):
        return 5 * x_t.flatten(1).sum(1)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "dpm++"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [True, False])
def test_a_strong_gradient_in_few_steps_does_not_turn_round(name, prediction, clip):
    base = DDPMScheduler(clip_sample=clip, prediction_type=prediction, timestep_spacing="trailing")
    scheduler = make_scheduler(name, base, clip=clip)
    plain, guided = (draw(Mixture(prediction), scheduler, [0], steps=10, guides=guides) for guides in ([], [Up()]))
    assert float((guided > 0).double().mean()) > float((plain > 0).double().mean()) + 0.1


class Normal(Mixture):
    """Pixels that are draws of one normal distribution."""

    MEANS, DEVIATION, WEIGHTS = (0.2, 0.2), 0.25, (0.5, 0.5)


class Measured:
    """A measurement y of x0 with normal error: p(y | x_t) is ``N(y; E[x0 | x_t], Var[x0 | x_t] + tau^2)``."""

    sees_x0 = False

    def __init__(self, model, y, tau):
        self.model, self.y, self.tau = model, y, tau

    def __call__(self, x_t, t, x0, rows):
        bar, sigma2 = bar_at(t), self.model.DEVIATION**2
        left = sigma2 * (1 - bar) / (bar * sigma2 + 1 - bar)
        return -((self.y - self.model.x0(x_t, t)) ** 2 / (2 * (left + self.tau**2))).flatten(1).sum(1)


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(clip_sample=False, variance_type="fixed_large"), sampler("ddim")], ids=["ddpm", "ddim"]
)
def test_a_linear_measurement_gives_the_posterior(scheduler):
    model, y, tau = Normal(), 0.6, 0.15
    drawn = draw(model, scheduler, [0], steps=250, guides=[Measured(model, y, tau)]).double()
    precision = 1 / 0.25**2 + 1 / tau**2
    assert float(drawn.mean()) == pytest.approx((0.2 / 0.25**2 + y / tau**2) / precision, abs=0.015)
    assert float(drawn.std()) == pytest.approx(precision**-0.5, rel=0.08)


class Cosine(Normal):
    """The exact network for such pixels where the noise grows as Nichol & Dhariwal 2021 have it, nearly to infinity."""

    def forward(self, x_t, t, class_labels=None):
        known = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double().numpy()
        bar = float(1 / (1 + np.interp(float(t), np.arange(1000), ((1 - known) / known) ** 0.5) ** 2))
        sigma2, mu = self.DEVIATION**2, self.MEANS[0]
        x0 = mu + bar**0.5 * sigma2 / (bar * sigma2 + 1 - bar) * (x_t - bar**0.5 * mu)
        return SimpleNamespace(sample=told("v_prediction", x_t, x0, bar))


# A few steps that add noise of their own narrow what they draw, whatever the schedule.
@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"lcm", "ddpm", "euler-ancestral"}))
def test_samplers_do_where_the_noise_grows_nearly_to_infinity(name):
    base = DDPMScheduler(
        clip_sample=False,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    drawn = draw(Cosine("v_prediction"), make_scheduler(name, base), [0], steps=20).double()
    assert float(drawn.mean()) == pytest.approx(0.2, abs=0.04)
    assert float(drawn.std()) == pytest.approx(0.25, rel=0.2)


class Slope:
    """Gradients of 0, 1, 2, ... for the images of a call."""

    sees_x0 = False

    def __call__(self, x_t, t, x0, rows):
        return torch.arange(9.0)[rows][: len(x_t)] * x_t.flatten(1).sum(1)


class Zero(Mixture):
    """Says that there is no noise: x0 is ``x_t / a``."""

    def forward(self, x_t, t, class_labels=None):
        return SimpleNamespace(sample=torch.zeros_like(x_t))


def watched(scheduler, seeds, **options):
    """Timesteps and estimates of x0 of two steps."""
    seen = []
    draw(Zero(), scheduler, seeds, steps=2, watch=lambda t, x0: seen.append((t, x0)), **options)
    return zip(*seen, strict=True)


def test_ancestral_steps_are_shifted_by_the_variance_times_the_gradient():
    scheduler = DDPMScheduler(clip_sample=False)
    times, (first, plain) = watched(scheduler, [5, 6, 7])
    _, (first_guided, guided) = watched(scheduler, [5, 6, 7], guides=[Slope()])
    assert times == (500, 0)
    assert torch.equal(first, first_guided)
    beta_tilde = (1 - BARS[0]) / (1 - BARS[500]) * (1 - BARS[500] / BARS[0])
    expected = beta_tilde / BARS[0] ** 0.5 * torch.arange(3.0).double()  # as seen in x0 at timestep 0
    torch.testing.assert_close((guided - plain).flatten(1).mean(1), expected, rtol=1e-3, atol=1e-9)


# ---- DDIM -----------------------------------------------------------------------------------------------


def test_ddim_draws_the_same_picture_again_whatever_the_batch():
    model, scheduler, seeds = Mixture(), DDIMScheduler(clip_sample=False), [3, 4, 5]
    first = draw(model, scheduler, seeds, steps=20)
    for batch_size in (1, 2, 3):
        assert torch.equal(draw(model, scheduler, seeds, steps=20, batch_size=batch_size), first)
    assert torch.equal(draw(model, scheduler, [4], steps=20)[0], first[1])
    assert not torch.equal(draw(model, scheduler, seeds, steps=20, eta=1.0), first)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_noise_of_ddim_is_beta_tilde_at_eta_1(eta):
    (t, s), (x0, after) = watched(DDIMScheduler(clip_sample=False), [9], eta=eta)
    assert (t, s) == (500, 0)
    generator = torch.Generator().manual_seed(9)
    x_t, z = (torch.randn(1, 1, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(x0, x_t / BARS[t] ** 0.5, rtol=1e-5, atol=1e-9)
    beta_tilde = (1 - BARS[s]) / (1 - BARS[t]) * (1 - BARS[t] / BARS[s])
    expected = BARS[s] ** 0.5 * x_t / BARS[t] ** 0.5 + eta * beta_tilde**0.5 * z
    torch.testing.assert_close(after * BARS[s] ** 0.5, expected, rtol=1e-4, atol=1e-5)


# ---- models that guide -----------------------------------------------------------------------------------


def test_a_classifier_says_the_log_probability_of_each_images_label():
    class Linear(nn.Linear):
        def forward(self, x_t, t):
            assert t.shape == (2,)
            return super().forward(x_t.flatten(1))

    classifier = Linear(4, 3, bias=False, dtype=torch.float64)
    weights = classifier.weight.detach().T
    x_t = normal(1, 2, 1, 2, 2).requires_grad_()
    guide = ByClassifier(classifier, torch.tensor([0, 2, 1]), 1.5)
    said = guide(x_t, torch.tensor(7), None, slice(1, 3))
    (gradient,) = torch.autograd.grad(said.sum(), x_t)
    for k, label in enumerate((2, 1)):
        logits = x_t[k].detach().numpy().ravel() @ weights.numpy()
        p = np.exp(logits) / np.exp(logits).sum()
        assert said[k].item() == pytest.approx(1.5 * np.log(p[label]), rel=1e-6)
        expected = 1.5 * (weights.numpy()[:, label] - weights.numpy() @ p)  # of a softmax, by hand
        np.testing.assert_allclose(gradient[k].numpy().ravel(), expected, rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_gradient_of_clip_goes_through_the_network(channels):
    clip, unet = clip_network().double(), tiny_unet(channels).double()
    guide = ByClip(clip, torch.nn.functional.normalize(normal(5, 2, 8), dim=1), 2.0)
    process, t = DDPM(torch.from_numpy(BARS)), torch.tensor(300)

    def said(x_t):
        return guide(x_t, t, process.x0(x_t, unet(x_t, t).sample, t.expand(len(x_t))), slice(0, 2)).sum()

    x_t = normal(6, 2, channels, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(said(x_t), x_t)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        for seed in range(5):
            way, h = normal(10 + seed, *x_t.shape), 1e-5
            slope = (said(x_t + h * way) - said(x_t - h * way)) / (2 * h)
            assert float(slope) == pytest.approx(float((gradient * way).sum()), rel=1e-5)


def test_a_clip_of_noised_pictures_looks_at_those():
    """So nothing of the network that draws is in its gradient."""
    clip = clip_network()
    texts = torch.nn.functional.normalize(normal(5, 2, 8).float(), dim=1)
    usual, t = ByClip(clip, texts, 2.0), torch.tensor(300)
    clip.model.config.noised = True
    guide = ByClip(clip, texts, 2.0)
    x_t, x0 = (normal(k, 2, 3, 8, 8).float().requires_grad_() for k in (6, 7))
    assert (usual.sees_x0, guide.sees_x0) == (True, False)
    said = guide(x_t, t, x0, slice(0, 2))
    assert torch.autograd.grad(said.sum(), x0, allow_unused=True)[0] is None
    torch.testing.assert_close(guide(x_t, t, None, slice(0, 2)), usual(x0, t, x_t, slice(0, 2)))
    drawn = [
        guide(draw(tiny_unet(3), DDPMScheduler(), [1, 2], steps=10, guides=guides), t, None, slice(0, 2))
        for guides in ([], [guide])
    ]
    assert (drawn[1] > drawn[0]).all()


@pytest.mark.parametrize(("height", "width"), [(12, 12), (24, 24), (30, 20), (8, 8)])
def test_pixels_for_clip_are_those_of_its_own_processor(height, width):
    numbers = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(numbers.double(), 5, 1, 2).round()  # filters differ least on these
    mean, std = (torch.tensor(numbers).reshape(3, 1, 1) for numbers in (processor().image_mean, processor().image_std))
    ours = (opaque_squares(smooth / 127.5 - 1, 12) - mean) / std
    theirs = processor()(images=[smooth[0].permute(1, 2, 0).byte().numpy()], return_tensors="pt").pixel_values
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 0.04  # it rounds to whole levels, 1 / 255 / 0.26 = 0.015 each


def test_what_is_transparent_shows_white_to_clip():
    x0 = torch.tensor([-1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 12, 12)  # black, half covering
    torch.testing.assert_close(opaque_squares(x0, 12), torch.full((1, 3, 12, 12), 0.5))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_clip_guidance_brings_pictures_nearer_to_the_text(name):
    unet = tiny_unet(3)
    texts = torch.nn.functional.normalize(normal(5, 2, 8).float(), dim=1)
    guide = ByClip(clip_network(), texts, 3.0)
    said = []
    for guides in ([], [guide]):
        drawn = draw(unet, make_scheduler(name, DDPMScheduler(), clip=True), [1, 2], steps=10, guides=guides)
        said.append(guide(drawn, None, drawn, slice(0, 2)))
    assert (said[1] > said[0]).all()
