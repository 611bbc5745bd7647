"""Other projects' ways to wrap, prefix and name the weights of a Vision Transformer; here they become timm's names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# Under these names training scripts keep the weights in a torch file. HydraViT's authors evaluate the moving average.
_AVERAGED, _LATEST = ("state_dict_ema", "model_ema"), ("state_dict", "model")
# Of DDP before every name; of torch.compile, FSDP and checkpointing before the names of any module.
_WRAPPERS = re.compile(r"^(module\.)+|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(module\.)?")
_ANCHOR = "patch_embed.proj.weight"  # every Vision Transformer has it, so what stands before it is a prefix
_PRETRAINING = re.compile(r"(mask_token$|decoder[._])")  # what MAE, SimMIM and DINOv2 use in pretraining only

# Names that tell arithmetic which the model does not have, and what an error calls it. A row goes when the model can.
_FOREIGN = {
    r"attn_pool\.": "attention pooling",
    r"patch_embed\.(backbone|norm|proj\.\d)": "a patch embedding that is more than one convolution",
    r"pre_logits\.": "a layer before the classifier (pre_logits)",
    r".*\battn\.(q_norm|k_norm)\.": "norms of queries and keys (qk_norm)",
    r".*\battn\.norm\.": "a norm in the attention (scale_attn_norm)",
    r".*\battn\.gate\.": "gated attention",
    r".*\battn\.(lambda_|sub_norm)": "differential attention",
    r".*\battn\.(q_bias|v_bias|k_bias)": "biases of queries and values alone (BEiT)",
    r".*\battn\.[qkv](_proj)?\.": "queries, keys and values as separate matrices",
    r".*(rel_pos|relative_position|rope)": "relative or rotary positions",
    r".*\bmlp\.(w1|w2|w3|w12|fc1_g|fc1_x)\.": "a gated MLP (SwiGLU)",
    r".*\bmlp\.norm\.": "a norm in the MLP (scale_mlp_norm)",
    r"blocks\.\d+\.(attns|ffns|in_proj|in_norm|attn_out_proj|mlp_out_proj|out_proj)\b": "parallel branches in a block",
}

# Names that tell whose Vision Transformer it is, where it is not timm's.
_LIBRARIES = {
    r"(^|\.)vision_model\.": "CLIP or SigLIP of Hugging Face's transformers",
    r"(^|\.)embeddings\.(cls_token|patch_embeddings|position_embeddings)": "a ViT of Hugging Face's transformers",
    r"(^|\.)encoder\.layer\.\d+\.attention\.": "a ViT of Hugging Face's transformers",
    r"(^|\.)visual\.(class_embedding|transformer\.resblocks\.)": "CLIP of OpenAI or OpenCLIP",
    r"(^|\.)encoder\.layers\.encoder_layer_\d+\.": "torchvision's VisionTransformer",
}


def refuse_other_libraries(names: Iterable[str]) -> None:
    """Raise ``ValueError`` if one of the names tells that they are of another library than timm."""
    for name in names:
        for pattern, words in _LIBRARIES.items():
            if re.search(pattern, name):
                raise ValueError(
                    f"these are weights of {words} ({name}, ...), expected names as in timm: take the same model from "
                    "timm, checkpoint=timm.create_model(NAME, pretrained=True), or rename the weights"
                )


def reason(names: Iterable[str]) -> str:
    """Say which arithmetic, unlike the model's, the first telling one of these names belongs to; "" if none tells."""
    for name in names:
        for pattern, words in _FOREIGN.items():
            if re.match(pattern, name):
                return words
    return ""


def named_tensors(content: object, prefer_ema: bool = True, part: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of one model, without what a checkpoint wraps around them and puts before their names.

    Raises ``ValueError`` for anything but named tensors, and where several models are inside and ``part``, a key or
    a prefix of names such as ``"teacher"``, does not choose.
    """
    content, part = _unwrapped(content, prefer_ema, part)
    if not isinstance(content, Mapping) or not content:
        empty = " with nothing in it" if isinstance(content, Mapping) else ""
        raise ValueError(f"expected named tensors, found {type(content).__name__}{empty}")
    result: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            wrappers = ", ".join(_AVERAGED + _LATEST)
            raise ValueError(
                f"entry {name!r} is a {type(value).__name__}, not a tensor (weights may lie in {wrappers})"
            )
        _add(result, without_wrappers(str(name)), value)
    result.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    return _without_prefix(result, part)


def without_wrappers(name: str) -> str:
    """Return the name of a tensor or a module without those of DDP, torch.compile, FSDP and checkpointing."""
    return _WRAPPERS.sub("", f"{name}.").removesuffix(".")


def _unwrapped(content: object, prefer_ema: bool, part: str | None) -> tuple[object, str | None]:
    """Descend to the mapping that has the tensors; return it, and ``part`` unless it was a key on the way."""
    first, second = (_AVERAGED, _LATEST) if prefer_ema else (_LATEST, _AVERAGED)
    while isinstance(content, Mapping) and not _names_a_model(content):
        if part is not None and isinstance(content.get(part), Mapping):
            content, part = content[part], None
            continue
        models = [key for key, value in content.items() if isinstance(value, Mapping) and _holds_a_model(value)]
        wanted = [key for key in models if key in first] or [key for key in models if key in second]
        choice = wanted + [key for key in models if key not in first + second]
        if len(choice) > 1:
            problem = "it has the weights of several models" if part is None else f"there is no {part!r} in it"
            raise ValueError(f"{problem}; part= chooses one of {_quoted(choice)}")
        if not choice:  # no Vision Transformer: a later error says what lies under a usual name instead
            choice = [key for key in first + second if isinstance(content.get(key), Mapping)]
        if not choice:
            break
        content = content[choice[0]]
    return content, part


def _names_a_model(content: Mapping) -> bool:
    return any(isinstance(key, str) and key.endswith(_ANCHOR) for key in content)


def _holds_a_model(content: Mapping) -> bool:
    nested = (value for value in content.values() if isinstance(value, Mapping))
    return _names_a_model(content) or any(map(_holds_a_model, nested))


def _without_prefix(tensors: dict[str, Tensor], part: str | None) -> dict[str, Tensor]:
    """Remove what stands before the names of the one Vision Transformer among the tensors; other names stay."""
    prefixes = [name.removesuffix(_ANCHOR) for name in tensors if name.endswith(_ANCHOR)]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    chosen = [prefix for prefix in prefixes if part is None or part in prefix.split(".")]
    if part is not None and len(chosen) != 1 or len(chosen) > 1:
        problem = "it has the weights of several models" if chosen else f"there is no {part!r} in it"
        raise ValueError(f"{problem}; part= chooses one of {_quoted(p.rstrip('.') for p in prefixes)}")
    if chosen in ([], [""]):
        return tensors
    # The other models' tensors go, with what else stands under the first word of their prefixes.
    mine = chosen[0].split(".")[0]
    others = tuple(prefix.split(".")[0] + "." for prefix in prefixes if prefix.split(".")[0] not in ("", mine))
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(others):
            _add(result, name.removeprefix(chosen[0]), tensor)
    return result


def _add(result: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in result:
        raise ValueError(f"entry {name!r} occurs twice")
    result[name] = tensor


def plain_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under timm's names, without those of pretraining, and a message about each that is left out.

    * DeiT III's ``gamma_1`` is ``ls1.gamma``; DINOv2's ``blocks.<chunk>.<i>`` is ``blocks.<i>``.
    * DINOv2's ``register_tokens`` have no positions, only its class token has. Adding the latter's position to the
      token makes both alike, as timm does.
    * ``mask_token`` and the decoder of MAE are left out.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        _add(result, re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name), tensor)
    left_out = [name for name in result if _PRETRAINING.match(name)]
    for name in left_out:
        del result[name]
    if "register_tokens" in result:
        result["reg_token"] = result.pop("register_tokens")
        positions, token = result.get("pos_embed"), result.get("cls_token")
        if positions is not None and token is not None and positions.dim() == token.dim() == 3:
            result["cls_token"], result["pos_embed"] = token + positions[:, :1], positions[:, 1:]
    return result, [f"left out {some(left_out)}, which pretraining alone uses"] if left_out else []


def without_distillation(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors without the distillation token of a DeiT and its classifier, and the names of these."""
    names = [name for name in tensors if name == "dist_token" or name.startswith("head_dist.")]
    result = {name: tensor for name, tensor in tensors.items() if name not in names}
    if "dist_token" in tensors and "pos_embed" in tensors and tensors["pos_embed"].dim() == 3:
        positions = tensors["pos_embed"]
        result["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    return result, names


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
