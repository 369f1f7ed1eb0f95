"""`quantkit serve`: a server for a repo."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import Model, TrustRemoteCode
from quantkit.cli.sampling import SAMPLING, MaxTokens, TopP

if TYPE_CHECKING:
    from quantkit.serving.app import Address
    from quantkit.serving.turns import Service

_PANEL = "Address"


@dataclass(frozen=True)
class AddressOptions:
    """Where to listen, and who may ask."""

    port: Annotated[int, typer.Option(min=1, max=65535, rich_help_panel=_PANEL, help="Port.")] = (
        8080
    )
    host: Annotated[str, typer.Option(rich_help_panel=_PANEL, help="Address to listen on.")] = (
        "127.0.0.1"
    )
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="QUANTKIT_API_KEY",
            rich_help_panel=_PANEL,
            help="Key that clients must send; needed for another `--host`.",
        ),
    ] = None
    allow_origin: Annotated[
        list[str],
        typer.Option(
            metavar="ORIGIN",
            rich_help_panel=_PANEL,
            help="A web page that may ask, such as http://localhost:3000; may be repeated.",
        ),
    ] = ()  # type: ignore[assignment]

    def address(self) -> "Address":
        """Return the address. Raises InputError if a server cannot listen there."""
        from quantkit.serving.app import Address, require_address

        address = Address(self.host, self.port, self.api_key, tuple(self.allow_origin))
        require_address(address)
        return address


@dataclass(frozen=True)
class DefaultSampling:
    """The sampling of requests that name none; gpt-oss was trained for 1 and 1."""

    max_tokens: MaxTokens | None = None
    temp: Annotated[
        float,
        typer.Option("--temp", min=0.0, max=2.0, rich_help_panel=SAMPLING, help="Temperature."),
    ] = 1.0
    top_p: TopP = 1.0

    def parameters(self) -> dict[str, float | None]:
        """Return the sampling parameters by name."""
        return {"temperature": self.temp, "top_p": self.top_p, "max_tokens": self.max_tokens}


def serve(
    out: Model,
    where: AddressOptions,
    sampling: DefaultSampling,
    cache: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Memory for prompts that may come again, such as 4GB."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a repo: OpenAI's Chat Completions and Responses, by default on this machine only.

    gpt-oss's channels become reasoning, answers and calls of tools. docs/serving.md has the lines
    to paste for each client.

    `curl localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'`
    """
    from quantkit.errors import InputError, in_field
    from quantkit.units import parse_bytes

    with in_field("cache"):
        cache_bytes = parse_bytes(cache) if cache else None
    try:
        from quantkit.serving import app
        from quantkit.serving.turns import open_service
    except ImportError as exc:
        raise InputError(
            f"`quantkit serve` needs {exc.name}: pip install 'quantkit[serve]'."
        ) from exc
    address = where.address()
    app.end_at_once()
    service = open_service(
        out, sampling.parameters(), cache_bytes=cache_bytes, trust_remote_code=trust_remote_code
    )
    _print_banner(service, address)
    app.run(service, address)


def _print_banner(service: "Service", address: "Address") -> None:
    """Print the base URL and the lines to paste for clients."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    base = f"http://{host}:{address.port}/v1"
    console.note(f"serving {service.name} at {base} (Ctrl-C ends)")
    agent = f"codex --oss --local-provider lmstudio -m {service.name}"
    console.note(f"codex:   CODEX_OSS_BASE_URL={base} {agent}")
    key = "YOUR_KEY" if address.api_key else "none"
    console.note(f"others:  OPENAI_BASE_URL={base} OPENAI_API_KEY={key}")
