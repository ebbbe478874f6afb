"""Checks at the door: what must be right before anything is traced or compiled."""

import jax


def is_known(*values) -> bool:
    """Whether all values can be read here: none is traced, or on other hosts alone."""
    return all(
        not isinstance(a, jax.core.Tracer) and getattr(a, "is_fully_addressable", True)
        for a in values
    )


def check_leaves(tensors, shapes):
    """Raises ValueError with a line for each array that does not fit, ten at most.

    Args: tensors, arrays by name.   shapes, the shape that each must have, by name.
    """
    wrong = [
        f"missing: {name} {s}" for name, s in shapes.items() if name not in tensors
    ]
    for name, a in tensors.items():
        if name not in shapes:
            wrong.append(f"unexpected: {name} {a.shape}")
        elif a.shape != shapes[name]:
            wrong.append(f"mismatched: {name} is {a.shape}, not {shapes[name]}")
    if wrong:
        rest = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise ValueError("\n".join(wrong[:10] + rest))
