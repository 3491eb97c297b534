"""The recorder: what a run writes while it trains, off the hot path."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_hub.callbacks.samples import GenerateSamples
from lightning_hub.errors import ExitCode, HubError
from lightning_hub.methods.sft import SFT
from lightning_hub.ops.rows import Step
from lightning_hub.runs.rank import RankWriter
from lightning_hub.runs.writer import RunWriter
