"""What a run will do on so many GPUs before anyone gives it one: a discrete-event simulator of the loops (docs/simulator.md)."""
