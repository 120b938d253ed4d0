"""Log-probs from sharded logits against torch's own log_softmax in float64."""

import torch

from megatron_vespo.policy.logprobs import vocab_parallel_logprobs


def test_padded_vocabulary_and_temperature_match_log_softmax():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(7, 12, generator=generator) * 4
    labels = torch.randint(0, 9, (7,), generator=generator)
    weights = torch.randn(7, generator=generator)
    mine = logits.clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(mine, labels, vocab_size=9, temperature=0.7)
    (logprobs * weights).sum().backward()

    reference = logits.double().requires_grad_()
    table = torch.log_softmax(reference[:, :9] / 0.7, -1)
    expected = table.gather(-1, labels[:, None])[:, 0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(table.exp() * table).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-5, atol=1e-7)
    assert mine.grad[:, 9:].abs().max() == 0


def test_entropy_carries_no_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    _, entropy = vocab_parallel_logprobs(logits, torch.zeros(3, dtype=torch.int64), vocab_size=5)
    assert not entropy.requires_grad
