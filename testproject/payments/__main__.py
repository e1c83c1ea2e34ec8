"""python -m payments --ledger FILE [--port N] [--seed N] [--faults N] [--forget-keys]"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from payments.faults import Faults
from payments.ledger import Ledger
from payments.server import PaymentService


def main() -> None:
    parser = argparse.ArgumentParser(prog="payments", description="A payment service that is sometimes too busy.")
    parser.add_argument("--ledger", type=Path, required=True, help="SQLite file; made if it is not there")
    parser.add_argument("--port", type=int, default=0, help="0: any free one (default)")
    parser.add_argument("--seed", type=int, default=1, help="which sequence of failures (default 1)")
    parser.add_argument("--faults", type=int, default=3, choices=range(11), help="requests in 10 that get 503")
    parser.add_argument("--forget-keys", action="store_true", help="charge anew each time: what happens without keys")
    options = parser.parse_args()

    ledger = Ledger(options.ledger, options.forget_keys)
    with PaymentService(("127.0.0.1", options.port), ledger, Faults(options.seed, options.faults)) as service:
        service.tell(listening=service.url)
        with contextlib.suppress(KeyboardInterrupt):
            service.serve_forever()


if __name__ == "__main__":
    main()
