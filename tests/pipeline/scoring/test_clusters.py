import itertools

import numpy as np
import pytest
import torch

from pipeline.scoring import clusters
from pipeline.scoring.clusters import distinct_points, k_means


def groups(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}


@pytest.mark.parametrize("seed", range(5))
def test_clusters_that_lie_apart_are_found(seed: int) -> None:
    draws = np.random.default_rng(seed)
    truth = draws.permutation(np.repeat(np.arange(6), [1, 2, 5, 9, 9, 14]))
    centres = 100.0 * np.eye(6, 7)
    points = centres[truth] + draws.standard_normal((40, 7))
    found = k_means(points, 6, draws)
    assert groups(found.labels) == groups(truth)
    for label in range(6):
        members = points[found.labels == label]
        own = ((members - members.mean(axis=0)) ** 2).sum(axis=1)
        assert found.distances[found.labels == label] == pytest.approx(own)


@pytest.mark.parametrize("seed", range(20))
def test_no_partition_that_moves_one_point_is_better(seed: int) -> None:
    """Lloyd's fixed point: each point is nearest to its own centroid, and no cluster is empty."""
    draws = np.random.default_rng(seed)
    points = draws.standard_normal((30, 3))
    found = k_means(points, 7, draws)
    assert set(found.labels.tolist()) == set(range(7))
    centroids = np.stack([points[found.labels == label].mean(axis=0) for label in range(7)])
    distances = ((points[:, None] - centroids) ** 2).sum(axis=2)
    assert distances.min(axis=1) == pytest.approx(found.distances)


@pytest.mark.parametrize("seed", range(10))
def test_as_many_clusters_as_different_points_have_one_point_each(seed: int) -> None:
    draws = np.random.default_rng(seed)
    points = np.repeat(draws.standard_normal((12, 2)), [1, 3] * 6, axis=0)
    found = k_means(points, 12, draws)
    assert distinct_points(points) == 12
    same = {frozenset(np.flatnonzero((points == point).all(axis=1)).tolist()) for point in points}
    assert groups(found.labels) == same
    assert found.distances == pytest.approx(0.0, abs=1e-24)


def test_a_few_points_are_split_as_well_as_can_be_from_some_seed() -> None:
    points = np.random.default_rng(0).standard_normal((8, 2))

    def cost(labels: tuple[int, ...]) -> float:
        parts = [points[np.array(labels) == label] for label in set(labels)]
        return sum(float(((part - part.mean(axis=0)) ** 2).sum()) for part in parts)

    best = min(cost(labels) for labels in itertools.product(range(2), repeat=8))
    found = [
        float(k_means(points, 2, np.random.default_rng(seed)).distances.sum()) for seed in range(20)
    ]
    assert min(found) == pytest.approx(best)
    assert max(found) <= 2 * best


def test_threads_change_nothing() -> None:
    points = np.random.default_rng(0).standard_normal((300, 200))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(k_means(points, 120, np.random.default_rng(1)).labels.tolist())
    torch.set_num_threads(before)
    assert found[0] == found[1]


def test_an_empty_cluster_gets_the_point_farthest_from_its_own_centroid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both first centroids are the same point, so nothing is nearest to the second."""
    monkeypatch.setattr(clusters, "_first_centroids", lambda points, count, draws: [0, 0])
    points = np.array([[0.0], [1.0], [10.0]])
    assert k_means(points, 2, np.random.default_rng(0)).labels.tolist() == [0, 0, 1]
