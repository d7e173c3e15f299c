"""Workers and the evaluator: their core, its driver, the clients' states, and the program."""
