"""A training loop of several widths per step, written from the papers on plain tensors."""

import pytest
import torch


def divergence(teacher, pupil):
    """KL(teacher || pupil) from the definition, a mean over the images."""
    p, q = teacher.detach().softmax(1), pupil.softmax(1)
    return (p * (p.log() - q.log())).sum(1).mean()


def cross_entropy(logits, target):
    """To probabilities, a mean over the images."""
    return -(target * logits.log_softmax(1)).sum(1).mean()


def loop(weights, drawn, losses_of, lr, decay):
    """AdamW on the sum of a step's losses, ``losses_of(weights, widths)``; ``drawn`` has the widths of every step.

    Returns the weights at the end and the losses of every step.
    """
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    undecayed = {name for name, w in weights.items() if w.ndim < 2 or name.endswith(("token", "embed"))}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    found = []
    for t, widths in enumerate(drawn, 1):
        losses = losses_of(weights, widths)
        found.append([loss.item() for loss in losses])
        gradients = torch.autograd.grad(sum(losses), list(weights.values()), allow_unused=True)
        with torch.no_grad():
            for (name, w), g in zip(weights.items(), gradients, strict=True):
                g = torch.zeros_like(w) if g is None else g
                m, v = moments[name]
                w -= 0 if name in undecayed else lr * decay * w
                m += 0.1 * (g - m)
                v += 0.001 * (g * g - v)
                w -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return weights, found


def thirty_steps(trainer):
    """Run the trainer; return the widths that every step drew and their losses."""
    drawn, found, draw, track = [], [], trainer._draw, trainer._track

    def note_drawn(count):
        drawn.append(draw(count))
        return drawn[-1]

    def note_losses(losses, widths):
        found.append([float(losses[widths == heads].mean()) for heads in drawn[-1]])
        track(losses, widths)

    trainer._draw, trainer._track = note_drawn, note_losses
    trainer.run()
    assert len(drawn) == 30
    return drawn, found


def assert_equal(model, found, weights, losses):
    """Losses to 1e-9, weights to 1e-9 of the largest of their tensor: the gradient of a key's bias is all rounding."""
    for ours, expected in zip(found, losses, strict=True):
        assert ours == pytest.approx(expected, rel=1e-9)
    for name, tensor in model.state_dict().items():
        expected = weights[name].detach()
        error = (tensor - expected).abs().max() / expected.abs().max()
        assert error <= 1e-9, f"{name}: relative error {error:.1e}"
