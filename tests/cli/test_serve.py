"""`metamorph serve`: what is refused before weights are loaded. The server itself: tests/serving."""

import pytest

from metamorph.cli import main
from metamorph.cli.serve import KEY_VARIABLE, allowed_hosts, build_parser


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model mini --host 0.0.0.0", "--host 0.0.0.0 lets other machines ask: give --api-key"),
        ("--model mini --host ::", "--host :: lets other machines ask"),
        ("--model mini --host example.org", "lets other machines ask"),
        ("--model mini --api-key=", "is empty"),
        ("--model mini --cors-origin example.org", "--cors-origin example.org is not an origin"),
        ("--model mini --allow-remote-images https://example.org/a", "is not the name of a host"),
        ("--model mini --allowed-host example.org:80", "--allowed-host example.org:80 is not the name of a host"),
        ("--model mini --max-queue 0", "--max-queue 0 must be at least 1"),
        ("--model /nowhere --host 127.0.0.2", "--model /nowhere does not exist"),
        ("--model mini --visualizer /nowhere --host ::1", "--visualizer /nowhere does not exist"),
        ("--model /nowhere --host 0.0.0.0 --api-key a", "--model /nowhere does not exist"),
    ],
)
def test_bad_flags_are_named(
    flags: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert main(["serve", *flags.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "hosts"),
    [
        ("", {"localhost", "127.0.0.1", "[::1]"}),
        ("--host 127.0.0.2 --allowed-host Model.example.org", {"localhost", "127.0.0.2", "model.example.org"}),
        ("--host 0.0.0.0 --allowed-host model.example.org", {"localhost", "model.example.org"}),
    ],
)
def test_a_server_has_the_names_of_loopback_and_those_that_are_given(flags: str, hosts: set[str]) -> None:
    assert allowed_hosts(build_parser().parse_args(["--model", "mini", *flags.split()])) >= hosts


def test_any_name_will_do_where_a_key_is_needed() -> None:
    assert not allowed_hosts(build_parser().parse_args(["--model", "mini", "--host", "0.0.0.0"]))


def test_the_key_of_the_environment_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert main(["serve", "--model", "/nowhere", "--host", "0.0.0.0"]) == 2
    assert "--model /nowhere does not exist" in capsys.readouterr().err


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "--model", "mini"]) == 2
    assert 'needs fastapi: pip install -e ".[serve]"' in capsys.readouterr().err
