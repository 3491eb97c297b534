"""The summary of a run before its first step: model, what trains, data, number of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning.pytorch import Callback, LightningModule, Trainer

if TYPE_CHECKING:
    from lightning_hub.data.datamodule import ChatData
    from lightning_hub.methods.causal_lm import CausalLMModule


class RunSummary(Callback):
    """Prints model, data and steps when training starts, on rank 0."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        if trainer.is_global_zero:
            data = cast("ChatData", trainer.datamodule)  # type: ignore[attr-defined]  # typed without one
            module = cast("CausalLMModule", pl_module)
            lines = [_model(module), *module.summary_lines(), *_kernels(module), *_data(data), _steps(trainer, data)]
            print("\n".join(lines), flush=True)


def _model(module: CausalLMModule) -> str:
    sizes = [(parameter.numel(), parameter.requires_grad, parameter.dtype) for parameter in module.parameters()]
    total, trained = module.num_parameters, sum(size for size, trains, _ in sizes if trains)
    dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for _, _, dtype in sizes}))
    share = "all trained" if trained == total else f"{trained:,} trained ({trained / total:.2%})"
    return f"model  {module.source}: {total:,} parameters, {share}, {dtypes}"


def _kernels(module: CausalLMModule) -> list[str]:
    """Return notes about properties of the model that make it slower than others."""
    assert module.loss_head is not None, "configure_model has run"
    capabilities = module.loss_head.capabilities
    notes = []
    if not capabilities.isolates_documents:
        notes.append(f"documents run one by one with {capabilities.attention}: {capabilities.reason}")
    if capabilities.max_document_length is not None:
        notes.append(
            f"packed rows with a document of more than {capabilities.max_document_length:,} tokens run one by one: "
            f"{capabilities.reason}"
        )
    if not capabilities.has_linear_head:
        notes.append("the model's head is more than one linear layer: the loss is computed from full logits")
    if capabilities.adds_to_loss:
        notes.append("the model's own loss has other terms than the cross-entropy of the next token: they are left out")
    return [f"note   {note}" for note in notes]


def _data(data: ChatData) -> list[str]:
    report = data.prepared.report
    layouts = ", ".join(f"{source}: {layout}" for source, layout in report.formats.items())
    fill = data.packing_report()["fill"]
    lines = [
        f"data   {layouts}",
        f"       {report.samples:,} samples, {report.tokens:,} tokens, {report.trained_share:.1%} of them trained; "
        f"packed rows of {data.batching.max_tokens:,} are {fill:.1%} full",
    ]
    notes = [f"examples dropped: {count:,} ({reason})" for reason, count in report.dropped.items() if count]
    if report.truncated:
        notes.append(f"samples truncated: {report.truncated:,}, tokens lost: {report.tokens_lost:,}")
    notes += [f"{note}: {count}" for note, count in report.notes.items()]
    return lines + [f"note   {note}" for note in notes]


def _steps(trainer: Trainer, data: ChatData) -> str:
    batching = data.batching
    size = f"{batching.effective_batch_size:,} samples" if batching.effective_batch_size else None
    size = size or f"{batching.tokens_per_step:,} token slots"
    total = trainer.estimated_stepping_batches
    known = f"{int(total):,} in all, " if total != float("inf") else ""
    return f"steps  {known}{len(data.plan):,} an epoch, {size} each"
