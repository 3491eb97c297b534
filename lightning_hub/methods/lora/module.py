"""LoRA: what is trained are low-rank adapters; the step, the data and the loss are those of SFT."""

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
        learning_rate: Peak learning rate of AdamW; adapters want about ten times that of full training.
        r: Rank of the adapters.
        alpha: Their strength: outputs are scaled by alpha / r.
        dropout: Share of an adapter's inputs that is left out while training.
        targets: Which layers are adapted: all-linear, or groups (attention, mlp, experts, router), names and regular
            expressions.
        modules_to_save: Modules that are trained whole beside the adapters, as embed_tokens for new tokens.
        use_rslora: Scale by alpha / sqrt(r), which keeps high ranks alive (arXiv 2312.03732).
        use_dora: Train the length of each weight column apart from its direction (arXiv 2402.09353).
        init: What adapters start from; pissa and olora decompose the weights, eva what the layers are given, and all
            but pissa and olora start at no change.
        quantization: How the frozen weights are held: none, nf4 (4 bits) or int8, in one process with bitsandbytes.
        adapter: Folder of an adapter to go on from, made for this model with the same r, alpha, targets and variant.
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
            raise ConfigError(f"{other} does not go with init {init}", where=INIT_OPTION, remedy="leave it out")
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
        """Freeze everything, and put adapters beside the target layers."""
        is_read = not next(model.parameters()).is_meta
        if is_read and self.quantization == "none":
            self.base_hash = hash_of_base(model)
        self.adapter_config = inject_adapters(model, self.settings, self.pretrained.name)
        if is_read and self.adapter is not None:
            load_adapter(self.adapter, model, self.base_hash)

    def configure_model(self) -> None:
        """Read the weights; tell every rank which base it is; draw other random numbers for other rows."""
        if self.model is not None:
            return
        self._check_strategy()
        if self.trainer.state.fn == "fit" and (base := self.pretrained.base) is not None:
            raise ConfigError(
                f"{self.source} is an adapter itself: peft would read one upon it as if it were alone",
                where="model.init_args.model",
                remedy=f"go on from it (model: {base.name}, adapter: {self.source}), or merge it with export --merge",
            )
        super().configure_model()
        assert self.model is not None, "the call before has made it"
        self.base_hash = Ranks().run_on_rank_zero(lambda: self.base_hash)
        if share := data_parallel(self.trainer.strategy).rank:
            reseed(share)

    def _check_strategy(self) -> None:
        """Refuse what has not been made right, where no recipe was checked before the processes started.

        Raises:
            ConfigError: The strategy cuts what the adapters need whole.
        """
        if str(self.trainer.precision) in ("64", "64-true"):
            raise ConfigError(
                "adapters are float32 beside any base, so they cannot be trained in float64",
                where="trainer.precision",
                remedy="take 32-true",
            )
        strategy = self.trainer.strategy
        mesh = strategy.device_mesh if isinstance(strategy, MeshStrategy) else None
        is_named = mesh is not None and "tp" in (mesh.mesh_dim_names or ())
        tp = mesh["tp"].size() if mesh is not None and is_named else 1
        check_adapters(
            use_dora=self.settings.use_dora, quantization=self.quantization, tp=tp, world_size=self.trainer.world_size
        )

    def load_pretrained(self) -> tuple[PreTrainedModel, ModelCapabilities]:
        """Read the base, and find out what its layers are given where the adapters start from that."""
        if self.settings.init != EVA or self.run.resume_from is not None or self.trainer.state.fn != "fit":
            return super().load_pretrained()
        proven = self.proven_capabilities()
        model = self.load_weights(proven.attention)
        if not isinstance(self.trainer.strategy, HubStrategy):  # else it may be too large for the device of one
            nn.Module.to(model, self.trainer.strategy.root_device)  # its own `to` is typed as no method
        config, _ = build_lora_config(model, self.settings, self.source)
        steps = getattr(self._data(), "plan", None)
        if steps is None:
            raise ConfigError(
                "init eva looks at the rows of the run", where=INIT_OPTION, remedy="take the data class ChatData"
            )
        found = eva_directions(model, apply_capabilities(model, proven), config, steps)
        self.choose_trainable(model)
        set_directions(model, found)
        return model, apply_capabilities(model, proven)

    def load_weights(self, attention: str) -> PreTrainedModel:
        """Read the base, in fewer bits where that is asked for."""
        if self.quantization == "none":
            return super().load_weights(attention)
        device = self.trainer.strategy.root_device
        return load_quantized(self.pretrained, self.quantization, self.load_dtype(), attention, device)

    def load_dtype(self) -> torch.dtype:
        """Frozen weights need no more than the precision that is computed in, unless some train or are decomposed."""
        shifting = modifies_base(self.settings.init)
        dtype = super().load_dtype()
        if shifting and dtype != torch.float32:
            raise ConfigError(
                f"init {self.settings.init} takes a part out of the weights, which loses digits in bfloat16",
                where=INIT_OPTION,
                remedy="read the base in float32: precision bf16-mixed or 32-true, dtype auto or float32",
            )
        is_frozen = not self.settings.modules_to_save and not shifting
        is_bf16 = str(self.trainer.precision).startswith("bf16")
        return torch.bfloat16 if self.weights_dtype == "auto" and is_frozen and is_bf16 else dtype

    def summary_lines(self) -> list[str]:
        """Return what is adapted."""
        assert self.model is not None, "configure_model has run"
        assert self.adapter_config is not None, "so adapters are in place"
        begun = [f"       going on from {self.adapter}"] if self.adapter else []
        trained = list(self.adapter_config.modules_to_save or [])
        return describe_adapters(self.model, self.settings, trained) + begun

    def tensor_parallel_plan(self, name: str, layer: nn.Module, style: str) -> dict[str, str]:
        """Return which parts of a layer are cut under tensor parallelism, each with its style.

        An adapter computes ``B(A(x))``. Beside columns, ``B`` gives the columns of its rank, and every rank has all of
        ``A``. Beside rows, ``A`` takes the inputs of its rank and its short outputs are summed; every rank has all of
        ``B``.
        """
        if not isinstance(layer, LoraLayer):
            return super().tensor_parallel_plan(name, layer, style)
        cut = {"colwise": "lora_B", "rowwise": "lora_A"}.get(style)
        adapters = [] if cut is None else [f"{name}.{cut}.{adapter}" for adapter in getattr(layer, cut)]
        return {f"{name}.base_layer": style, **dict.fromkeys(adapters, style)}

    # ---- that it learns ----------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Begin to watch."""
        assert self.model is not None, "configure_model has run"
        self.update_check = AdapterUpdateCheck(self.model)
        self.update_check.check(self.trainer.optimizers)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Remember the weights before the first steps."""
        assert self.update_check is not None, "training has started"
        self.update_check.before_step(optimizer)

    def on_train_batch_end(self, outputs: object, batch: StepBatch, batch_idx: int) -> None:
        """See whether they have moved."""
        assert self.update_check is not None, "training has started"
        self.update_check.after_step(counts=batch.num_trained > 0 and not self.is_skipped)

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which base the adapters belong to: the base itself is not saved."""
        super().on_save_checkpoint(checkpoint)
        if self.update_check is not None:
            self.update_check.check(self.trainer.optimizers)
        checkpoint["base"] = self.base_hash

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse adapters of another base.

        Raises:
            ConfigError: The checkpoint's base is not this run's.
        """
        if checkpoint.get("base") != self.base_hash:
            raise ConfigError(
                f"the checkpoint's adapters belong to another model than {self.source}",
                where="model.init_args.model",
                remedy="resume with the model that they were trained on",
            )

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """Return what trains: frozen weights are read again from where they came."""
        return {name: tensor for name, tensor in super().checkpoint_state_dict().items() if tensor.requires_grad}

    def build_empty(self) -> None:
        """Read the base: what is written is compared with it."""
        self.model, _ = self.load_pretrained()

    def export(self, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the adapter, and check it by loading it into a fresh base.

        Raises:
            DeadAdapterError: Some layers have learnt, and others nothing at all.
            HubError: What was written does not answer as what was trained.
        """
        assert self.model is not None, "configure_model has run"
        assert self.adapter_config is not None, "so adapters are in place"
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
        """Write a plain model, in the dtype of the base on disk if None; return what of the change has survived."""
        kept = dtype or self.pretrained.stored_dtype
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent) as scratch:
            self.export(Path(scratch) / "adapter", tokenizer)
            return write_merged(target, Path(scratch) / "adapter", self.pretrained, tokenizer, kept)


def _check_alive(state: dict[str, Tensor]) -> None:
    """Refuse an adapter of which some layers have learnt and others nothing; untrained as a whole it may be."""
    ends = {name: bool(tensor.any()) for name, tensor in state.items() if ".lora_B." in name}
    alive = {group_of(name) for name, moved in ends.items() if moved}
    dead = [name for name in ends if group_of(name) not in alive]
    if dead and alive:
        raise DeadAdapterError("are zero after the training", dead, len(state))
