"""What steers a sample: formulas on predictions and on the mean of a reverse step, each a pure function.

Tensors are ``[B, C, H, W]``. A network predicts noise, velocity or image; at a given ``x_t`` each of them is an affine
function of the others, ``v = (eps - s_t x_t) / a_t`` and ``x0 = (x_t - s_t eps) / a_t``, with ``a_t^2 = alpha_bar``,
``s_t^2 = 1 - alpha_bar``. So a formula of the papers on eps whose weights add up to one is the same formula on v and
on x0, and nothing has to be converted, not even at zero terminal SNR, where eps says nothing of the image.
"""

from torch import Tensor


def classifier_free(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """``eps_u + scale (eps_c - eps_u)`` (Ho & Salimans 2022, equation 6, where scale is 1 + w).

    0 is the unconditional prediction, 1 the conditional one; predictions are of noise, velocity or image alike.
    """
    return unconditional + scale * (conditional - unconditional)


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """``guided`` with the standard deviation of ``conditional``, mixed in by ``share`` (Lin et al. 2023, section 3.4).

    Args:
        share: the paper's phi, 0 to 1; 0 changes nothing.
    """
    deviations = [pred.flatten(1).std(1).reshape(-1, 1, 1, 1) for pred in (conditional, guided)]
    return share * (guided * deviations[0] / deviations[1]) + (1 - share) * guided


def shifted(
    pred: Tensor, x0: Tensor, gradient: Tensor, alpha_bar: float, prediction: str, limit: float | None = None
) -> Tensor:
    """``eps - s_t gradient``, in what the network predicts (Dhariwal & Nichol 2021, algorithm 2), within bounds.

    On x0 the shift is ``s_t^2 / a_t gradient``, which near pure noise, where no gradient should count, leaves every
    pixel far outside of what pixels can be. A scheduler that then clips x0 and keeps the noise walks away from what is
    asked for; one that clips nothing never comes back. So x0 is shifted no further than to the range of pixels, and
    the noise goes with it: both still add up to x_t. At zero terminal SNR nothing is shifted.

    Args:
        x0: the estimate that ``pred`` stands for.
        gradient: of the log-probability of what is asked for, times its scale, by x_t.
        prediction: ``epsilon``, ``v_prediction`` or ``sample``.
        limit: what the scheduler clips x0 to, which then holds for the noise as well. ``None`` is no clipping, and
            pixels of x0 that lie outside [-1, 1] already may stay where they are.
    """
    a: float = alpha_bar**0.5
    s: float = (1 - alpha_bar) ** 0.5
    if a == 0:
        return pred
    wanted = x0 + s * s / a * gradient
    if limit is None:
        wanted = wanted.maximum(x0.clamp(max=-1)).minimum(x0.clamp(min=1))
    else:
        wanted = wanted.clamp(-limit, limit)
    return pred + {"epsilon": -a / s, "v_prediction": -1 / s, "sample": 1.0}[prediction] * (wanted - x0)


def shifted_mean(mean: Tensor, gradient: Tensor, variance: float | Tensor) -> Tensor:
    """``mu + Sigma gradient``, of an ancestral step (Dhariwal & Nichol 2021, algorithm 1).

    A sample of the step is shifted like its mean. For ``gradient`` see `shifted`.
    """
    return mean + variance * gradient


def reverse_variance(alpha_bar: float, previous: float, large: bool = False) -> float:
    """Fixed variance of a reverse step (Ho et al. 2020, section 3.2): beta-tilde of equation 7, or beta if ``large``.

    Args:
        alpha_bar, previous: the paper's alpha-bar at the step's timestep and at the one it leads to.
    """
    beta = 1 - alpha_bar / previous
    return beta if large else (1 - previous) / (1 - alpha_bar) * beta
