"""AdamW on the active slice: weights, moments and average of what a step trained, read and written once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

import hydravit_kernels as kernels
from hydravit.model import HydraViT
from hydravit.training.memory import zeros_like
from hydravit.training.regions import Region, Regions
from hydravit_kernels import Subnetwork

# How many steps "exact" may owe before it makes up for all of them.
_HISTORY = 256


class SliceAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) for a model with ``SliceGradients``, whose steps read and write the trained slice only.

    ``mode`` says what becomes of weights, moments and averages outside the slice:

    * ``"exact"``: what dense AdamW makes of them, whose gradients are zero there: decay, a move by the momentum, and
      decay of the moments. They get the steps they missed, one after the other with the numbers each had then, the next
      time anybody can look: before a forward pass of a width that reads them, or one without gradients in place,
      ``eval()``, ``state_dict()``, copying, pickling and extraction. Whoever reads or writes parameters in another
      way, or runs a compiled model, calls ``flush()`` before. The bits are those of steps on everything, on every
      backend; on ``native`` they are also those of torch's ``AdamW(fused=True)``, but for what lies beyond a
      parameter's last whole vectors, which torch rounds in another way. A step that a ``GradScaler`` skips is no step.
      The state of the optimizer fits ``torch.optim.AdamW``, and the reverse. Work is put off here, and not saved.
    * ``"active"``: they rest. Bias correction, and ``ema_decay``, count the steps an entry took part in and no others:
      moments that rested are still as near to zero, where they began, as those steps left them.

    Gradients are cleared by ``SliceGradients.zero_``. Parameters that are frozen now are left out. A model has one such
    optimizer at a time: a new one takes over. Every step is decided anew, so no CUDA graph can hold one.

    Args:
        params: parameters of ``model``, or groups of them, as for ``torch.optim.AdamW``; the options, ``lr`` above all,
            may change from step to step.
        average: a copy of ``model`` that the optimizer makes the moving average of its weights. As with torch's
            ``AveragedModel`` the first step makes it equal to them, and weights enter it after they moved.
        ema_decay: of the average; or a function of the number of steps before this one, at least 1, that gives it.
    Raises:
        ValueError: unknown mode, options out of range or not offered, parameters that are not the model's, an average
            that does not fit.
        TypeError: ``average`` is no ``HydraViT``.
    """

    def __init__(
        self,
        params: Iterable,
        model: HydraViT,
        *,
        mode: str = "exact",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        average: HydraViT | None = None,
        ema_decay: float | Callable[[int], float] = 0.999,
    ):
        if mode not in ("exact", "active"):
            raise ValueError(f"mode must be 'exact' or 'active', not {mode!r}")
        if average is not None and not isinstance(average, HydraViT):
            raise TypeError(f"average must be a copy of the model, not {type(average).__name__}")
        if not callable(ema_decay) and not 0.0 <= ema_decay <= 1.0:
            raise ValueError(f"ema_decay must be in [0, 1], not {ema_decay}")
        self.model, self.mode, self.average, self.ema_decay = model, mode, average, ema_decay
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._averages = {} if average is None else dict(average.named_parameters())
        self._parameters: dict[str, nn.Parameter] = {}
        self._groups: dict[str, int] = {}
        self._history: list[list[dict]] = []  # per step that some region still lacks, per group: the options
        self._done = 0  # steps since the optimizer was made or loaded
        self._make_regions([])
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for module in (model, average):
            if module is not None:
                if module.slice_optimizer is not None:
                    module.slice_optimizer.flush()
                module.slice_optimizer = self

    def add_param_group(self, param_group: dict) -> None:
        """As in torch. Parameters that come later begin with their own first step."""
        self.flush()  # the steps up to now are not those of the new group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_options(group)
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
        new = {name: [_whole(p)] for name, p in self._parameters.items() if p in set(group["params"])}
        self._make_regions([*self._regions.all, Region(new, self._done)])

    def _make_regions(self, found: list[Region]) -> None:
        self._regions = Regions(self.model.config, self._parameters, self._groups, found)

    # Steps ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of what the forward passes since ``SliceGradients.zero_`` read; returns what ``closure`` does.

        Raises:
            RuntimeError: the model has no gradients in place, a buffer was taken away, or another optimizer replaced
                this one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self.model.slice_gradients
        if gradients is None:
            raise RuntimeError("the model has no gradients in place: make SliceGradients(model) and keep it open")
        if self.model.slice_optimizer is not self:
            raise RuntimeError("the model has got another SliceAdamW since this one was made")
        trained, buffers = self._regions.read_by(gradients.marked), self._gradients()
        self._history.append([_options(group) for group in self.param_groups])
        self._done += 1
        self._advance(trained, buffers)
        if self.mode == "active":
            for region in self._regions.all:
                region.done = self._done
        self._forget_history()
        if len(self._history) > _HISTORY:
            self.flush()
        torch.autograd.graph.increment_version(self._parameters.values())
        return loss

    def catch_up(self, subnetworks: Iterable[Subnetwork] | None = None) -> None:
        """Give what these subnetworks read, or everything, the steps it missed. The model calls it in every forward."""
        if not self._history:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError("a compiled forward cannot make up for skipped steps: call SliceAdamW.flush() before it")
        self._advance(self._regions.all if subnetworks is None else self._regions.read_by(subnetworks), [])
        self._forget_history()

    def flush(self) -> None:
        """Give everything the steps it missed."""
        self.catch_up()

    def _advance(self, regions: Sequence[Region], gradients: list[Tensor]) -> None:
        """All steps that the regions lack, in one call; the last of them sees the gradients, if there are any."""
        alike: dict[tuple[int, int], list[Region]] = {}
        for region in regions:
            if region.done < self._done:
                alike.setdefault((region.done, region.age), []).append(region)
        if not alike:
            return
        programs = []
        for done, age in alike:
            lacking = self._history[len(self._history) - (self._done - done) :]
            for group in range(len(self.param_groups)):
                programs.append([self._numbers(options[group], age + i) for i, options in enumerate(lacking)])
        states = [self.state[parameter] for parameter in self._parameters.values()]
        kernels.adamw(
            list(self._parameters.values()),
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [self._averages[name] for name in self._parameters] if self._averages else [],
            self._regions.table(alike.values(), len(self.param_groups)),
            programs,
            backend=self.model.backend,
        )
        for members in alike.values():
            for region in members:
                region.age += self._done - region.done
                region.done = self._done

    def _numbers(self, options: dict, age: int) -> kernels.AdamWStep:
        decay = 0.0  # the first step makes the average equal to the weights
        if age:
            decay = self.ema_decay(age) if callable(self.ema_decay) else self.ema_decay
        return kernels.AdamWStep.at(age + 1, average_decay=decay, **options)

    def _gradients(self) -> list[Tensor]:
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise RuntimeError(f"parameter {name!r} has no gradient in place: it was frozen for SliceGradients")
        return [parameter.grad for parameter in self._parameters.values()]

    def _forget_history(self) -> None:
        oldest = min((region.done for region in self._regions.all), default=self._done)
        del self._history[: len(self._history) - (self._done - oldest)]

    # Saving and going on ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """As of ``torch.optim.AdamW``, of which ``"step"`` is the count of a parameter's steps.

        Where its entries differ in that, ``"step"`` is int64 ``(boxes, 1 + 2 * axes)``: a count, then per axis the
        first index and how many.
        """
        self.flush()
        for name, parameter in self._parameters.items():
            self.state[parameter]["step"] = _pack_ages(name, self._regions.all)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """From ``state_dict`` of this class or of ``torch.optim.AdamW``, with the same groups."""
        self.flush()
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
            for age, box in _unpack_ages(parameter, state.get("step", torch.zeros(()))):
                regions.setdefault(age, Region({}, age=age)).boxes.setdefault(name, []).append(box)
        self._done, self._history = 0, []
        self._make_regions(list(regions.values()))

    def __getstate__(self):
        raise TypeError("SliceAdamW belongs to its model and is not copied; save and load its state_dict()")


def _options(group: dict) -> dict:
    """A group's numbers as they are now: ``lr`` may be a tensor, and lists may be changed in place."""
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


def _whole(parameter: Tensor) -> tuple[tuple[int, int], ...]:
    return tuple((0, size) for size in parameter.shape)


def _pack_ages(name: str, regions: Iterable[Region]) -> Tensor:
    found = [(region.age, box) for region in regions for box in region.boxes.get(name, ())]
    if len({age for age, _ in found}) == 1:
        return torch.tensor(float(found[0][0]))
    return torch.tensor([(age, *(number for interval in box for number in interval)) for age, box in found])


def _unpack_ages(parameter: Tensor, step: Tensor) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    if step.dim() == 0:
        return [(int(step), _whole(parameter))]
    return [(age, tuple(zip(box[::2], box[1::2], strict=True))) for age, *box in step.long().tolist()]
