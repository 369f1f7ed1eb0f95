"""`quantkit serve`: a server for a repo."""

from typing import Annotated

import typer

from quantkit.cli.options import Model, ServerSampling, TrustRemoteCode


def serve(
    out: Model,
    sampling: ServerSampling,
    port: Annotated[
        int, typer.Option(min=1, max=65535, rich_help_panel="Address", help="Port.")
    ] = 8080,
    host: Annotated[
        str, typer.Option(rich_help_panel="Address", help="Address to listen on.")
    ] = "127.0.0.1",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a repo with mlx-lm's server: OpenAI's protocol, by default on this machine only.

    `curl localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'`
    """
    from quantkit.generation.server import serve as run_server

    options = {"max-tokens": sampling.max_tokens, "temp": sampling.temp, "top-p": sampling.top_p}
    given = [f"--{name}={value}" for name, value in options.items()]
    run_server(out, host, port, given + ["--trust-remote-code"] * trust_remote_code)
