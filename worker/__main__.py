"""`python -m worker`: the same as the console script `avatar-worker`."""

import sys

from worker.cli import main

sys.exit(main())
