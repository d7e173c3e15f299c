"""Whether the nodes of a run start from one model: how the fingerprints of two compare.

`fedmq.nodes.run.version_zero` makes them; whoever only reads a ledger needs no torch.
"""

from __future__ import annotations

Fingerprint = list[float]
"""[norm, signed sum] of a model, each a float64."""

TOLERANCE = 1e-4
"""How far two fingerprints may lie apart, as a part of the norm. Rounding in float32 moves them
by some 1e-7 of it; another seed moves the sum by about all of it."""


def disagree(one: object, other: object) -> bool:
    """Tell whether two nodes say that they start from different models.

    What is no fingerprint, or not there (an older release's), says nothing.
    """
    if one == other:
        return False
    match one, other:
        case [float(norm), float(total)], [float(norm_b), float(total_b)]:
            most = TOLERANCE * max(abs(norm), abs(norm_b))
            return not (abs(norm - norm_b) <= most and abs(total - total_b) <= most)
    return False
