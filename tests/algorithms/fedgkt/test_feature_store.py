"""What the server of FedGKT holds: without loss, within a limit, shared between versions."""

import gc
import tempfile

import numpy as np
import pytest
import torch

from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.fedgkt.feature_store import (
    FORMS,
    FeatureStore,
    Maps,
    MemoryLimit,
    Upload,
    UploadedTest,
)
from fedmq.codecs.base import MAX_DECODED_BYTES
from fedmq.codecs.registry import decode, make_codec


def noise(n=5, seed=0, shape=(3, 16, 16)):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def as_sent(x, dtype):
    """Return feature maps as they come out of the codec."""
    codec = make_codec(f"features({dtype})")
    return decode(codec.encode({"features": x, "ids": torch.arange(len(x))}, 0), MAX_DECODED_BYTES)[
        "features"
    ]


def upload(n, seed=0, limit=None, *, tested=False):
    limit = MemoryLimit(1 << 20) if limit is None else limit
    ids = torch.arange(n)
    test = None
    if tested:
        test = UploadedTest(
            Maps.of(noise(2, seed + 50), limit), torch.tensor([1, 0]), torch.ones(2, 4)
        )
    maps = Maps.of(noise(n, seed), limit)
    return Upload(maps, ids, ids % 4, torch.full((n, 4), float(seed)), test)


@pytest.mark.parametrize("most", [0, 1 << 20])
@pytest.mark.parametrize(
    ("dtype", "form", "times"),
    [
        ("float32", torch.float32, 1),
        ("float16", torch.float16, 2),
        ("bfloat16", torch.bfloat16, 2),
        ("int8", torch.uint8, 4),
        ("int4", torch.uint8, 4),
    ],
)
def test_what_a_codec_made_is_kept_narrow_and_comes_back_to_the_bit(dtype, form, times, most):
    # Beyond float16's range, where a bfloat16 is not one of those too.
    scale = 1e6 if dtype == "bfloat16" else 1.0
    x = as_sent(noise(40) * scale, dtype)
    maps = Maps.of(x, MemoryLimit(most))
    assert maps.in_memory == (most > 0)
    assert maps.packed.dtype == form
    assert maps.nbytes * times == x.nbytes
    assert maps[:].equal(x)
    rows = torch.tensor([7, 0, 7, 39])
    assert maps[rows].equal(x[rows])
    assert len(maps) == 40


def test_one_value_that_no_narrow_form_has_keeps_all_as_float32():
    """At the end, where the glance at the beginning does not see it."""
    for dtype in ("float16", "bfloat16"):
        x = as_sent(noise(), dtype)
        x[-1, -1, -1, -1] = 1 / 3
        maps = Maps.of(x, MemoryLimit(1 << 20))
        assert maps.packed.dtype == torch.float32
        assert maps[:].equal(x)
    many = torch.arange(257.0).view(257, 1, 1, 1) / 3
    assert Maps.of(many, MemoryLimit(0))[:].equal(many)
    assert Maps.of(many[:256], MemoryLimit(0)).packed.dtype == torch.uint8


def test_a_copy_is_kept_not_what_came():
    x = noise()
    maps = Maps.of(x, MemoryLimit(1 << 20))
    expected = x.clone()
    x.zero_()
    assert maps[:].equal(expected)


@pytest.mark.slow
def test_memory_is_bounded_and_comes_back_when_nobody_uses_it():
    limit = MemoryLimit(2 * noise().nbytes)
    first, second, third = (Maps.of(noise(seed=seed), limit) for seed in range(3))
    assert [each.in_memory for each in (first, second, third)] == [True, True, False]
    assert limit.used_bytes == 2 * noise().nbytes
    assert third[:].equal(noise(seed=2))
    del second
    gc.collect()
    assert limit.used_bytes == noise().nbytes
    assert Maps.of(noise(seed=3), limit).in_memory


def test_files_have_no_name_so_that_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    maps = Maps.of(noise(), MemoryLimit(0))
    assert not maps.in_memory
    assert list(tmp_path.iterdir()) == []
    assert maps[:].equal(noise())


def test_samples_are_read_by_place_across_clients():
    store = FeatureStore(MemoryLimit(0)).updated({4: upload(3, 1), 2: upload(5, 2)})
    assert list(store.uploads) == [2, 4]
    assert len(store) == 8
    features, labels, logits = store.read(np.array([7, 0, 4, 5, 0]))
    both = torch.cat([noise(5, 2), noise(3, 1)])
    assert features.equal(both[[7, 0, 4, 5, 0]])
    assert labels.tolist() == [2, 0, 0, 0, 0]
    assert logits[:, 0].tolist() == [1, 2, 2, 1, 2]


def test_a_version_stays_what_it_was_and_shares_what_did_not_change():
    first = FeatureStore(MemoryLimit(1 << 20)).updated({0: upload(3), 1: upload(4, 1)})
    second = first.updated({1: upload(6, 2)})
    assert second.uploads[0] is first.uploads[0]
    assert (len(first), len(second)) == (7, 9)
    assert first.uploads[1].features[:].equal(noise(4, 1))


@pytest.mark.parametrize("most", [0, 1 << 20])
def test_saved_and_loaded_to_the_bit(most):
    store = FeatureStore(MemoryLimit(most))
    store = store.updated(
        {0: upload(3, 1, store.limit), 12: upload(4, 2, store.limit, tested=True)}
    )
    saved = store.save()
    loaded = FeatureStore.load(saved, MemoryLimit(most))
    again = loaded.save()
    assert list(again) == list(saved)
    assert all(again[name].equal(saved[name]) for name in saved)
    assert loaded.uploads[12].test.features[:].equal(noise(2, 52))
    assert loaded.uploads[0].test is None
    coded = Maps.of(as_sent(noise(), "int8"), store.limit)
    samples = torch.arange(5), torch.zeros(5, dtype=torch.int64), torch.ones(5, 4)
    with_codes = store.updated({3: Upload(coded, *samples)})
    reread = FeatureStore.load(with_codes.save(), MemoryLimit(most))
    assert reread.uploads[3].features[:].equal(coded[:])


def damaged():
    good = FeatureStore(MemoryLimit(0)).updated({0: upload(3, tested=True)}).save()
    codes = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    return [
        ({"x.ids": good["0.ids"]}, "client's number"),
        ({name: each for name, each in good.items() if name != "0.labels"}, "labels"),
        ({name: each for name, each in good.items() if name != "0.test.logits"}, "test.logits"),
        (good | {"0.features": codes}, "as uint8 with"),
        (good | {"0.features": good["0.features"].double()}, "as uint8 with"),
        (good | {"0.features": torch.zeros(3)}, "channels"),
        (good | {"0.features": torch.zeros(0, 3, 16, 16)}, "channels"),
        (good | {"0.features": codes, "0.features.table": torch.zeros(2, 256)}, "table"),
        (good | {"0.features.table": torch.zeros(3, 256)}, "as uint8 with"),
    ]


@pytest.mark.parametrize("index", range(len(damaged())))
def test_what_is_no_store_is_refused(index):
    saved, message = damaged()[index]
    with pytest.raises(ResultError, match=message):
        FeatureStore.load(saved, MemoryLimit(0))


def test_forms_are_the_widths_that_a_file_has():
    assert [torch.zeros(1, dtype=each).element_size() for each in FORMS] == [1, 2, 2, 4]
