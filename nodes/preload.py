"""What the nodes of a local cluster have in common, imported once and forked from."""

import fedmq.nodes.aggregator_program
import fedmq.nodes.worker_program  # noqa: F401
