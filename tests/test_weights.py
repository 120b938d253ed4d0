"""HF -> Megatron -> HF is bitwise, computes what transformers computes, and refuses what does not fit, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_checkpoints import (
    BFLOAT16,
    KINDS,
    build,
    differences,
    exported,
    megatron_logits,
    misplaced,
    relative_error,
    transformers_logits,
    write_checkpoint,
)
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_vespo import platform
from megatron_vespo.weights.export import export_hf
from megatron_vespo.weights.load import load_hf
from megatron_vespo.weights.mapping import FAMILIES, WeightsError, template
from megatron_vespo.weights.save import save_hf_folder

TOLERANCE = 1e-5

SPLITS: dict[str, list[dict[str, Any]]] = {
    "qwen3 tied": [
        dict(tensor=2),
        dict(pipeline=2),
        dict(pipeline=2, virtual_pipeline=2),
        dict(context=2),
        dict(),
    ],
    "qwen3_moe": [
        dict(tensor=2, sequence=True),
        dict(tensor=2, sequence=True, expert=2),
        dict(tensor=2, sequence=True, expert_tensor=2),
        dict(expert=2),
        dict(expert_tensor=2),
        dict(pipeline=2),
        dict(pipeline=2, virtual_pipeline=2),
        dict(context=2, expert=2),
    ],
    "qwen3_moe bfloat16": [dict(tensor=2, sequence=True, expert=2)],
    "qwen3_moe mixed": [dict(pipeline=2, virtual_pipeline=2), dict(expert=2)],
    "qwen2 untied": [dict(tensor=2), dict(pipeline=2)],
    "llama": [dict(tensor=2)],
    "mixtral": [dict(tensor=2, sequence=True, expert=2), dict(expert_tensor=2)],
    "deepseek_v3": [
        dict(tensor=2, sequence=True),
        dict(tensor=2, sequence=True, expert=2),
        dict(pipeline=2),
        dict(expert=2),
        dict(context=2),
    ],
    "deepseek_v3 direct": [dict(tensor=2, sequence=True, expert_tensor=2)],
    "deepseek_v3 bfloat16": [dict(tensor=2, sequence=True, expert=2)],
    "glm4_moe": [
        dict(tensor=2, sequence=True),
        dict(tensor=2, sequence=True, expert=2),
        dict(pipeline=2, virtual_pipeline=2),
        dict(expert=2),
    ],
    "glm4_moe plain": [dict(tensor=2, sequence=True), dict(pipeline=2)],
}
FOUR_RANKS: dict[str, list[dict[str, Any]]] = {
    "qwen3_moe": [dict(pipeline=2, expert=2), dict(pipeline=2, tensor=2, sequence=True, expert_tensor=2)],
}
CASES = [(kind, split) for kind, splits in SPLITS.items() for split in splits]


def label(value: object) -> str:
    return str(value) if not isinstance(value, dict) else " ".join(f"{k}={v}" for k, v in value.items()) or "data=2"


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A world of this process alone."""
    from megatron_vespo.policy import ranks

    platform.current().prepare_megatron()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    ranks.destroy()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_checkpoint(root / kind.replace(" ", "_"), kind) for kind in (*KINDS, *BFLOAT16)}


# ---------------------------------------------------------------------------------------------- one rank


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_is_bitwise_and_computes_what_transformers_does(
    kind: str, one_rank: None, checkpoints: dict[str, Path]
) -> None:
    folder = checkpoints[kind]
    chunks, config = build(folder)
    load_hf(chunks, folder)
    assert misplaced(chunks, folder) == []
    assert differences(exported(chunks, config), folder) == []
    found = megatron_logits(chunks[0], config.vocab_size)
    assert relative_error(found, transformers_logits(folder)) < TOLERANCE


@pytest.mark.parametrize("kind", BFLOAT16)
def test_bfloat16_stays_bitwise(kind: str, one_rank: None, checkpoints: dict[str, Path]) -> None:
    """The routers' expert biases are float32 in such a checkpoint too, and stay it."""
    folder = checkpoints[kind]
    chunks, config = build(folder)
    load_hf(chunks, folder)
    assert differences(exported(chunks, config), folder) == []


def test_wrapped_models_are_unwrapped(one_rank: None, checkpoints: dict[str, Path]) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    folder = checkpoints["qwen3 tied"]
    chunks, config = build(folder)
    wrapped: list[Any] = [DistributedDataParallel(c.config, DistributedDataParallelConfig(), c) for c in chunks]
    load_hf(wrapped, folder)
    assert differences(exported(wrapped, config), folder) == []


def test_transformer_engines_names_are_known() -> None:
    """The names are those of get_gpt_layer_with_transformer_engine_spec with and without grouped experts."""
    layer = "decoder.layers.3."
    for te_name, local_name in [
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("mlp.experts.linear_fc1.weight5", "mlp.experts.local_experts.5.linear_fc1.weight"),
        ("mlp.experts.linear_fc2.weight12", "mlp.experts.local_experts.12.linear_fc2.weight"),
        ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
        ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"),
    ]:
        assert template(layer + te_name) == template(layer + local_name)
        assert template(layer + te_name)[0] in FAMILIES["deepseek_v3"] | FAMILIES["qwen3_moe"]
    assert template("decoder.layers.3.mlp.experts.linear_fc1.weight5")[1:] == (3, 5)


# ---------------------------------------------------------------------------------------------- refusals

EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
Tensors = dict[str, torch.Tensor]


def _without_an_expert(tensors: Tensors) -> None:
    del tensors[EXPERT]


def _with_one_layer_more(tensors: Tensors) -> None:
    tensors["model.layers.4.input_layernorm.weight"] = torch.ones(32)


def _with_a_transposed_expert(tensors: Tensors) -> None:
    tensors[EXPERT] = tensors[EXPERT].T.contiguous()


def _with_an_fp8_expert(tensors: Tensors) -> None:
    tensors[EXPERT] = tensors[EXPERT].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_an_expert, rf"{EXPERT}: missing.*decoder\.layers\.2\.mlp\.experts\.local_experts\.3\.linear_fc1"),
        (_with_one_layer_more, r"model\.layers\.4\.input_layernorm\.weight: in .*model\.safetensors, and no parameter"),
        (_with_a_transposed_expert, rf"{EXPERT}: shape \[32, 24\] in .*model\.safetensors.* needs \[24, 32\]"),
        (_with_an_fp8_expert, rf"{EXPERT}: stored as F8_E4M3 in .*model\.safetensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name_before_anything_changes(
    change: Callable[[Tensors], None], message: str, one_rank: None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    chunks, _ = build(checkpoints["qwen3_moe"])
    before = {name: p.clone() for name, p in chunks[0].named_parameters()}
    with pytest.raises(WeightsError, match=message):
        load_hf(chunks, changed(checkpoints["qwen3_moe"], tmp_path, change))
    assert all(torch.equal(before[name], p) for name, p in chunks[0].named_parameters())


def changed(source: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


@pytest.mark.parametrize("same", [True, False])
def test_an_output_layer_beside_tied_embeddings_must_equal_them(
    same: bool, one_rank: None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """transformers unties them when they differ; Megatron cannot, so that would be another model."""

    def add_output(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if same else 1)

    folder = changed(checkpoints["qwen3 tied"], tmp_path, add_output)
    chunks, config = build(folder)
    if same:
        load_hf(chunks, folder)
        assert differences(exported(chunks, config), checkpoints["qwen3 tied"]) == []
    else:
        with pytest.raises(WeightsError, match=r"lm_head\.weight: .* differs from model\.embed_tokens\.weight"):
            load_hf(chunks, folder)


def test_layers_for_multi_token_prediction_are_left_out_and_that_is_said(
    one_rank: None, checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Released checkpoints of DeepSeek-V3 and GLM-4.5 hold one more layer than the model has."""

    def add_layers(*layers: int) -> Callable[[Tensors], None]:
        return lambda tensors: tensors.update(
            {f"model.layers.{i}.{name}.weight": torch.ones(32) for i in layers for name in ("enorm", "input_layernorm")}
        )

    source = checkpoints["glm4_moe"]
    chunks, config = build(source)
    folder = changed(source, tmp_path, add_layers(4))
    with pytest.raises(WeightsError, match=r"model\.layers\.4\.enorm\.weight: .* no parameter"):
        load_hf(chunks, folder)
    written = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(written))
    load_hf(chunks, folder)
    assert "2 tensors of the 1 layers for multi-token prediction (from model.layers.4 on) are not loaded" in caplog.text
    assert misplaced(chunks, source) == []

    save_hf_folder(export_hf(chunks, config), tmp_path / "out", folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), source) == []
    add_layers(5)(more := load_file(folder / "model.safetensors"))
    save_file(more, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.layers\.5\.enorm\.weight: .* no parameter"):
        load_hf(chunks, folder)


def test_a_truncated_file_is_named(one_rank: None, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(checkpoints["llama"], tmp_path, lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    chunks, _ = build(folder)
    with pytest.raises(WeightsError, match=str(file)):
        load_hf(chunks, folder)


def test_an_index_that_names_an_absent_file_is_named(
    one_rank: None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(checkpoints["llama"], tmp_path, lambda tensors: None)
    names = load_file(folder / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | {"model.norm.weight": "model-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    chunks, _ = build(folder)
    with pytest.raises(WeightsError, match=r"model-00002\.safetensors"):
        load_hf(chunks, folder)


def test_a_family_without_a_table_is_refused(one_rank: None, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(checkpoints["llama"], tmp_path, lambda tensors: None)
    chunks, _ = build(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    with pytest.raises(WeightsError, match=r"gpt_neox.*there is one for"):
        load_hf(chunks, folder)


# ---------------------------------------------------------------------------------------------- ranks


@dataclass
class RankReport:
    """What one rank saw. ``round_trips``, a case each: misplaced parameters; what the export has wrong."""

    round_trips: list[tuple[list[str], list[str] | int]]
    logits: torch.Tensor | None = None
    refusal: str = ""


def round_trips(cases: list[tuple[str, dict[str, Any]]], checkpoints: dict[str, Path]) -> RankReport:
    """Off rank 0 the export's place is taken by the number of tensors that the rank was given."""
    platform.current().prepare_megatron(1)
    report = RankReport([])
    for kind, split in cases:
        folder = checkpoints[kind]
        chunks, config = build(folder, **split)
        load_hf(chunks, folder)
        found = exported(chunks, config)
        wrong = differences(found, folder) if dist.get_rank() == 0 else len(found)
        report.round_trips.append((misplaced(chunks, folder), wrong))
    return report


def two_ranks_report(checkpoints: dict[str, Path], broken: Path) -> RankReport:
    report = round_trips(CASES, checkpoints)
    folder = checkpoints["qwen3_moe"]
    chunks, config = build(folder, tensor=2, sequence=True)
    load_hf(chunks, folder)
    report.logits = megatron_logits(chunks[0], config.vocab_size)
    chunks, _ = build(broken, pipeline=2)
    with pytest.raises(WeightsError) as refusal:
        load_hf(chunks, broken)
    report.refusal = str(refusal.value)
    return report


@pytest.fixture(scope="module")
def two_ranks(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[RankReport]:
    broken = changed(checkpoints["qwen3_moe"], tmp_path_factory.mktemp("broken"), _without_an_expert)
    return run_ranks(two_ranks_report, 2, checkpoints, broken, timeout_s=240)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "split"), CASES, ids=label)
def test_two_ranks_are_bitwise(kind: str, split: dict[str, Any], two_ranks: list[RankReport]) -> None:
    case = CASES.index((kind, split))
    assert two_ranks[0].round_trips[case] == ([], [])
    assert two_ranks[1].round_trips[case] == ([], 0), "only rank 0 is given tensors"


@pytest.mark.slow
def test_four_ranks_are_bitwise(checkpoints: dict[str, Path]) -> None:
    """Experts and pipeline stages at once: a tensor takes two hops to rank 0."""
    cases = [(kind, split) for kind, splits in FOUR_RANKS.items() for split in splits]
    first, *others = run_ranks(round_trips, 4, cases, checkpoints)
    assert first.round_trips == [([], [])] * len(cases)
    assert [other.round_trips for other in others] == [[([], 0)] * len(cases)] * 3


@pytest.mark.slow
def test_tensor_parallel_ranks_compute_what_transformers_does(
    two_ranks: list[RankReport], checkpoints: dict[str, Path]
) -> None:
    for report in two_ranks:
        assert report.logits is not None
        assert relative_error(report.logits, transformers_logits(checkpoints["qwen3_moe"])) < TOLERANCE


@pytest.mark.slow
def test_all_ranks_refuse_what_one_stage_misses(two_ranks: list[RankReport]) -> None:
    first, last = (report.refusal for report in two_ranks)
    assert first == last
    assert f"{EXPERT}: missing" in first
