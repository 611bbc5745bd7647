"""One call of every op on small tensors."""

import torch


def calls(backend="native"):
    """Map every op's name to arguments for it, with every optional one."""
    d, embed, tokens, batch, full = 8, 16, 5, 3, 24
    attention, mlp = [4, embed, 2, 26, 50, 3, 2, d, d, d], [4, embed, 7, 30]
    x = torch.randn(batch, tokens, embed)
    norms = (torch.randn(full), torch.randn(full))
    scales = (torch.randn(full), torch.rand(batch))
    qkv = (torch.randn(3 * full, full), torch.randn(3 * full), torch.randn(full, full), torch.randn(full))
    fc = (torch.randn(96, full), torch.randn(96), torch.randn(full, 96), torch.randn(full))
    stem = (torch.randn(full, 3, 4, 4), torch.randn(full), *(torch.randn(1, n, full) for n in (1, 2, 4)))
    images, classifier = torch.randn(batch, 3, 4, 4), (torch.randn(10, full), torch.randn(10))
    one = torch.zeros(batch, dtype=torch.int64)

    def buffers(parameters):
        return tuple(torch.zeros_like(p) for p in parameters)

    def run(name, *arguments):
        return getattr(torch.ops.hydravit, f"{name}_{backend}")(*arguments)

    attention_inputs = (*norms, *qkv, *scales, attention, [0.3], 1e-6, one, 2)
    mlp_inputs = (*norms, *fc, *scales, mlp, 1e-6, one)
    head_inputs = (x, *norms, *classifier, 1, tokens, [4, embed, 2, 6], 1e-6, one)
    stem_inputs = (images, *stem[:4], torch.randn(1, 4, full), [4, embed], one)
    y, *attention_saved = run("attention_block", x, *attention_inputs, True)
    _, hidden = run("mlp_block", x, *mlp_inputs, True)
    return {
        "stem": stem_inputs,
        "stem_backward": (torch.randn(batch, 4, embed), *stem_inputs, True, *buffers(stem_inputs[1:6])),
        # All queries: with fewer, what is saved of the others is uninitialised and differs from call to call.
        "attention_block": (x, *attention_inputs[:-1], tokens, True),
        "attention_block_backward": (
            torch.randn_like(y), x, *attention_saved, *attention_inputs, True, *buffers((*norms, *qkv, scales[0])),
        ),
        "mlp_block": (x, *mlp_inputs, False),
        "mlp_block_backward": (torch.randn_like(x), x, hidden, *mlp_inputs, True, *buffers((*norms, *fc, scales[0]))),
        "head": head_inputs,
        "head_backward": (torch.randn(batch, 6), *head_inputs, True, *buffers((*norms, *classifier))),
    }  # fmt: skip
