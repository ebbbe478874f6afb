"""A subset is nested, the held-out set is disjoint, an epoch is a permutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsep_jax import data, parallel
from memsep_jax.data import batches

KEY = jax.random.key(0)


def pool(n=60, classes=3, test=0, shape=(4, 4, 1)):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (n + test, *shape), np.uint8)
    labels = np.arange(n + test, dtype=np.int32) % classes
    if not test:
        return data.Source(images, labels)
    return data.Source(images[:n], labels[:n], images[n:], labels[n:])


def rows(x):
    return {row.tobytes() for row in np.asarray(x)}


# Choosing.


def test_subsets_of_one_seed_are_nested_and_seeds_differ():
    source = pool()
    small, large = data.select(source, 8, 3), data.select(source, 20, 3)
    np.testing.assert_array_equal(small.train.x, large.train.x[:8])
    assert rows(data.select(source, 8, 4).train.x) != rows(small.train.x)


def test_balanced_subsets_have_equal_counts_and_stay_nested():
    source = pool(n=70)
    small = data.select(source, 9, balanced=True, labels="true")
    large = data.select(source, 30, balanced=True, labels="true")
    assert np.bincount(small.train.label).tolist() == [3, 3, 3]
    assert np.bincount(large.train.label).tolist() == [10, 10, 10]
    np.testing.assert_array_equal(small.train.x, large.train.x[:9])
    whole = np.bincount(data.select(source, balanced=True, labels="true").train.label)
    assert len(set(whole.tolist())) == 1


@pytest.mark.parametrize("test", [0, 20])
def test_the_held_out_set_is_fixed_and_disjoint(test):
    source = pool(test=test)
    few, all_ = data.select(source, 5, 1), data.select(source, None, 2)
    np.testing.assert_array_equal(few.held_out.x, all_.held_out.x)
    assert not rows(all_.held_out.x) & rows(all_.train.x)
    assert len(all_.held_out.x) == (test or 10)  # round(0.165 * 60)
    assert len(all_.train.x) == (60 if test else 50)


def test_a_held_out_copy_of_a_training_image_is_removed():
    source = pool(test=6)
    source.test_images[2] = source.images[7]
    assert len(data.select(source, 4).held_out.x) == 5
    copies = source._replace(test_images=source.images[:3], test_labels=None)
    assert data.select(copies).held_out is None
    assert data.select(source, num_held_out=0).held_out is None
    # And a copy of an image of the other source.
    first, second = pool(test=6), pool(n=9)
    choose = dict(mix=0.5, mix_from=second)
    # Of the nine, the last of the fixed permutation is not held out.
    kept = second.images[np.random.default_rng(0).permutation(9)[-1]]
    for i in (0, 1):
        got = data.select(first, 4, **choose).held_out
        expected = data.from_uint8(first.test_images[i])
        np.testing.assert_array_equal(got.x[0], expected)
        first.test_images[0] = kept


def test_kept_classes_are_counted_from_zero():
    got = data.select(pool(test=12), classes=(2, 0), labels="true")
    assert set(np.asarray(got.train.label)) == set(np.asarray(got.held_out.label))
    assert np.bincount(got.train.label).tolist() == [20, 20]
    assert len(got.held_out.x) == 8
    # One may be absent from the test split.
    source = pool(test=6)._replace(test_labels=np.zeros(6, np.int32))
    assert len(data.select(source, classes=(0, 1)).held_out.x) == 6
    assert data.select(source, classes=(1, 2)).held_out is None


def test_labels_can_be_absent_random_or_unique():
    source = pool()
    assert data.select(source).train.label is None
    unique = data.select(source, 9, labels="unique")
    np.testing.assert_array_equal(unique.train.label, np.arange(9))
    assert unique.held_out.label is None
    drawn, again, fewer = (
        data.select(source, n, 1, labels="random", num_labels=4) for n in (40, 40, 9)
    )
    np.testing.assert_array_equal(drawn.train.label, again.train.label)
    np.testing.assert_array_equal(drawn.train.label[:9], fewer.train.label)
    assert set(np.asarray(drawn.train.label)) == {0, 1, 2, 3}
    assert drawn.train.label.dtype == jnp.int32
    assert len(drawn.held_out.label) == len(drawn.held_out.x)


def test_random_labels_are_uniform():
    counts = np.bincount(data.random_labels(KEY, 40_000, 4))
    assert np.abs(counts - 10_000).max() < 500  # 5.8 standard deviations


def test_duplicates_are_appended_with_their_labels_and_counted():
    got = data.select(pool(), 10, duplicates=0.3, copies=2, labels="unique")
    assert len(got.train.x) == 10 + 3 * 2 and got.num_distinct == 10
    np.testing.assert_array_equal(got.train.x[10:13], got.train.x[:3])
    np.testing.assert_array_equal(got.train.label[10:], [0, 1, 2, 0, 1, 2])
    once = data.deduplicate(got.train)
    np.testing.assert_array_equal(once.x, got.train.x[:10])
    np.testing.assert_array_equal(once.label, np.arange(10))
    # 0.29 * 100 is 28.999999999999996.
    assert len(data.select(pool(n=200), 100, duplicates=0.29).train.x) == 129


def test_without_duplicates_every_distinct_point_is_there_once():
    """Those of the pool and those that were added; labels are the first ones."""
    source = pool()
    source.images[30:40] = source.images[:10]
    choose = dict(duplicates=0.3, copies=2, labels="unique", num_held_out=0)
    all_ = data.select(source, **choose)
    once = data.select(source, **choose, deduplicate=True)
    assert len(all_.train.x) == 60 + 18 * 2 and len(once.train.x) == 50
    assert once.num_distinct == all_.num_distinct == 50
    assert rows(once.train.x) == rows(all_.train.x)
    assert once.fingerprint != all_.fingerprint
    again = data.deduplicate(all_.train)
    np.testing.assert_array_equal(once.train.x, again.x)
    np.testing.assert_array_equal(once.train.label, again.label)
    # Where nothing repeats, nothing is done.
    plain = data.select(pool(), 9)
    assert data.select(pool(), 9, deduplicate=True).fingerprint == plain.fingerprint
    added = data.select(pool(), 9, duplicates=0.5, copies=3, deduplicate=True)
    assert added.fingerprint == plain.fingerprint


def test_the_fingerprint_tells_sets_apart():
    source, other = pool(), grey(60, 128)
    base = data.select(source, 9).fingerprint
    assert base == data.select(source, 9).fingerprint and len(base) == 64
    assert base == data.select(source, 9, mix=0.0, mix_from=other).fingerprint
    others = [
        data.select(source, 10),
        data.select(source, 9, 1),
        data.select(source, 9, skip=2),
        data.select(source, 9, labels="unique"),
        data.select(source, 9, num_held_out=3),
        data.select(source._replace(images=source.images + 1), 9),
        data.select(source, 9, mix=0.4, mix_from=other),
        data.select(source, 9, mix=0.6, mix_from=other),
    ]
    assert len({base} | {other.fingerprint for other in others}) == 9


def test_resolution_resizes_and_keeps_constants():
    images = np.repeat(np.arange(77, 86, dtype=np.uint8), 192).reshape(9, 8, 8, 3)
    got = data.select(data.Source(images), resolution=4, num_held_out=0).train
    assert got.x.shape == (9, 4, 4, 3)
    assert set(np.asarray(data.to_uint8(got.x)).ravel()) == set(range(77, 86))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_uint8_round_trips(array):
    u = np.arange(256, dtype=np.uint8)
    x = data.from_uint8(array(u))
    assert x.dtype == np.float32 and x[0] == -1 and x[255] == 1
    assert isinstance(x, type(array(u)))
    np.testing.assert_array_equal(data.to_uint8(x), u)
    assert data.to_uint8(array([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_examples=99), "num_examples=99, but the pool has 50"),
        (dict(num_examples=0), "num_examples=0 must be"),
        (dict(num_examples=2.5), "num_examples=2.5 must be"),
        (dict(seed=-1), "seed=-1"),
        (dict(num_held_out=60), "leaves nothing"),
        (dict(num_examples=10, balanced=True), "multiple of the 3 classes"),
        (dict(num_examples=60, balanced=True), "at most"),
        (dict(classes=()), "keeps nothing"),
        (dict(classes=(1, 7)), r"classes: 7 not among"),
        (dict(labels="wrong"), "one of none, true"),
        (dict(labels="random"), "give num_labels"),
        (dict(num_labels=3), "only there"),
        (dict(duplicates=1.0), r"in \[0, 1\)"),
        (dict(duplicates=0.5, copies=0), "copies=0"),
        (dict(resolution=0), "resolution=0"),
        (dict(skip=-1), "skip=-1 must be"),
        (dict(skip=50), "num_examples=0 after skip=50, but the pool has 50"),
        (dict(num_examples=41, skip=10), "41 after skip=10, but the pool has 50"),
        (dict(num_examples=9, skip=4, balanced=True), "after skip=4 must be a mult"),
        (dict(num_examples=2, balanced=True), "num_examples=2 .* of the 3 classes"),
        (
            dict(num_examples=5, labels="random", num_labels=6),
            "num_labels=6 classes of num_examples=5: some would have no image",
        ),
        (dict(mix=1.5), r"mix=1.5 must be in \[0, 1\]"),
        (dict(mix=0.5), "mix=0.5 of what"),
    ],
)
def test_a_wrong_argument_says_its_rule(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        data.select(pool(), **arguments)
    assert not isinstance(caught.value, data.DataError)


def test_what_needs_labels_says_so():
    source = pool(test=9)._replace(labels=None, test_labels=None)
    with pytest.raises(data.DataError, match="labels='true'"):
        data.select(source, labels="true")
    with pytest.raises(ValueError, match="need labels"):
        data.select(source, balanced=True)
    with pytest.raises(ValueError, match="need labels"):
        data.select(source, classes=(1,))
    with pytest.raises(ValueError, match="num_held_out=10, but the test split has 9"):
        data.select(source, num_held_out=10)


def test_arguments_are_checked_before_the_source_is_read():
    with pytest.raises(ValueError, match="duplicates=2"):
        data.splits("npz", path="/absent.npz", duplicates=2)
    with pytest.raises(ValueError, match="known: digits, mixture, npz"):
        data.source("digit")
    with pytest.raises(TypeError, match="num_exmaples"):
        data.load("digits", num_exmaples=3)


# A part of the order, and two sources.


@pytest.mark.parametrize(
    "choose",
    [
        {},
        dict(balanced=True, labels="true"),
        dict(labels="random", num_labels=3),
        dict(mix=0.5, mix_from=pool(n=24, shape=(4, 4, 1)), labels="true"),
    ],
)
def test_to_skip_n_points_gives_the_disjoint_twin(choose):
    """The two halves are the set of twice the size, and the held-out set is theirs."""
    source = pool()
    whole = data.select(source, 24, 3, **choose)
    twins = [data.select(source, 12, 3, skip=skip, **choose) for skip in (0, 12)]
    for field, both in zip(
        whole.train, zip(*(t.train for t in twins), strict=True), strict=True
    ):
        if field is not None:
            np.testing.assert_array_equal(np.concatenate(both), field)
    for twin in twins:
        np.testing.assert_array_equal(twin.held_out.x, whole.held_out.x)
    if "balanced" in choose:
        assert np.bincount(twins[1].train.label).tolist() == [4, 4, 4]
    few = data.select(source, 3, 3, skip=12, **choose).train  # nested
    np.testing.assert_array_equal(few.x, twins[1].train.x[:3])
    rest = len(data.select(source, skip=6, **choose).train.x)  # all the others
    assert rest == len(data.select(source, **choose).train.x) - 6


def grey(n, value):
    """Images of one value each, and a class of its own for every value."""
    images = np.full((n, 4, 4, 1), value, np.uint8)
    images += np.arange(n, dtype=np.uint8)[:, None, None, None]
    return data.Source(images, np.arange(n, dtype=np.int32) % 2)


@settings(max_examples=15, deadline=None)
@given(mix=st.floats(0, 1), n=st.integers(1, 40), skip=st.integers(0, 20))
def test_of_the_first_m_points_the_share_is_of_the_second_source(mix, n, skip):
    """floor(mix m) for every m: subsets are nested, in their share too."""
    first, second = grey(60, 0), grey(60, 128)
    choose = dict(mix=mix, mix_from=second, num_held_out=0)
    x = data.select(first, skip + n, 5, **choose).train.x
    is_second = np.asarray(x).mean((1, 2, 3)) > 0
    truth = [int(round(mix * m, 6)) for m in range(1, skip + n + 1)]
    assert np.cumsum(is_second).tolist() == truth
    part = data.select(first, n, 5, skip=skip, **choose).train.x
    np.testing.assert_array_equal(part, x[skip:])


def test_a_mixed_set_is_as_large_as_both_sources_allow():
    """At 1/4 all of both; at 3/4 the 40 of the second and 14 of the first."""
    first, second = grey(120, 0), grey(40, 128)
    sizes = [
        len(data.select(first, mix=m, mix_from=second, num_held_out=0).train.x)
        for m in (0.0, 0.25, 0.75, 1.0)
    ]
    assert sizes == [120, 160, 54, 40]


def test_a_mixed_set_keeps_share_and_classes_everywhere():
    """Held-out points have the share; balanced rounds are of one source."""
    first, second = grey(60, 0), grey(60, 128)
    choose = dict(mix=0.5, mix_from=second, labels="true")
    got = data.select(first, 20, balanced=True, **choose)
    x, held = (np.asarray(some.x).mean((1, 2, 3)) for some in (got.train, got.held_out))
    assert (x > 0).sum() == 10 and (held > 0).sum() == len(held) // 2 == 10
    assert np.bincount(got.train.label).tolist() == [10, 10]
    # Class c is class c: a value's parity, in either source.
    values = np.asarray(data.to_uint8(got.train.x))[:, 0, 0, 0]
    np.testing.assert_array_equal(got.train.label, values % 2)
    few = data.select(first, 20, num_held_out=6, **choose).held_out
    assert (np.asarray(few.x).mean((1, 2, 3)) > 0).sum() == 3 and len(few.x) == 6


def test_a_second_source_takes_size_and_channels_of_the_first():
    colour = pool(n=30, shape=(6, 4, 3))
    images = np.repeat(np.arange(40, dtype=np.uint8), 64).reshape(40, 8, 8, 1)
    got = data.select(colour, 20, mix=1.0, mix_from=data.Source(images)).train
    assert got.x.shape == (20, 6, 4, 3) and got.label is None
    assert all(np.unique(x).size == 1 for x in np.asarray(got.x))


def test_a_second_source_is_named_or_a_file(tmp_path):
    path = tmp_path / "more.npz"
    np.savez(path, train_images=grey(30, 128).images)
    for mix_from in (str(path), "digits"):
        got = data.splits("digits", 10, mix=0.3, mix_from=mix_from, resolution=4)
        assert got.train.x.shape == (10, 4, 4, 1)
    unread = data.splits("digits", 10, mix_from="/absent.npz")  # a share of 0
    assert unread.fingerprint == data.splits("digits", 10).fingerprint
    with pytest.raises(ValueError, match="'folder' must be .* one of digits, mixture"):
        data.splits("digits", 10, mix=0.3, mix_from="folder")


@pytest.mark.parametrize(
    ("second", "choose", "message"),
    [
        (pool(shape=(4, 4, 3)), {}, "only grey ones can become colour"),
        (data.Source(np.zeros((9, 5), np.float32)), {}, "only uint8 images"),
        (data.Source(pool().images), dict(labels="true"), "mix_from lacks labels"),
        (pool(classes=4), dict(balanced=True), r"0, 1, 2 in the first"),
        (pool(n=9), dict(num_examples=40), "has 17 .* at mix=0.5"),
    ],
)
def test_what_cannot_be_mixed_says_why(second, choose, message):
    with pytest.raises(ValueError, match=message):
        data.select(pool(), mix=0.5, mix_from=second, **choose)


# Batches.


@pytest.mark.parametrize("n, size", [(1, 4), (5, 1), (7, 3), (6, 6), (4, 11)])
def test_every_epoch_holds_every_example_once(n, size):
    batch = jax.jit(lambda step: data.indices(n, KEY, step, size))
    steps = -(-3 * n // size)
    seen = np.concatenate([batch(step) for step in range(steps)])
    for epoch in seen[: 3 * n].reshape(3, n):
        assert sorted(epoch.tolist()) == list(range(n))


def test_a_fixed_order_is_that_of_the_first_epoch():
    n, size = 10, 4
    drawn = [
        jax.jit(lambda step, on=on: data.indices(n, KEY, step, size, reshuffle=on))
        for on in (False, True)
    ]
    fixed, anew = (np.concatenate([d(step) for step in range(5)]) for d in drawn)
    np.testing.assert_array_equal(fixed, np.tile(fixed[:n], 2))
    np.testing.assert_array_equal(fixed[:n], anew[:n])
    assert np.any(anew[:n] != anew[n:])
    train = data.Dataset(jnp.asarray(np.arange(10.0)[:, None]))
    x = jax.jit(lambda: data.draw(train, KEY, 3, size, reshuffle=False).x)()
    np.testing.assert_array_equal(np.asarray(x)[:, 0], fixed[12:16])


@pytest.mark.parametrize(("n", "size"), [(50_000, 128), (7, 20), (1_281, 4_096)])
def test_a_late_step_is_exact(n, size):
    """step * size far beyond 32 bits: the epoch and the place are still right."""
    step = 2**32 - 5
    epoch, place = divmod(step * size, n)
    order = jax.jit(
        lambda: jax.random.permutation(jax.random.fold_in(KEY, epoch % 2**32), n)
    )
    got = jax.jit(lambda step: data.indices(n, KEY, step, size))(np.uint32(step))
    got, order = np.asarray(got), np.asarray(order())
    np.testing.assert_array_equal(got[: n - place], order[place : place + size])
    np.testing.assert_array_equal(data.order(n, KEY, size)(step), got)


def test_the_host_has_the_order_of_the_device(monkeypatch):
    """Also where a batch holds several of the blocks that are made at once."""
    monkeypatch.setattr(batches, "KEPT", 50)
    for n, size, reshuffle in [
        (1, 3, True),
        (7, 90, True),
        (40, 9, True),
        (7, 5, False),
    ]:
        rows_of = data.order(n, KEY, size, reshuffle)
        device = jax.jit(
            lambda step, n=n, size=size, reshuffle=reshuffle: data.indices(
                n, KEY, step, size, reshuffle
            )
        )
        for step in (0, 1, 7, 3):
            np.testing.assert_array_equal(rows_of(step), device(step))


def test_a_batch_depends_on_its_step_alone():
    train = data.select(pool(), 10, labels="unique").train
    batch = jax.jit(lambda step: data.draw(train, KEY, step, 4, flip=True))
    forward = [batch(step) for step in range(6)]
    resumed = [batch(step) for step in range(3, 6)]
    for one, other in zip(forward[3:], resumed, strict=True):
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(one.label, other.label)
    assert batch._cache_size() == 1
    assert forward[0].x.shape == (4, 4, 4, 1)


def test_flips_mirror_half_of_the_images_and_nothing_else():
    train = data.select(pool(), 40, labels="unique").train
    plain, got = jax.device_get(
        jax.jit(
            lambda: [data.draw(train, KEY, 0, 400, flip=on) for on in (False, True)]
        )()
    )
    np.testing.assert_array_equal(plain.label, got.label)
    same = np.all(plain.x == got.x, axis=(1, 2, 3))
    mirrored = np.all(plain.x[:, :, ::-1] == got.x, axis=(1, 2, 3))
    assert np.all(same | mirrored) and 150 < mirrored.sum() < 250


# What stays on disk.

CHOICES = (
    {},
    {"num_examples": 10, "skip": 4, "seed": 3},
    {"classes": (0, 2), "labels": "true"},
    {"num_examples": 9, "balanced": True, "labels": "true"},
    {"duplicates": 0.3, "copies": 2, "labels": "unique"},
    {"duplicates": 0.3, "copies": 2, "deduplicate": True},
    {"labels": "random", "num_labels": 3, "num_held_out": 5},
)


def on_disk(source):
    """The same pools as Rows, whose arrays are never read whole."""
    images, test = (
        x if x is None else data.Rows(x) for x in (source.images, source.test_images)
    )
    return source._replace(images=images, test_images=test)


@pytest.mark.parametrize("test", [0, 20])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_among_rows_on_disk_is_that_in_memory(choice, test):
    source = pool(test=test)
    one, two = data.select(source, **choice), data.select(on_disk(source), **choice)
    assert isinstance(two.train.x, data.Rows) and two.train.x.dtype == np.uint8
    assert not isinstance(two.held_out.x, data.Rows)
    assert one.fingerprint == two.fingerprint
    assert one.num_distinct == two.num_distinct
    for a, b in zip(
        jax.tree.leaves((one.train, one.held_out)),
        jax.tree.leaves((data.read(two.train), two.held_out)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("flip", [False, True])
def test_a_streamed_batch_is_the_one_that_is_drawn(flip):
    """To the last bit, from any step on, each device with its part."""
    choice = dict(labels="unique")
    whole = data.select(pool(), **choice).train
    disk = data.select(on_disk(pool()), **choice).train
    split = parallel.by_batch(parallel.make_mesh())
    augment = jax.jit(lambda batch, step: data.augment(batch, KEY, step, flip))
    for start in (0, 5):
        batches = data.stream(disk, data.order(50, KEY, 8), split)
        for step in range(start, start + 4):
            batch = batches(step)
            assert batch.x.sharding == split and batch.x.dtype == np.uint8
            got = augment(batch, step)
            drawn = data.draw(whole, KEY, step, 8, flip)
            np.testing.assert_array_equal(got.x, drawn.x)
            np.testing.assert_array_equal(got.label, drawn.label)


def test_what_has_no_meaning_is_refused():
    source = on_disk(pool())
    for choice in ({"mix": 0.5, "mix_from": pool()}, {"resolution": 2}):
        with pytest.raises(ValueError, match="stay on disk"):
            data.select(source, **choice)
    vectors = data.Dataset(jnp.asarray(np.zeros((3, 2))))
    assert jax.jit(lambda: data.draw(vectors, KEY, 0, 5))().label is None
    with pytest.raises(ValueError, match="flip"):
        data.draw(vectors, KEY, 0, 2, flip=True)
    with pytest.raises(ValueError, match="batch size=0"):
        data.indices(3, KEY, 0, 0)
