"""The mini-batch of the matrix, and what it must give: transformers in float64, one sequence at a time, plain loops."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from objective_data import Response, build_case, merged_sums, pack, ready
from objective_formulas import reference_scale, reference_sums
from router_reference import router_reference
from tiny_models import megatron_tensors, tiny_config, tiny_hf_model
from transformers import PreTrainedConfig, PreTrainedModel

from invariance.cases import ROUTER_LOSSES, TEMPERATURE, Cell
from megatron_vespo.samples.records import Prompt, Sample


class Shape(NamedTuple):
    """How off-policy a response is. Its token noise sums to zero, so that log W is what is asked for."""

    tokens: int
    advantage: float
    log_w_stale: float
    stale: float
    """s.d. of log pi - log pi_old of a token."""
    log_w_engine: float
    engine: float
    """s.d. of log pi_old - log mu of a token."""
    counted: float = 0.9
    """Share of tokens that count."""


SEED = 44

SHAPES = (
    Shape(5, 0.5, -0.4, 0.6, 0.03, 0.05),
    Shape(12, -0.8, 0.5, 0.5, -0.2, 0.15),
    Shape(1, 0.5, 0.3, 0.0, 0.07, 0.0),
    Shape(14, 0.6, 0.002, 0.4, 0.0005, 0.002),  # log W / T inside the clip of GSPO
    Shape(7, -1.0, -0.3, 0.8, 0.1, 0.1),
    Shape(6, -0.5, 0.0, 0.5, 0.0, 0.0, counted=0.0),
    Shape(9, -0.9, 0.001, 0.5, -0.0005, 0.003),
    Shape(3, 1.0, -0.7, 0.3, -0.1, 0.2),
    Shape(11, 0.5, -0.4, 0.6, 0.2, 0.1),
    Shape(8, -0.7, -0.5, 0.8, -0.05, 0.03),
)


def model_config(kind: str) -> PreTrainedConfig:
    """Four layers, as PP2 VPP2 needs, and a vocabulary (odd: TP pads it) so small that some tokens are probable, as
    DPPO's mask needs."""
    experts = dict(num_experts=4) if kind == "moe" else {}
    return tiny_config(kind, vocab_size=37, **experts)


@torch.no_grad()
def make_samples(kind: str) -> list[Sample]:
    """Responses that the model itself sampled, so that some of their tokens are probable, and then moved off-policy."""
    model = tiny_hf_model(model_config(kind))
    rng = np.random.default_rng(SEED)
    return [make_sample(i, shape, model, rng) for i, shape in enumerate(SHAPES)]


def make_sample(i: int, shape: Shape, model: PreTrainedModel, rng: np.random.Generator) -> Sample:
    prompt = rng.integers(1, model.config.vocab_size, 3 + i % 3).tolist()
    tokens, now = list(prompt), []
    for _ in range(shape.tokens):
        last = (model(torch.tensor([tokens])).logits[0, -1] / TEMPERATURE).log_softmax(-1).numpy()
        tokens.append(int(rng.choice(len(last), p=np.exp(last) / np.exp(last).sum())))
        now.append(last[tokens[-1]])
    mask = rng.random(shape.tokens) < shape.counted
    mask[-1] = shape.counted > 0

    def differences(deviation: float, total: float) -> np.ndarray:
        noise = np.where(mask, rng.normal(0, deviation, shape.tokens), 0.0)
        count = max(int(mask.sum()), 1)
        return np.where(mask, noise - noise.sum() / count + total / count, 0.0)

    old = np.minimum(np.array(now) - differences(shape.stale, shape.log_w_stale), -0.01)  # probabilities stay below 1
    rollout = np.minimum(old - differences(shape.engine, shape.log_w_engine), -0.01)
    return Sample(
        id=str(i),
        prompt=Prompt(str(i % 2), np.array(prompt, np.int32), "", ""),
        response_tokens=np.array(tokens[len(prompt) :], np.int32),
        rollout_logprobs=rollout.astype(np.float32),
        weight_versions=np.zeros(shape.tokens, np.int32),
        loss_mask=mask,
        finish_reason="stop",
        advantage=float(np.float32(shape.advantage)),
        old_logprobs=old.astype(np.float32),
    )


@dataclass
class Expected:
    """What a cell must give under every split."""

    loss: float
    loss_scale: float
    """Sum of the absolute shares of the responses, whose signs differ."""
    gradients: dict[str, torch.Tensor]
    """Whole tensors by megatron-core's names, float64."""
    metrics: dict[str, tuple[float, float]]
    """Name -> (sum, denominator) of the mini-batch."""


class Reference:
    """One model and mini-batch, and what every cell must give for it.

    Loss and gradients share nothing with the product. The metrics are those of the product's objective, called once on
    the whole mini-batch in float64 (tests/test_objective_reference.py holds that call against plain loops).
    """

    def __init__(self, kind: str) -> None:
        self.config = model_config(kind)
        self.model = tiny_hf_model(self.config)
        self.samples = make_samples(kind)
        self.responses: list[Response] = []
        self.logprobs: list[torch.Tensor] = []
        """[response] float64 each, with grad."""
        self.router_logits: list[tuple[torch.Tensor, ...]] = []
        """Of each sequence, for each MoE layer, [tokens, experts]; empty for a dense model."""
        self.entropy = 0.0
        self._routers: dict[str, tuple[tuple[torch.Tensor, ...], dict[str, tuple[float, float]]]] = {}
        start = 0
        for sample in self.samples:
            first, length = len(sample.prompt.tokens), len(sample.response_tokens)
            tokens = torch.tensor([[*sample.prompt.tokens.tolist(), *sample.response_tokens.tolist()]])
            if kind == "moe":
                output = self.model(tokens, output_router_logits=True)
                self.router_logits.append(output.router_logits)
            else:
                output = self.model(tokens)
            table = (output.logits[0, first - 1 : -1] / TEMPERATURE).log_softmax(-1)
            mask = torch.from_numpy(sample.loss_mask)
            self.logprobs.append(table.gather(1, torch.from_numpy(sample.response_tokens).long()[:, None])[:, 0])
            self.entropy -= (table.exp() * table).sum(-1)[mask].sum().item()
            assert sample.old_logprobs is not None and sample.advantage is not None
            self.responses.append(
                Response(
                    positions=torch.arange(start, start + length),
                    old=torch.from_numpy(sample.old_logprobs).double(),
                    rollout=torch.from_numpy(sample.rollout_logprobs).double(),
                    mask=mask,
                    advantage=sample.advantage,
                )
            )
            start += length

    @cached_property
    def jacobian(self) -> list[torch.Tensor]:
        """d log p of each token by each parameter of the model, [tokens, *shape]: a cell's gradients are sums of it."""
        parameters = list(self.model.parameters())
        rows = [self.gradients(logprob) for logprobs in self.logprobs for logprob in logprobs]
        return [torch.stack([row[i] for row in rows]) for i in range(len(parameters))]

    def gradients(self, scalar: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of what the model's forward passes gave, by each of its parameters; zero for an expert without a token."""
        return torch.autograd.grad(scalar, list(self.model.parameters()), retain_graph=True, materialize_grads=True)

    def expected(self, cell: Cell) -> Expected:
        leaf = torch.cat(self.logprobs).detach().requires_grad_()
        shares = self.shares(cell, leaf)
        loss = torch.stack(shares).sum()
        (by_logprob,) = torch.autograd.grad(loss, leaf)
        router_gradients, router_metrics = self.router(cell.router)
        gradients = [torch.tensordot(by_logprob, rows, dims=1) for rows in self.jacobian]
        if router_gradients is not None:
            gradients = [ours + router for ours, router in zip(gradients, router_gradients, strict=True)]
        names = [name for name, _ in self.model.named_parameters()]
        return Expected(
            loss=loss.item(),
            loss_scale=sum(abs(share.item()) for share in shares),
            gradients=megatron_tensors(self.config, dict(zip(names, gradients, strict=True))),
            metrics=self.metrics(cell, leaf.detach()) | router_metrics,
        )

    def shares(self, cell: Cell, logprobs: torch.Tensor) -> list[torch.Tensor]:
        """What each response with a counted token adds to the loss. logprobs: of all responses, end to end."""
        sums = reference_sums(cell.objective, cell.correction, self.responses, logprobs)
        return [reference_scale(cell.aggregation, self.responses[i], self.responses) * x for i, x in sums.items()]

    def router(self, name: str) -> tuple[tuple[torch.Tensor, ...] | None, dict[str, tuple[float, float]]]:
        """Gradients of the routers' weighted loss, None where there is none, and its metric: unweighted, added over the
        layers."""
        if not ROUTER_LOSSES[name]:
            return None, {}
        if name not in self._routers:
            loss: torch.Tensor | float = 0.0
            metrics = {}
            z, balance = router_reference(self.router_logits, self.config.num_experts_per_tok)
            for field, weight in ROUTER_LOSSES[name].items():
                value = {"router_z_loss": z, "router_balance_loss": balance}[field]
                loss = loss + weight * value
                metrics[field] = (value.item(), float(self.config.num_hidden_layers))
            assert isinstance(loss, torch.Tensor)
            self._routers[name] = self.gradients(loss), metrics
        return self._routers[name]

    def metrics(self, cell: Cell, logprobs: torch.Tensor) -> dict[str, tuple[float, float]]:
        inputs = pack(self.responses, self.responses, logprobs)
        objective = ready(build_case(cell.objective, cell.aggregation, cell.correction), [inputs])
        return merged_sums(objective(inputs).metrics).sums | {"entropy": (self.entropy, inputs.total_tokens)}
