"""How a workload is measured: the timer, the check of outputs, memory, copied bytes, and the machine's limits."""
