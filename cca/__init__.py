"""Condition Contrastive Alignment (arXiv 2410.09347): losses, trainer, sampler, evaluator."""

from cca.config import SampleRequest, TrainingConfig
from cca.distributed import Processes
from cca.losses import LOSSES, Loss, cca_loss, dpo_loss, unlearning_loss
from cca.sampling.sampler import Sampler
from cca.training.batch import Batch
from cca.training.trainer import Trainer
from models.log_likelihood import linear_sequence_logprob, sequence_logprob

__all__ = [
    "LOSSES",
    "Batch",
    "Loss",
    "Processes",
    "SampleRequest",
    "Sampler",
    "Trainer",
    "TrainingConfig",
    "cca_loss",
    "dpo_loss",
    "linear_sequence_logprob",
    "sequence_logprob",
    "unlearning_loss",
]
