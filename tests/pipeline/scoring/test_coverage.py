import numpy as np
import pytest
from scipy import stats

from pipeline.scoring.coverage import (
    effective_directions,
    entropy,
    missing_mass,
    nearest_distance,
)
from pipeline.scoring.mean_states import WIDTH, chosen_layers


def test_entropy_is_that_of_the_distribution_in_bits() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(40))
    assert entropy(shares) == pytest.approx(stats.entropy(shares, base=2))
    assert entropy(np.array([0.25, 0.0, 0.25, 0.25, 0.25])) == 2.0
    assert entropy(np.array([0.0, 1.0])) == 0.0


def test_the_missing_mass_is_that_of_ids_that_the_set_lacks() -> None:
    reference = np.array([0.1, 0.2, 0.3, 0.4])
    assert missing_mass(np.array([0.5, 0.0, 0.5]), reference) == pytest.approx(0.6)
    assert missing_mass(np.array([0.0, 0.2, 0.2, 0.2, 0.0, 0.4]), reference) == pytest.approx(0.1)
    assert missing_mass(reference, reference) == 0.0


def axes(count: int, copies: int = 1) -> np.ndarray:
    """States that spread equally in so many directions: both ways along each axis."""
    points = np.concatenate([np.eye(count, WIDTH), -np.eye(count, WIDTH)])
    return np.repeat(points, copies, axis=0)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("copies", [1, 3])
def test_states_that_spread_equally_in_d_directions_have_d(count: int, copies: int) -> None:
    assert effective_directions(axes(count, copies)) == pytest.approx(count)
    assert effective_directions(5.0 + 3.0 * axes(count, copies)) == pytest.approx(count)


def test_unequal_variances_count_by_the_participation_ratio() -> None:
    points = axes(2) * np.array([[2.0], [1.0], [2.0], [1.0]])  # variances 4 and 1
    assert effective_directions(points) == pytest.approx((4 + 1) ** 2 / (4**2 + 1**2))


def test_two_layers_that_differ_in_size_count_the_same() -> None:
    small, large = axes(3)[[0, 0, 1, 1, 2, 2]], axes(3)[[0, 1, 2, 0, 1, 2]]
    both = np.concatenate([small, 1000.0 * large], axis=1)
    swapped = np.concatenate([1000.0 * small, large], axis=1)
    assert effective_directions(both) == pytest.approx(effective_directions(swapped))


def test_equal_states_have_no_directions_and_measure_no_distance() -> None:
    equal = np.ones((3, WIDTH))
    assert effective_directions(equal) is None
    assert nearest_distance(axes(2), equal) is None


def test_the_distance_is_the_mean_over_the_reference_to_its_nearest_in_the_set() -> None:
    """The four points of the reference are 1 from their mean, which is the unit."""
    reference = 3.0 * axes(2) + 7.0
    assert nearest_distance(reference[::-1], reference) == pytest.approx(0.0)
    assert nearest_distance(reference[:1], reference) == pytest.approx((2 * 2**0.5 + 2) / 4)
    far = np.concatenate([reference, reference + 100.0])
    assert nearest_distance(far, reference) == pytest.approx(0.0)
    mean = reference.mean(axis=0, keepdims=True)
    assert nearest_distance(mean, reference) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("layers", "chosen"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (7, [2, 4, 6]), (12, [3, 7, 11])]
)
def test_states_are_taken_after_each_third_of_the_layers(layers: int, chosen: list[int]) -> None:
    assert chosen_layers(layers) == chosen
