"""Check what a client of FedGKT sends, and convert it to an upload in the server's store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmq.algorithms.base import Payload
from fedmq.algorithms.errors import Fault, ResultError
from fedmq.algorithms.fedgkt.feature_store import (
    FeatureStore,
    Maps,
    MemoryLimit,
    Upload,
    UploadedTest,
)
from fedmq.algorithms.toolkit.layout import expect_tensor
from fedmq.codecs.text import shorten

LARGEST = 65504.0
"""Largest feature or logit, that of float16: a network with such inputs stays finite."""
TEST = ("test.features", "test.labels", "test.logits")
"""Tensors of test data: float32 [m, c, h, w], int64 [m], float32 [m, classes]."""


@dataclass(frozen=True)
class Expected:
    """The expected form of an upload.

    features: shape of one sample's feature maps. classes: number of classes.
    most: largest number of samples. tested: whether it includes test samples.
    """

    features: tuple[int, ...]
    classes: int
    most: int
    tested: bool

    @property
    def nbytes(self) -> int:
        """Return the size of the largest upload, in bytes."""
        sample = 4 * (math.prod(self.features) + self.classes) + 3 * 8
        return self.most * sample * (1 + self.tested)

    def upload(self, payload: Payload, n: int, limit: MemoryLimit) -> Upload:
        """Return a copy of a client's upload of ``n`` samples.

        Raises:
            ResultError: the payload does not have the expected form.
        """
        check_names(payload.features, ("features", "ids", "labels"))
        check_names(payload.logits, ("logits", "ids"))
        check_names(payload.exact, TEST if self.tested else ())
        check_names(payload.weights, ())
        features, ids, labels = (payload.features[key] for key in ("features", "ids", "labels"))
        logits = payload.logits["logits"]
        self._check_samples(n, features, labels, logits)
        self._check_ids(n, ids)
        if not ids.equal(payload.logits["ids"]):
            raise ResultError("expected logits of the same samples as features, in their order")
        test = None
        if self.tested:
            samples = tuple(payload.exact[key] for key in TEST)
            count = samples[1].numel()
            self._check_samples(count, samples[0], samples[1], samples[2])
            test = UploadedTest(Maps.of(samples[0], limit), samples[1].clone(), samples[2].clone())
        kept = Maps.of(features, limit)
        return Upload(kept, ids.clone(), labels.clone(), logits.clone(), test)

    def check_store(self, store: FeatureStore, clients: int) -> None:
        """Refuse a store that does not consist of such uploads.

        Raises:
            ResultError: an upload does not have the expected form, or is of another client.
        """
        for client, upload in store.uploads.items():
            if client >= clients:
                raise ResultError(f"expected an upload of clients 0 to {clients - 1}, got {client}")
            if (upload.test is not None) != self.tested:
                wanted = "test samples" if self.tested else "no test samples"
                raise ResultError(f"expected {wanted} of client {client}")
            n = len(upload)
            self._check_samples(n, upload.features[:], upload.labels, upload.logits)
            self._check_ids(n, upload.ids)
            if upload.test is not None:
                test = upload.test
                self._check_samples(len(test.labels), test.features[:], test.labels, test.logits)

    def _check_samples(self, n: int, features: Tensor, labels: Tensor, logits: Tensor) -> None:
        if not 1 <= n <= self.most:
            raise ResultError(f"expected 1 to {self.most} samples, got {n}")
        expect_tensor("features", features, torch.float32, (n, *self.features))
        expect_tensor("labels", labels, torch.int64, (n,))
        expect_tensor("logits", logits, torch.float32, (n, self.classes))
        low, high = torch.aminmax(labels)
        if int(low) < 0 or int(high) >= self.classes:
            raise ResultError(f"expected labels from 0 to {self.classes - 1}")
        for name, tensor in (("features", features), ("logits", logits)):
            least, most = (each.item() for each in torch.aminmax(tensor))
            # With a NaN both are NaN, and the comparison fails.
            if not (least >= -LARGEST and most <= LARGEST):
                raise ResultError(f"expected {name} from -{LARGEST:g} to {LARGEST:g}")

    def _check_ids(self, n: int, ids: Tensor) -> None:
        expect_tensor("ids", ids, torch.int64, (n,))
        # Ascending, so that no id occurs twice.
        if int(ids[0]) < 0 or int(ids[-1]) >= self.most or bool((ids.diff() <= 0).any()):
            raise ResultError(f"expected ascending ids from 0 to {self.most - 1}")


def check_names(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """Refuse tensors with other names.

    Raises:
        ResultError: the message has the names.
    """
    if set(tensors) != set(names):
        wanted, found = ", ".join(names) or "no tensors", ", ".join(map(shorten, tensors))
        raise ResultError(f"expected {wanted}, got {found or 'none'}", Fault.WRONG_SHAPE)
