"""Training of all widths at once: a sampled width per step, gradients in place, exact resuming."""

from hydravit.training.adamw import SliceAdamW
from hydravit.training.batches import Batches
from hydravit.training.data import load_held_out, load_training, make_mix
from hydravit.training.gradients import LiveSlices, SliceGradients
from hydravit.training.losses import Loss
from hydravit.training.model import make_model
from hydravit.training.optimization import make_average, make_optimizer, make_scheduler
from hydravit.training.resuming import load_state, save_state
from hydravit.training.sampler import WidthSampler
from hydravit.training.teachers import Teacher, make_teacher
from hydravit.training.trainer import Interrupted, Trainer

__all__ = [
    "Batches",
    "Interrupted",
    "LiveSlices",
    "Loss",
    "SliceAdamW",
    "SliceGradients",
    "Teacher",
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
    "make_teacher",
    "save_state",
]
