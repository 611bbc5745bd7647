"""What every width costs beside the best tools somebody else would use: measured, never asserted.

``run`` measures (``hydravit benchmark``, ``make bench``); ``plot`` and ``page`` draw what it wrote and cannot measure.
"""
