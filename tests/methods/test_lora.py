"""LoRA beside peft itself: the same training, folders that peft reads, and merges that are the same model."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_hub.checkpoints.checkpoint_io import FolderCheckpointIO
from lightning_hub.cli import run
from lightning_hub.errors import ConfigError, HubError
from lightning_hub.methods.lora import LoRA
from lightning_hub.methods.lora.adapter_io import Adapter, export_adapter, probe_logits
from lightning_hub.methods.lora.adapters import layers_of
from lightning_hub.models.pretrained import EMBEDDED_FOLDER, Pretrained
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.attention_proof import proven_loss
from lightning_hub.runs.folder import RunFolder
from tests.conftest import WriteRows
from tests.parallel.multiprocess import Case, calm, plan, trained
from tests.parallel.test_topology import ONE, saved

SMALL: dict[str, Any] = {"r": 4, "alpha": 8.0, "learning_rate": 1e-2, "lr_scheduler": "constant"}


def peft_loop(model: PreTrainedModel, config: LoraConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Train the same rows with peft, AdamW and a loop that anyone would write."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    loss_of = proven_loss(model)  # whose layers peft has replaced
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], 1e-2, (0.9, 0.95), weight_decay=0
    )
    losses = []
    for index in range(len(plan())):
        step = plan().step(0, index)
        optimizer.zero_grad()
        loss = torch.stack([loss_of(row) for row in step.rows]).sum() / step.num_trained
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}


# ---- the same as peft ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "peft_options"),
    [
        ({}, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}),
        ({"targets": ["attention"], "use_dora": True}, {"target_modules": "all_attention", "use_dora": True}),
        ({"targets": ["mlp"], "use_rslora": True, "init": "pissa"}, {"target_modules": "all_mlp", "use_rslora": True,
         "init_lora_weights": "pissa"}),
    ],
    ids=["plain", "dora", "pissa"],
)  # fmt: skip
def test_losses_and_weights_are_those_of_a_peft_loop(options: dict[str, Any], peft_options: dict[str, Any]) -> None:
    groups = {
        "all_attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "all_mlp": ["gate_proj", "up_proj", "down_proj"],
    }
    names = peft_options["target_modules"]
    peft_options = {**peft_options, "target_modules": groups.get(names, names) if isinstance(names, str) else names}
    model = Pretrained(saved("qwen3")).load(dtype=torch.float32, attn_implementation=PACKED)
    losses, weights = peft_loop(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **peft_options))
    seen = trained(Case("lora", method=LoRA, model=saved("qwen3"), options={**SMALL, **options}), ONE)
    assert seen.losses == pytest.approx(losses, rel=1e-6)
    assert weights
    for name, weight in weights.items():
        torch.testing.assert_close(seen.weights[name.removeprefix("base_model.model.")], weight, rtol=1e-4, atol=1e-6)


# ---- targets ---------------------------------------------------------------------------------------------------------


def adapted(folder: str, **options: Any) -> LoRA:
    """Return a module with its model read and adapted, without a training."""
    module = LoRA(folder, **{**SMALL, **options})
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    return module


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"targets": ["q_proj", "nope"]}, ["'nope'", "attention: q_proj, k_proj, v_proj, o_proj; mlp: gate_proj"]),
        ({"targets": ["experts"]}, ["'experts' matches no weight", "mlp: gate_proj"]),
        ({"modules_to_save": ["embed_token"]}, ["'embed_token'", "modules_to_save", "attention: q_proj"]),
        ({"targets": ["lm_head"]}, ["model.embed_tokens shares its weight with lm_head", "modules_to_save"]),
        ({"targets": [".*"]}, ["model.embed_tokens shares its weight with lm_head", "modules_to_save"]),
        ({"targets": ["q_proj"], "modules_to_save": ["self_attn"]}, ["modules_to_save already trains all layers"]),
        ({"modules_to_save": ["layers"]}, ["'layers' is a list of modules", "name its modules, as model.layers.0"]),
        ({"init": "pissa", "r": 65}, ["r 65 is more than the 64 directions of", "k_proj (64 x 128)"]),
        ({"init": "olora", "r": 65}, ["r 65 is more than the 64 directions of"]),
        ({"adapter": "/nowhere"}, ["is not an adapter"]),
        ({"use_dora": True, "init": "pissa"}, ["use_dora cannot be used with init pissa"]),
    ],
    ids=str,
)
def test_a_wrong_name_is_refused_with_the_names_there_are(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        adapted("demo", **options)
    assert all(part in str(refused.value) for part in parts), refused.value


@pytest.mark.parametrize(
    ("family", "options", "layer"),
    [
        ("qwen3", {"init": "pissa", "targets": ["embed_tokens"]}, "model.embed_tokens"),
        ("qwen3", {"init": "olora", "targets": ["embed_tokens"]}, "model.embed_tokens"),
        ("gpt-oss, sinks", {"init": "pissa", "targets": ["experts"]}, "model.layers.0.mlp.experts.gate_up_proj"),
        ("gpt2", {"init": "olora"}, "transformer.h.0.attn.c_attn"),
    ],
)
def test_an_init_that_takes_its_start_out_of_other_layers_is_refused(
    family: str, options: dict[str, Any], layer: str
) -> None:
    with pytest.raises(ConfigError, match=f"init {options['init']} is for plain linear layers, not for {layer}"):
        adapted(saved(family), **options)


def test_adapters_in_float64_are_refused() -> None:
    module = LoRA("demo", **SMALL)
    module.trainer = Trainer(accelerator="cpu", precision="64-true", logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"trainer\.precision: adapters are always float32"):
        module.configure_model()


def test_what_is_adapted_is_said() -> None:
    lines = adapted("demo", targets=["q_proj", "mlp"], modules_to_save=["norm"]).summary_lines()
    assert lines == [
        "lora   rank 4, scaled by 8 / 4, beside 3 x q_proj (128 -> 128), 3 x gate_proj (128 -> 256), "
        "3 x up_proj (128 -> 256), 3 x down_proj (256 -> 128)",
        "       trained whole: model.norm",
    ]


def test_every_adapter_leaves_out_inputs_as_it_is_told() -> None:
    module = adapted("demo", dropout=0.25)
    assert module.model is not None
    dropped = [layer.lora_dropout["default"] for _, layer in layers_of(module.model)]
    assert len(dropped) == 21
    assert {cast("nn.Dropout", one).p for one in dropped} == {0.25}


def test_tied_modules_are_trained_whole_under_both_names() -> None:
    module = adapted("demo", modules_to_save=["embed_tokens"])
    assert module.adapter_config is not None
    assert module.adapter_config.modules_to_save == ["model.embed_tokens", "lm_head"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_adapters_stay_in_float32_beside_a_bfloat16_base(precision: str) -> None:
    seen = trained(Case("lora", method=LoRA, options=SMALL, trainer={"precision": precision}), ONE)
    dtypes = {".lora_" in name: tensor.dtype for name, tensor in seen.weights.items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert seen.losses[-1] < seen.losses[0]


# ---- folders ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen3", {}),
    "whole modules": ("llama", {"modules_to_save": ["embed_tokens", "norm"], "targets": ["attention"]}),
    "whole blocks": ("llama", {"modules_to_save": ["mlp", "up_proj", "layers.1"]}),
    "output layer": ("qwen3", {"targets": ["lm_head", "q_proj"]}),
    "dora, scaled by the root": ("qwen2", {"use_dora": True, "use_rslora": True}),
    "pissa": ("qwen3", {"init": "pissa", "use_rslora": True}),
    "olora": ("qwen3", {"init": "olora"}),
    "transposed layers": ("gpt2", {}),
    "experts and router": ("gpt-oss, sinks", {"targets": ["experts", "router"]}),
}


def train(folder: str, tmp_path: Path, **options: Any) -> LoRA:
    """Train for a few steps and write the adapter."""
    kept: list[LoRA] = []

    class Kept(LoRA):
        def on_train_end(self) -> None:
            super().on_train_end()
            kept.append(self)

    trained(Case("lora", method=Kept, model=folder, options={**SMALL, **options}), ONE)
    kept[0].export(tmp_path / "adapter", Pretrained("demo").tokenizer)
    return kept[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_the_trained_model_for_peft_and_merged(kind: str, tmp_path: Path) -> None:
    family, options = KINDS[kind]
    folder = saved(family)
    module = train(folder, tmp_path, **options)
    assert module.model is not None
    module.model.set_attn_implementation("eager")
    expected = probe_logits(module.model)
    base = Pretrained(folder).load(dtype=torch.float32, attn_implementation="eager")
    before = probe_logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(probe_logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.01, "the adapter does something"
    said = module.export_merged(tmp_path / "merged", Pretrained("demo").tokenizer, torch.float32)
    assert "in bfloat16" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(probe_logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert not [name for name in load_file(tmp_path / "merged/model.safetensors") if "lora" in name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # chat and predict would show it
        again = Pretrained(str(tmp_path / "adapter")).load(dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(probe_logits(again), expected, rtol=1e-5, atol=1e-5)


def test_untouched_weights_keep_their_bytes(tmp_path: Path) -> None:
    module = train("demo", tmp_path, targets=["q_proj"])
    module.export_merged(tmp_path / "merged", Pretrained("demo").tokenizer, None)
    before, after = (load_file(folder / "model.safetensors") for folder in (EMBEDDED_FOLDER, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "q_proj" in name}
    assert {tensor.dtype for tensor in after.values()} == {tensor.dtype for tensor in before.values()}


def test_what_a_cast_does_to_the_change_is_said(tmp_path: Path) -> None:
    module = train("demo", tmp_path, targets=["q_proj"])
    rounded, exact = module.export_merged(tmp_path / "merged", Pretrained("demo").tokenizer, torch.float32).splitlines()
    before, after = (load_file(folder / "model.safetensors") for folder in (EMBEDDED_FOLDER, tmp_path / "merged"))
    starts, ends = (torch.cat([held[name].float().flatten() for name in before if "q_proj" in name])
                    for held in (before, after))  # fmt: skip
    share = float((ends.bfloat16() != starts.bfloat16())[ends != starts].float().mean())
    error = float((ends.bfloat16() - ends).norm() / (ends - starts).norm())
    assert error > 1e-3
    said = (
        f"in bfloat16 {share:.1%} of the changed numbers differ from the base's, and the change is off by {error:.1%}"
    )
    assert said in rounded
    assert "in float32 100.0% of the changed numbers differ from the base's, and the change is off by 0.0%" in exact


FAULTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "prefix": lambda found: {f"_orig_mod.{name}": tensor for name, tensor in found.items()},
    "lost shard": lambda found: {name: tensor for name, tensor in found.items() if "layers.0" not in name},
    "half a tensor": lambda found: {
        name: tensor * (torch.arange(len(tensor)) % 2)[:, None] for name, tensor in found.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_file_is_noticed_when_it_is_written(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda found, *rest: real(FAULTS[fault](found), *rest))
    with pytest.raises(HubError, match="of the written adapter differ from the trained ones"):
        train("demo", tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_whose_reading_changes_the_base_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another_start(*args: Any, **options: Any) -> Adapter:
        adapter = export_adapter(*args, **options)
        adapter.config.init_lora_weights = "pissa"  # peft then takes a start out of the base that it reads it into
        return adapter

    monkeypatch.setattr("lightning_hub.methods.lora.module.export_adapter", with_another_start)
    with pytest.raises(HubError, match="loading the adapter changes"):
        train("demo", tmp_path)
    assert not (tmp_path / "adapter").exists()


# ---- continuing from an adapter -------------------------------------------------------------------------------------


def test_an_adapter_is_gone_on_from(tmp_path: Path) -> None:
    first = train(saved("qwen3"), tmp_path, targets=["attention"], modules_to_save=["norm"])
    again = adapted(saved("qwen3"), targets=["attention"], modules_to_save=["norm"], adapter=str(tmp_path / "adapter"))
    ours, theirs = again.checkpoint_state_dict(), first.checkpoint_state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "parts"),
    [
        ("calm", {}, ["was trained on another model"]),
        ("demo", {"r": 8}, ["has r 4, the recipe says 8", "set it to 4"]),
        ("demo", {"targets": ["q_proj"]}, ["the recipe does not train", "self_attn.k_proj.lora_A"]),
        ("demo", {"targets": "all-linear"}, ["the adapter does not contain", "mlp"]),
    ],
)
def test_an_adapter_for_something_else_is_refused(
    model: str, options: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    train("demo", tmp_path, targets=["attention"])
    with pytest.raises(ConfigError) as refused:
        adapted(
            calm() if model == "calm" else model,
            **{"targets": ["attention"], "adapter": str(tmp_path / "adapter"), **options},
        )
    assert all(part in str(refused.value) for part in parts), refused.value


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    train("demo", tmp_path, targets=["attention"])
    whole = tmp_path / "adapter"
    weights = load_file(whole / "adapter_model.safetensors")
    name = min(weights)
    config = json.loads((whole / "adapter_config.json").read_text())
    damages: dict[str, tuple[Callable[[Path], object], str]] = {
        "cut": (lambda file: os.truncate(file / "adapter_model.safetensors", 1000), "cannot be read"),
        "nan": (
            lambda file: save_file({**weights, name: weights[name] * math.nan}, file / "adapter_model.safetensors"),
            "has NaN or infinite numbers",
        ),
        "no config": (lambda file: (file / "adapter_config.json").write_text("{"), "cannot be read"),
        "other type": (
            lambda file: (file / "adapter_config.json").write_text('{"peft_type": "IA3"}'),
            "not LORA",
        ),
        "own strengths": (
            lambda file: (file / "adapter_config.json").write_text(
                json.dumps({**config, "alpha_pattern": {"q_proj": 1}})
            ),
            "another rank or alpha for some layers",
        ),
    }
    for kind, (damage, said) in damages.items():
        damage(shutil.copytree(whole, tmp_path / kind))
        with pytest.raises(ConfigError, match=said):
            adapted("demo", targets=["attention"], adapter=str(tmp_path / kind))


# ---- runs ------------------------------------------------------------------------------------------------------------


# fmt: off
def fit(tmp_path: Path, write_rows: WriteRows, *flags: str, folder: str = "run") -> tuple[int, RunFolder]:
    code = run([
        "fit", "--run-dir", str(tmp_path / folder), "--trainer.log_every_n_steps", "1",
        "--model", "LoRA", "--model.model", "demo", "--model.dropout", "0.1", "--model.r", "4",
        "--data", "ChatData", "--data.train", str(write_rows(40)), "--data.max_seq_len", "64",
        "--data.effective_batch_size", "8", "--checkpoint.every_n_steps", "1", "--checkpoint.keep", "9", *flags,
    ])
    return code, RunFolder(tmp_path / folder)
# fmt: on


@pytest.mark.slow
def test_a_run_goes_on_exactly_and_keeps_adapters_only(tmp_path: Path, write_rows: WriteRows) -> None:
    assert fit(tmp_path, write_rows, "--trainer.max_steps", "6")[0] == 0
    straight = RunFolder(tmp_path / "run")
    for step in (1, 4):
        start = ["--resume", str(straight.checkpoints / f"step-{step}"), "--trainer.max_steps", "6"]
        assert fit(tmp_path, write_rows, *start, folder=f"from-{step}")[0] == 0
        ours, theirs = (
            load_file(tmp_path / name / "export/adapter_model.safetensors") for name in (f"from-{step}", "run")
        )
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    stored = FolderCheckpointIO().load_checkpoint(straight.latest.resolve())["restored"].weights.names()
    assert len(stored) == 42
    assert all(".lora_" in name for name in stored)


@pytest.mark.slow
def test_a_checkpoint_of_another_base_is_refused(
    tmp_path: Path, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = fit(tmp_path, write_rows, "--trainer.max_steps", "1")
    capsys.readouterr()
    flags = ["--resume", str(first.checkpoints / "step-1"), "--model.model", calm(), "--trainer.max_steps", "2"]
    assert fit(tmp_path, write_rows, *flags, folder="other")[0] == 2
    assert "the checkpoint's adapters belong to another model" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_upon_an_adapter_is_refused(
    tmp_path: Path, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = fit(tmp_path, write_rows, "--trainer.max_steps", "1")
    upon = ["--model.model", str(first.export), "--trainer.max_steps", "1"]
    assert fit(tmp_path, write_rows, *upon, folder="second")[0] == 2
    error = capsys.readouterr().err
    assert f"{first.export} is itself an adapter" in error
    assert f"adapter: {first.export})" in error
    going_on = ["--model.adapter", str(first.export), "--trainer.max_steps", "1"]
    assert fit(tmp_path, write_rows, *going_on, folder="third")[0] == 0


@pytest.mark.slow
def test_the_commands_understand_adapters(
    tmp_path: Path, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = fit(tmp_path, write_rows, "--trainer.max_steps", "3", "--model.learning_rate", "1e-3")
    assert "lora   rank 4" in capsys.readouterr().out
    assert run(["export", str(folder.path), "--merge"]) == 0
    assert "in bfloat16" in capsys.readouterr().out
    assert run(["export", str(folder.path), "--merge", "--to", str(tmp_path / "new/folders/merged")]) == 0
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Spell kamo."}\n')
    answers = []
    data = ["--data", "ChatData", "--data.train", str(write_rows(2)), "--data.predict", str(prompts)]
    for source in (folder.export, folder.export_merged):
        capsys.readouterr()
        assert run(["predict", "--model", "SFT", "--model.model", str(source), *data]) == 0
        answers.append(json.loads(capsys.readouterr().out)["completion"])
    assert answers == ["k-a-m-o"] * 2
    assert run(["export", str(folder.path), "--to", str(tmp_path / "again")]) == 0
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "again", folder.export))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_run_of_another_method_has_nothing_to_merge(
    tmp_path: Path, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    # fmt: off
    run(["fit", "--run-dir", str(tmp_path / "run"), "--model", "SFT", "--model.model", "demo", "--data", "ChatData",
         "--data.train", str(write_rows(8)), "--trainer.max_steps", "1"])
    # fmt: on
    assert run(["export", str(tmp_path / "run"), "--merge"]) == 2
    assert "nothing to merge" in capsys.readouterr().err
