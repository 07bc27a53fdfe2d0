"""The app: routes of the three dialects, models, health and metrics, checked by the guard."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

from metamorph import __version__
from metamorph.serving.chat_completions import chat_router
from metamorph.serving.engine import Engine
from metamorph.serving.errors import ErrorBody, add_error_handlers
from metamorph.serving.guard import Guard
from metamorph.serving.images import images_router
from metamorph.serving.limits import Limits
from metamorph.serving.metrics import MeasuredApp
from metamorph.serving.responses import responses_router
from metamorph.serving.service import Service


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorBody, "description": "Why the server cannot answer"},
}


def create_app(
    engine: Engine,
    *,
    model_name: str = "metamorph",
    limits: Limits | None = None,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    allowed_hosts: Collection[str] = (),
    image_hosts: Collection[str] = (),
) -> FastAPI:
    """The ASGI app of a server. It keeps nothing of a request, so any number of them may share a load.

    With `api_key` all routes but `/health` need it. `allowed_hosts` are the names by which requests may call the
    server, by default any. `image_hosts` are the hosts from which images may be fetched.
    """
    limits = limits or Limits()
    service = Service(engine, model_name, limits, image_hosts)
    app = FastAPI(title="MetaMorph", version=__version__, docs_url=None, redoc_url=None, responses=_ERRORS)
    app.state.service = service
    for router in (chat_router(service), images_router(service), responses_router(service)):
        app.include_router(router)
    _add_information(app, service)
    add_error_handlers(app)
    app.add_middleware(Guard, engine=engine, limits=limits, api_key=api_key, hosts=allowed_hosts, origins=cors_origins)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(MeasuredApp, metrics=service.metrics)
    return app


def _add_information(app: FastAPI, service: Service) -> None:
    engine = service.engine
    service.metrics.watch(lambda: engine.num_waiting, lambda: engine.num_running)
    card = {"id": service.model_name, "object": "model", "created": service.started, "owned_by": "metamorph"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def find_model(name: str) -> dict[str, Any]:
        """The model, if it has this name."""
        service.check_model(name)
        return card

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether new requests are taken: 200, or 503 while the server ends."""
        return JSONResponse({"status": "ending"}, 503) if engine.is_refusing else JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' metrics."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
