"""Training of all widths at once: a sampled width per step, gradients in place, exact resuming."""

from hydravit.training.adamw import SliceAdamW
from hydravit.training.batches import Batches
from hydravit.training.data import load_held_out, load_training, make_mix
from hydravit.training.gradients import LiveSlices, SliceGradients
from hydravit.training.model import make_model
from hydravit.training.optimization import make_average, make_optimizer, make_scheduler
from hydravit.training.resuming import load_state, save_state
from hydravit.training.sampler import WidthSampler
from hydravit.training.trainer import Interrupted, Trainer

__all__ = [
    "Batches",
    "Interrupted",
    "LiveSlices",
    "SliceAdamW",
    "SliceGradients",
    "Trainer",
    "WidthSampler",
    "load_held_out",
    "load_state",
    "load_training",
    "make_average",
    "make_mix",
    "make_model",
    "make_optimizer",
    "make_scheduler",
    "save_state",
]
