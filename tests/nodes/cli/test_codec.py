"""``fedmq codec bench`` and the list of codecs."""

import pytest
import torch
from click.testing import CliRunner

from fedmq.codecs.pipeline import STAGES
from fedmq.nodes.cli.main import main


@pytest.fixture(autouse=True, scope="module")
def threads():
    """The command sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(*arguments):
    return CliRunner().invoke(main, ["codec", "bench", *arguments])


def fields_of(output):
    return dict(line.split(maxsplit=1) for line in output.splitlines())


def test_bench_prints_bytes_error_and_speed():
    result = bench("hadamard | quantize(4)", "--model", "cnn-mnist", "--repeats", "2")
    assert result.exit_code == 0, result.output
    fields = fields_of(result.output)
    assert list(fields) == ["codec", "values", "bytes", "ratio", "nmse", "encode", "decode"]
    assert fields["codec"] == "hadamard@1(4096) | quantize@1(4, 4096)"
    assert fields["values"] == "21,840"
    sent, _, before = fields["bytes"].rstrip(")").partition(" (float32: ")
    assert before == "87,360"
    assert 10_920 < int(sent.replace(",", "")) < 14_500
    assert float(fields["ratio"]) == pytest.approx(87_360 / int(sent.replace(",", "")), abs=0.01)
    assert 0.005 < float(fields["nmse"]) < 0.06
    for speed in (fields["encode"], fields["decode"]):
        assert float(speed.removesuffix(" GB/s")) >= 0


@pytest.mark.parametrize("spec", ["raw", "cast(float16)", "limit(0) | topk(0.01) | entropy"])
def test_bench_takes_any_codec_of_models(spec):
    result = bench(spec, "--model", "cnn-mnist", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert (fields_of(result.output)["nmse"] == "0") is (spec == "raw")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantise(4)"], ["unknown codec 'quantise' (did you mean 'quantize'?); choose from"]),
        (["quantize(40)"], ["bits must be from 1 to 8, got 40"]),
        (["quantize(4) | hadamard"], ["expected stages in this order"]),
        (["raw", "--model", "cnn-mnits"], ["--model", "did you mean 'cnn-mnist'?"]),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, words):
    result = bench(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line


def test_codecs_are_listed_with_their_pipelines():
    result = CliRunner().invoke(main, ["list", "codecs"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "pipelines" in text
    for name in STAGES:
        assert name in text
    order = ["limit(values)", "lowrank(rank)", "hadamard(block=4096)", "topk(keep)"]
    places = [text.index(word) for word in [*order, "quantize(bits", "entropy(level=3)"]]
    assert places == sorted(places)


@pytest.mark.parametrize("spec", ["features", "logits", "lowrank(3)"])
def test_bench_of_codecs_that_are_not_for_models_ends_in_a_sentence_or_figures(spec):
    result = bench(spec, "--model", "cnn-mnist", "--repeats", "1")
    assert result.exit_code in (0, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
