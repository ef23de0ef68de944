"""The operations that the engine understands, by kind."""
