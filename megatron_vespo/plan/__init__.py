"""What a run will do on so many GPUs, before it is given any: its loop in simulated time (docs/simulator.md)."""
