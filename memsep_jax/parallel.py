"""One mesh over all devices of all processes: batches are split, a state may be."""

import collections
import functools
import math
import os
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MISSING = 6  # exit code of a process that waits for others that are not there
# Numbers in an array that is worth splitting; a smaller one, such as a bias, is
# replicated, since splitting it would save 64 kB and cost a message in each step.
SPLIT = 2**14


def join(where: str, timeout: int = 300) -> None:
    """Makes this process one of several that train together.

    Args: where, "auto" (SLURM, TPU, Kubernetes and Open MPI say it) or
      "HOST:PORT,PROCESSES,INDEX", with the host of process 0; timeout, in seconds,
      after which the process ends with exit code 6.
    Raises: ValueError: no other process can be joined, or their numbers of devices
      differ.
    """
    # A run handles SIGTERM itself; the service would take the signal from it.
    jax.config.update("jax_enable_preemption_service", False)
    place: dict[str, Any] = {}
    if where != "auto":
        try:
            address, count, index = where.split(",")
            host, port = address.rsplit(":", 1)
            if not (host and 0 < int(port) < 65_536 and 0 <= int(index) < int(count)):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"--distributed={where} must be auto, or HOST:PORT,PROCESSES,INDEX, "
                "0 <= INDEX < PROCESSES, such as 10.0.0.1:9876,2,0"
            ) from None
        place["coordinator_address"] = address
        place |= {"num_processes": int(count), "process_id": int(index)}

    def give_up():
        # Without this, jax would abort the process with a dump.
        sys.stderr.write(
            f"error: --distributed={where}: the other processes did not come in "
            f"{timeout} s: start all of them, and see that they reach that host and "
            "port\n"
        )
        sys.stderr.flush()
        os._exit(MISSING)

    waiting = threading.Timer(timeout, give_up)
    waiting.daemon = True
    waiting.start()
    try:
        # Later than `give_up`, which ends the process with a message and code 6.
        jax.distributed.initialize(initialization_timeout=2 * timeout + 60, **place)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed={where}: no processes could be joined ({error}): give "
            "HOST:PORT,PROCESSES,INDEX"
        ) from error
    finally:
        waiting.cancel()
    # Every process sees all counts, so all of them come to the same decision.
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        jax.distributed.shutdown()  # together: the others raise the same error
        shares = ", ".join(f"{n} in process {i}" for i, n in sorted(counts.items()))
        raise ValueError(
            f"--distributed={where}: all devices get equal parts of a batch, and there "
            f"are {shares}: give every process the same number"
        )


def is_first() -> bool:
    """Whether this is process 0, which alone writes."""
    return jax.process_index() == 0


def make_mesh(devices=None) -> Mesh:
    """All devices along one axis, "data"; or those given, as `jax.local_devices()`."""
    devices = jax.devices() if devices is None else devices
    # Auto: under the Explicit default of newer jax the train step does not trace.
    kind = (AxisType.Auto,)
    return jax.make_mesh((len(devices),), ("data",), axis_types=kind, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def sharded(tree, mesh: Mesh, least: int = SPLIT):
    """The sharding of each leaf of a state, split over the devices as FSDP does.

    An array of at least `least` numbers is split along its longest axis that the
    devices divide; smaller ones, and those without such an axis, are replicated.

    Returns: a tree of NamedSharding.
    """

    def of(leaf):
        shape = jnp.shape(leaf)
        # Only axes that divide evenly: jax refuses to place any other.
        axes = [i for i, size in enumerate(shape) if size and size % mesh.size == 0]
        if math.prod(shape) < least or not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda i: shape[i])
        return NamedSharding(mesh, PartitionSpec(*axis * [None], "data"))

    return jax.tree.map(of, tree)


def place(tree, shardings):
    """Places a tree, of which every process has a copy, on the devices.

    Args: shardings, one for all leaves, or a tree of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    # device_put cannot reach the devices of other processes; each of them fills its
    # own from its copy.
    def put(leaf, sharding):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda i: leaf[i])

    return jax.tree.map(put, jax.device_get(tree), shardings)


def local(tree):
    """A tree that this process can compute with alone; all processes call it."""
    if jax.process_count() == 1:
        return tree

    def whole(leaf):  # one after the other: no device holds more than one of them
        if not leaf.is_fully_replicated:
            leaf = _on_all(leaf, 1, leaf.sharding.mesh)
        return jax.device_get(leaf)

    return jax.tree.map(whole, tree)


def gather(values) -> jax.Array:
    """Gathers values [k], uint32, of each process as [processes, k] on all of them.

    All processes must call it. It does not wait; np.asarray of its result does.
    """
    mesh, each = make_mesh(), jax.local_device_count()
    # One row for each device, because the first axis is split over devices and not
    # over processes; `_on_all` takes every `each`-th again.
    rows = np.repeat(np.asarray(values, np.uint32)[None], each, axis=0)
    split = jax.make_array_from_process_local_data(by_batch(mesh), rows)
    return _on_all(split, each, mesh)


@functools.partial(jax.jit, static_argnames=("each", "mesh"))
def _on_all(rows, each, mesh):
    return jax.lax.with_sharding_constraint(rows[::each], replicated(mesh))
