"""The ways from the trainer to the engines, behind :class:`~megatron_vespo.weights.sync.WeightTransport`."""
