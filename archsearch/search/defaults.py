"""What a search does where nobody says otherwise: from Python, on the command line, and in ``Quest``.

Nothing is imported here, so that the command line shows these without Optuna and torch.
"""

from __future__ import annotations

from typing import Final

TRIALS: Final = 100
OBJECTIVE: Final = "short"
SHORT: Final = 0.25
SAMPLER: Final = "model"
THOMPSON: Final = 0.0
PROXY: Final = "uniform"
CALIBRATE: Final = 0
FINALS: Final = 3
JOBS: Final = 1
BUDGET: Final = "scratch-e"
