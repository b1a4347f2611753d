"""k-means clustering: Lloyd's algorithm from centroids drawn by k-means++."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Points = npt.NDArray[np.float64]
"""[points, width]"""

MOST_ROUNDS = 100
"""Rounds of Lloyd's algorithm; it mostly ends sooner, when no point changes its cluster."""


class Clusters(NamedTuple):
    """A partition of points into clusters, none of them empty."""

    labels: npt.NDArray[np.int64]
    """[points]: the cluster of each."""

    distances: npt.NDArray[np.float64]
    """[points]: squared distance to its cluster's centroid, the mean of its members."""


def k_means(points: Points, count: int, draws: np.random.Generator) -> Clusters:
    """Partition points into `count` clusters (Lloyd 1982; Arthur and Vassilvitskii 2007).

    A cluster that loses its last point gets the point farthest from its own centroid.

    Args:
        points: [points, width], of which at least `count` differ.
        draws: draws the first centroids.
    """
    held = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float64))
    labels = _nearest(held, held[_first_centroids(points, count, draws)])
    for _ in range(MOST_ROUNDS):
        labels = _without_empty(held, labels, count)
        again = _without_empty(held, _nearest(held, _centroids(held, labels, count)), count)
        if torch.equal(again, labels):
            break
        labels = again
    return Clusters(labels.numpy(), _own_distances(held, labels, count).numpy())


def distinct_points(points: Points) -> int:
    """Return how many points differ."""
    return len(np.unique(points, axis=0))


def _first_centroids(points: Points, count: int, draws: np.random.Generator) -> list[int]:
    """Draw points, each in proportion to its squared distance from those drawn before."""
    chosen = [int(draws.integers(len(points)))]
    nearest = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < count:
        chosen.append(int(draws.choice(len(points), p=nearest / nearest.sum())))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return chosen


def _centroids(points: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    sums = torch.zeros(count, points.shape[1], dtype=points.dtype).index_add_(0, labels, points)
    return sums / torch.bincount(labels, minlength=count)[:, None]


def _nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the nearest centroid of each point, the first of equally near ones."""
    return ((centroids**2).sum(dim=1) - 2 * points @ centroids.T).argmin(dim=1)


def _own_distances(points: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    return ((points - _centroids(points, labels, count)[labels]) ** 2).sum(dim=1)


def _without_empty(points: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Give each empty cluster the point that is farthest from its own centroid."""
    empty = (torch.bincount(labels, minlength=count) == 0).nonzero().flatten().tolist()
    labels = labels.clone()
    for cluster in empty:
        labels[_own_distances(points, labels, count).argmax()] = cluster
    return labels
