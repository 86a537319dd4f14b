"""`celery -A ferrum worker`, without what `celery` loads besides: the commands of other packages, Flower's among them.

They take as long to import as all that a worker needs. So what ferrum starts by itself, it starts with this:

    python -m ferrum.start_worker [OPTIONS OF celery worker]

Unlike `celery`, it looks for no module in the directory that it stands in, but for those of `FERRUM_IMPORTS`, and there
last.
"""

from __future__ import annotations

import os
import sys

from ferrum.local.path import leave_here, look_here_last


def main(arguments: list[str]) -> None:
    from celery.bin.base import CLIContext
    from celery.bin.worker import worker

    from ferrum.celery import app
    from ferrum.settings import settings

    if settings().imports:
        look_here_last()
    context = CLIContext(app=app, no_color=bool(os.environ.get("NO_COLOR")), workdir=None)
    worker.main(arguments, prog_name="celery -A ferrum worker", auto_envvar_prefix="CELERY_WORKER", obj=context)


if __name__ == "__main__":
    leave_here()
    main(sys.argv[1:])
