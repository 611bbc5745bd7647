"""Which modules of a model have to run themselves, because somebody could tell if a fused op took their place.

A module can be replaced, wrapped, patched, hooked or parametrized. Fused ops call no module: they stand for the modules
that ``layers.py`` made. ``Structure`` looks at all modules once, and a call only at what may have changed since.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from hydravit import layers
from hydravit_kernels import exporting, named_specs, sizes

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_hooks_of = operator.itemgetter(*_HOOKS)
_ON_ALL_MODULES = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]

# The modules for which the fused ops stand, by their names inside a block or the model.
_BLOCK: dict[str, tuple[type[nn.Module], ...]] = {
    "norm1": (layers.LayerNorm,),
    "attn": (layers.Attention,),
    "attn.qkv": (layers.Linear,),
    "attn.attn_drop": (nn.Identity,),
    "attn.proj": (layers.Linear,),
    "ls1": (layers.LayerScale, nn.Identity),
    "drop_path1": (layers.DropPath,),
    "norm2": (layers.LayerNorm,),
    "mlp": (layers.Mlp,),
    "mlp.fc1": (layers.Linear,),
    "mlp.act": (layers.GELU,),
    "mlp.fc2": (layers.Linear,),
    "ls2": (layers.LayerScale, nn.Identity),
    "drop_path2": (layers.DropPath,),
}
_STEM: dict[str, tuple[type[nn.Module], ...]] = {
    "patch_embed": (layers.PatchEmbed,),
    "patch_embed.proj": (layers.Conv2d,),
    "norm_pre": (layers.LayerNorm,),
}
_HEAD: dict[str, tuple[type[nn.Module], ...]] = {
    "norm": (layers.LayerNorm,),
    "fc_norm": (layers.LayerNorm,),
    "head": (layers.Linear, layers.Classifiers, nn.Identity),
    "head_dist": (layers.Linear, nn.Identity),
}
# Parameters of a distilled model that are as large as another.
_OF_DISTILLATION = {
    "reg_token": "dist_token",
    "head.weight": "head_dist.weight",
    "head.bias": "head_dist.bias",
}
_WITHOUT_WEIGHTS = {nn.Identity, layers.GELU, layers.DropPath}
# What these modules ran when this file was loaded: somebody may patch the class later.
_KINDS = {kind for table in (_BLOCK, _STEM, _HEAD) for kinds in table.values() for kind in kinds} | {layers.Block}
_FORWARDS = {kind: kind.forward for kind in _KINDS}
# Names under which timm's ViT runs a module and this model runs none.
_NOT_RUN = ("pos_drop", "patch_drop", "head_drop", "norm_pre", "norm", "fc_norm", "attn_pool")
_NOT_RUN_IN_PARTS = {
    layers.PatchEmbed: ("norm",),
    layers.Attention: ("q_norm", "k_norm", "norm", "proj_drop"),
    layers.Mlp: ("drop1", "norm", "drop2"),
}
# Plain layers of torch that somebody put in the place of ours, which compute the same and can be cut.
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: layers.Linear,
    nn.LayerNorm: layers.LayerNorm,
    nn.Conv2d: layers.Conv2d,
    nn.GELU: layers.GELU,
}


class Fused(NamedTuple):
    """What a call may run by fused ops.

    Attributes:
        stem, blocks, head: whether nobody could tell that the modules inside this part do not run.
        full_only: why calls can only have the full width, or "".
        unpackable: why no network of packed weights can stand for the model, or "".
        hooked: the blocks that have hooks of their own, which see what goes in and comes out.
        forward: whether the model's ``forward_features`` and ``forward_head`` are our own.
    """

    stem: bool
    blocks: tuple[bool, ...]
    head: bool
    full_only: str
    unpackable: str
    hooked: tuple[int, ...]
    forward: bool


class Structure:
    """The modules of a model at one moment.

    Args:
        model: a ``HydraViT``.
        methods: its own methods, by name, in whose place fused ops may run too.
    """

    def __init__(self, model: nn.Module, methods: Mapping[str, Callable]):
        self._model, self._methods = model, methods
        self._modules = list(model.modules())
        self._attributes = [module.__dict__ for module in self._modules]
        self._norms = [module for module in self._modules if isinstance(module, nn.LayerNorm)]
        children, parameters = ([own[name] for own in self._attributes] for name in ("_modules", "_parameters"))
        self._empty = [table for table in (*children, *parameters) if not table]
        self._children = [table for table in children if table]
        self._parameters = [table for table in parameters if table]
        self._handles, self._hooks = RemovableHandle.next_id, self._hooks_now()
        self._state = self._now()
        self.fused = _look(model, self._replaced())

    def holds(self) -> bool:
        """Whether the model still has these modules, with hooks, patches and classes as they were."""
        return not any(self._empty) and self._state == self._now() and self._same_hooks()

    def parameters(self) -> list[Tensor | None]:
        return [*itertools.chain.from_iterable(map(dict.values, self._parameters))]

    def _now(self) -> tuple[Any, ...]:
        return (
            [*map(type, self._modules)],
            [*map(dict.get, self._attributes, itertools.repeat("forward"))],
            [*itertools.chain.from_iterable(map(dict.values, self._children))],
            [*map(type, self.parameters())],
            [norm.eps for norm in self._norms],
            [kind.forward for kind in _FORWARDS],
            self._replaced(),
            _watched(),
        )

    def _same_hooks(self) -> bool:
        """Whether the same modules have hooks.

        Every registration of a hook takes a number. Without a new number no module has got its first hook: to look into
        all tables takes as long as everything else that ``holds`` does.
        """
        handles = RemovableHandle.next_id
        if handles == self._handles and not any(self._hooks):
            return True
        if self._hooks != self._hooks_now():
            return False
        self._handles = handles
        return True

    def _hooks_now(self) -> list[bool]:
        # Tables are looked up anew, because code that removes all hooks of a module gives it new ones.
        return [*map(bool, itertools.chain.from_iterable(map(_hooks_of, self._attributes[1:])))]

    def _replaced(self) -> list[str]:
        """The names of methods that a subclass overrides, or that somebody patched."""
        kind, own = type(self._model), self._model.__dict__
        return [name for name, method in self._methods.items() if name in own or getattr(kind, name) is not method]


def _watched() -> bool:
    """Whether a hook on all modules sees what goes through them.

    torch's ``ModuleTracker``, by which FLOP counters tell modules apart, sees their names only.
    """
    return any(_ON_ALL_MODULES) and any(
        type(getattr(hook, "__self__", None)).__name__ != "ModuleTracker"
        for hooks in _ON_ALL_MODULES
        for hook in hooks.values()
    )


def _look(model: Any, replaced: list[str]) -> Fused:
    """Find out what of a model fused ops may stand for."""
    _refuse_unused(model)
    if not exporting():  # the question would be recorded
        _refuse_other_shapes(model)
    config = model.config
    told: dict[str, list[str]] = {}  # part -> what is told to whom
    full_only = ""
    everywhere = "a hook on all modules" if _watched() else ""
    for part, name, module, expected in _places(model):
        reason = everywhere or _stranger(name, module, expected, config.norm_eps)
        if reason:
            told.setdefault(part, []).append(reason)
        if not full_only and not _serves_widths(module, expected, config):
            what = "has a patched forward" if "forward" in module.__dict__ else f"is {_article(module)}"
            full_only = f"{name} {what}, which knows nothing of widths; " + (
                "give it one parameter for all channels, or let forward take the keyword argument s, the call's slice"
                if _WITHOUT_WEIGHTS.issuperset(expected)
                else "parametrize its weights instead (torch.nn.utils.parametrize), or let forward take the keyword "
                "arguments that ours takes"
            )
    if not config.pooling_is_fused:
        told.setdefault("head", []).append(f"pool={config.pool!r} with {config.final_norm} has no fused op")
    if config.pre_norm:
        told.setdefault("stem", ["norm_pre comes before the blocks"])
    count = len(model.blocks)
    blocks = tuple(f"blocks.{i}" not in told for i in range(count))
    unpackable = next((reasons[0] for reasons in told.values()), "")
    if not unpackable:
        unpackable = next(
            (f"{name} is parametrized" for name, module in model.named_modules() if is_parametrized(module)), ""
        )
    hooked = tuple(i for i, block in enumerate(model.blocks) if any(getattr(block, name) for name in _HOOKS))
    if not unpackable and hooked:
        unpackable = f"blocks.{hooked[0]} has a hook"
    if not unpackable and replaced:
        unpackable = f"{replaced[0]} is not the model's own"
    if not unpackable and config.distilled:
        unpackable = "head_dist is a second classifier, which packed networks do not have"
    if not unpackable and count != config.depth:
        unpackable = f"the model has {count} blocks, its config {config.depth}"
    return Fused("stem" not in told, blocks, "head" not in told, full_only, unpackable, hooked, not replaced)


def _places(model: Any) -> Iterator[tuple[str, str, nn.Module, tuple[type[nn.Module], ...]]]:
    """Every place of a module: its part, its name, who is there and who is expected."""
    for part, table in (("stem", _STEM), ("head", _HEAD)):
        for name, expected in table.items():
            module = _find(model, name)
            if module is not None:
                yield part, name, module, expected
    for i, block in enumerate(model.blocks):
        yield f"blocks.{i}", f"blocks.{i}", block, (layers.Block,)
        for name, expected in _BLOCK.items() if isinstance(block, layers.Block) else ():
            module = _find(block, name)
            if module is not None:
                yield f"blocks.{i}", f"blocks.{i}.{name}", module, expected


def _find(module: nn.Module, name: str) -> nn.Module | None:
    """Return a module by its name; None where it is missing, or is inside a foreign one."""
    found: Any = module
    for part in name.split("."):
        if found is not module and not isinstance(found, (layers.Attention, layers.Mlp, layers.PatchEmbed)):
            return None
        found = getattr(found, part, None)
    return found


def _stranger(name: str, module: nn.Module, expected: tuple[type[nn.Module], ...], eps: float) -> str:
    """Return why a fused op cannot stand for the module in this place, or ""."""
    own = _PLAIN.get(type(module))
    if own in expected and not (isinstance(module, nn.GELU) and module.approximate != "none"):
        module.__class__ = own
    if not isinstance(module, expected) or type(module).__call__ is not nn.Module.__call__:
        return f"{name} is {_article(module)}"
    if not any(type(module).forward is _FORWARDS[kind] for kind in expected):
        return f"{name} is {_article(module)} with another forward"
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return f"{name} approximates by {module.approximate}"
    if "forward" in module.__dict__:
        return f"{name} has a patched forward"
    if not isinstance(module, layers.Block) and any(getattr(module, hooks) for hooks in _HOOKS):
        return f"{name} has a hook"
    if isinstance(module, nn.LayerNorm) and module.eps != eps:
        return f"{name} has eps {module.eps}"
    if isinstance(module, nn.LayerNorm) and (module.weight is None or module.bias is None):
        return f"{name} has no weight or no bias"
    if isinstance(module, nn.Conv2d) and not _cuts_patches(module):
        return f"{name} does not cut images into patches side by side"
    plain = is_parametrized(module) or torch.compiler.is_compiling()  # torch.export has fake parameters
    for parameter in () if plain else module._parameters.values():
        if parameter is not None and type(parameter) not in (Tensor, nn.Parameter):
            return f"{name} has a parameter of type {type(parameter).__name__}"
    return ""


def _serves_widths(module: nn.Module, expected: tuple[type[nn.Module], ...], config: Any) -> bool:
    """Whether the module in this place can run at a narrower width."""
    of_ours = [m for m in module.modules() if isinstance(m, layers.SLICED)]
    own = {id(p) for m in of_ours for p in m.parameters()}
    if layers.takes_slices(module):
        # With **kwargs it hands the slice on to a module of ours, but has no use for it itself.
        return layers.names_slices(module) or all(id(p) in own for p in module.parameters())
    if all(math.prod(sizes(parameter)) == 1 for parameter in module.parameters()):
        return True  # there are none, or one for all channels
    # A wrapper of a block hands on the residual, whose channels tell the block its width if no two have as many.
    wraps_block = expected == (layers.Block,) and any(isinstance(m, layers.Block) for m in of_ours if m is not module)
    return wraps_block and layers.channels_tell_width(config)


def _cuts_patches(conv: nn.Conv2d) -> bool:
    plain = (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1)
    return plain and conv.stride == conv.kernel_size


def _refuse_unused(model: Any) -> None:
    """Raise ``ValueError`` for a module in a place where timm's ViT runs one and this model does not."""
    ours = {model.config.final_norm, *(["norm_pre"] if model.config.pre_norm else [])}
    places = [(name, getattr(model, name, None)) for name in _NOT_RUN if name not in ours]
    for name, module in model.named_modules():
        for slot in next((slots for kind, slots in _NOT_RUN_IN_PARTS.items() if isinstance(module, kind)), ()):
            places.append((f"{name}.{slot}", getattr(module, slot, None)))
    for name, module in places:
        idle = isinstance(module, nn.Dropout) and module.p == 0
        if isinstance(module, nn.Module) and not isinstance(module, nn.Identity) and not idle:
            raise ValueError(
                f"{name} is {_article(module)}, but this model runs no module there; wrap a neighbour of it"
            )


def _refuse_other_shapes(model: Any) -> None:
    """Raise ``RuntimeError`` for a parameter that has not the shape that the config demands."""
    full, parameters = model.config.sizes, dict(model.named_parameters())
    for name, spec, _ in named_specs(full.layers, model.config.final_norm):
        shape = tuple(full.axis(axis) for axis in spec.axes)
        separate = name.startswith("head.") and model.config.separate_classifiers
        for place in (name, _OF_DISTILLATION.get(name)):
            parameter = parameters.get(place)
            if parameter is not None and not separate and parameter.shape != shape:
                raise RuntimeError(f"{place}: shape {shape} expected, {tuple(parameter.shape)} given")


def _article(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
