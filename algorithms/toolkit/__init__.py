"""What algorithms are built from: flat models, SGD, split models, sums, checks of results."""
