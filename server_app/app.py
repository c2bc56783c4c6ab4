"""The Flower ServerApp: run config in, results folder out."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server_app.config import parse
from server_app.run import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run over Flower's grid."""
    run(parse(context.run_config), grid)
