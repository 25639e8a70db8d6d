"""Condition Contrastive Alignment (arXiv 2410.09347): losses, trainer, sampler, evaluator."""

from cca.losses import cca_loss, dpo_loss, sequence_logprob, unlearning_loss

__all__ = ["cca_loss", "dpo_loss", "sequence_logprob", "unlearning_loss"]
