"""AdamW on the slices that a step trained: one pass over their weights, moments and average."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import hydravit_kernels as kernels
from hydravit.model import HydraViT
from hydravit.training.memory import zeros_like
from hydravit.training.regions import Box, Region, Regions


class SliceAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) for a model with ``SliceGradients``, whose steps read and write the trained slice only.

    A step leaves weights, moments and averages outside the slice as they are. Dense AdamW, for which their gradient is
    zero, decays and moves them. Bias correction and ``ema_decay`` count, for every entry, only the steps that trained
    it, because only these moved its moments away from zero. Inside the slice ``native`` computes the bits of torch's
    ``AdamW(fused=True)``, except in the last elements of a parameter, which fill no whole vector and which torch rounds
    in another way.

    ``SliceGradients.zero_`` clears the gradients. Parameters that are frozen when the optimizer gets them are left out.
    A step that a ``GradScaler`` skips does not count. A CUDA graph cannot hold a step, because its numbers change from
    step to step.

    Args:
        params: parameters of ``model``, or groups of them, as for ``torch.optim.AdamW``; the options, such as ``lr``,
            may change from step to step.
        average: a copy of ``model``, in which the optimizer keeps the moving average of the model's weights. As in
            torch's ``AveragedModel`` the first step makes the two equal, and every step updates the weights first.
        ema_decay: the decay of the average; or a function from the number of earlier steps, at least 1, to the decay.
    Raises:
        ValueError: an option is out of range or not offered, a parameter is not the model's, or ``average`` does not
            fit.
        TypeError: ``average`` is no ``HydraViT``.
    """

    def __init__(
        self,
        params: Iterable,
        model: HydraViT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        average: HydraViT | None = None,
        ema_decay: float | Callable[[int], float] = 0.999,
    ):
        if average is not None and not isinstance(average, HydraViT):
            raise TypeError(f"average must be a copy of the model, not {type(average).__name__}")
        if not callable(ema_decay) and not 0.0 <= ema_decay <= 1.0:
            raise ValueError(f"ema_decay must be in [0, 1], not {ema_decay}")
        self.model, self.average, self.ema_decay = model, average, ema_decay
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._averages = {} if average is None else dict(average.named_parameters())
        self._parameters: dict[str, nn.Parameter] = {}
        self._groups: dict[str, int] = {}
        self._make_regions([])
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict) -> None:
        """Add a group as in torch. Its parameters begin with a first step of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_options(group)
        boxes = {}
        for parameter in group["params"]:
            name = self._names.get(parameter)
            if name is None:
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not one of the model's")
            if parameter.requires_grad:
                if self._averages:
                    _check_average(name, self._averages.get(name), parameter)
                self._parameters[name] = parameter
                self._groups[name] = len(self.param_groups) - 1
                self.state[parameter] = {key: zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                boxes[name] = [_whole(parameter)]
        self._make_regions([*self._regions.all, Region(boxes)])

    def _make_regions(self, found: list[Region]) -> None:
        self._regions = Regions(self.model.config, self._parameters, self._groups, found)

    # Steps ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Train what the forward passes since ``SliceGradients.zero_`` have read; return what ``closure`` returns.

        Raises:
            RuntimeError: the model has no gradients in place, or a gradient buffer was taken away.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self.model.slice_gradients
        if gradients is None:
            raise RuntimeError("the model has no gradients in place: make SliceGradients(model) and keep it open")
        by_age = self._regions.read_by(gradients.marked)
        buffers = []
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise RuntimeError(f"parameter {name!r} has no gradient in place: it was frozen for SliceGradients")
            buffers.append(parameter.grad)
        if not by_age:
            return loss
        options = [_options(group) for group in self.param_groups]
        decays = {age: self._average_decay(age) for age in by_age}
        states = [self.state[parameter] for parameter in self._parameters.values()]
        averages = [self._averages[name] for name in self._parameters] if self._averages else []
        kernels.adamw(
            list(self._parameters.values()),
            buffers,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            averages,
            self._regions.table(by_age.values()),
            [
                kernels.AdamWStep.at(age + 1, average_decay=decay, **numbers)
                for numbers in options
                for age, decay in decays.items()
            ],
            backend=self.model.backend,
        )
        for region in itertools.chain(*by_age.values()):
            region.age += 1
        torch.autograd.graph.increment_version([*self._parameters.values(), *averages])
        return loss

    def _average_decay(self, age: int) -> float:
        if not age:
            return 0.0  # the first step makes the average equal to the weights
        return self.ema_decay(age) if callable(self.ema_decay) else self.ema_decay

    # Saving and loading -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Return a state dict like that of ``torch.optim.AdamW``, in which ``"step"`` counts a parameter's steps.

        If a parameter's entries took part in different numbers of steps, ``"step"`` is an int64 tensor
        ``(boxes, 1 + 2 * axes)``. A row has the count, and then start and length per axis.
        """
        for name, parameter in self._parameters.items():
            self.state[parameter]["step"] = _pack_ages(name, self._regions.all)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a ``state_dict`` of this class or of ``torch.optim.AdamW``, with the same groups."""
        for group in state_dict["param_groups"]:
            _check_options(group)
        super().load_state_dict(state_dict)
        regions: dict[int, Region] = {}
        for name, parameter in self._parameters.items():
            state = self.state[parameter]  # empty if there was no step yet
            for key in ("exp_avg", "exp_avg_sq"):
                loaded = state.get(key, parameter.new_zeros(()).expand_as(parameter))
                if loaded.shape != parameter.shape:
                    raise ValueError(f"{key} of {name} has shape {tuple(loaded.shape)}, not {tuple(parameter.shape)}")
                state[key] = torch.empty_like(parameter).copy_(loaded)  # in the parameter's strides
            for age, box in _unpack_ages(
                parameter, state.get("step", torch.zeros((), dtype=torch.float32, device="cpu"))
            ):
                regions.setdefault(age, Region({}, age=age)).boxes.setdefault(name, []).append(box)
        self._make_regions(list(regions.values()))

    def __getstate__(self):
        raise TypeError("SliceAdamW belongs to its model and is not copied; save and load its state_dict()")


def _options(group: dict) -> dict:
    """Return a group's numbers as floats: ``lr`` may be a tensor."""
    options = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
    return {**options, "betas": tuple(map(float, group["betas"]))}


def _check_options(group: dict) -> None:
    missing = {"lr", "betas", "eps", "weight_decay"} - group.keys()
    if missing:
        raise ValueError(f"a parameter group of AdamW has {', '.join(sorted(missing))}, this one has not")
    options = _options(group)
    for name in ("lr", "eps", "weight_decay"):
        if not options[name] >= 0.0:
            raise ValueError(f"{name} must be at least 0, not {options[name]}")
    if not all(0.0 <= beta < 1.0 for beta in options["betas"]):
        raise ValueError(f"betas must be in [0, 1), not {options['betas']}")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"SliceAdamW does not offer {name}")


def _check_average(name: str, average: Tensor | None, parameter: Tensor) -> None:
    if average is parameter:
        raise ValueError(f"average: its {name} is the model's own; it must be a copy")
    kind = None if average is None else (average.shape, average.stride(), average.dtype, average.device)
    if kind != (parameter.shape, parameter.stride(), parameter.dtype, parameter.device):
        raise ValueError(f"average: its {name} does not have the shape, strides, dtype and device of the model's")


def _whole(parameter: Tensor) -> Box:
    return tuple((0, size) for size in parameter.shape)


def _pack_ages(name: str, regions: Iterable[Region]) -> Tensor:
    found = [(region.age, box) for region in regions for box in region.boxes.get(name, ())]
    if len({age for age, _ in found}) == 1:
        return torch.tensor(float(found[0][0]), dtype=torch.float32, device="cpu")
    rows = [(age, *(number for interval in box for number in interval)) for age, box in found]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _unpack_ages(parameter: Tensor, step: Tensor) -> list[tuple[int, Box]]:
    if step.dim() == 0:
        return [(int(step), _whole(parameter))]
    return [(age, tuple(zip(box[::2], box[1::2], strict=True))) for age, *box in step.long().tolist()]
