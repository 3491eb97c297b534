"""LoRA: trains low-rank adapters; the step, the data and the loss are those of SFT."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_hub.checkpoints.rng import reseed
from lightning_hub.config.bounds import Bounds
from lightning_hub.config.rules import check_adapters
from lightning_hub.errors import ConfigError
from lightning_hub.methods.causal_lm import CausalLMModule
from lightning_hub.methods.lora.adapter_io import export_adapter, load_adapter, read_config, write_adapter
from lightning_hub.methods.lora.adapters import (
    EVA,
    INIT_OPTION,
    Init,
    LoraSettings,
    build_lora_config,
    describe_adapters,
    hash_of_base,
    inject_adapters,
    modifies_base,
)
from lightning_hub.methods.lora.eva import eva_directions, set_directions
from lightning_hub.methods.lora.liveness import AdapterUpdateCheck, DeadAdapterError, group_of
from lightning_hub.methods.lora.merge import write_merged
from lightning_hub.methods.lora.quantization import Quantization, check_quantization, load_quantized
from lightning_hub.ops.attention_proof import apply_capabilities
from lightning_hub.ops.batch import StepBatch
from lightning_hub.ops.loss import ModelCapabilities
from lightning_hub.parallel.collectives import Ranks
from lightning_hub.parallel.data_parallel import HubStrategy, data_parallel
from lightning_hub.parallel.dtensor import full_tensors
from lightning_hub.parallel.strategies import MeshStrategy


class LoRA(CausalLMModule):
    """Low-rank adapters beside frozen layers (Hu et al. 2021, arXiv 2106.09685), through peft.

    Args:
        model: Local folder or hub id of the model to adapt.
        learning_rate: Peak learning rate of AdamW; adapters need about ten times that of full training.
        r: Rank of the adapters.
        alpha: Scale of the adapters: their outputs are multiplied by alpha / r.
        dropout: Dropout probability of an adapter's inputs during training.
        targets: Which layers are adapted: all-linear, or groups (attention, mlp, experts, router), names and regular
            expressions.
        modules_to_save: Modules whose weights are all trained, beside the adapters; embed_tokens for new tokens.
        use_rslora: Scale by alpha / sqrt(r), so that high ranks train well (arXiv 2312.03732).
        use_dora: Train the magnitude of each weight column separately from its direction (arXiv 2402.09353).
        init: How the adapters are initialised. pissa and olora decompose the weights, eva the inputs of the layers;
            with all inits but pissa and olora the product of the factors starts at zero.
        quantization: Quantization of the frozen weights: none, nf4 (4 bits) or int8; one process, with bitsandbytes.
        adapter: Folder of an adapter to continue from, made for this model with the same r, alpha, targets and variant.
        **options: SFT's.
    """

    fixed_on_resume = ("r", "alpha", "targets", "modules_to_save", "use_rslora", "use_dora", "init", "quantization")

    def __init__(
        self,
        model: str,
        learning_rate: float = 2e-4,
        r: Annotated[int, Bounds(">= 1")] = 16,
        alpha: Annotated[float, Bounds("> 0")] = 32.0,
        dropout: Annotated[float, Bounds(">= 0, < 1")] = 0.0,
        targets: str | list[str] = "all-linear",
        modules_to_save: list[str] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        init: Init = "default",
        quantization: Quantization = "none",
        adapter: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, learning_rate, **options)
        if (modifies_base(init) and (use_dora or adapter)) or (init == EVA and adapter):
            other = "adapter" if adapter else "use_dora"
            raise ConfigError(
                f"{other} cannot be used with init {init}", where=INIT_OPTION, remedy="remove one of them"
            )
        self.settings = LoraSettings(r, alpha, dropout, targets, modules_to_save or [], use_rslora, use_dora, init)
        check_quantization(quantization, init)
        self.quantization: Quantization = quantization
        self.adapter = Path(adapter).expanduser() if adapter else None
        if self.adapter is not None:
            read_config(self.adapter, self.settings)
        self.adapter_config: LoraConfig | None = None
        self.base_hash = ""
        self.update_check: AdapterUpdateCheck | None = None

    # ---- what trains -------------------------------------------------------------------------------------------------

    def choose_trainable(self, model: PreTrainedModel) -> None:
        """Freeze everything, and inject adapters into the target layers."""
        is_read = not next(model.parameters()).is_meta
        if is_read and self.quantization == "none":
            self.base_hash = hash_of_base(model)
        self.adapter_config = inject_adapters(model, self.settings, self.pretrained.name)
        if is_read and self.adapter is not None:
            load_adapter(self.adapter, model, self.base_hash)

    def configure_model(self) -> None:
        """Load the weights, broadcast the hash of the base model, and seed each data-parallel rank differently."""
        if self.model is not None:
            return
        self._check_strategy()
        if self.trainer.state.fn == "fit" and (base := self.pretrained.base) is not None:
            raise ConfigError(
                f"{self.source} is itself an adapter: peft cannot put a second adapter on it",
                where="model.init_args.model",
                remedy=f"continue from it (model: {base.name}, adapter: {self.source}), or merge it (export --merge)",
            )
        super().configure_model()
        assert self.model is not None, "super().configure_model has set it"
        self.base_hash = Ranks().run_on_rank_zero(lambda: self.base_hash)
        if share := data_parallel(self.trainer.strategy).rank:
            reseed(share)

    def _check_strategy(self) -> None:
        """Reject strategies and precisions that adapters do not support; a run without a recipe was not checked before.

        Raises:
            ConfigError: The strategy shards weights that the adapters need complete, or the precision is float64.
        """
        if str(self.trainer.precision) in ("64", "64-true"):
            raise ConfigError(
                "adapters are always float32, so they cannot be trained in float64",
                where="trainer.precision",
                remedy="use 32-true",
            )
        strategy = self.trainer.strategy
        mesh = strategy.device_mesh if isinstance(strategy, MeshStrategy) else None
        is_named = mesh is not None and "tp" in (mesh.mesh_dim_names or ())
        tp = mesh["tp"].size() if mesh is not None and is_named else 1
        check_adapters(
            use_dora=self.settings.use_dora, quantization=self.quantization, tp=tp, world_size=self.trainer.world_size
        )

    def load_pretrained(self) -> tuple[PreTrainedModel, ModelCapabilities]:
        """Load the base model; for init ``eva`` also compute the directions of the inputs of its layers."""
        if self.settings.init != EVA or self.run.resume_from is not None or self.trainer.state.fn != "fit":
            return super().load_pretrained()
        proven = self.proven_capabilities()
        model = self.load_weights(proven.attention)
        if not isinstance(self.trainer.strategy, HubStrategy):  # a model to shard may be too large for one device
            nn.Module.to(model, self.trainer.strategy.root_device)  # the types of its own `to` are wrong
        config, _ = build_lora_config(model, self.settings, self.source)
        steps = getattr(self._data(), "plan", None)
        if steps is None:
            raise ConfigError(
                "init eva needs the training data of a ChatData",
                where=INIT_OPTION,
                remedy="use the data class ChatData",
            )
        found = eva_directions(model, apply_capabilities(model, proven), config, steps)
        self.choose_trainable(model)
        set_directions(model, found)
        return model, apply_capabilities(model, proven)

    def load_weights(self, attention: str) -> PreTrainedModel:
        """Load the base model, quantized if the recipe asks for it."""
        if self.quantization == "none":
            return super().load_weights(attention)
        device = self.trainer.strategy.root_device
        return load_quantized(self.pretrained, self.quantization, self.load_dtype(), attention, device)

    def load_dtype(self) -> torch.dtype:
        """Return bfloat16 for frozen weights in bf16 precision, unless some of them train or are decomposed."""
        shifting = modifies_base(self.settings.init)
        dtype = super().load_dtype()
        if shifting and dtype != torch.float32:
            raise ConfigError(
                f"init {self.settings.init} changes the base weights, which loses precision in bfloat16",
                where=INIT_OPTION,
                remedy="load the base model in float32: precision bf16-mixed or 32-true, dtype auto or float32",
            )
        is_frozen = not self.settings.modules_to_save and not shifting
        is_bf16 = str(self.trainer.precision).startswith("bf16")
        return torch.bfloat16 if self.weights_dtype == "auto" and is_frozen and is_bf16 else dtype

    def summary_lines(self) -> list[str]:
        """Return lines about the adapters."""
        assert self.model is not None, "configure_model has run"
        assert self.adapter_config is not None, "configure_model has injected the adapters"
        start = [f"       continuing from {self.adapter}"] if self.adapter else []
        trained = list(self.adapter_config.modules_to_save or [])
        return describe_adapters(self.model, self.settings, trained) + start

    def tensor_parallel_plan(self, name: str, layer: nn.Module, style: str) -> dict[str, str]:
        """Return which modules of a layer are sharded under tensor parallelism, each with its style.

        An adapter computes ``B(A(x))``. For a colwise layer, ``B`` computes the outputs of its rank and ``A`` is
        replicated. For a rowwise layer, ``A`` takes the inputs of its rank, its outputs (``r`` numbers for each token)
        are all-reduced, and ``B`` is replicated.
        """
        if not isinstance(layer, LoraLayer):
            return super().tensor_parallel_plan(name, layer, style)
        factor = {"colwise": "lora_B", "rowwise": "lora_A"}.get(style)
        adapters = [] if factor is None else [f"{name}.{factor}.{adapter}" for adapter in getattr(layer, factor)]
        return {f"{name}.base_layer": style, **dict.fromkeys(adapters, style)}

    # ---- liveness -------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Start the check that all adapters change."""
        assert self.model is not None, "configure_model has run"
        self.update_check = AdapterUpdateCheck(self.model)
        self.update_check.check(self.trainer.optimizers)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Copy the weights before each of the first steps."""
        assert self.update_check is not None, "training has started"
        self.update_check.before_step(optimizer)

    def on_train_batch_end(self, outputs: object, batch: StepBatch, batch_idx: int) -> None:
        """Check that the weights have changed."""
        assert self.update_check is not None, "training has started"
        self.update_check.after_step(counts=batch.num_trained > 0 and not self.is_skipped)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the hash of the base model; the base model itself is not saved."""
        super().on_save_checkpoint(checkpoint)
        if self.update_check is not None:
            self.update_check.check(self.trainer.optimizers)
        checkpoint["base"] = self.base_hash

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject a checkpoint of another base model.

        Raises:
            ConfigError: The base model of the checkpoint is not that of this run.
        """
        if checkpoint.get("base") != self.base_hash:
            raise ConfigError(
                f"the checkpoint's adapters belong to another model than {self.source}",
                where="model.init_args.model",
                remedy="resume with the model that they were trained on",
            )

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """Return the trained tensors only; frozen weights are loaded from the base model again."""
        return {name: tensor for name, tensor in super().checkpoint_state_dict().items() if tensor.requires_grad}

    def build_empty(self) -> None:
        """Load the base model with its weights: the export needs them for its comparison."""
        self.model, _ = self.load_pretrained()

    def export(self, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the adapter, and check it by loading it into a fresh base model.

        Raises:
            DeadAdapterError: The adapters of some layers are still zero, and others are not.
            HubError: The written adapter gives other logits than the trained model.
        """
        assert self.model is not None, "configure_model has run"
        assert self.adapter_config is not None, "configure_model has injected the adapters"
        state = full_tensors(self.checkpoint_state_dict())
        if not state:
            return
        state = {name.removeprefix("model."): tensor.cpu() for name, tensor in state.items()}
        _check_alive(state)
        shifted = modifies_base(self.settings.init)
        adapter = export_adapter(self.model, state, self.adapter_config, self.base_hash, is_shifted=shifted)

        def as_trained(fresh: PreTrainedModel) -> None:
            inject_adapters(fresh, self.settings, self.source)
            found = fresh.load_state_dict(state, strict=False)
            assert not found.unexpected_keys, f"live names are those of a fresh model: {found.unexpected_keys[:1]}"

        write_adapter(target, adapter, tokenizer, self.pretrained, as_trained)

    def export_merged(self, target: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None) -> str:
        """Write a merged model (``dtype`` None: that of the base model on disk); return lines about the cast."""
        dtype = dtype or self.pretrained.stored_dtype
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent) as scratch:
            self.export(Path(scratch) / "adapter", tokenizer)
            return write_merged(target, Path(scratch) / "adapter", self.pretrained, tokenizer, dtype)


def _check_alive(state: dict[str, Tensor]) -> None:
    """Reject an adapter in which some layers are still zero and others are not; all zero is allowed (no step)."""
    ends = {name: bool(tensor.any()) for name, tensor in state.items() if ".lora_B." in name}
    alive = {group_of(name) for name, moved in ends.items() if moved}
    dead = [name for name in ends if group_of(name) not in alive]
    if dead and alive:
        raise DeadAdapterError("are zero after the training", dead, len(state))
