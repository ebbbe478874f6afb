"""Checks at the door: what must be right before anything is traced or compiled."""

import jax


def is_known(*values) -> bool:
    """Whether all values can be read here: none is traced, or on other hosts alone."""
    return all(
        not isinstance(a, jax.core.Tracer) and getattr(a, "is_fully_addressable", True)
        for a in values
    )


def check_leaves(given, expected):
    """Raises ValueError with a line for each array that does not fit, ten at most.

    Args: descriptions of the arrays by name, such as their shapes, as they are and as
      they must be.
    """
    # All of them, not only the first: their pattern shows which size is wrong.
    wrong = [f"missing: {n} {expected[n]}" for n in expected.keys() - given.keys()]
    wrong += [f"unexpected: {n} {given[n]}" for n in given.keys() - expected.keys()]
    wrong += [
        f"mismatched: {n} {given[n]}, not {expected[n]}"
        for n in given.keys() & expected.keys()
        if given[n] != expected[n]
    ]
    if wrong:
        more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise ValueError("\n".join(sorted(wrong)[:10] + more))
