"""What every width delivers (accuracy) and costs (parameters, multiply-accumulates, latency, memory)."""

from hydravit.evaluation.cost import Cost, cost, costs
from hydravit.evaluation.evaluate import accuracy, evaluate
from hydravit.evaluation.report import format_table, plot, write_results

__all__ = ["Cost", "accuracy", "cost", "costs", "evaluate", "format_table", "plot", "write_results"]
