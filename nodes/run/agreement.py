"""Comparison of two nodes' fingerprints of the model that a run starts from.

`fedmq.nodes.run.version_zero` computes them; this module needs no torch.
"""

from __future__ import annotations

Fingerprint = list[float]
"""[norm, signed sum] of a model, each a float64."""

TOLERANCE = 1e-4
"""Largest difference of two fingerprints of one model, relative to the norm. Rounding in float32
moves them by about 1e-7 of the norm; another seed moves the sum by about the whole norm."""


def disagree(one: object, other: object) -> bool:
    """Return whether two fingerprints belong to different models.

    A missing fingerprint (of an older release) or a malformed one agrees with any other.
    """
    if one == other:
        return False
    match one, other:
        case [float(norm), float(total)], [float(norm_b), float(total_b)]:
            limit = TOLERANCE * max(abs(norm), abs(norm_b))
            return not (abs(norm - norm_b) <= limit and abs(total - total_b) <= limit)
    return False
