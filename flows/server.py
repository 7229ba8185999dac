"""The temporary Prefect server of a command, which ends with the command's process however that ends: after `kill -9` too."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from typing import Any

#: Seconds that the server has to start; Prefect's twenty are too few on a busy machine.
START_SECONDS = 120


def tie_server() -> None:
    """Has the server that Prefect starts, where none is configured, end with this process; call before a flow."""
    import prefect
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is not None:
        return
    from prefect.server.api.server import SubprocessASGIServer  # all of the server: it takes long, and Prefect needs it next

    class TiedServer(SubprocessASGIServer):
        """Its standard input is a pipe from this process. Whatever ends that closes the pipe, and no process need do it."""

        def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
            folder, port = str(prefect.__module_path__.parent), str(self.port)
            address = ["--app-dir", folder, "--host", "127.0.0.1", "--port", port]
            app = ["--factory", "prefect.server.api.server:create_app", "--log-level", "error", "--lifespan", "on"]
            own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}  # as Prefect does
            settings = get_current_settings().to_environment_variables(exclude_unset=True)
            return subprocess.Popen(
                [sys.executable, "-m", "flows.server", *app, *address],
                stdin=subprocess.PIPE,
                env={**os.environ, **own, **settings},
            )

        def start(self, timeout: int | None = None) -> None:
            super().start(START_SECONDS if timeout is None else timeout)

        def stop(self) -> None:
            process = self.server_process
            logging.disable(logging.INFO)  # its end is no news, and the command has had its last word
            super().stop()
            logging.disable(logging.NOTSET)
            if process is not None and process.stdin is not None:
                process.stdin.close()

    SubprocessASGIServer._instances[None] = TiedServer()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # nobody is left to serve, and the database bears it


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()  # before the server's imports, which take seconds
    from uvicorn import main

    main()
