"""Checks of arguments, made before anything is traced or compiled."""

import jax


def is_known(*values) -> bool:
    """Whether all values can be read here: none is traced, or on other hosts alone."""
    return all(
        not isinstance(a, jax.core.Tracer) and getattr(a, "is_fully_addressable", True)
        for a in values
    )


def check_on_host(name: str, *values):
    """Refuses traced arrays where NumPy does the work.   Raises: TypeError."""
    if any(isinstance(a, jax.core.Tracer) for a in values):
        raise TypeError(
            f"{name} runs on the host, on NumPy arrays, so jax.grad, jit and vmap "
            "cannot pass through it: call it outside of the function they transform"
        )


def check_leaves(given, expected):
    """Raises ValueError with a line for each array that does not fit, ten at most.

    Args: given, expected: descriptions of the arrays, such as their shapes, by name.
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
