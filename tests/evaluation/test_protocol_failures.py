"""A protocol that fails on a dataset does not end the others."""

from pathlib import Path

import pytest
from PIL import Image

from likewise.cli.__main__ import main
from likewise.errors import InvalidInputError
from likewise.evaluation.evaluate import ProtocolFailedError, evaluate
from likewise.evaluation.results import read_results


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a dataset of two classes, with boxes of training images only."""
    root = tmp_path_factory.mktemp("failures") / "two"
    root.mkdir()
    lines = ["file,label,split,x0,y0,x1,y1"]
    for i in range(16):
        Image.new("RGB", (16, 16), (200 * (i % 2), 8 * i, 0)).save(root / f"{i}.png")
        split, box = ("train", "0.1,0.1,0.9,0.9") if i < 10 else ("test", ",,,")
        lines.append(f"{i}.png,{i % 2},{split},{box}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def test_failing_protocols_are_stored_and_raised_after_the_others(two_classes: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    broken = tmp_path / "broken/labels.csv"
    broken.write_text("file,label,split\na.png,x,train\nb.png,y,test\n")
    with pytest.raises(ProtocolFailedError) as error:
        evaluate(
            "random:test_resnet",
            [broken.parent, two_classes],
            ("fewshot", "localization", "knn"),
            out=tmp_path / "out",
        )
    messages = str(error.value).splitlines()
    assert len(messages) == 3
    assert messages[0].startswith("no train image of")
    assert messages[1].startswith("fewshot on two: 5-way 5-shot")
    assert "`ways` or `shots`" in messages[1]
    assert messages[2].startswith("localization on two: no test image of")
    assert isinstance(error.value, InvalidInputError)
    assert [row.protocol for row in error.value.results] == ["knn"]
    assert [row.protocol for row in read_results(tmp_path / "out")] == ["knn"]
    assert error.value.results.raw[0]["failures"] == {"fewshot": messages[1], "localization": messages[2]}


def test_command_prints_the_results_and_the_error(
    two_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "random:test_resnet", "--dataset", str(two_classes), "--protocol", "fewshot,knn"]
    with pytest.raises(SystemExit) as exit_info:
        main([*command, "--out", str(tmp_path / "out"), "--quiet"])
    assert exit_info.value.code == 1
    output = capsys.readouterr()
    assert "knn" in output.out
    assert "error: fewshot on two" in output.err
    assert "--ways" in output.err
