"""The weights of a pickled checkpoint as a safetensors file.

    python tools/convert_checkpoint.py CHECKPOINT OUT.safetensors [--ema]

CHECKPOINT is a .pt or .pth of PyTorch: a state dict, or a dict with one as "model" and
as "ema", which --ema takes; or a network-snapshot .pkl of EDM, which holds "ema" only
and also takes --i_trust_this_file. memsep_jax itself unpickles nothing: this runs
outside of it, and needs torch >= 2.6 and safetensors.

Unpickling can run any code. A .pt is read by torch's own unpickler of weights. Every
object of a .pkl is rebuilt as an inert record of its arguments, and the source code in
it stays text; anything but tensors and plain containers is refused by name.

Exit codes: 0 done, 2 usage, 3 refused, 5 not written.
"""

import argparse
import contextlib
import io
import os
import pickle
import re
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


class RefusedError(Exception):
    """What is in the file is not weights, or not weights only."""


class Inert:
    """What a pickled object was made with, and nothing of what it could do."""

    args: tuple = ()
    state: object = None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class Storage(Inert):
    """args: (bytes of torch.save,)."""


class Tensor(Inert):
    """args: (Storage, offset, size, stride, ...)."""


class Parameter(Inert):
    """args: (Tensor, ...)."""


class Persistent(Inert):
    """args: (dict of class_name, state and the source of the class,)."""


class Container(Inert):
    """state: the attributes of a torch module that holds others."""


CONTAINERS = "torch.nn.modules.container"
STAND_INS = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Persistent,
    ("torch._utils", "_rebuild_tensor_v2"): Tensor,
    ("torch._utils", "_rebuild_parameter"): Parameter,
    ("torch.storage", "_load_from_bytes"): Storage,
    (CONTAINERS, "ModuleDict"): Container,
    (CONTAINERS, "ModuleList"): Container,
    (CONTAINERS, "Sequential"): Container,
    ("collections", "OrderedDict"): dict,
    ("dnnlib.util", "EasyDict"): dict,
    ("builtins", "set"): set,
    ("numpy", "dtype"): Inert,  # of attributes that are numbers of numpy
    ("numpy.core.multiarray", "scalar"): Inert,
    ("numpy._core.multiarray", "scalar"): Inert,
}


class Unpickler(pickle.Unpickler):
    """Gives a stand-in for what a pickle names, and refuses all else."""

    def find_class(self, module, name):
        """The stand-in of module.name."""
        if (module, name) not in STAND_INS:
            raise RefusedError(_names(f"{module}.{name}"))
        return STAND_INS[module, name]


def from_torch(path, ema):
    """The state dict of a .pt or .pth, and metadata."""
    try:
        # The training script of DiT keeps its arguments there, a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip, or torch, each in its own way
        raise _refused(error) from error
    if not isinstance(found, dict):
        raise RefusedError(f"it holds a {type(found).__name__}, not a state dict")
    if ema and "ema" not in found:
        raise RefusedError('it has no "ema": leave --ema out')
    found = found["ema"] if ema else found.get("model", found)
    if not isinstance(found, dict):
        raise RefusedError(f"it holds a {type(found).__name__}, not a state dict")
    return found, {}


def from_edm(path):
    """The parameters and buffers of the network in a .pkl of EDM, and metadata."""
    try:
        found = Unpickler(io.BytesIO(path.read_bytes())).load()
        network = found["ema"]
        tensors = {}
        _walk(network, "", tensors, set())
        return tensors, {"class_name": str(network.args[0]["class_name"])}
    except RefusedError:
        raise
    except Exception as error:
        raise _refused(error) from error


def write(path, tensors, metadata, most):
    """Writes tensors that take at most `most` bytes, whole or not at all."""
    for name, a in tensors.items():
        if not isinstance(name, str) or not isinstance(a, torch.Tensor):
            raise RefusedError(f"{name!r} is a {type(a).__name__}, not a tensor")
        if a.layout != torch.strided:
            raise RefusedError(f"{name} is not dense ({a.layout})")
    needed = sum(a.numel() * a.element_size() for a in tensors.values())
    if needed > most:  # many views of one storage, or repeats of one number
        raise RefusedError(f"its tensors take {needed:,} bytes, and itself {most:,}")
    part = path.with_name(f".{path.name}.part")
    try:
        copies = {n: a.detach().clone().contiguous() for n, a in tensors.items()}
        save_file(copies, part, metadata)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def main(argv=None) -> int:
    """The command line.   Returns: the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ema", action="store_true", help='take "ema", not "model"')
    parser.add_argument("--i_trust_this_file", action="store_true", help="for a .pkl")
    args = parser.parse_args(argv)
    suffix = args.checkpoint.suffix
    if suffix not in (".pt", ".pth", ".pkl"):
        parser.error(f"{args.checkpoint}: give a .pt, .pth or .pkl")
    if not args.checkpoint.is_file():
        parser.error(f"{args.checkpoint}: no such file")
    if suffix == ".pkl" and not args.i_trust_this_file:
        parser.error(
            f"{args.checkpoint} is a pickle, which can run any code: none of it is run "
            "here, but give --i_trust_this_file, and only where you trust its makers"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # CVE-2025-32434
        parser.error(f"torch {torch.__version__} can be made to run code: take >= 2.6")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats of torch
            if suffix == ".pkl":
                tensors, metadata = from_edm(args.checkpoint)
            else:
                tensors, metadata = from_torch(args.checkpoint, args.ema)
        write(args.out, tensors, metadata, args.checkpoint.stat().st_size)
    except RefusedError as error:
        sys.stderr.write(f"{args.checkpoint}: refused: {error}\n")
        return 3
    except (OSError, SafetensorError) as error:
        sys.stderr.write(f"could not write {args.out}: {error}\n")
        return 5
    sys.stdout.write(f"{len(tensors)} tensors in {args.out}\n")
    return 0


def _walk(module, prefix, tensors, seen):
    """Collects the tensors of an inert module, by the names of its state dict."""
    if id(module) in seen:
        raise RefusedError(f"{prefix} is there twice")
    seen.add(id(module))
    state = module.state
    if isinstance(module, Persistent):
        state = module.args[0]["state"]
    for name, a in (*state["_parameters"].items(), *state["_buffers"].items()):
        if a is not None:
            tensors[f"{prefix}{name}"] = _tensor(a)
    for name, inner in state["_modules"].items():
        if inner is not None:
            _walk(inner, f"{prefix}{name}.", tensors, seen)


def _tensor(inert):
    """An inert tensor or parameter as a tensor: a view of its storage."""
    if isinstance(inert, Parameter):
        inert = inert.args[0]
    storage, offset, size, stride = inert.args[:4]
    stored = io.BytesIO(storage.args[0])
    stored = torch.load(stored, map_location="cpu", weights_only=True)
    flat = torch.tensor([], dtype=stored.dtype).set_(stored.untyped())
    return flat.as_strided(size, stride, offset)  # which checks its bounds


def _refused(error):
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if unsafe:
        return RefusedError(_names(unsafe[1]))
    # Torch goes on about weights_only=False, which runs all there is: not said here.
    text = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
    return RefusedError(f"damaged, or not weights ({type(error).__name__}: {text})")


def _names(what):
    return f"it names {what}, and only tensors and plain containers are taken"


if __name__ == "__main__":
    sys.exit(main())
