"""Server rules: what the server does with a worker's report, as optax transformations."""
