"""The names of the RoPE scalings, and those of the user's own, which a config holds as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from .families import RopeError, family_of, head_size
from .plugins import add

Scaling = Callable[[NDArray[np.float64], int, int], tuple[NDArray[np.float64], float]]

ROPE_SCALING_TYPES: dict[str, Scaling | None] = {"linear": None, "ntk": None, "yarn": None}
"""The values of rope_scaling_type, and the function of those that `register_scaling` added; a rope_scaling_type of None
leaves the base's RoPE as it is."""


def register_scaling(name: str, scaling: Scaling) -> None:
    """Make `rope_scaling_type: name` scale with a function of your own, `scaling(inv_freq, window, target_length)`.

    inv_freq are the base's inverse frequencies, float64 of shape (d/2,) for heads of d features, the fastest first;
    window and target_length are in tokens. It returns the inverse frequencies for the target, of the same shape, and
    the factor of cosines and sines (1.0: none).

    Raises:
        PluginError: a name that is taken.
    """
    add(ROPE_SCALING_TYPES, "RoPE scaling", name, scaling, scaling)


def own_parameters(
    config: PreTrainedConfig, parameters: dict[str, Any], window: int, target_length: int, name: str
) -> dict[str, Any]:
    """rope_parameters with the numbers of a registered scaling: rope_type longrope, whose short and long factors are
    the same here. transformers reads them without the package that made them.

    Raises:
        RopeError: a base that such numbers do not fit, or numbers that no RoPE can have.
    """
    scaling, found = ROPE_SCALING_TYPES[name], parameters.get("rope_type", "default")
    family = family_of(config.model_type)
    if not scaling or found != "default" or family.is_per_layer_type or family.is_partial:
        raise RopeError(
            f"{name!r} needs an unscaled base with one RoPE over whole heads, and this one has model_type "
            f"{config.model_type!r} and rope_type {found!r}: use one of linear, ntk, yarn that it takes"
        )
    size = head_size(config)
    plain = float(parameters["rope_theta"]) ** -(np.arange(0, size, 2) / size)
    returned, attention_factor = scaling(plain.copy(), window, target_length)
    inv_freq = np.asarray(returned, dtype=np.float64)
    if inv_freq.shape != plain.shape or not (np.isfinite(inv_freq).all() and (inv_freq > 0).all()):
        raise RopeError(f"{name!r} returned {inv_freq}, and must return {len(plain)} finite numbers above 0")
    if not (math.isfinite(attention_factor) and attention_factor > 0):
        raise RopeError(f"{name!r} returned the factor {attention_factor}, and must return a finite one above 0")
    # Rounded, since the last digit of a power differs between machines, and an adapter's base is compared.
    factors = [float(f"{factor:.9g}") for factor in plain / inv_freq]
    return parameters | {
        "rope_type": "longrope",
        "factor": target_length / window,
        "original_max_position_embeddings": window,
        "attention_factor": float(attention_factor),
        "short_factor": factors,
        "long_factor": list(factors),
    }


def holds_numbers(parameters: dict[str, Any]) -> bool:
    """Whether rope_parameters are of `own_parameters`: a longrope that does not change with the length of the input."""
    is_longrope = parameters.get("rope_type") == "longrope"
    return is_longrope and parameters.get("short_factor") == parameters.get("long_factor")
