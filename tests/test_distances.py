"""Distances between sets of features, against closed forms and independent float64 computations."""

from itertools import combinations

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.neighbors import NearestNeighbors

from sdtune.evaluation.distances import estimates, frechet, kernel_distance, mean, precision_recall
from sdtune.evaluation.scores import Bootstrap, figures, of_subject


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def with_moments(n, mean, covariance, seed=0):
    """``n`` points whose own mean and covariance are exactly these."""
    x = normal(n, len(mean), seed=seed)
    x -= x.mean(0)
    x = x @ np.linalg.inv(scipy.linalg.sqrtm(np.cov(x, rowvar=False)).real)
    return torch.from_numpy(x @ scipy.linalg.sqrtm(covariance).real + mean)


def moments(x):
    return x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)


def by_matrix_root(x, y):
    (mu, S), (nu, T) = moments(x), moments(y)
    return ((mu - nu) ** 2).sum() + np.trace(S + T - 2 * scipy.linalg.sqrtm(S @ T).real)


def by_eigenvalues(x, y):
    (mu, S), (nu, T) = moments(x), moments(y)
    values, vectors = np.linalg.eigh(S)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ T @ root).clip(0)
    return ((mu - nu) ** 2).sum() + np.trace(S) + np.trace(T) - 2 * np.sqrt(eigenvalues).sum()


def kernel_by_hand(x, y):
    """Equation 4 of Bińkowski et al. 2018, a pair at a time."""
    n, m, D = len(x), len(y), x.shape[1]
    k = lambda a, b: float(((a * b).sum() / D + 1) ** 3)  # noqa: E731
    within = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    between = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within + between - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def share_by_hand(queries, points, k):
    """Share of ``queries`` in the manifold of ``points``, by sorting every row of distances."""
    found = 0
    radii = [np.sort(np.linalg.norm(points - p, axis=1))[k] for p in points]
    for q in queries:
        found += any(np.linalg.norm(q - p) <= r for p, r in zip(points, radii, strict=True))
    return found / len(queries)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_of_gaussians_with_a_known_answer(seed):
    g = np.random.default_rng(seed)
    mu, nu, s, t = g.normal(size=5), g.normal(size=5), g.uniform(0.1, 4, 5), g.uniform(0.1, 4, 5)
    turn = scipy.linalg.qr(g.normal(size=(5, 5)))[0]
    x = with_moments(40, mu, turn @ np.diag(s) @ turn.T, seed)
    y = with_moments(60, nu, turn @ np.diag(t) @ turn.T, seed + 9)  # covariances that commute
    answer = ((mu - nu) ** 2).sum() + ((np.sqrt(s) - np.sqrt(t)) ** 2).sum()
    assert frechet(x, y) == pytest.approx(answer, rel=1e-9)


def test_frechet_in_one_dimension_is_the_distance_of_means_and_deviations():
    x, y = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[10.0], [11.0], [12.0]])
    assert frechet(x, y) == pytest.approx((2 - 11) ** 2 + (2 - 1) ** 2)


@pytest.mark.parametrize(("n", "m", "D"), [(90, 130, 12), (400, 300, 64)])
def test_frechet_agrees_with_the_matrix_root_and_with_eigenvalues(n, m, D):
    x = torch.from_numpy(normal(n, D, seed=1) @ normal(D, D, seed=2) + 0.3)
    y = torch.from_numpy(normal(m, D, seed=3))
    assert frechet(x, y) == pytest.approx(by_matrix_root(x, y), rel=1e-6)
    assert frechet(x, y) == pytest.approx(by_eigenvalues(x, y), rel=1e-6)


def test_frechet_without_full_rank():
    x, y = torch.from_numpy(normal(20, 50, seed=1)), torch.from_numpy(normal(30, 50, seed=2) * 2)
    assert frechet(x, y) == pytest.approx(by_eigenvalues(x, y), rel=1e-6)
    assert frechet(x, x) == pytest.approx(0, abs=1e-10)


def test_frechet_does_not_depend_on_directions():
    x, y = torch.from_numpy(normal(50, 8)), torch.from_numpy(normal(60, 8, seed=1) + 1)
    turn = torch.from_numpy(scipy.linalg.qr(normal(8, 8, seed=2))[0])
    assert frechet(x @ turn, y @ turn) == pytest.approx(frechet(x, y), rel=1e-12)


def test_kernel_distance_agrees_with_pairs_by_hand():
    x, y = torch.from_numpy(normal(12, 6)), torch.from_numpy(normal(9, 6, seed=1) + 0.5)
    assert kernel_distance(x, y) == pytest.approx(kernel_by_hand(x, y), rel=1e-10)


def test_kernel_distance_is_its_mean_over_all_subsets():
    x, y = torch.from_numpy(normal(6, 3)), torch.from_numpy(normal(5, 3, seed=1))
    each = [
        kernel_distance(x[list(a)], y[list(b)]) for a in combinations(range(6), 3) for b in combinations(range(5), 3)
    ]
    assert np.mean(each) == pytest.approx(kernel_distance(x, y), rel=1e-12)


def test_kernel_distance_is_unbiased():
    """Sets of three drawn from populations of twenty: on average the distance of the populations."""
    P, Q = normal(20, 2), normal(20, 2, seed=1) + 0.2
    k = lambda a, b: (a @ b.T / 2 + 1) ** 3  # noqa: E731
    truth = k(P, P).mean() + k(Q, Q).mean() - 2 * k(P, Q).mean()
    g = np.random.default_rng(5)
    drawn = np.array(
        [
            kernel_distance(torch.from_numpy(P[g.integers(0, 20, 3)]), torch.from_numpy(Q[g.integers(0, 20, 3)]))
            for _ in range(2000)
        ]
    )
    error = drawn.std() / len(drawn) ** 0.5
    assert abs(drawn.mean() - truth) < 3 * error
    with_the_diagonal = (np.diag(k(P, P)).mean() + np.diag(k(Q, Q)).mean() - k(P, P).mean() - k(Q, Q).mean()) / 3
    assert with_the_diagonal > 4 * error  # what the biased estimate would be off by


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("spread", "shift"), [(1.0, 0.0), (0.6, 0.0), (1.5, 0.7)])
def test_precision_and_recall_agree_with_brute_force(k, spread, shift):
    x, y = normal(80, 4) * spread + shift, normal(120, 4, seed=1)
    precision, recall = precision_recall(torch.from_numpy(x), torch.from_numpy(y), k)
    assert precision > 0 and recall > 0
    assert precision == pytest.approx(share_by_hand(x, y, k), abs=1e-12)
    assert recall == pytest.approx(share_by_hand(y, x, k), abs=1e-12)


def test_precision_and_recall_agree_with_scikit_learn():
    x, y = normal(300, 16) * 0.9, normal(250, 16, seed=1)
    shares = []
    for queries, points in ((x, y), (y, x)):
        radii = NearestNeighbors(n_neighbors=4).fit(points).kneighbors(points)[0][:, 3]
        to_all, which = NearestNeighbors(n_neighbors=len(points)).fit(points).kneighbors(queries)
        shares.append((to_all <= radii[which]).any(1).mean())
    assert min(shares) > 0.1 and max(shares) < 0.99
    assert precision_recall(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(shares, abs=1e-12)


def test_precision_and_recall_of_sets_with_a_known_answer():
    line = torch.arange(10.0)[:, None]
    assert precision_recall(line, line, 3) == (1, 1)
    assert precision_recall(line + 1000, line, 3) == (0, 0)
    left = torch.arange(5.0)[:, None]  # half of the modes: all of it is real, and 5 of 10 are reached, and 3 beyond
    assert precision_recall(left, line, 3) == (1, 0.8)


def test_far_from_zero_nothing_is_lost():
    x, y = torch.from_numpy(normal(60, 8)), torch.from_numpy(normal(70, 8, seed=1))
    assert precision_recall(x + 1e6, y + 1e6) == precision_recall(x, y)
    assert frechet(x + 1e6, y + 1e6) == pytest.approx(frechet(x, y), rel=1e-6)


def test_more_rows_than_a_block(monkeypatch):
    x, y = torch.from_numpy(normal(50, 4)), torch.from_numpy(normal(40, 4, seed=1))
    whole = kernel_distance(x, y), precision_recall(x, y)
    monkeypatch.setattr("sdtune.evaluation.distances.BLOCK", 7)
    assert kernel_distance(x, y) == pytest.approx(whole[0], rel=1e-12)
    assert precision_recall(x, y) == whole[1]


def repeated(x, n):
    return x.repeat_interleave(n, 0)


def test_counts_are_repeated_rows():
    x, y = torch.from_numpy(normal(30, 4)), torch.from_numpy(normal(40, 4, seed=1) + 0.5)
    n_x, n_y = (torch.from_numpy(np.random.default_rng(s).integers(1, 4, k)) for s, k in ((0, 30), (1, 40)))
    assert frechet(x, y, n_x, n_y) == pytest.approx(by_eigenvalues(repeated(x, n_x), repeated(y, n_y)), rel=1e-6)
    hand = kernel_by_hand(repeated(x, n_x), repeated(y, n_y))
    assert kernel_distance(x, y, n_x, n_y) == pytest.approx(hand, rel=1e-10)
    assert mean(x[:, 0], n_x) == pytest.approx(float(repeated(x[:, 0], n_x).mean()), rel=1e-12)
    shares = precision_recall(x, y, 2, n_x, n_y)  # counts weigh who is asked, and change no neighbour
    assert shares[0] == pytest.approx(share_by_hand(repeated(x, n_x).numpy(), y.numpy(), 2), abs=1e-12)
    assert shares[1] == pytest.approx(share_by_hand(repeated(y, n_y).numpy(), x.numpy(), 2), abs=1e-12)
    assert 0 < min(shares) < max(shares) < 1


def test_intervals_are_the_bootstrap_s():
    """Resamples draw as many rows with replacement: the spread of a mean of n is then sqrt((n - 1) / n) s / sqrt(n)."""
    x, seen = torch.from_numpy(normal(50, 1)), []

    def measure(x, n=None):
        if n is not None:
            seen.append(n)
        return {"mean": mean(x[:, 0], n)}

    found = estimates(measure, [x], 4000)["mean"]
    assert {int(n.sum()) for n in seen} == {50} and min(int(n.min()) for n in seen) == 1
    assert np.mean([len(n) for n in seen]) == pytest.approx(50 * (1 - 0.98**50), rel=0.01)  # different rows
    spread = float(x.std(correction=0)) / 50**0.5
    assert found.high - found.value == pytest.approx(1.96 * spread, rel=0.03)
    assert found.value - found.low == pytest.approx(found.high - found.value, rel=1e-9)


def test_resamples_of_a_handful():
    x, y = torch.from_numpy(normal(4, 2)), torch.from_numpy(normal(4, 2, seed=1))
    found = estimates(lambda *sets: figures(*sets, neighbours=1), [x, y], 300)
    assert all(np.isfinite([e.low, e.high]).all() for e in found.values())


def test_references_that_do_not_differ_have_no_diversity():
    """A resample of two images is one of them half of the time."""
    x, y = torch.rand(4, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    bootstrap = Bootstrap(100)
    found = bootstrap(of_subject, x, y)
    assert found["diversity"].low < found["diversity"].value < found["diversity"].high
    alike = bootstrap(of_subject, x, y[[0, 0]])
    assert list(alike) == ["likeness"]


def test_intervals_cover():
    """An interval holds what sets of this size give on average in 95 of 100 cases, within what chance allows.

    Of sets this small those of the kernel distance and of recall are narrow (docs/log.md).
    """
    draws = [
        (torch.from_numpy(normal(60, 3, seed=2 * s)), torch.from_numpy(normal(90, 3, seed=2 * s + 1) * 1.5 + 1))
        for s in range(100)
    ]

    def measure(*sets):
        return figures(*sets) | {"mean": mean(sets[0][:, 0], *sets[2:3])}

    found = [estimates(measure, d, 60) for d in draws]
    for name in found[0]:
        truth = np.mean([f[name].value for f in found])
        covered = np.mean([f[name].low <= truth <= f[name].high for f in found])
        assert (0.85 if name in ("kernel", "recall") else 0.9) <= covered <= 0.99, name
    assert all(f[name].low < f[name].value < f[name].high for f in found for name in f)


def test_intervals_are_a_function_of_the_seed():
    x = torch.from_numpy(normal(40, 3))
    first, again, other = (estimates(lambda *s: {"mean": mean(*s)}, [x[:, 0]], 30, seed) for seed in (1, 1, 2))
    assert first == again
    assert first["mean"].value == other["mean"].value
    assert first["mean"].low != other["mean"].low
    none = estimates(lambda *s: {"mean": mean(*s)}, [x[:, 0]], 0)["mean"]
    assert (none.low, none.high) == (None, None)
