"""JSON and weight files of others are checked from their headers."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from metamorph.files.model_files import (
    JSON_LIMIT,
    check_finite,
    check_implementations,
    check_layer_counts,
    check_weights,
    load_pickled_tensors,
    read_json_object,
    weight_shapes,
)


def test_shapes_of_one_file_a_variant_and_shards_agree(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(0), "c": torch.ones(())}
    expected = {"a": (2, 3), "b": (0,), "c": ()}
    save_file(tensors, tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.fp16.safetensors")
    assert weight_shapes(tmp_path) == weight_shapes(tmp_path, variant="fp16") == expected
    (tmp_path / "model.safetensors").unlink()
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, tmp_path / f"{number}.safetensors")
    index = {"weight_map": {name: f"{number}.safetensors" for number, name in enumerate(tensors)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_shapes(tmp_path) == expected
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.safetensors is missing"):
        weight_shapes(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 5}}])
def test_an_index_that_is_none(tmp_path: Path, index: dict) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no weight_map"):
        weight_shapes(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("5", "must hold a JSON object, not int"),
        (" " * (JSON_LIMIT + 1), "more than the"),
    ],
    ids=["cut", "nested", "long number", "no UTF-8", "number", "large"],
)
def test_json_that_is_no_object(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"x\.json .*{message}"):
        read_json_object(tmp_path / "x.json")


def test_a_pipe_is_no_json_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"x\.json is missing"):
        read_json_object(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": (2,)}, "here lacks 1 weights .* b"),
        ({"a": (2,), "b": (3,), "c": (1,)}, "here holds 1 weights unknown .* c"),
        ({"a": (2,), "b": (4,)}, r"here: b has shape \[4\], but its configuration asks for \[3\]"),
    ],
)
def test_weights_of_another_configuration(found: dict, message: str) -> None:
    expected = {"a": (2,), "b": (3,)}
    check_weights(expected, dict(expected), "here")
    with pytest.raises(ValueError, match=message):
        check_weights(found, expected, "here")


def test_numbers_of_layers_are_bounded_by_the_weights() -> None:
    # Fields of Qwen2 and of a UNet, which ask for no more layers than there are.
    check_layer_counts({"text_config": {"num_hidden_layers": 24, "max_window_layers": 24}}, 290, "x")
    check_layer_counts({"layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10]}, 1680, "x")
    for config in (
        {"vision_config": {"num_hidden_layers": 301}},
        {"sub": [{"layers_per_block": [[10, -400]]}]},
        {"layers_per_block": 20, "transformer_layers_per_block": 20},
        {"block_out_channels": [1] * 301},
    ):
        with pytest.raises(ValueError, match=r"x: .*_.* asks for"):
            check_layer_counts(config, 300, "x")


def test_kernels_of_the_hub_are_refused_wherever_they_are_named() -> None:
    check_implementations({"_attn_implementation": "sdpa", "sub": {"_attn_implementation": None}}, "x")
    for value in ("owner/kernel", {"text_config": "owner/kernel@v1:name"}):
        with pytest.raises(ValueError, match=r"x: _attn_implementation .* is code on the Hub"):
            check_implementations({"sub": [{"_attn_implementation": value}]}, "x")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    weights = {
        "whole": torch.ones(3, dtype=torch.int64),
        "empty": torch.ones(0),
        "a": torch.full((4,), 60000).to(dtype),
    }
    check_finite(weights.items(), "x")
    weights["a"][2] = value
    with pytest.raises(ValueError, match="x: a holds NaN or infinite values"):
        check_finite(weights.items(), "x")


def test_a_weight_without_values_is_missing() -> None:
    with pytest.raises(ValueError, match="x: a has no values: the weight is missing"):
        check_finite([("a", torch.empty(3, device="meta"))], "x")


def test_pickled_tensors(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    table = torch.arange(12.0).view(3, 4)
    torch.save({"a": table, "b": table[1:].T}, file)
    loaded = load_pickled_tensors(file)
    assert torch.equal(loaded["a"], table)
    assert torch.equal(loaded["b"], table[1:].T)
    for hostile, message in (
        ({"a": torch.zeros(1).expand(100_000, 100_000)}, r"a of shape \[100000, 100000\] is larger than"),
        ({"a": torch.empty(10**6, device="meta")}, "a of shape"),
        ({"a": torch.sparse_coo_tensor(size=(10**6, 10**6))}, "a of shape"),
        ({5: table}, "is not a dictionary of tensors"),
        ([table], "is not a dictionary of tensors"),
        ({"a": pytest.raises}, "is refused, because loading other objects can run code"),
    ):
        torch.save(hostile, file)
        with pytest.raises(ValueError, match=rf"x\.bin.*{message}"):
            load_pickled_tensors(file)


def test_damaged_and_compressed_pickles(tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.bin", tmp_path / "x.bin"
    torch.save({"a": torch.zeros(10**6)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    with pytest.raises(ValueError, match=r"x\.bin.*compressed, which torch\.save never does"):
        load_pickled_tensors(file)
    for content in (b"", whole.read_bytes()[:5000], b"\x80\x02" + b"\xff" * 9, pickle.dumps({"a": 1}), b"PK\x03\x04"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.bin (cannot be read|is not a dictionary)"):
            load_pickled_tensors(file)
