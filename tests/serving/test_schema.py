"""Whatever fits the OpenAPI document, and what does not, never makes the server fail."""

import pytest
import torch
from serving_parts import served

import metamorph
from metamorph.serving.limits import Limits


schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")

QUICK = hypothesis.settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)


@pytest.mark.slow
def test_no_request_makes_the_server_fail() -> None:
    session = metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)
    found: dict[str, set[int]] = {}

    def send(case: schemathesis.Case) -> None:
        steps = case.body.get("num_inference_steps") if isinstance(case.body, dict) else None
        if isinstance(steps, int) and 2 < steps <= 250:
            case.body["num_inference_steps"] = 2  # the same code, sooner
        status = case.call(timeout=60).status_code
        found.setdefault(f"{case.method} {case.path}", set()).add(status)
        assert status < 500

    with served(session, Limits(max_tokens=60)) as url:
        document = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for operation in document.get_all_operations():
            for mode in schemathesis.GenerationMode:
                if operation.ok().method.upper() == "GET" and mode is schemathesis.GenerationMode.NEGATIVE:
                    continue  # there is nothing to be wrong
                QUICK(hypothesis.given(case=operation.ok().as_strategy(generation_mode=mode))(send))()
    works = {path for path, statuses in found.items() if 200 in statuses}
    assert {path for path, statuses in found.items() if 400 in statuses} >= {
        "POST /v1/chat/completions",
        "POST /v1/responses",
        "POST /v1/images/generations",
        "POST /v1/images/edits",
    }
    assert works >= {"GET /v1/models", "GET /health", "GET /metrics", "POST /v1/chat/completions", "POST /v1/responses"}
