"""``python -m rcu_ops``: the same as the command ``rcu-ops``."""

import sys

from rcu_ops.cli import main

sys.exit(main())
