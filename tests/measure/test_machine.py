"""Results in files: JSON that every reader takes, whole or not there."""

import json
import math

import pytest

from lora_kernels.measure.machine import write_json


def test_json_is_json_and_never_half(tmp_path):
    file = tmp_path / "deep" / "x.json"
    write_json(file, {"a": [math.inf, 1.5], "b": {"c": math.nan}})
    read = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert read["a"] == ["inf", 1.5]
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == read
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]
