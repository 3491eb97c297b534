"""The base class of all methods: one training step, one optimizer, one validation, one export.

A method is a subclass. It decides what trains (`choose_trainable`) and overrides only what else differs from training
the whole model. ``docs/methods.md`` lists the hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from lightning_hub.checkpoints.export import write_export
from lightning_hub.config.bounds import Bounds
from lightning_hub.config.rules import refuse, warmup_fault
from lightning_hub.errors import ConfigError
from lightning_hub.methods.neftune import Neftune
from lightning_hub.methods.nonfinite import NonFiniteGuard
from lightning_hub.methods.run_context import current_run
from lightning_hub.methods.schedule import Schedule, ScheduleName
from lightning_hub.models.generation import Messages, complete
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.attention_proof import apply_capabilities, prove_attention
from lightning_hub.ops.batch import IGNORE_INDEX, PackedSequence, StepBatch
from lightning_hub.ops.loss import CausalLMLoss, ModelCapabilities
from lightning_hub.parallel.clipping import clip_grad_norm, clip_grad_value, total_norm
from lightning_hub.parallel.data_parallel import data_parallel, no_gradient_sync
from lightning_hub.parallel.dtensor import full_state_dict, group_by_mesh
from lightning_hub.parallel.lightning_internals import trainer_of
from lightning_hub.parallel.materialize import load_and_shard

Dtype = Literal["auto", "float32", "bfloat16"]


class CausalLMModule(LightningModule):
    """Base class of the methods: fine-tunes a causal language model.

    Args:
        model: Local folder or hub id of the model to train.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay of matrices; norms and biases are never decayed.
        betas: Decay rates of AdamW's two moments.
        eps: Added to AdamW's denominator.
        lr_scheduler: constant, linear, cosine, or wsd (warm up, stay, fall in the last tenth).
        warmup_steps: Number of steps in which the learning rate rises from 0.
        warmup_ratio: The same as a share of all steps; give one of the two only.
        min_lr_ratio: Learning rate at the end as a share of the peak.
        attn_implementation: auto attends inside each packed document with the fastest exact kernel of the device;
            sdpa, eager, flash_attention_2 and flex_attention are those of transformers.
        gradient_checkpointing: Recompute activations in the backward: less memory, about a third more compute.
        label_smoothing: Share of each target that is spread over the vocabulary.
        neftune_alpha: Strength of the noise on the embeddings during training (NEFTune); null for no noise.
        dtype: dtype of the trained weights. auto: the dtype of precision bf16-true or 16-true, else float32.
        on_nan: What to do when the loss or gradient of a step is NaN or infinite on any rank: stop, or skip:n to
            skip up to n such steps.
    """

    fixed_on_resume: ClassVar[tuple[str, ...]] = ()
    """Options that the tensors of a checkpoint depend on: a resumed run must have the same values."""

    def __init__(
        self,
        model: str,
        learning_rate: Annotated[float, Bounds("> 0")] = 1e-5,
        weight_decay: Annotated[float, Bounds(">= 0")] = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: Annotated[float, Bounds("> 0")] = 1e-8,
        lr_scheduler: ScheduleName = "cosine",
        warmup_steps: Annotated[int, Bounds(">= 0")] = 0,
        warmup_ratio: Annotated[float, Bounds(">= 0, <= 1")] = 0.0,
        min_lr_ratio: Annotated[float, Bounds(">= 0, <= 1")] = 0.0,
        attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto",
        gradient_checkpointing: bool = False,
        label_smoothing: Annotated[float, Bounds(">= 0, < 1")] = 0.0,
        neftune_alpha: Annotated[float, Bounds(">= 0")] | None = None,
        dtype: Dtype = "auto",
        on_nan: str = "stop",
    ) -> None:
        super().__init__()
        refuse(warmup_fault(warmup_steps, warmup_ratio))
        self.source = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.lr_scheduler: ScheduleName = lr_scheduler
        self.warmup_steps = warmup_steps
        self.warmup_ratio = warmup_ratio
        self.min_lr_ratio = min_lr_ratio
        self.attn_implementation = PACKED if attn_implementation == "auto" else attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.label_smoothing = label_smoothing
        self.neftune_alpha = neftune_alpha
        self.weights_dtype: Dtype = dtype
        self.run = current_run()
        self.model: PreTrainedModel | None = None
        self.loss_head: CausalLMLoss | None = None
        self.step_loss = torch.zeros(())
        self.grad_norm = torch.zeros(())
        self.nonfinite_guard = NonFiniteGuard(on_nan)
        self.is_skipped = False
        self._has_trained = False
        self._sums = torch.zeros(2, dtype=torch.float64)

    # ---- set-up ----------------------------------------------------------------------------------------------------

    @property
    def pretrained(self) -> Pretrained:
        """The model as it is stored on disk or on the hub."""
        return Pretrained(self.source, self.run.trust_remote_code)

    def _data(self) -> object:
        """Return the data module of the trainer; None if the trainer gets its data in another way."""
        return getattr(trainer_of(self), "datamodule", None)

    def configure_model(self) -> None:
        """Read the weights and decide what is trainable (Lightning calls this once it knows the strategy)."""
        if self.model is not None:
            return
        self.model, capabilities = load_and_shard(self.trainer.strategy, self.load_pretrained, self.build_on_meta)
        self.model.train()
        if self.gradient_checkpointing:
            # The name changed within the versions of transformers that are supported.
            newer = getattr(self.model, "activation_checkpointing_enable", None)
            enable = self.model.gradient_checkpointing_enable if newer is None else newer
            enable({"use_reentrant": False})
        if self.neftune_alpha is not None:
            Neftune(self.neftune_alpha).attach(self.model)
        self.loss_head = CausalLMLoss(self.model, self.label_smoothing, capabilities=capabilities)

    @property
    def num_parameters(self) -> int:
        """The number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def summary_lines(self) -> list[str]:
        """Return lines about what trains, for the summary at the start of a run; a method adds its own."""
        return []

    def build_empty(self) -> None:
        """Build the model in memory without reading its weights; the caller loads them afterwards."""
        with no_init_weights():
            self.model = self.build_on_meta(None)
        self.model.tie_weights()  # no_init_weights skips this

    def load_pretrained(self) -> tuple[PreTrainedModel, ModelCapabilities]:
        """Load the weights, choose what trains, and return the model with its capabilities."""
        proven = self.proven_capabilities()
        model = self.load_weights(proven.attention)
        self.choose_trainable(model)
        return model, apply_capabilities(model, proven)

    def proven_capabilities(self) -> ModelCapabilities:
        """Find out how the model can run, with a miniature, before its weights are read.

        So a model that fails a proof fails before minutes of reading.
        """
        with torch.device("meta"):
            outline = self.pretrained.skeleton(dtype=torch.float32, attn_implementation="eager")
        self.pretrained.check_part(outline.config)
        return prove_attention(
            type(outline), outline.config, self.attn_implementation, self.trainer.strategy.root_device
        )

    def load_weights(self, attention: str) -> PreTrainedModel:
        """Load the weights with an attention implementation of transformers; this does not choose what trains."""
        return self.pretrained.load(dtype=self.load_dtype(), attn_implementation=attention)

    def build_on_meta(self, capabilities: ModelCapabilities | None) -> PreTrainedModel:
        """Build the model without its weights; ``capabilities`` is None if the model will not run."""
        attention = "eager" if capabilities is None else capabilities.attention
        model = self.pretrained.skeleton(dtype=self.load_dtype(), attn_implementation=attention)
        self.choose_trainable(model)
        return model

    def choose_trainable(self, model: PreTrainedModel) -> None:
        """Set ``requires_grad`` of every parameter, and add what the method trains. Every method defines this."""
        raise ConfigError(
            f"{type(self).__name__} does not say what trains",
            where="model.class_path",
            remedy="name a method, or define choose_trainable in the class",
        )

    def load_dtype(self) -> torch.dtype:
        """Return the dtype in which weights are loaded."""
        if self.weights_dtype == "auto":
            halves = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
            return halves.get(str(self.trainer.precision), torch.float32)
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.weights_dtype]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, but keep every dtype: each weight was loaded in its right dtype.

        In half precision the trainer would cast the complete module. Rotary frequencies would lose precision, and the
        adapters and deltas of a bfloat16 model, which train in float32, would become bfloat16.
        """
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                return super().to(value.device)
            if isinstance(value, str | int | torch.device) and not isinstance(value, bool):
                return super().to(value)
        return self

    def tensor_parallel_plan(self, name: str, layer: nn.Module, style: str) -> dict[str, str]:
        """Return which modules of a layer are sharded under tensor parallelism, each with its style.

        Args:
            name: The layer's name in the model.
            layer: The layer, or what the method has put in its place.
            style: The style of the model's own plan: ``colwise``, ``rowwise`` and others.
        """
        return {name: style}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer: matrices with weight decay, all others without.

        The biases of all experts are one tensor with two dims, so biases are recognised by their name as well.
        """
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                if parameter.ndim > 1 and not name.endswith("bias"):
                    matrices.append(parameter)
                else:
                    vectors.append(parameter)
        return [
            {"params": parameters, "weight_decay": decay}
            for kind, decay in ((matrices, self.weight_decay), (vectors, 0.0))
            for parameters in group_by_mesh(kind)
        ]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW over the trainable parameters; the learning rate depends only on the step."""
        optimizer = AdamW(self.parameter_groups(), lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True)
        total = self.trainer.estimated_stepping_batches
        warmup = self.warmup_steps or round(self.warmup_ratio * total if self.warmup_ratio else 0)
        schedule = Schedule(self.lr_scheduler, warmup, total, self.min_lr_ratio)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step", "name": "lr"},
        }

    # ---- the step --------------------------------------------------------------------------------------------------

    def training_step(self, step: StepBatch, index: int) -> Tensor:
        """Run the micro-batches of one optimizer step; Lightning calls the backward of the last one.

        A micro-batch is one packed row. The gradient is that of the mean loss over all trained tokens of the step,
        over all packed rows and ranks. It is exact for any packing, accumulation and number of ranks, also in a last
        partial step.
        """
        self.trainer.optimizers[0].zero_grad()
        total = torch.zeros((), dtype=torch.float32, device=self.device)  # float32 also in half precision
        with no_gradient_sync(self.trainer.strategy):
            for row in step.rows[:-1]:
                loss = self.row_loss(row, step)
                self.trainer.strategy.backward(loss, None)
                total += loss.detach()
        loss = self.row_loss(step.rows[-1], step)
        self.step_loss = total + loss.detach()
        return loss

    def row_loss(self, row: PackedSequence, step: StepBatch) -> Tensor:
        """Return the share of one packed row in the loss of the step, a float32 scalar.

        The factor of the data-parallel size is there because ranks average their gradients.
        """
        assert self.loss_head is not None, "configure_model has run"
        return self.loss_head(row) * (data_parallel(self.trainer.strategy).size / max(1, step.num_trained))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Do nothing: the training step clears the gradients itself.

        Lightning calls this between the forward and the backward of the last packed row, when the gradients of the
        other packed rows are already there.
        """

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients as the trainer asks, and skip a step whose loss or gradient is not finite."""
        trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
        parameters = [parameter for parameter in trained if parameter.grad is not None]
        by_norm = gradient_clip_val if gradient_clip_algorithm != "value" else None
        self.grad_norm = clip_grad_norm(parameters, by_norm) if by_norm else total_norm(parameters)
        if gradient_clip_val and not by_norm:
            clip_grad_value(parameters, gradient_clip_val)
        self.step_loss = data_parallel(self.trainer.strategy).mean(self.step_loss)
        self.is_skipped = not self.nonfinite_guard.check(self.trainer.global_step + 1, self.step_loss, self.grad_norm)
        if self.is_skipped:
            optimizer.zero_grad()  # without gradients the optimizer moves nothing, weight decay included

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Check the steps that were not checked yet, before anything is saved."""
        self.nonfinite_guard.flush()

    def on_train_end(self) -> None:
        """Check the last step; every callback has finished by now."""
        self.nonfinite_guard.flush()
        if self.run.stays_on_device:
            self.trainer.strategy.optimizers = []
            self._has_trained = True

    def cpu(self) -> Self:
        """Move to the host; do nothing at the end of a training that leaves the weights on their device."""
        return self if self._has_trained else super().cpu()

    # ---- validation and generation ---------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Set the two sums of the validation loss to 0: sum of losses, number of trained tokens."""
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, step: StepBatch, index: int) -> None:
        """Add the packed rows of this rank to the two sums."""
        assert self.loss_head is not None, "configure_model has run"
        for row in step.rows:
            self._sums[0] += self.loss_head(row).detach()
            self._sums[1] += (row.labels != IGNORE_INDEX).sum()

    def on_validation_epoch_end(self) -> None:
        """Log the loss per trained token over the whole validation set: one division, over all ranks."""
        self.log("val_loss", self._mean_loss(), logger=False)

    test_step = validation_step

    def on_test_epoch_start(self) -> None:
        """Do the same as for validation."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """Do the same as for validation, under the name ``test_loss``."""
        self.log("test_loss", self._mean_loss(), logger=False)

    def _mean_loss(self) -> float:
        total, count = data_parallel(self.trainer.strategy).sum(self._sums).tolist()
        return float(total / max(1.0, count))

    def predict_step(self, prompts: list[Messages], index: int) -> list[str]:
        """Generate the answers to a batch of prompts."""
        return self.generate(prompts, self.pretrained.tokenizer)

    def generate(
        self,
        prompts: Sequence[Messages],
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
    ) -> list[str]:
        """Generate answers with the current weights; every rank must call this."""
        assert self.model is not None, "configure_model has run"
        return complete(self.model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """Return the live tensors of a checkpoint; a tied tensor is listed under each of its names."""
        state: dict[str, Tensor] = self.state_dict(keep_vars=True)
        return state

    def export(self, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the result to a folder and check it; every rank must call this, and rank 0 writes."""
        model, weights = self.export_state()
        if weights:
            write_export(target, model, weights, tokenizer)

    def export_merged(self, target: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None) -> str:
        """Merge an export that needs a base model into a plain model; the base class exports a plain model already.

        Raises:
            ConfigError: There is nothing to merge.
        """
        raise ConfigError(
            f"a run of {type(self).__name__} has nothing to merge",
            where="--merge",
            remedy="its export is a plain model folder already",
        )

    def export_state(self) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """Return the model to export and its full weights, so that an exporter does not depend on the method.

        Every rank must call this; rank 0 gets the weights, the others none.
        """
        assert self.model is not None, "configure_model has run"
        return self.model, full_state_dict(self.model)
