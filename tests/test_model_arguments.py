from __future__ import annotations

import pytest

from rcu_ops.cli import main
from rcu_ops.cli_errors import UserError
from rcu_ops.model_arguments import parse_model_options


def test_values_are_json_or_python_or_text() -> None:
    options = parse_model_options(["a=3", "b=[1, 2]", "c=true", "d=False", "e=None", "f=last", 'g="3"', "h=x=y"])
    assert options == {
        "a": 3, "b": [1, 2], "c": True, "d": False, "e": None, "f": "last", "g": "3", "h": "x=y"
    }  # fmt: skip
    for wrong in ("a", "=3", "a b=3", "num_classes=3"):
        with pytest.raises(UserError, match="--model-option: "):
            parse_model_options([wrong])


@pytest.mark.parametrize(
    "arguments",
    [
        ["cost", "rcn_resnet19"],
        ["features", "LIST", "--layer", "x", "--out", "OUT", "--model", "rcn_resnet19"],
        ["train", "--train", "LIST", "--out", "OUT", "--recipe", "kinetics_resnet18", "--model", "rcn_resnet19"],
    ],
)
def test_a_network_that_is_not_there(arguments, tmp_path, capsys) -> None:
    (tmp_path / "list.txt").write_text("a.mp4,0\n")
    places = {"LIST": str(tmp_path / "list.txt"), "OUT": str(tmp_path / "out")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    flag = "MODEL" if arguments[0] == "cost" else "--model"
    assert f"error: {flag}: there is no model named 'rcn_resnet19'" in capsys.readouterr().err
