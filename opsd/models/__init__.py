"""A transformers model: loading, the forward pass, the head, generation, sharding."""
