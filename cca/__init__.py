"""Condition Contrastive Alignment (arXiv 2410.09347): losses, and the log-likelihoods that they compare."""

from cca.losses import LOSSES, Loss, cca_loss, dpo_loss, pair_labels, unlearning_loss
from models.log_likelihood import linear_sequence_logprob, sequence_logprob
from models.utils.files import VERSION as __version__

__all__ = [
    "LOSSES",
    "Loss",
    "__version__",
    "cca_loss",
    "dpo_loss",
    "linear_sequence_logprob",
    "pair_labels",
    "sequence_logprob",
    "unlearning_loss",
]
