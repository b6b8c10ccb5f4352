"""Settings of hypothesis: no time limit on shared machines, and the same examples in every CI run."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# A shell that starts the tests in the background lets them ignore Ctrl-C, which some send to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
