"""FedGKT: group knowledge transfer between edge models and a server model."""
