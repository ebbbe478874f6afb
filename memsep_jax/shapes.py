"""Types of arrays for annotations: tests check the shapes, and users pay nothing.

`Float[Arr, " n *e"]` is n points of any event shape *e, such as [d] or [h, w, c].
"""

from typing import TYPE_CHECKING, Any

from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Key, Num

if TYPE_CHECKING:
    Arr = Any  # mypy would ask of each operation whether a plain number has it too
else:
    Arr = ArrayLike  # numbers, and arrays of NumPy and jax

Scalar = Num[Arr, ""]
Point = Num[Arr, "*e"]
Points = Num[Arr, " n *e"]
Keys = Key[Arr, "..."]

__all__ = ["Arr", "Bool", "Float", "Int", "Keys", "Num", "Point", "Points", "Scalar"]
