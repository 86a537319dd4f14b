"""`celery -A ferrum worker`, without what `celery` loads besides: the commands of other packages, Flower's among them.

They take as long to import as all that a worker needs. So what ferrum starts by itself, it starts with this:

    python -m ferrum.start_worker [OPTIONS OF celery worker]
"""

from __future__ import annotations

import os
import sys

from celery.bin.base import CLIContext
from celery.bin.worker import worker

from ferrum.celery import app


def main(arguments: list[str]) -> None:
    context = CLIContext(app=app, no_color=bool(os.environ.get("NO_COLOR")), workdir=None)
    worker.main(arguments, prog_name="celery -A ferrum worker", auto_envvar_prefix="CELERY_WORKER", obj=context)


if __name__ == "__main__":
    main(sys.argv[1:])
