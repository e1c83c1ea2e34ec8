"""What demo.py and serve.py share: processes, the shop they open, a buyer who fills in forms, and the proof."""

import importlib.util
import sys

MISSING = [name for name in ("django", "django_durable", "environ", "httpx") if importlib.util.find_spec(name) is None]
if MISSING:
    sys.exit(f"Not installed here: {', '.join(MISSING)}. `make demo` and `make serve`, one folder up, install them.")
