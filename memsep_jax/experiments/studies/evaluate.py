"""Samples of any score, their neighbours, and how much of them is copied.

Numbers go to the workdir, chunk by chunk: evaluation/ (chunks), samples.npz,
per_sample.csv, held_out.csv, pairs.npz, metrics.json. The report is drawn from those.
"""

import functools
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from memsep_jax import checkpoint, data, features, memorization, neighbours, parallel
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import report, tables, verdict
from memsep_jax.experiments.studies import compare

# Numbers that a search of the training points in themselves may compare: seconds.
RANKED = 1e12
TOGETHER = 256  # images, at most, in a network of features at once


def make_generate(
    config, parts, mesh, score_of, session=None, key=None, labels=None, made=None
):
    """(weights, start, stop) -> samples start .. stop, run.chunk of them at once.

    Compiled for run.chunk samples, and for a half, a quarter, ... of it where fewer are
    wanted, a step of a whole chunk takes too long (`record.at_once`) or memory ends.
    The steps are `record.paced`.

    Args: score_of, (weights, label or None) -> score_fn; session, which is told where
      memory ends, and hears signals; key, of the samples, by default that of the run;
      labels [k], among which each sample draws one, by default those of the data;
      made, `programs` that were compiled before.
    Raises: record.OutOfMemoryError; Interrupted.
    """
    key = build.keys(config.seed).sample if key is None else key
    # Labels are drawn from those of training points: of others nothing was learned.
    if labels is None and parts.num_classes:
        labels = jnp.unique(parts.splits.train.label)
    begin, advance = made or programs(config, parts, mesh, score_of)

    @functools.cache
    def pace(count):  # one for each count, since the rate depends on it
        return record.paced(advance, session.pause if session else lambda: None)

    def samples(weights, start, stop):
        count = config.run.chunk
        # Halves alone, as each count is one more program to compile.
        while stop - start <= (half := -(-count // 2)) < count:
            count = half
        count = -(-count // mesh.size) * mesh.size  # each device takes equally many
        x = begin(weights, start, key, labels, count)
        steps = len(parts.times)  # and the last one to 0
        args = weights, start, key, labels
        x = np.asarray(pace(count)(x, steps, *args))[: stop - start]
        # Images as they would be saved: measured as a person would see them.
        return data.to_uint8(x) if x.ndim == 4 and parts.splits.pixels else x

    fitting: list = []  # at the first call, which brings the weights

    def generate(weights, start, stop):
        if not fitting:
            label = None if labels is None else labels[0]
            call = jax.jit(lambda weights, x, t: score_of(weights, label)(x, t))
            x = jnp.zeros(parts.splits.train.x.shape[1:])
            # A step of most samplers calls the score twice.
            flops = 2 * training.flops(call.lower(weights, x, parts.times[0]))
            most = record.at_once(flops / mesh.size, config.run.chunk)
            say = session.say if session else lambda text: None
            fitting.append(record.halving(samples, say, most, least=mesh.size))
        return fitting[0](weights, start, stop)

    return generate


def programs(config, parts, mesh, score_of):
    """The start of samples, and steps of them, each one program for all keys.

    Returns: begin, (weights, start, key, labels, count) -> x [count, *e]; advance, (x,
      weights, start, key, labels, first, last) -> x after the steps first .. last.
    """
    split = parallel.by_batch(mesh)

    def stages(weights, i, key, labels):
        sample_key, label = _own(key, labels, i)
        return training.stages(config, parts, score_of(weights, label)), sample_key

    @functools.partial(jax.jit, static_argnums=4, out_shardings=split)
    def begin(weights, start, key, labels, count):
        def of(i):
            (start, *_), sample_key = stages(weights, i, key, labels)
            return start(sample_key)

        indices = start + jnp.arange(count)
        return jax.vmap(of)(jax.lax.with_sharding_constraint(indices, split))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=split)
    def advance(x, weights, start, key, labels, first, last):
        def of(x, i, k):
            (_, step, _), sample_key = stages(weights, i, key, labels)
            return step(x, sample_key, k)

        indices = start + jnp.arange(len(x))
        indices = jax.lax.with_sharding_constraint(indices, split)
        body = jax.vmap(of, (0, 0, None))
        return jax.lax.fori_loop(first, last, lambda k, x: body(x, indices, k), x)

    return begin, advance


def drawn_labels(config, parts, count: int):
    """The labels that samples 0 .. count - 1 of a run are drawn with, [count].

    None of a network without labels.
    """
    if not parts.num_classes:
        return None
    key, labels = build.keys(config.seed).sample, jnp.unique(parts.splits.train.label)
    return jax.vmap(lambda i: _own(key, labels, i)[1])(jnp.arange(count))


def _own(key, labels, i):
    """The key of sample i, and the label that it draws, or None."""
    # By its own key: sample i depends on the seed and on i, not on its chunk.
    sample_key, label_key = jax.random.split(jax.random.fold_in(key, i))
    if labels is None:
        return sample_key, None
    return sample_key, labels[jax.random.randint(label_key, (), 0, len(labels))]


def _on_host(x):
    return x if isinstance(x, data.Rows) else np.asarray(x)


def place(config, parts, session, weights, groups=("sampler",)):
    """The folder of the numbers of these weights, data and groups, and of no others."""
    of = [checkpoint.digest(weights), parts.splits.fingerprint, config.seed]
    of += [build.to_json(config)[group] for group in groups]
    tag = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]
    return session.workdir / "evaluation" / tag


def evaluate(config, parts, session, generate, weights, about: dict, workdir=None):
    """Draws sampler.num_samples samples and measures how many are copies.

    Args:
      generate: as make_generate gives it.   weights: what it is called with.
      about: further sections of metrics.json; "model" says what the score is.
      workdir: where the numbers go; by default that of the session.
    """
    folder = place(config, parts, session, weights)
    mesh = parallel.make_mesh(jax.local_devices())
    weights = jax.device_put(weights, parallel.replicated(mesh))
    chunk = config.run.chunk

    def chunked(name, work, total, what):
        return record.in_chunks(folder / name, work, total, chunk, session, what)

    with session.phase("sample"):
        samples = chunked(
            "samples",
            lambda start, stop: {"x": generate(weights, start, stop)},
            config.sampler.num_samples,
            "sampling",
        )["x"]

    with session.phase("neighbours"):
        train_x = _on_host(parts.splits.train.x)
        distinct = parts.splits.num_distinct
        near = min(config.memorization.near, distinct)
        search = neighbours.searcher(train_x, near, chunk)

        def nearest(name, x):
            def work(start, stop):
                return search(data.like(train_x, x[start:stop]))._asdict()

            return neighbours.Neighbours(
                **chunked(f"{name}-{near}", work, len(x), name)
            )

        held_out = parts.splits.held_out
        held_out = None if held_out is None else _on_host(held_out.x)
        null = None if held_out is None else nearest("held-out", np.asarray(held_out))
        result = memorization.ratio_of(
            nearest("neighbours", samples),
            null,
            len(train_x) - distinct,
            config.memorization.threshold,
        )
        beside = compare.distances(result.neighbours, null)
        ranked, shown = None, {}
        many = len(train_x) ** 2 * math.prod(train_x.shape[1:]) > RANKED
        if result.memorized.sum() >= compare.COPIES and not many:
            copies = result.neighbours, result.memorized
            own = nearest("in-itself", np.asarray(train_x))
            labels = parts.splits.train.label
            ranked = compare.which(*copies, own, train_x, labels)
            if ranked is not None:
                shown = compare.emission(*copies, own, train_x)
        beside["which"] = ranked

    with session.phase("quality"):
        sets = compare.Sets(samples, train_x, held_out)
        about = about | {"frechet": _laws(sets, parts.splits.pixels, config, chunked)}
    workdir = workdir or session.workdir
    if null is not None:
        record.write_csv(workdir / "held_out.csv", compare.nearest_two(null))
    _write(config, parts, workdir, samples, result, beside, about, shown)


def _laws(sets, pixels, config, chunked):
    """`compare.law` in pixels and random features; of no images, as they are."""
    some = compare.equal(sets, config.seed)
    if not (pixels and some.samples.ndim == 4):
        return [compare.law(some, "Frechet distance")]

    @functools.cache  # not made where all chunks are on disk
    def space():
        shape, most = some.samples.shape[1:], min(TOGETHER, config.run.chunk)
        return features.random_conv(shape, config.seed, most)

    def see(name, x):
        def work(start, stop):
            return {"x": space().apply(x[start:stop], compare.ROOM)}

        return chunked(f"random_conv-{name}", work, len(x), f"features of {name}")["x"]

    return [
        compare.law(some, "FD (pixels)"),
        compare.law(some, "FD (random_conv)", see),
    ]


def _write(config, parts, workdir, samples, result, beside, about, shown):
    splits, near = parts.splits, result.neighbours
    d1, d2 = near.distances[:, 0], near.distances[:, 1]
    calibrated = memorization.calibrated_l2(near.distances)
    record.write_npz(workdir / "samples.npz", samples=samples)
    files = {}
    if splits.files is not None:
        files["nearest_file"] = splits.files[near.indices[:, 0]]
    record.write_csv(
        workdir / "per_sample.csv",
        {
            "index": range(len(samples)),
            "d1": d1.tolist(),
            "d2": d2.tolist(),
            "nearest": near.indices[:, 0].tolist(),
            "second": near.indices[:, 1].tolist(),
            "memorized": result.memorized.astype(int).tolist(),
            "calibrated_l2": calibrated.tolist(),
        }
        | files,
    )
    train_x = _on_host(splits.train.x)
    order = np.argsort(memorization.quotient(d1, d2), kind="stable")
    picked = {"first": np.arange(len(samples)), "most": order, "least": order[::-1]}
    for name, index in picked.items():
        index = index[: compare.PAIRS]
        shown |= compare.pairs(name, index, samples, train_x, near)
    record.write_npz(workdir / "pairs.npz", **shown)
    emitted = near.indices[result.memorized, 0]
    nearest = data.like(samples, np.asarray(train_x[near.indices[:, 0]]))
    copies = np.all(nearest == samples, axis=tuple(range(1, samples.ndim)))
    metrics = {
        "memorization": {
            "ratio": result.value,
            "interval": result.interval,
            "memorized": int(result.memorized.sum()),
            "samples": len(samples),
            "null": result.null,
            "null_interval": result.null_interval,
            "held_out": 0 if splits.held_out is None else len(splits.held_out.x),
            "threshold": config.memorization.threshold,
            "distinct_emitted": len(np.unique(emitted)),
            "exact_copies": int(copies.sum()),
            "median_calibrated_l2": float(np.median(calibrated)),
            **beside,
        },
        "data": {
            "name": config.data.name,
            "n": len(train_x),
            "shape": train_x.shape[1:],
            "duplicates": result.duplicates,
            "fingerprint": splits.fingerprint,
        },
        **about,
    }
    metrics["notes"] = [*parts.notes, *splits.notes, *verdict.notes(metrics)]
    metrics["verdict"] = verdict.verdict(metrics)
    # Last: where it is, all files that a report is drawn from are whole.
    record.write_json(workdir / "metrics.json", metrics)


def finish(session):
    """Draws the report, and gives the numbers to the person and the tracker."""
    with session.reporting():
        report.write(session.workdir, session.say)
    tell(session, session.workdir)
    metrics = record.read_json(session.workdir / "metrics.json")
    copies, known = metrics["memorization"], metrics["verdict"]
    numbers = {"ratio": copies["ratio"], "null": copies["null"]}
    session.track(
        {"step": metrics["model"].get("steps", 0)}
        | {f"final_{k}": value for k, value in numbers.items() if value is not None}
        | {"verdict": f"{known['name']}: {known['text']} {known['small']}"}
    )


def tell(session, numbers):
    """Shows the person the numbers in a directory, and where the report is."""
    metrics = record.read_json(numbers / "metrics.json")
    session.say(summary(metrics, session.status["seconds"]))
    for line in verdict.lines(metrics):
        session.say(line)
    session.say(f"report: {session.workdir / 'report.html'}")


def summary(numbers, seconds) -> Table:
    """The end of a run as a short table, of metrics.json and the seconds by phase."""
    copies, about, model = (numbers[k] for k in ("memorization", "data", "model"))
    table = Table(title=f"{about['name']}, n = {about['n']:,}", show_header=False)

    table.add_row("memorized samples", verdict.share(copies))
    table.add_row("  of", f"{copies['memorized']:,} of {copies['samples']:,}")
    if copies["null"] is None:
        table.add_row("held-out null level", "no held-out data")
    else:
        table.add_row("held-out null level", verdict.share(copies, "null_"))
    for text, cells in tables.pruning(numbers)["rows"][1:]:
        table.add_row(text, cells[0])
    table.add_row("exact copies, to the last bit", f"{copies['exact_copies']:,}")
    table.add_row("training points emitted", f"{copies['distinct_emitted']:,}")
    for name, text in tables.quality_lines(numbers):
        table.add_row(name, text)
    table.add_row("model", model["name"])
    table.add_row("parameters", f"{model['parameters']:,}")
    if "steps" in model:
        table.add_row("steps", verdict.steps(numbers))
    table.add_section()
    for name, spent in seconds.items():
        table.add_row(f"time: {name}", f"{spent:.1f} s")
    return table
