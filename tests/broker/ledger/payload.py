"""Open the payload of a ledger for reading."""

from fedmq.broker.ledger.blob_store import BlobStore
from fedmq.broker.ledger.entries import PAYLOAD, segment_numbers


def open_payload(folder):
    """Return an index of all blobs in a ledger; raise the first damage."""
    index = BlobStore(folder)
    for number in segment_numbers(folder, PAYLOAD):
        index.add_segment(number, verify=True)
    for damage in index.damage:
        raise damage
    return index
