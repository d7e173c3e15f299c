"""What the nodes of a local cluster have in common, imported once and forked from."""

import fedmq.nodes.aggregator
import fedmq.nodes.worker  # noqa: F401
