"""The Inception weights of pytorch-fid, or torch-fidelity, as a .safetensors file.

python tools/convert_inception.py pt_inception-2015-12-05-6726825d.pth OUT.safetensors

Not of the package, which never unpickles: this needs torch 2.6 or later, whose
weights_only=True takes tensors and runs nothing.
"""

import hashlib
import io
import re
import sys
from pathlib import Path

from memsep_jax import checkpoint, weights
from memsep_jax.features import INCEPTION_SHA256
from memsep_jax.models import inception


def convert(source, target) -> bool:
    """Writes the tensors of `source` to `target`; whether it is the standard file.

    Raises: WeightsError: no torch, no file, no state dict, or another network's.
    """
    try:
        import torch
    except ImportError:
        raise weights.WeightsError(
            "torch is needed: pip install 'torch>=2.6'"
        ) from None
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < (2, 6):
        raise weights.WeightsError(
            f"torch {torch.__version__} can be made to run what a file holds "
            "(CVE-2025-32434, weights_only or not): pip install 'torch>=2.6'"
        )
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        raise weights.WeightsError(
            f"{source}: {error.strerror}; give the path of "
            "pt_inception-2015-12-05-6726825d.pth"
        ) from error
    # Of the very bytes that are then read.
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        # As float32, exactly: numpy has no bfloat16.
        tensors = {name: tensor.float().numpy() for name, tensor in state.items()}
    except Exception as error:  # torch fails in many ways, some of them pages long
        why = str(error).split("\n", 1)[0]
        raise weights.WeightsError(
            f"{source}: not a state dict of tensors, so none of it was run ({why})"
        ) from error
    try:
        params = inception.params_of(tensors)
    except ValueError as error:
        raise weights.WeightsError(
            f"{source}: not the Inception of FID (torchvision's is another)\n{error}"
        ) from error
    standard = sha256 == INCEPTION_SHA256
    about = {"source_sha256": sha256, "standard": str(standard).lower()}
    weights.write(target, params, about | {"digest": checkpoint.digest(params)})
    return standard


def main(argv) -> int:
    """Converts; what went wrong is one message and an exit code."""
    if len(argv) != 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    try:
        standard = convert(*argv)
    except (weights.WeightsError, checkpoint.StorageError) as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(
        f"{argv[1]}: the standard weights, so a Frechet distance on them is an FID\n"
        if standard
        else f"{argv[1]}: not the standard weights ({INCEPTION_SHA256[:8]}), so a "
        "Frechet distance on them is no FID, and will not be called so\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
