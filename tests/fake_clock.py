"""A clock for tests, so that they neither wait nor depend on how busy the machine is."""


class FakeClock:
    """Time passes only in ``sleep``, and by ``tick`` seconds in every call of ``now``."""

    def __init__(self, tick=0.0):
        self.time, self.tick = 0.0, tick

    def now(self):
        self.time += self.tick
        return self.time

    def sleep(self, seconds):
        self.time += seconds
