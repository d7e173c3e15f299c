"""Workers and the evaluator: their core, the states of clients, and the program."""
