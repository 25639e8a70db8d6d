"""Condition Contrastive Alignment (arXiv 2410.09347): losses, trainer, sampler, evaluator."""

from cca.logprob import linear_sequence_logprob, sequence_logprob
from cca.losses import cca_loss, dpo_loss, unlearning_loss

__all__ = ["cca_loss", "dpo_loss", "linear_sequence_logprob", "sequence_logprob", "unlearning_loss"]
