"""The probabilities of the next token by definition, in float64, for both engines."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.generation.sampling import Sampling


def all_logits(model: Any, ids: list[int]) -> npt.NDArray[np.float64]:
    """Return the logits after each id, [ids, vocabulary]."""
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].double())


def penalised(
    logits: npt.NDArray[np.float64], ids: list[int], penalty: float
) -> npt.NDArray[np.float64]:
    """Return the logits [vocabulary] after the penalty on the tokens in `ids`."""
    scores = logits.copy()
    for token in set(ids):
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    return scores


def next_probabilities(
    logits: npt.NDArray[np.float64], ids: list[int], sampling: Sampling
) -> npt.NDArray[np.float64]:
    """Return the probabilities after penalty, temperature, top-k and then top-p, by definition."""
    scores = penalised(logits, ids, sampling.repetition_penalty) / sampling.temperature
    order = np.argsort(-scores)[: sampling.top_k or None]
    chances = np.exp(scores[order] - scores[order[0]])
    chances /= chances.sum()
    held = np.cumsum(chances) - chances < sampling.top_p
    probabilities = np.zeros_like(scores)
    probabilities[order[held]] = chances[held] / chances[held].sum()
    return probabilities
