"""The accuracy of every width, and its cost: parameters, multiply-accumulates, latency and memory."""

from hydravit.evaluation.accuracy import accuracy, interval
from hydravit.evaluation.cost import Cost, cost, costs, widest_within
from hydravit.evaluation.evaluate import evaluate
from hydravit.evaluation.picture import plot
from hydravit.evaluation.report import format_accuracy, format_supernet, format_table, write_json, write_results
from hydravit.evaluation.supernet import measure_supernet

__all__ = [
    "Cost",
    "accuracy",
    "cost",
    "costs",
    "evaluate",
    "format_accuracy",
    "format_supernet",
    "format_table",
    "interval",
    "measure_supernet",
    "plot",
    "widest_within",
    "write_json",
    "write_results",
]
