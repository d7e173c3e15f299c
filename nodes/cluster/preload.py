"""What the nodes of a local cluster have in common, imported once and forked from."""

import fedmq.nodes.aggregator.program
import fedmq.nodes.worker.program  # noqa: F401
