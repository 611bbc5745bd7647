"""What every width delivers (accuracy) and costs (parameters, multiply-accumulates, latency, memory)."""

from hydravit.evaluation.accuracy import accuracy, interval
from hydravit.evaluation.cost import Cost, cost, costs
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
    "write_json",
    "write_results",
]
