"""Who holds device memory; weights to the engine, and the canary."""
