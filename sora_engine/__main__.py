"""`python -m sora_engine` is the `sora` command."""

import sys

from sora_engine.cli import main

sys.exit(main())
