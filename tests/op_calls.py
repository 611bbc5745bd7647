"""One call of every op on small tensors."""

import blocks
import torch

from hydravit_kernels import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice


def calls(backend="native", device="cpu"):
    """Map every op's name to arguments for it, with every optional one."""
    full, batch, tokens, embed = 24, 3, 5, 16
    attention, mlp = AttentionSlice(4, embed, 2, 26, 50, 3, 2, 8, 8, 8, 0.3), MlpSlice(4, embed, 7, 30)
    stem, head = EmbedSlice(4, embed), HeadSlice(4, embed, 2, 6)
    images, x, scale = torch.randn(batch, 3, 4, 4), torch.randn(batch, tokens, embed), torch.rand(batch)
    index = torch.zeros(batch, dtype=torch.int64)
    of_stem = blocks.stem_parameters([stem], full, 3, (4, 4), reg=2, positions=4)
    of_attention = blocks.attention_parameters([attention], full, 3 * full, full)
    all_queries = blocks.attention_block(x, of_attention, scale, [attention], index)
    # Of fewer queries, what forward saves is in part nobody's business, and differs from call to call.
    few_queries = blocks.attention_block(x, of_attention, scale, [attention], index, queries=2)
    others = [
        blocks.stem_block(images, of_stem, [stem], index),
        blocks.mlp_block(x, blocks.mlp_parameters([mlp], full, 96), scale, [mlp], index),
        blocks.head_block(x, blocks.head_parameters([head], full, 10), (1, tokens), [head], index),
    ]
    found = {block.name: block.on(backend, device).arguments(save=True) for block in [all_queries, *others]}
    for block in [few_queries, *others]:
        y, *saved = block.on(backend, device).forward(save=True)
        found[f"{block.name}_backward"] = block.backward_arguments(torch.randn_like(y), saved, block.zeros())
    return found
