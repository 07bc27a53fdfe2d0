"""The server's app as a Ray Serve deployment, one replica a GPU: `serve run examples.ray_serve:app`."""

from fastapi import FastAPI
from ray import serve

import metamorph
from metamorph.serving.app import create_app
from metamorph.serving.engine import Engine


def build() -> FastAPI:
    """The app of a replica, which loads its own model."""
    return create_app(Engine(metamorph.load("mini", "mini")), model_name="mini")


@serve.deployment(num_replicas=1, ray_actor_options={"num_gpus": 0})
@serve.ingress(build)
class Replica:
    """Answers HTTP requests."""


app = Replica.bind()
