"""Which rung of the ladder between truth and copy explains a trained network?

Experiment `explain`: one network for each point of config.sweep, whose denoiser is
compared at each noise level with those of `analytic`, with the empirical one and, where
it is known, with the truth. Points at which they are compared lie in three places:

  held_out  noised held-out points       shell  noised training points, where it learned
  path      its own probability flow, from the prior down to that noise level

Sources: Wang & Vastola 2024 (2412.09726) for the Gaussian rung, Kamb & Ganguli 2024
(2412.20292) for the local ones, Lukoianov 2025 (2509.09672) for that of the covariance.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import (
    analytic,
    data,
    empirical,
    gap,
    memorization,
    mixture,
    neighbours,
    parallel,
    process,
    sampling,
    score,
)
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import evaluate, loss_gap, networks, training_run
from memsep_jax.experiments.studies.study import Study
from memsep_jax.streaming import floats

PLACES = {
    "held_out": "held-out points",
    "shell": "training points",
    "path": "its own path",
}
RUNGS = {
    "gaussian": "Gaussian",
    "local": "local",
    "equivariant_local": "equivariant local",
    "covariance_local": "covariance local",
    "empirical": "empirical",
    "truth": "truth",
}
LOCAL = {
    "local": analytic.local,
    "equivariant_local": analytic.equivariant_local,
}  # the rungs with a patch
COLORS = dict(zip(RUNGS, (*figures.COLORS[:4], figures.RED, "black"), strict=True))
THRESHOLD = 0.05  # of `covariance_local`, the upper end of the published code's
SHOWN = 8  # samples in a picture
COLUMNS = (
    "num_examples", "setting", "ratio",
    *(f"{rung}_{what}" for what in ("held_out", "path", "cosine", "copies")
      for rung in RUNGS),
    "null", "seeds",
)  # fmt: skip


def check(config) -> build.Parts:
    """The parts of the first point.   Raises: ConfigError."""
    return grid.check(config, _check)


def _check(config, parts):
    if parts.num_classes:
        raise build.ConfigError(
            f"data.labels={config.data.labels}: the rungs are scores of all training "
            "points, not of those of a label: data.labels=none"
        )
    if parts.splits.held_out is None or not len(parts.splits.held_out.x):
        raise build.ConfigError(
            f"data.num_held_out={config.data.num_held_out}: networks are compared with "
            "the rungs at noised held-out points; raise it"
        )
    group, low, high = config.measure, config.sampler.t_min, config.sampler.t_max
    outside = [t for t in group.times if not low <= t <= high]
    if outside or not group.times:
        raise build.ConfigError(
            f"measure.times={outside[:10]} must be times that a sample passes, from "
            f"sampler.t_min={low} to sampler.t_max={high}, and at least one"
        )
    if group.draws < 2:
        raise build.ConfigError(
            f"measure.draws={group.draws}: patches are chosen at one half of the "
            "points and compared at the other; give at least 2"
        )
    if parts.splits.train.x.ndim == 4:
        if not group.patches:
            raise build.ConfigError(
                "measure.patches=() has no value: give the sides of the patches that "
                "are tried, such as --config.measure.patches='(3, 5, 7)'"
            )
        try:
            for side in group.patches:
                analytic.local(_points(parts), parts.process, side)
        except ValueError as error:
            raise build.ConfigError(f"measure.patches: {error}") from error


def measure(points, session):
    """Yields the numbers of `measured` for each point of a sweep."""
    for point in points:
        yield measured(point.config, session)


def measured(config, session) -> dict:
    """Trains a network, and measures which rungs explain its denoiser and samples.

    Rungs are sampled measure.draws times, since some cost much more than a network.

    Returns: the numbers of `explained` and of `alike`; samples_NAME [8, h, w, c], of
      images only, the first samples of the network and of each rung.
    """
    with session.phase("data"):
        parts = build.build(config)
        truth = build.truth(config) if build.has_truth(config) else None
    generate = training_run.network_samples(config, parts, session)
    state = networks.trained(config, parts, session, generate)
    weights = training.sampled_weights(state, config)
    m = config.sampler.num_samples
    few = min(config.measure.draws, m)
    with session.phase("measure"):
        network = training.score_fn(parts, weights)
        row, rungs = explained(config, parts, network, truth)
    with session.phase("sample"):
        drawn = {"network": generate(weights, 0, m)}
        for name, score_fn in rungs.items():
            drawn[name] = sampled(config, parts, score_fn, session)((), 0, few)
    with session.phase("neighbours"):
        row |= alike(drawn, parts.splits, config.memorization.threshold)
    if parts.splits.pixels and config.run.images and drawn["network"].ndim == 4:
        row |= {f"samples_{name}": some[:SHOWN] for name, some in drawn.items()}
    return row


def explained(config, parts, network, truth=None) -> tuple[dict, dict]:
    """How far the denoiser of a network is from that of each rung.

    With squares, the sum of |D_network - D_rung|^2 over every second one of
    measure.draws points, and the mean of D_network over the same points:

      error = squares / sum |D_network|^2
      r2    = 1 - squares / sum |D_network - mean|^2

    The patch of a local rung is, at each time, the one of measure.patches with the
    least error at the other half of the held-out points; all places take the same.

    Args: network, its score_fn(x, t); truth, the known law, or None.
    Returns:
      Numbers: RUNG_PLACE_error and RUNG_PLACE_r2 [k], at measure.times; RUNG_PLACE,
      the r2 of all times together, which weighs each by how much the network's
      denoiser varies; RUNG_patch [k]; PLACE_radius [k], the median distance of
      the points from the nearest alpha x_i over sigma sqrt(d): 1 in the shell of noise
      of a training point; noise [k], sigma / alpha of the times.
      And rung -> score_fn, with the patch of each time.
    """
    times = jnp.asarray(config.measure.times, jnp.float32)
    x = places(config, parts, network, times)
    own = _denoised(network, parts.process, x, times)
    row = {
        "times": np.asarray(times),
        "noise": np.asarray(process.noise_to_signal(parts.process, times)),
    }
    for place, radius in zip(PLACES, _radii(parts, x, times).T, strict=True):
        row[f"{place}_radius"] = radius
    rungs, held_out = {}, [*PLACES].index("held_out")
    for name, forms in _ladder(parts, config.measure.patches, truth).items():
        # One form after another, since each holds as much as all points.
        chosen, compared = [], []
        for form in forms.values():
            other = _denoised(form, parts.process, x, times)
            chosen.append(squared(own[:, :, ::2], other[:, :, ::2]))
            compared.append(squared(own[:, :, 1::2], other[:, :, 1::2]))
        best = np.stack(chosen)[:, :, held_out].argmin(axis=0)  # [k]
        squares = np.stack(compared)[best, np.arange(len(times))]
        error, r2, together = agreement(own[:, :, 1::2], squares)
        for i, place in enumerate(PLACES):
            row |= {
                f"{name}_{place}_error": error[:, i],
                f"{name}_{place}_r2": r2[:, i],
                f"{name}_{place}": together[i],
            }
        (rungs[name], *_) = forms.values()
        if name in LOCAL:
            sides = row[f"{name}_patch"] = np.array([*forms])[best]
            patch = schedule(config.measure.times, sides.tolist())
            rungs[name] = LOCAL[name](_points(parts), parts.process, patch)
    return row, rungs


def squared(own, other):
    """The sums of |a - b|^2 over the points of each place, [k, p].

    Args: own and other [k, p, m, *e], the denoisers of m points.
    """
    return _sums((np.asarray(own, np.float64) - other) ** 2)


def agreement(own, squares) -> tuple:
    """error [k, p], r2 [k, p] and the r2 of all times together [p], of `explained`.

    Args: own [k, p, m, *e], the denoiser of the network; squares [k, p], by `squared`.
    """
    own = np.asarray(own, np.float64)
    spread = _sums((own - own.mean(axis=2, keepdims=True)) ** 2)
    together = 1 - squares.sum(axis=0) / spread.sum(axis=0)
    return squares / _sums(own**2), 1 - squares / spread, together


def _sums(x):
    return x.sum(axis=tuple(range(2, x.ndim)))


def schedule(times, sides) -> list[tuple[float, int]]:
    """Pairs (t, side) of `analytic.local`, from the sides that are best at some times.

    A side holds half of the way, in log t, to the next time with another one.
    """
    ends = [*np.sqrt(np.multiply(times[:-1], times[1:])).tolist(), times[-1]]
    pairs = list(zip(ends, sides, strict=True))
    last = len(pairs) - 1
    return [
        pair for i, pair in enumerate(pairs)
        if i == last or pair[1] != pairs[i + 1][1]
    ]  # fmt: skip


def places(config, parts, network, times):
    """The points at which denoisers are compared, [k, p, m, *e], by PLACES.

    The path is that of Heun's method, at the sampler's times and at these.
    """
    m, made, splits = config.measure.draws, parts.process, parts.splits
    keys = jax.random.split(build.keys(config.seed).evaluate, len(PLACES))

    def noised(key, x):
        x = floats(jnp.asarray(x), jnp.float32)
        one = jax.jit(lambda key, t: gap.noised(key, x, made, t, m)[0])
        return jnp.stack(list(map(one, jax.random.split(key, len(times)), times)))

    every = np.union1d(np.asarray(parts.times, np.float32), times)[::-1]
    walk = sampling.path(network, made, jnp.asarray(every))
    shape = m, *splits.train.x.shape[1:]
    starts = sampling.prior(keys[2], made, every[0], shape)
    path = jax.jit(lambda x: jax.lax.map(walk, x, batch_size=gap.BATCH))(starts)
    path = jnp.swapaxes(path[:, np.isin(every, times)], 0, 1)[::-1]
    held_out = noised(keys[0], splits.held_out.x)
    return jnp.stack([held_out, noised(keys[1], splits.train.x), path], axis=1)


def sampled(config, parts, score_fn, session=None):
    """((), start, stop) -> samples of a score, from the noises of the network's."""
    mesh = parallel.make_mesh(jax.local_devices())
    return evaluate.make_generate(config, parts, mesh, lambda *_: score_fn, session)


def alike(drawn, splits, threshold) -> dict:
    """Samples of the same noises against those of the network and the training set.

    Args: drawn, "network" and rungs -> samples [m, *e]; a rung may have fewer.
    Returns: ratio, RUNG_copies, null: shares of copies, of the network, of a rung and
      of held-out points; RUNG_cosine, the mean cosine of the angle between a sample and
      that of the network, about the mean training point.
    """
    train = np.asarray(splits.train.x)
    search = neighbours.searcher(train)

    def copies(x):
        return memorization.copied(search(x), threshold).mean()

    own, *others = (data.like(train, x) for x in drawn.values())
    _, *names = drawn
    centre = _as_floats(train).mean(axis=0)
    held_out = np.asarray(splits.held_out.x)
    row = {"ratio": copies(own), "ratio_of": len(own)}
    row |= {"null": copies(held_out), "null_of": len(held_out)}
    for name, x in zip(names, others, strict=True):
        angles = memorization.cosine(_as_floats(own[: len(x)]), _as_floats(x), centre)
        row |= {f"{name}_cosine": angles.mean(), f"{name}_copies": copies(x)}
        row[f"{name}_copies_of"] = len(x)
    return row


def _as_floats(x):
    return data.from_uint8(x) if x.dtype == np.uint8 else x


def _points(parts):
    """The training points on the host, as `analytic` takes them."""
    return np.asarray(parts.splits.train.x)


def _ladder(parts, patches, truth=None) -> dict:
    """rung -> side of its patch, or None -> score_fn; vectors have no patches."""
    x, made = _points(parts), parts.process
    local = LOCAL if x.ndim == 4 else {}
    return {
        "gaussian": {None: analytic.gaussian(x, made)},
        **{
            name: {side: make(x, made, side) for side in patches}
            for name, make in local.items()
        },
        "covariance_local": {None: analytic.covariance_local(x, made, THRESHOLD)},
        "empirical": {None: empirical.score(x, made)},
    } | ({} if truth is None else {"truth": {None: mixture.score(truth, made)}})


def _denoised(score_fn, made, x, times):
    """E[X_0 | X_t = x] by a score, at points x [k, p, m, *e] of times [k]."""
    denoise = score.to_denoiser(score_fn, made)

    # All times in one program, and one time in a batch: the rungs share its masks.
    @jax.jit
    def at_all(x, times):
        def at(pair):
            x, t = pair
            return jax.lax.map(lambda x: denoise(x, t), x, batch_size=gap.BATCH)

        return jax.lax.map(at, (x, times))

    flat = x.reshape(len(x), -1, *x.shape[3:])
    return np.asarray(at_all(flat, times)).reshape(x.shape)


def _radii(parts, x, times):
    """PLACE_radius of `explained`, [k, p]."""
    noise = np.asarray(process.noise_to_signal(parts.process, times))
    alpha = np.asarray(jax.vmap(parts.process.alpha)(times))
    clean = np.asarray(x) / alpha.reshape(-1, *[1] * (x.ndim - 1))
    search = neighbours.searcher(_as_floats(_points(parts)))
    nearest = search(clean.reshape(-1, *x.shape[3:])).distances[:, 0]
    radii = np.median(nearest.reshape(x.shape[:3]), axis=2)
    return radii / (noise[:, None] * math.sqrt(math.prod(x.shape[3:])))


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    rows = [row for row in metrics["table"] if "noise" in row]
    yield (
        "explained",
        "The share of a network's denoiser that a rung leaves unexplained, 1 - r², at "
        "each noise level. Left, at noised held-out points, at others of which the "
        "patches of the local rungs are chosen; middle, at noised training points; "
        "right, along the network's own probability flow. Bands: 95 % intervals over "
        "the seeds.",
        figures.curves([
            _panel(_title(row, words), [
                _unexplained(row, f"{rung}_{place}_r2", RUNGS[rung], COLORS[rung])
                for rung in _rungs(row)
            ], "unexplained share, 1 - r²")
            for row in rows for place, words in PLACES.items()
        ]),
    )  # fmt: skip
    yield (
        "shells",
        "The squared error of a network's denoiser to the empirical and, where it is "
        "known, the true one, relative to its own square; and the median distance of "
        "the points from the nearest noised training point, in units of the noise's "
        "length: 1 in the shells of noise that training has seen. A path that stays "
        "at 1 ends at a training point. Bands: 95 % intervals over the seeds.",
        figures.curves(_shells(rows)),
    )
    local = [rung for rung in LOCAL if all(f"{rung}_patch" in row for row in rows)]
    if local:
        yield (
            "patches",
            "The side of the patch with the least error at noised held-out points, "
            "averaged over the seeds, at each noise level.",
            figures.curves([
                _panel(_title(row), [
                    _line(row, f"{rung}_patch", RUNGS[rung], color=COLORS[rung])
                    for rung in local
                ], "side of the patch, pixels", yscale="linear")
                for row in rows
            ]),
        )  # fmt: skip
    seen = set()
    for point in points:
        n = int(point["num_examples"]) if "num_examples" in point else 0
        names = [name for name in ("network", *RUNGS) if f"samples_{name}" in point]
        if not names or n in seen:
            continue
        seen.add(n)  # of the first setting and seed
        yield (
            f"samples_{n}" if n else "samples",
            "Samples of one network and of each rung; those of a column have the same "
            "initial noise" + (f"; n = {n:,}." if n else "."),
            figures.image_rows(
                {RUNGS.get(name, name): point[f"samples_{name}"] for name in names}
            ),
        )


def _shells(rows):
    """The panels of the figure `shells`."""
    marks = loss_gap.MARKS  # one for each row of the table
    known = [rung for rung in ("empirical", "truth") if rung in _rungs(rows[0])]
    panels = {
        f"to the {RUNGS[rung]} denoiser".replace("truth", "true"): (
            lambda place, rung=rung: f"{rung}_{place}_error", "relative squared error"
        )
        for rung in known
    } | {
        "to the nearest training point": (
            lambda place: f"{place}_radius", "distance / (sigma sqrt(d))"
        )
    }  # fmt: skip
    return [
        _panel(title, [
            _line(row, name(place), ", ".join(filter(None, [words, grid.label(row)])),
                  marks[i % len(marks)], color)
            for i, row in enumerate(rows)
            for (place, words), color in zip(PLACES.items(), figures.COLORS,
                                             strict=False)
        ], ylabel)
        for title, (name, ylabel) in panels.items()
    ]  # fmt: skip


def _rungs(row):
    return [rung for rung in RUNGS if f"{rung}_held_out_r2" in row]


def _title(row, *words):
    return "\n".join(filter(None, [grid.label(row), *words]))


def _panel(title, lines, ylabel, yscale="log"):
    return figures.Panel(title, lines, "noise level, sigma / alpha", ylabel,
                         yscale=yscale)  # fmt: skip


def _line(row, name, label, style="o-", color=None):
    return figures.line(row["noise"]["mean"], row[name], label, style, color)


def _unexplained(row, name, label, color):
    """1 - r2 as a line, whose band does not reach below a tenth of its mean."""
    mean, std, low, high = figures.Interval.read(row[name])
    flipped = figures.Interval(1 - mean, std, 1 - high, 1 - low)._asdict()
    return figures.line(row["noise"]["mean"], flipped, label, "o-", color, log=True)


STUDY = Study(measure, draw, check, columns=COLUMNS, what="networks")
