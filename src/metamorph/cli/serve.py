"""`metamorph serve --model DIR [--visualizer DIR]`: answer over HTTP, in a web page and as OpenAI's clients ask."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from metamorph.cli.shared import add_loading_flags, hide_loading_bars, loading_options
from metamorph.flags.extras import install_command
from metamorph.flags.parser import FlagParser, at_least, finite_number
from metamorph.mini import shipped_folder
from metamorph.serving.limits import Limits


logger = logging.getLogger(__name__)

KEY_VARIABLE = "METAMORPH_API_KEY"


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = FlagParser(
        prog="metamorph serve",
        description="Serve a model over HTTP: a web page, and OpenAI's chat completions, images and responses.",
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a trained MetaMorph model, or mini")
    parser.add_argument(
        "--visualizer", help="folder or Hub id of the visualizer, or mini; without it, answers are text only"
    )
    parser.add_argument("--model-name", help="name of the model for clients (default: the last part of --model)")
    add_loading_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a key")
    parser.add_argument("--port", type=at_least(0), default=8000, help="port to listen on; 0 is a free one")
    key_help = f"key that clients must send (default: ${KEY_VARIABLE}, which other users of the machine cannot see)"
    parser.add_argument("--api-key", help=key_help)
    parser.add_argument(
        "--allowed-host",
        nargs="+",
        default=[],
        metavar="HOST",
        help="other Host names to accept, such as a proxy's (default: loopback names with a loopback --host, else any)",
    )
    parser.add_argument(
        "--cors-origin", nargs="+", default=[], metavar="URL", help="web pages of other origins that may call the API"
    )
    parser.add_argument(
        "--allow-remote-images",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts from which images of a request are fetched; .example.org is all below it (default: none)",
    )
    parser.add_argument("--max-batch-size", type=at_least(1), default=8, help="answers that are generated at once")
    parser.add_argument(
        "--max-wait-ms", type=at_least(0, finite_number), default=25.0, help="milliseconds to wait for a full batch"
    )
    parser.add_argument("--max-queue", type=at_least(1), default=64, help="answers that may wait; more get status 429")
    positive = at_least(0.001, finite_number)
    parser.add_argument("--max-body-mb", type=positive, default=Limits.max_body_mb, help="megabytes of a request")
    parser.add_argument("--max-images", type=at_least(0), default=Limits.max_images, help="images in a request")
    parser.add_argument(
        "--max-pixels", type=at_least(1), default=Limits.max_pixels, help="pixels of all images in a request together"
    )
    parser.add_argument(
        "--max-tokens",
        type=at_least(1),
        help="tokens of a prompt and its answer together (default: the model's context)",
    )
    timeout_help = "seconds in which a client must send its request, and accept each piece of the answer"
    parser.add_argument("--client-timeout", type=positive, default=Limits.client_timeout, help=timeout_help)
    return parser


def main(argv: Sequence[str]) -> None:
    """Serve until a signal ends it."""
    flags = build_parser().parse_args(argv)
    for package in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "gradio"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"metamorph serve needs {package}: {install_command('serve')}")
    api_key = check_network(flags)
    model_name = flags.model_name or Path(flags.model).name
    flags.model = shipped_folder(flags.model, "model")
    if flags.visualizer is not None:
        flags.visualizer = shipped_folder(flags.visualizer, "visualizer")
    hide_loading_bars()
    from metamorph.inference.session import open_session
    from metamorph.serving.app import create_app
    from metamorph.serving.engine import Engine
    from metamorph.serving.page import mount_page
    from metamorph.serving.server import Server

    session = open_session(flags.model, flags.visualizer, **loading_options(flags))
    engine = Engine(
        session, max_batch_size=flags.max_batch_size, max_wait_ms=flags.max_wait_ms, max_queue=flags.max_queue
    )
    app = create_app(
        engine,
        model_name=model_name,
        limits=Limits(
            max_body_mb=flags.max_body_mb,
            max_images=flags.max_images,
            max_pixels=flags.max_pixels,
            max_tokens=flags.max_tokens,
            client_timeout=flags.client_timeout,
        ),
        api_key=api_key,
        cors_origins=flags.cors_origin,
        allowed_hosts=allowed_hosts(flags),
        image_hosts=[host.lower() for host in flags.allow_remote_images],
    )
    mount_page(app)
    logger.info("serving %s", model_name)
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    Server(app, engine, flags.host, flags.port, flags.client_timeout).run()


def check_network(flags: argparse.Namespace) -> str | None:
    """The API key. It is a `ValueError` to listen to other machines without one."""
    api_key = flags.api_key if flags.api_key is not None else os.environ.get(KEY_VARIABLE)
    if api_key == "":
        raise ValueError(f"--api-key or ${KEY_VARIABLE} is empty: give a key, or neither")
    if api_key is None and not _is_loopback(flags.host):
        raise ValueError(f"--host {flags.host} lets other machines ask: give --api-key, or set {KEY_VARIABLE}")
    for origin in flags.cors_origin:
        if origin != "*" and not origin.startswith(("http://", "https://")):
            raise ValueError(f"--cors-origin {origin} is not an origin such as https://example.org")
    for flag, hosts in (("--allow-remote-images", flags.allow_remote_images), ("--allowed-host", flags.allowed_host)):
        for host in hosts:
            if "/" in host or ":" in host:
                raise ValueError(f"{flag} {host} is not the name of a host, such as images.example.org")
    return api_key


def allowed_hosts(flags: argparse.Namespace) -> set[str]:
    """Names that the header `Host` may have; an empty set allows any.

    A web page of another site can make a name of its own point to loopback, and so ask as if it were from here.
    """
    if not (flags.allowed_host or _is_loopback(flags.host)):
        return set()
    names = ("localhost", "127.0.0.1", "[::1]", flags.host, *flags.allowed_host)
    return {name.lower() for name in names}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
