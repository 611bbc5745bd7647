"""What a step makes small: the loss of every image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hydravit.recipes import Recipe


class Loss:
    """Cross entropy to the targets and, if the recipe distils, a term to the teacher (DeiT, arXiv 2012.12877).

    With ``a = recipe.distillation_weight`` and ``t = recipe.temperature`` it is
    ``(1 - a) * cross_entropy(logits, targets) + a * term``. The term of "hard" is the cross entropy to the teacher's
    class. That of "soft" is ``t**2`` times the Kullback-Leibler divergence of the teacher's and the student's
    probabilities, both of logits divided by ``t``, in the sum over the classes, as in the paper. (DeiT's code divides
    by the number of classes too.) A distilled model learns the term with the classifier of its distillation token.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def transfer(self, logits: Tensor | tuple[Tensor, Tensor], targets: Tensor, wider: Tensor) -> Tensor:
        """Compute the losses ``(B,)`` of a width that a wider one of the same step teaches.

        They are the Kullback-Leibler divergence of both widths' probabilities, in the sum over the classes, and
        ``recipe.label_weight`` times the cross entropy to the targets.

        Args:
            logits, targets: those of ``__call__``.
            wider: the wider width's logits ``(B, classes)``; no gradient goes to them.
        """
        logits, pupil = _both(logits)
        ours, theirs = (F.log_softmax(each, dim=1) for each in (pupil, wider.detach().to(pupil.dtype)))
        loss = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
        if not self.recipe.label_weight:
            return loss
        return self.recipe.label_weight * self._to_labels(logits, targets) + loss

    def _to_labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.recipe.smoothing, reduction="none")

    def __call__(self, logits: Tensor | tuple[Tensor, Tensor], targets: Tensor, taught: Tensor | None = None) -> Tensor:
        """Compute the losses ``(B,)``, float32.

        Args:
            logits: ``(B, classes)``; or two of them, for the targets and for the teacher.
            targets: classes ``(B,)``, or their probabilities ``(B, classes)``.
            taught: the teacher's logits ``(B, classes)``; for distillation only.
        """
        recipe = self.recipe
        logits, pupil = _both(logits)
        loss = self._to_labels(logits, targets)
        if taught is None:
            return loss
        taught = taught.float()
        if recipe.distillation == "hard":
            term = F.cross_entropy(pupil, taught.argmax(1), reduction="none")
        else:
            t = recipe.temperature
            ours, theirs = (F.log_softmax(each / t, dim=1) for each in (pupil, taught))
            term = t**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
        return (1 - recipe.distillation_weight) * loss + recipe.distillation_weight * term


def pupil(logits: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return the logits that learn from a teacher, and teach: of a distilled model, those of the distillation token."""
    return logits[1] if isinstance(logits, tuple) else logits


def _both(logits: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits that learn from labels, and those that learn from a teacher, at least in float32."""
    first, second = logits if isinstance(logits, tuple) else (logits, logits)
    dtype = torch.promote_types(first.dtype, torch.float32)
    return first.to(dtype), second.to(dtype)
