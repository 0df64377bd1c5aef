"""From plans to tokens: padded batches, compiled programs, and the engine's process."""
