"""`python -m opsd …`, which is also how launchers start it: `torchrun -m opsd train …`."""

import sys

from opsd.cli import main

sys.exit(main())
