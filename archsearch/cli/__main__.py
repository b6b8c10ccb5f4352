"""``python -m archsearch.cli``, as launchers of several processes want it."""

import sys

from archsearch.cli.main import main

sys.exit(main())
