"""``python -m megacpp_stp``: the command line."""

import sys

from megacpp_stp.cli import main

sys.exit(main())
