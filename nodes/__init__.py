"""Programs: aggregator, worker, evaluator, cluster, the command line."""
